"""Instances that come as metadata and bulk data (PS3.18 10.5.1.1.2): into DICOM files in Explicit VR Little Endian."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID

from sphere.conf.errors import SphereError
from sphere.ingest.members import FileRange
from sphere.ingest.part10 import file_meta
from sphere.scp.web.accept import parse
from sphere.scp.web.bulk_in import BulkParts, Part, Unusable
from sphere.scp.web.incoming import ArrivingBody, ArrivingFile
from sphere.scp.web.problem import WebError

EXPLICIT: Final = "1.2.840.10008.1.2.1"
MAX_DEPTH: Final = 30  # sequences in one another
MAX_UID: Final = 64  # characters (PS3.5 9.1)
MAX_VALUE: Final = 64 << 20  # bytes of bulk data other than pixel data
_TAG = re.compile(r"[0-9A-Fa-f]{8}")
_PIXEL_DATA, _AVAILABLE = "7FE00010", "00083002"
_VRS: Final = frozenset(
    [
        "AE",
        "AS",
        "AT",
        "CS",
        "DA",
        "DS",
        "DT",
        "FD",
        "FL",
        "IS",
        "LO",
        "LT",
        "OB",
        "OD",
        "OF",
        "OL",
        "OV",
        "OW",
        "PN",
        "SH",
        "SL",
        "SQ",
        "SS",
        "ST",
        "SV",
        "TM",
        "UC",
        "UI",
        "UL",
        "UN",
        "UR",
        "US",
        "UT",
        "UV",
    ]
)
_OTHER: Final = frozenset(("OB", "OW", "UN"))  # that stand for one another in practice
Header = dict[str, Any]


class Broken(Header):
    """An object of metadata with something in it that no data set can have; `reason` says what."""

    reason: str = ""


def read_json(text: bytes) -> Iterator[Header]:
    """The data sets of DICOM JSON; raises WebError (400) where it is none."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise WebError("the metadata is not JSON") from None
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, dict):
            raise WebError("the metadata is not a list of DICOM JSON objects")
        yield one


