"""Where the frames of an instance lie, and what is known of their pixels without opening it."""

from __future__ import annotations

import functools
import re
import struct
import threading
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
import orjson
from pydicom import dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from sphere.catalog.service import StoredInstance
from sphere.scp.retrieve.outbound import DEFLATED, syntax_of
from sphere.scp.retrieve.transcode import DECODERS, NATIVE, TARGETS, NotConverted
from sphere.scp.web.allowance import Allowance
from sphere.scp.web.archive import Archive
from sphere.scp.web.inflated import MAX_INFLATED, inflated
from sphere.scp.web.problem import WebError
from sphere.scp.web.retrieve import meta_of

EXPLICIT: Final = TARGETS[0]
OCTETS: Final = "application/octet-stream"
MAX_FRAME: Final = 1 << 28  # bytes of one frame, decoded
MAX_RENDERING: Final = 2 << 30  # bytes of memory that all renderings of the process may take at once
MAX_FRAMES: Final = 1 << 20
MAX_TABLE: Final = 1 << 18  # bytes of a lookup table; one of 65,536 entries of 16 bits has half of them
END_OF_IMAGE: Final = b"\xff\xd9"  # EOI of JPEG, EOC of JPEG 2000: no other marker of theirs ends a codestream
IN_PLACE: Final = (*TARGETS, DEFLATED)  # transfer syntaxes whose frames are bytes of the (inflated) data set
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
KNOWN: Final = 64  # instances whose frames are remembered
_IMAGE: Final = {  # the media types of encapsulated frames (PS3.18 Table 8.7.3-5)
    **dict.fromkeys(("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57",
                     "1.2.840.10008.1.2.4.70"), "image/jpeg"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), "image/jls"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"), "image/jp2"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"), "image/jphc"),
    "1.2.840.10008.1.2.5": "image/dicom-rle",
    **dict.fromkeys(("1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.101"), "video/mpeg"),
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{n}" for n in range(102, 109)), "video/mp4"),
}  # fmt: skip
_DESCRIPTION: Final = ("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns",
                       "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")  # fmt: skip
_COLOURS: Final = ("Red", "Green", "Blue")
_SHOWN: Final = (
    "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "PixelPaddingValue", "FrameTime", "CineRate", "RecommendedDisplayFrameRate", "PatientName",
    "PatientID", "PatientBirthDate", "PatientSex", "Modality", "StudyDate", "SeriesDescription", "SliceThickness",
    "KVP", "EchoTime",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in _COLOURS),
    *(f"{segmented}{colour}PaletteColorLookupTableData" for segmented in ("", "Segmented") for colour in _COLOURS),
)  # fmt: skip
_TABLES: Final = frozenset(
    f"{tag_for_keyword(name):08X}" for name in ("LUTData", *(one for one in _SHOWN if one.endswith("TableData")))
)
_TAGS: Final = {keyword: f"{tag_for_keyword(keyword):08X}" for keyword in (*_DESCRIPTION, *_SHOWN)}
_WANTED: Final = frozenset(_TAGS.values())
_PLACE = re.compile(r"\?(inflated_)?offset=(\d+)&length=(\d+)")


def media_type(syntax: str) -> str:
    """That of a frame as it lies; OCTETS where it is not encapsulated."""
    return _IMAGE.get(syntax, OCTETS)


Fragments = tuple[tuple[tuple[int, int], ...], ...]
"""(offset, length) of the fragments of each frame; nothing where the pixel data is not encapsulated."""


@dataclass(frozen=True)
class Pixels:
    """The pixel data of an instance: bytes [offset, offset + length) of the member, and its frames.

    `bits`: of one frame, where it is not encapsulated. `read_header` gives `header`, which frames as they lie need not.
    `deflated`: the bytes are those of the inflated data set.
    """

    instance: StoredInstance
    read_header: Callable[[], Dataset]
    bits: int
    offset: int
    length: int
    frames: int
    fragments: Fragments = ()
    deflated: bool = False

    @functools.cached_property
    def header(self) -> Dataset:
        """The attributes that pixels are shown by."""
        return self.read_header()


