"""A data set in another transfer syntax: from what PS3.5 Annex A has to Explicit or Implicit VR Little Endian, or
compressed without loss.

Decoding is done by other people's native code on bytes of other people: it runs in processes of its own
(`transcoder`), and not in the receiver.
"""

from __future__ import annotations

import tempfile
import zlib
from io import BytesIO
from typing import Any, Final

import numpy as np
from pydicom import dcmread
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr, write_dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from sphere.ingest.part10 import file_meta

TARGETS: Final = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))  # in the order of preference
NATIVE: Final = frozenset((*TARGETS, str(ExplicitVRBigEndian), str(DeflatedExplicitVRLittleEndian)))
JPEG, JPEG_LS, J2K, HTJ2K, RLE = ("gdcm",), ("pyjpegls",), ("pylibjpeg",), ("pylibjpeg",), ("pylibjpeg", "pydicom")
DECODERS: Final[dict[str, tuple[str, ...]]] = {  # transfer syntax to pydicom's names of decoders
    "1.2.840.10008.1.2.4.50": JPEG,  # baseline
    "1.2.840.10008.1.2.4.51": JPEG,  # extended; for 12 bit see _decode_12_bit
    "1.2.840.10008.1.2.4.57": JPEG,  # lossless
    "1.2.840.10008.1.2.4.70": JPEG,  # lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": JPEG_LS,
    "1.2.840.10008.1.2.4.81": JPEG_LS,  # near-lossless
    "1.2.840.10008.1.2.4.90": J2K,  # lossless only
    "1.2.840.10008.1.2.4.91": J2K,
    "1.2.840.10008.1.2.4.201": HTJ2K,  # lossless only
    "1.2.840.10008.1.2.4.202": HTJ2K,  # lossless only, RPCL
    "1.2.840.10008.1.2.4.203": HTJ2K,
    "1.2.840.10008.1.2.5": RLE,
}
EXTENDED: Final = "1.2.840.10008.1.2.4.51"  # JPEG extended
ALWAYS_LOSSY: Final = frozenset(("1.2.840.10008.1.2.4.50", EXTENDED))
LOSSY_JPEG_LS: Final = frozenset(("1.2.840.10008.1.2.4.81",))  # which may be lossless too
LOSSY_J2K: Final = frozenset(("1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.203"))
CONVERTIBLE: Final = NATIVE | DECODERS.keys()
ENCODERS: Final[dict[str, str]] = {  # transfer syntax to pydicom's name of its encoder
    str(RLELossless): "pylibjpeg",
    str(JPEGLSLossless): "pyjpegls",
    str(JPEG2000Lossless): "pylibjpeg",  # not below 32 rows or columns
}
NAMED: Final[dict[str, str]] = {  # as in peers.transfer_syntaxes
    one.keyword: str(one)
    for one in (RLELossless, JPEGLSLossless, JPEG2000Lossless, ExplicitVRLittleEndian, ImplicitVRLittleEndian)
}
MAX_PLAIN: Final = 1 << 30  # bytes of a data set inflated or decoded
_WORD: Final = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}  # bytes of one value


class NotConverted(Exception):
    """Why a data set could not be converted; without anything of its content."""


def convert(dataset: bytes, source: str, target: str) -> bytes:
    """The data set of transfer syntax `source` in `target`, one of TARGETS or ENCODERS; raises NotConverted.

    Attributes stay as they are, but those that describe the pixel data's encoding. What was lossy says so in
    LossyImageCompression (PS3.3 C.7.6.1.1.5). What is compressed has been decompressed again, to the same pixels.
    """
    if source not in CONVERTIBLE:
        raise NotConverted(f"{UID(source).name} cannot be decoded")
    if source == DeflatedExplicitVRLittleEndian:
        dataset, source = _inflated(dataset), str(ExplicitVRLittleEndian)
    if source == target:
        return dataset
    try:
        if target in ENCODERS:
            plain = convert(dataset, source, str(ExplicitVRLittleEndian))
            return _encoded(plain, UID(target))
        return _converted(dataset, UID(source), UID(target))
    except NotConverted:
        raise
    except MemoryError:
        raise NotConverted("too large to be decoded") from None
    except Exception as error:
        raise NotConverted(f"cannot be converted ({type(error).__name__})") from error