def _object(pairs: list[tuple[str, Any]]) -> Header:
    """An object, its names in it once (RFC 8259 4 leaves open which of several counts)."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else broken(found, "a tag or a name is in the metadata twice")


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def broken(header: Header, reason: str) -> Broken:
    """The same object, to be refused for a reason."""
    found = Broken(header)
    found.reason = reason
    return found


class Described:
    """Instances of metadata; `base`: the Content-Location that these came with, "" where there was none."""

    def __init__(self, bulk: BulkParts, base: str = "") -> None:
        self._bulk, self._base = bulk, base

    def write(self, header: Header, file: ArrivingFile) -> None:
        """One instance as a file; raises Unusable, with a reason, where the metadata does not make one.

        Raises StorageError, and OSError, where the bulk data cannot be read back.
        """
        if isinstance(header, Broken):
            raise Unusable(header.reason)
        header = {tag: element for tag, element in header.items() if tag[:4] not in ("0000", "0002")}
        _check(header, 0)
        header = {tag.upper(): element for tag, element in header.items()}
        pixels = header.pop(_PIXEL_DATA, None)
        trailing = {tag: header.pop(tag) for tag in list(header) if tag > _PIXEL_DATA}
        syntax, parts = self._pixels(pixels, header)
        header.pop(_AVAILABLE, None)
        uids = {tag: str((header.get(tag, {}).get("Value") or [""])[0]) for tag in ("00080016", "00080018")}
        if any(len(uid) > MAX_UID for uid in uids.values()):
            raise Unusable("an identifying UID is none")
        meta = file_meta(sop_class_uid=uids["00080016"], sop_instance_uid=uids["00080018"], transfer_syntax_uid=syntax)
        file.add(meta)
        file.add(self._encoded(header))
        for part in _pixel_element(pixels, syntax, parts) if pixels else ():
            file.add(part)
        file.add(self._encoded(trailing))
        file.end()

    def _encoded(self, header: Header) -> bytes:
        return _encoded(header, self._value, "the metadata")

    def _value(self, tag: str, vr: str, uri: str) -> bytes:
        """The bulk data of an element that is no pixel data."""
        return b"".join(body.tobytes(MAX_VALUE, "a value") for _, body in self._parts(uri))

    def _parts(self, uri: Any) -> list[Part]:
        return self._bulk.find(uri, self._base)

    def _pixels(self, pixels: Header | None, header: Header) -> tuple[str, list[ArrivingBody]]:
        """(transfer syntax, bodies) of the pixel data."""
        named = [str(one) for one in header.get(_AVAILABLE, {}).get("Value") or []]
        if not pixels or "BulkDataURI" not in pixels:
            return EXPLICIT, []
        parts = self._parts(pixels["BulkDataURI"])
        ranges = parse(parts[0][0])
        kind = ranges[0].type if ranges else "application/octet-stream"
        syntax = ranges[0].parameters.get("transfer-syntax", "") if ranges else ""
        if kind == "application/octet-stream":
            syntax = EXPLICIT
        elif not syntax:
            syntax = named[0] if len(named) == 1 else _DEFAULT.get(kind, "")
        if syntax != EXPLICIT and not (UID(syntax).is_transfer_syntax and UID(syntax).is_encapsulated):
            raise Unusable("the transfer syntax of the pixel data is not told")
        return syntax, [body for _, body in parts]


_DEFAULT: Final = {  # PS3.18 Table 8.7.3-5
    "image/jpeg": "1.2.840.10008.1.2.4.70",
    "image/jls": "1.2.840.10008.1.2.4.80",
    "image/jp2": "1.2.840.10008.1.2.4.90",
    "image/jphc": "1.2.840.10008.1.2.4.201",
    "image/dicom-rle": "1.2.840.10008.1.2.5",
}


def _check(header: Mapping[str, Any], depth: int) -> None:
    """Tags, VRs and nesting; raises Unusable."""
    if depth > MAX_DEPTH:
        raise Unusable("sequences are too deep in one another")
    if len({tag.upper() for tag in header}) < len(header):
        raise Unusable("a tag is in the metadata twice")
    for tag, element in header.items():
        if not _TAG.fullmatch(tag) or tag[:4].upper() == "FFFE" or not isinstance(element, Mapping):
            raise Unusable(f"{tag[:20]!r} is not a tag with an element")
        if isinstance(element, Broken):
            raise Unusable(f"{tag}: {element.reason}")
        if tag[3] in "13579BDFbdf" and "0000" < tag[4:] < "0010":
            raise Unusable(f"{tag}: is private, and nothing says whose")
        vr = element.get("vr")
        if not isinstance(vr, str) or vr not in _VRS:
            raise Unusable(f"{tag}: its VR is none of PS3.5")
        allowed = _known(int(tag, 16))
        if allowed and vr not in allowed and not {vr, *allowed} <= _OTHER and vr != "UN":
            raise Unusable(f"{tag}: has VR {vr}, and is {' or '.join(sorted(allowed))}")
        values = element.get("Value", [])
        if not isinstance(values, list):
            raise Unusable(f"{tag}: its Value is no list")
        if vr == "SQ":
            for item in values:
                if not isinstance(item, Mapping):
                    raise Unusable(f"{tag}: an item is no object")
                if isinstance(item, Broken):
                    raise Unusable(f"{tag}: in an item {item.reason}")
                _check(item, depth + 1)


def _encoded(header: Header, bulk: Callable[[str, str, str], bytes] | None, what: str) -> bytes:
    """Elements as bytes, `bulk` asked for values that they refer to; raises Unusable, StorageError, and OSError."""
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = False, True
    try:
        write_dataset(out, Dataset.from_json(header, bulk))
    except (Unusable, SphereError):
        raise
    except Exception as error:  # pydicom raises whatever the metadata make of it
        if isinstance(error, OSError) and error.errno is not None:  # it raises one for numbers out of range, too
            raise
        raise Unusable(f"{what} cannot be encoded ({type(error).__name__})") from None
    return out.getvalue()


def _known(tag: int) -> frozenset[str]:
    try:
        return frozenset(dictionary_VR(tag).split(" or "))
    except KeyError:
        return frozenset()


def _pixel_element(pixels: Header, syntax: str, parts: list[ArrivingBody]) -> Iterator[bytes]:
    """(7FE0,0010), its value copied in pieces."""
    if not parts:
        yield _encoded({_PIXEL_DATA: pixels}, None, "the pixel data")
        return
    if syntax == EXPLICIT:
        size = sum(body.size for body in parts)
        if size >= 0xFFFFFFFE:
            raise Unusable("the pixel data is longer than an element can be")
        vr = str(pixels["vr"]).encode() if pixels["vr"] in ("OB", "OW") else b"OW"
        yield struct.pack("<HH2sHI", 0x7FE0, 0x0010, vr, 0, size + size % 2)
        for body in parts:
            yield from _copied(body)
        yield b"\0" * (size % 2)
        return
    yield struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    for body in parts:
        yield struct.pack("<HHI", 0xFFFE, 0xE000, body.size + body.size % 2)
        yield from _copied(body)
        yield b"\0" * (body.size % 2)
    yield struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def _copied(body: ArrivingBody) -> Iterator[bytes]:
    if body.content.error is not None:
        raise body.content.error
    content = body.content.content()
    yield from content.chunks() if isinstance(content, FileRange) else map(bytes, content)