class PixelReader:
    """Finds and reads frames; remembers where those of the last instances are. Safe to share between threads.

    `rendering`: memory of who renders them.
    """

    def __init__(self, archive: Archive) -> None:
        self.rendering = Allowance(MAX_RENDERING)
        self._archive = archive
        self._known: OrderedDict[tuple[str, str], Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, instance: StoredInstance) -> Pixels:
        """The frames of an instance; raises WebError (404) where it has no pixel data."""
        name = (instance.bundle, str(instance.offset))
        with self._lock:
            if known := self._known.get(name):
                self._known.move_to_end(name)
                return known
        found = self._found(instance)
        with self._lock:
            self._known[name] = found
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return found

    def _found(self, instance: StoredInstance) -> Pixels:
        elements = self._elements(instance)
        element = _pixel_data(elements)
        frames = _number(elements, "NumberOfFrames") or 1
        if not 0 < frames <= MAX_FRAMES:
            raise WebError("the instance does not say how many frames it has", http=404)
        made = functools.partial(Pixels, instance, functools.partial(self._header, instance), _bits(elements))
        place = _PLACE.fullmatch(element.get("BulkDataURI", ""))
        if place is None:  # short enough to be in the header: read by way of the converter
            return made(0, 0, frames)
        offset, length = int(place[2]), int(place[3])
        if place[1]:
            return made(offset, length, frames, deflated=True)
        fragments = () if syntax_of(instance) in NATIVE else self._fragments(instance, offset, frames)
        return made(offset, length, frames, fragments)

    def _header(self, instance: StoredInstance) -> Dataset:
        return _image_header(self._elements(instance), functools.partial(self._table, instance))

    def _elements(self, instance: StoredInstance) -> dict[str, Any]:
        elements: dict[str, Any] = orjson.loads(self._archive.known.header(instance))
        return elements

    def _table(self, instance: StoredInstance, uri: str) -> bytes:
        """A lookup table that metadata refer to; nothing where it cannot be read from its place."""
        place = _PLACE.fullmatch(uri)
        if place is None or syntax_of(instance) == BIG_ENDIAN or int(place[3]) > MAX_TABLE:
            return b""
        return self._value(instance, int(place[2]), int(place[3]), deflated=bool(place[1]))

    def _value(self, instance: StoredInstance, offset: int, length: int, *, deflated: bool) -> bytes:
        """Bytes of the member, or of its inflated data set; fewer where there are not so many."""
        if not deflated:
            return self._archive.read(instance, offset, length)
        if offset + length > MAX_INFLATED:
            return b""
        return b"".join(inflated(self._archive, instance, offset, length))

    def _fragments(self, instance: StoredInstance, start: int, frames: int) -> Fragments:
        """The fragments of each frame (PS3.5 A.4): by the Basic Offset Table, else one for each, or all for one."""
        items: list[tuple[int, int]] = []
        at = start
        while at + 8 <= instance.length and len(items) <= 2 * MAX_FRAMES:
            tag, size = struct.unpack("<II", self._archive.read(instance, at, 8))
            if tag != 0xE000FFFE or at + 8 + size > instance.length:
                break
            items.append((at + 8, size))
            at += 8 + size
        if len(items) < 2:
            raise WebError("the pixel data has no fragments", http=404)
        table, pieces = items[0], items[1:]
        if frames == 1:
            return (tuple(pieces),)
        if table[1] == 4 * frames:
            first = pieces[0][0] - 8
            begins = [first + one for one in struct.unpack(f"<{frames}I", self._archive.read(instance, *table))]
            ends = [*begins[1:], at]
            pairs = zip(begins, ends, strict=True)
            return tuple(tuple(p for p in pieces if begin <= p[0] - 8 < end) for begin, end in pairs)
        if len(pieces) == frames:
            return tuple((piece,) for piece in pieces)
        groups = self._ended(instance, pieces) if len(pieces) > frames else ()
        if len(groups) == frames:
            return groups
        raise WebError("its fragments do not tell its frames apart", http=406)

    def _ended(self, instance: StoredInstance, pieces: Sequence[tuple[int, int]]) -> Fragments:
        """Fragments put together up to those in which a codestream ends."""
        groups: list[tuple[tuple[int, int], ...]] = []
        open_: list[tuple[int, int]] = []
        for offset, length in pieces:
            open_.append((offset, length))
            tail = min(length, 4)  # the marker, and padding (PS3.5 A.4)
            if END_OF_IMAGE in self._archive.read(instance, offset + length - tail, tail):
                groups.append(tuple(open_))
                open_ = []
        return tuple(groups) if not open_ else ()

    def stored(self, pixels: Pixels, frame: int) -> bytes:
        """A frame (from 1) as it lies: an encapsulated one without its item headers."""
        if pixels.fragments:
            parts = pixels.fragments[frame - 1]
            return b"".join(self._archive.read(pixels.instance, offset, length) for offset, length in parts)
        if not pixels.length or syntax_of(pixels.instance) not in IN_PLACE:
            return self._converted_whole(pixels, frame)
        bits = pixels.bits
        _check_size(bits)
        first, end = bits * (frame - 1), (bits * frame + 7) // 8
        size = end - first // 8
        data = b""
        if end <= pixels.length:
            data = self._value(pixels.instance, pixels.offset + first // 8, size, deflated=pixels.deflated)
        if len(data) < size:
            raise WebError(f"the pixel data ends before frame {frame}", http=404)
        return _cut_bits(data, first % 8, bits)

    def plain(self, pixels: Pixels, frame: int) -> Dataset:
        """A data set with one frame in Explicit VR Little Endian, and what describes its pixels.

        Raises WebError (406) where it cannot be decoded.
        """
        syntax = syntax_of(pixels.instance)
        if not pixels.fragments:
            return _described(pixels.header, self.stored(pixels, frame))
        if syntax not in DECODERS:
            raise WebError("the pixel data cannot be decoded here", http=406)
        _check_size(pixels.bits)
        image = _described(pixels.header, encapsulate([self.stored(pixels, frame)]))
        image["PixelData"].VR = "OB"
        image["PixelData"].is_undefined_length = True
        out = DicomBytesIO()
        out.is_implicit_VR, out.is_little_endian = False, True
        write_dataset(out, image)
        try:
            converted = self._archive.converter.convert(out.getvalue(), syntax, EXPLICIT)
        except NotConverted as error:
            raise WebError(f"the frame cannot be decoded: {error}", http=406) from None
        return _read(converted)

    def _converted_whole(self, pixels: Pixels, frame: int) -> bytes:
        """A frame of an instance that is big endian, or whose pixel data is so short that it is in the header."""
        instance = pixels.instance
        if syntax_of(instance) in IN_PLACE:
            values = b64decode(_pixel_data(self._elements(instance)).get("InlineBinary", ""))
        else:
            try:
                plain = _read(self._archive.converted(instance, EXPLICIT))
            except NotConverted as error:
                raise WebError(f"the frame cannot be had: {error}", http=406) from None
            values = bytes(
                plain.get("PixelData") or plain.get("FloatPixelData") or plain.get("DoubleFloatPixelData") or b""
            )
        first = pixels.bits * (frame - 1)
        if first + pixels.bits > 8 * len(values):
            raise WebError(f"the pixel data ends before frame {frame}", http=404)
        return _cut_bits(values[first // 8 : (first + pixels.bits + 7) // 8], first % 8, pixels.bits)


def _pixel_data(elements: Mapping[str, Any]) -> Mapping[str, Any]:
    """The element of an instance's pixels in DICOM JSON; raises WebError (404) where it has none."""
    for tag in ("7FE00010", "7FE00008", "7FE00009"):
        if tag in elements:
            element: Mapping[str, Any] = elements[tag]
            return element
    raise WebError("the instance has no pixel data", http=404)


def _number(elements: Mapping[str, Any], keyword: str) -> int:
    """The first value of an attribute in DICOM JSON; 0 where it has none that is a number."""
    try:
        return int(elements[_TAGS[keyword]]["Value"][0])
    except (LookupError, TypeError, ValueError, OverflowError):
        return 0


def _bits(elements: Mapping[str, Any]) -> int:
    """Of one frame, not compressed (PS3.3 C.7.6.3.1)."""
    rows, columns, allocated = (_number(elements, keyword) for keyword in ("Rows", "Columns", "BitsAllocated"))
    sampled = _number(elements, "SamplesPerPixel") or 1
    if elements.get(_TAGS["PhotometricInterpretation"], {}).get("Value") == ["YBR_FULL_422"]:
        sampled = 2
    return rows * columns * sampled * allocated


def _check_size(bits: int) -> None:
    if not 0 < bits <= 8 * MAX_FRAME:
        raise WebError(f"the header says that a frame has {bits // 8} bytes", http=406)


def _cut_bits(data: bytes, first: int, bits: int) -> bytes:
    """`bits` from bit `first` on, packed from the least significant bit as 1-bit pixels are (PS3.5 8.1.1)."""
    if first == 0 and bits % 8 == 0:
        return data[: bits // 8]
    unpacked = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return np.packbits(unpacked[first : first + bits], bitorder="little").tobytes()


def _described(header: Dataset, pixels: bytes) -> Dataset:
    image = Dataset()
    for keyword in _DESCRIPTION:
        if keyword in header:
            image[keyword] = header[keyword]
    image.PixelData = pixels + b"\0" * (len(pixels) % 2)
    image["PixelData"].VR = "OB" if int(header.get("BitsAllocated") or 8) <= 8 else "OW"
    return image


def _read(dataset: bytes) -> Dataset:
    nobody = StoredInstance("", "", "", "", "", "", 0, 0, 0, None, "")
    return dcmread(BytesIO(meta_of(nobody, EXPLICIT) + dataset), force=True)


def _image_header(elements: Mapping[str, Any], table: Callable[[str], bytes]) -> Dataset:
    """The attributes that pixels are shown by, as far as they have values that pydicom takes; little endian.

    `table`: what lies at a BulkDataURI.
    """
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = EXPLICIT  # type: ignore[assignment]
    for tag, element in elements.items():
        if tag in _WANTED:
            try:
                header.update(Dataset.from_json({tag: _with_table(tag, element, table)}))
            except (ValueError, TypeError, OverflowError, KeyError):
                continue
    return header


def _with_table(tag: str, element: Mapping[str, Any], table: Callable[[str], bytes]) -> dict[str, Any]:
    """An element without what lies elsewhere; a lookup table with it, as far as `table` gives it."""
    kept = {name: value for name, value in element.items() if name != "BulkDataURI"}
    if value := table(str(element["BulkDataURI"])) if tag in _TABLES and "BulkDataURI" in element else b"":
        kept["InlineBinary"] = b64encode(value).decode()
    if kept.get("vr") == "SQ":
        items = [item or {} for item in kept.get("Value") or []]
        kept["Value"] = [{name: _with_table(name, inner, table) for name, inner in item.items()} for item in items]
    return kept