def _inflated(deflated: bytes) -> bytes:
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        plain = inflater.decompress(deflated, MAX_PLAIN)
    except zlib.error:
        raise NotConverted("cannot be inflated") from None
    if inflater.unconsumed_tail or not inflater.eof:
        raise NotConverted("cannot be inflated: too large, or cut off")
    return plain


def _converted(dataset: bytes, source: UID, target: UID) -> bytes:
    meta = file_meta(sop_class_uid="", sop_instance_uid="", transfer_syntax_uid=source)
    read = dcmread(BytesIO(meta + dataset), force=True)
    # what it is, which is not always what it is said to be
    implicit = any(isinstance(one, RawDataElement) and one.is_implicit_VR for one in read.values())
    if source == EXTENDED and read.get("BitsAllocated") == 16 and read.get("SamplesPerPixel") == 1:
        _decode_12_bit(read, meta + dataset)
    elif source.is_encapsulated:
        _decode(read, source)
    if implicit != target.is_implicit_VR or not source.is_little_endian:
        for _ in read.iterall():  # elements that nobody looked at would be written as the bytes that they are
            pass
    if implicit:
        correct_ambiguous_vr(read, True)
    if not source.is_little_endian:
        _swap(read, read.get("BitsAllocated"))
    return _written(read, target)


def _written(dataset: Dataset, target: UID) -> bytes:
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = target.is_implicit_VR, True
    write_dataset(out, dataset)
    return out.getvalue()


def _decode(dataset: Dataset, source: UID) -> None:
    if "PixelData" in dataset and _is_lossy(dataset.PixelData, source):
        dataset.LossyImageCompression = "01"
    for item in _with_pixels(dataset):
        size = _decoded_size(item)
        if size > MAX_PLAIN:
            raise NotConverted(f"too large to be decoded ({size >> 20} MiB)")
        item.file_meta = dataset.file_meta
        _decompress(item, source)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _is_lossy(encapsulated: bytes, source: UID) -> bool:
    """Whether the first code stream says that it lost something, whatever the data set says.

    JPEG-LS: NEAR of its scan is not 0 (ISO/IEC 14495-1 C.2.3); JPEG 2000: the irreversible 9-7 wavelet (ISO/IEC 15444-1
    A.6.1). A reversible stream that was cut does not show: there LossyImageCompression stays as it came.
    """
    if source in ALWAYS_LOSSY:
        return True
    items = BytesIO(encapsulated)
    parse_basic_offsets(items)
    stream = next(generate_fragments(items), b"")
    if source in LOSSY_JPEG_LS:
        scan = stream.find(b"\xff\xda")
        near = scan + 5 + 2 * stream[scan + 4] if 0 <= scan < len(stream) - 4 else len(stream)
        return near < len(stream) and stream[near] > 0
    if source in LOSSY_J2K:
        cod = stream.find(b"\xff\x52", max(0, stream.find(b"\xff\x4f\xff\x51")))
        return 0 <= cod < len(stream) - 13 and stream[cod + 13] == 0
    return False


def _encoded(plain: bytes, target: UID) -> bytes:
    """Explicit VR Little Endian compressed; raises NotConverted also where pixels would not come back as they are."""
    meta = file_meta(sop_class_uid="", sop_instance_uid="", transfer_syntax_uid=ExplicitVRLittleEndian)
    dataset = dcmread(BytesIO(meta + plain), force=True)
    if "PixelData" not in dataset:
        raise NotConverted(f"no pixel data to be compressed to {target.name}")
    if _decoded_size(dataset) > MAX_PLAIN:
        raise NotConverted(f"too large to be compressed ({_decoded_size(dataset) >> 20} MiB)")
    try:
        before = pixel_array(dataset, raw=True)
        if dataset.SamplesPerPixel > 1:  # by pixel, as encoders want it (PS3.5 8.2); pydicom's mix up the other order
            dataset.PixelData, dataset.PlanarConfiguration = before.tobytes(), 0
        if target == JPEG2000Lossless and dataset.PhotometricInterpretation == "RGB":
            dataset.PhotometricInterpretation = "YBR_RCT"  # the encoder makes it so (PS3.5 8.2.4)
        dataset.compress(target, encoding_plugin=ENCODERS[target], generate_instance_uid=False)
        after = pixel_array(dataset, raw=True, decoding_plugin=DECODERS[target][0])
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise NotConverted(f"cannot be compressed to {target.name} ({type(error).__name__})") from None
    if not np.array_equal(before, after):
        raise NotConverted(f"cannot be compressed to {target.name} without loss")
    return _written(dataset, target)


def _decode_12_bit(dataset: Dataset, file: bytes) -> None:
    """12-bit JPEG: GDCM reads it from a whole file only, so that pydicom does not use it."""
    import gdcm

    if _decoded_size(dataset) > MAX_PLAIN:
        raise NotConverted("too large to be decoded")
    reader = gdcm.ImageReader()
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(file)
        copy.flush()
        reader.SetFileName(copy.name)
        if not reader.Read():
            raise NotConverted("JPEG that cannot be decoded")
        pixels = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    if len(pixels) != _decoded_size(dataset):
        raise NotConverted("JPEG with another number of pixels than its header says")
    dataset.PixelData = pixels
    dataset["PixelData"].VR = "OW"
    dataset["PixelData"].is_undefined_length = False
    dataset.LossyImageCompression = "01"


def _decompress(dataset: Dataset, source: UID) -> None:
    """Colour of a lossy JPEG becomes RGB, which every peer shows; other samples stay as they are: YBR_FULL made RGB is
    rounded."""
    dataset.file_meta.TransferSyntaxUID = source
    as_rgb = source in ALWAYS_LOSSY
    *others, last = DECODERS[source]
    for plugin in others:
        try:
            dataset.decompress(as_rgb=as_rgb, decoding_plugin=plugin, generate_instance_uid=False)
        except (RuntimeError, ValueError):
            continue
        return
    dataset.decompress(as_rgb=as_rgb, decoding_plugin=last, generate_instance_uid=False)


def _with_pixels(dataset: Dataset) -> list[Dataset]:
    """The data set and the items in it (of IconImageSequence) that have encapsulated pixel data."""
    found = [dataset] if "PixelData" in dataset and dataset["PixelData"].is_undefined_length else []
    for tag in list(dataset.keys()):
        if dataset.get_item(tag).VR == "SQ":  # what is not looked at stays the bytes that it is
            for item in dataset[tag].value or []:
                found += _with_pixels(item)
    return found


def _decoded_size(dataset: Dataset) -> int:
    def number(keyword: str) -> int:
        return int(dataset.get(keyword) or 1)

    pixels = number("Rows") * number("Columns") * number("SamplesPerPixel") * number("NumberOfFrames")
    return pixels * number("BitsAllocated") // 8


def _swap(dataset: Dataset, bits: Any) -> None:
    """Turn the bytes of big endian words around: pydicom leaves them as they are."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value or []:
                _swap(item, item.get("BitsAllocated", bits))
        elif element.VR in _WORD and isinstance(element.value, bytes):
            size = _WORD[element.VR]
            if element.keyword == "PixelData" and int(bits or 16) in (32, 64):
                size = int(bits) // 8
            element.value = _swapped(element.value, size)


def _swapped(data: bytes, size: int) -> bytes:
    whole = len(data) // size * size
    out = bytearray(data)
    for at in range(size):
        out[at:whole:size] = data[size - 1 - at : whole : size]
    return bytes(out)
