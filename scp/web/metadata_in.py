"""Instances that come as metadata and bulk data (PS3.18 10.5.1.1.2): into DICOM files in Explicit VR Little Endian."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final
from xml.etree.ElementTree import Element, ParseError

import orjson
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID

from sphere.ingest.members import FileRange
from sphere.ingest.part10 import file_meta
from sphere.scp.web.accept import parse
from sphere.scp.web.incoming import ArrivingBody, ArrivingFile
from sphere.scp.web.problem import WebError

EXPLICIT: Final = "1.2.840.10008.1.2.1"
MAX_DEPTH: Final = 30  # sequences in one another
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


def read_json(text: bytes) -> Iterator[Header]:
    """The data sets of DICOM JSON; raises WebError (400) where it is none."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise WebError("the metadata is not JSON") from None
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, dict):
            raise WebError("the metadata is not a list of DICOM JSON objects")
        yield one


def read_xml(text: bytes) -> Iterator[Header]:
    """The data sets of the Native DICOM Model; raises WebError (400), for entities and DTDs as well."""
    try:
        root = fromstring(text, forbid_dtd=True)
    except DefusedXmlException:
        raise WebError("the metadata has a DTD or entities, which are not read") from None
    except (ParseError, ValueError, LookupError):
        raise WebError("the metadata is not XML") from None
    models = [root] if _name(root) == "NativeDicomModel" else [one for one in root if _name(one) == "NativeDicomModel"]
    if not models:
        raise WebError("the metadata is no NativeDicomModel (PS3.19 A.1)")
    for model in models:
        yield _of_model(model, 0)


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _of_model(model: Element, depth: int) -> Header:
    if depth > MAX_DEPTH:
        raise WebError("sequences are too deep in one another")
    header: Header = {}
    for attribute in model:
        if _name(attribute) == "DicomAttribute":
            header[attribute.get("tag", "")] = _of_attribute(attribute, depth)
    return header


def _of_attribute(attribute: Element, depth: int) -> Header:
    element: Header = {"vr": attribute.get("vr", "")}
    values: list[Any] = []
    for child in attribute:
        name = _name(child)
        if name == "Value":
            values.append(_number(child.text, element["vr"]))
        elif name == "Item":
            values.append(_of_model(child, depth + 1))
        elif name == "PersonName":
            values.append({_name(group): _of_name(group) for group in child})
        elif name == "InlineBinary":
            element["InlineBinary"] = (child.text or "").strip()
        elif name == "BulkData":
            element["BulkDataURI"] = child.get("uri", "")
    if values:
        element["Value"] = values
    return element


def _number(text: str | None, vr: str) -> Any:
    if text is None:
        return None
    if vr in ("US", "SS", "UL", "SL", "UV", "SV", "IS"):
        return int(text) if re.fullmatch(r"\s*[+-]?\d{1,20}\s*", text, re.ASCII) else text
    if vr in ("FL", "FD", "DS"):
        return float(text) if re.fullmatch(r"\s*[+-]?[\d.]{1,30}([eE][+-]?\d{1,3})?\s*", text, re.ASCII) else text
    return text


def _of_name(group: Element) -> str:
    parts = {_name(part): part.text or "" for part in group}
    names = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")
    return "^".join(parts.get(name, "") for name in names).rstrip("^")


class Unusable(ValueError):
    """Why metadata makes no instance; without a value of it."""


class Described:
    """The bulk data of a request by their Content-Location."""

    def __init__(self) -> None:
        self._bodies: dict[str, list[tuple[str, ArrivingBody]]] = {}

    def add(self, location: str, content_type: str, body: ArrivingBody) -> None:
        """A part; several of one location are the frames of one value."""
        self._bodies.setdefault(location, []).append((content_type, body))

    def bodies(self) -> list[ArrivingBody]:
        """All of them."""
        return [body for parts in self._bodies.values() for _, body in parts]

    def write(self, header: Header, file: ArrivingFile) -> None:
        """One instance as a file; raises Unusable, with a reason, where the metadata does not make one."""
        header = {tag: element for tag, element in header.items() if tag[:4] not in ("0000", "0002")}
        _check(header, 0)
        pixels = header.pop(_PIXEL_DATA, None)
        trailing = {tag: header.pop(tag) for tag in list(header) if tag.upper() > _PIXEL_DATA}
        syntax, parts = self._pixels(pixels, header)
        header.pop(_AVAILABLE, None)
        uids = {tag: str((header.get(tag, {}).get("Value") or [""])[0]) for tag in ("00080016", "00080018")}
        meta = file_meta(sop_class_uid=uids["00080016"], sop_instance_uid=uids["00080018"], transfer_syntax_uid=syntax)
        file.add(meta)
        file.add(self._encoded(header))
        for part in _pixel_element(pixels, syntax, parts) if pixels else ():
            file.add(part)
        file.add(self._encoded(trailing))
        file.end()

    def _encoded(self, header: Header) -> bytes:
        out = DicomBytesIO()
        out.is_implicit_VR, out.is_little_endian = False, True
        try:
            write_dataset(out, Dataset.from_json(header, self._value))
        except Unusable:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, struct.error) as error:
            raise Unusable(f"the metadata cannot be encoded ({type(error).__name__})") from None
        return out.getvalue()

    def _value(self, tag: str, vr: str, uri: str) -> bytes:
        """The bulk data of an element that is no pixel data."""
        return b"".join(body.tobytes(MAX_VALUE, "a value") for _, body in self._parts(uri))

    def _parts(self, uri: str) -> list[tuple[str, ArrivingBody]]:
        found = self._bodies.get(uri) or next(
            (parts for location, parts in self._bodies.items() if uri and location.endswith(uri)), None
        )
        if found is None:
            raise Unusable("bulk data that the metadata refers to is not in the request")
        return found

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
        if not syntax or (syntax != EXPLICIT and not UID(syntax).is_encapsulated):
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
    for tag, element in header.items():
        if not _TAG.fullmatch(tag) or not isinstance(element, Mapping):
            raise Unusable(f"{tag[:20]!r} is not a tag with an element")
        vr = element.get("vr")
        if vr not in _VRS:
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
                _check(item, depth + 1)


def _known(tag: int) -> frozenset[str]:
    try:
        return frozenset(dictionary_VR(tag).split(" or "))
    except KeyError:
        return frozenset()


def _pixel_element(pixels: Header, syntax: str, parts: list[ArrivingBody]) -> Iterator[bytes]:
    """(7FE0,0010), its value copied in pieces."""
    if not parts:
        out = DicomBytesIO()
        out.is_implicit_VR, out.is_little_endian = False, True
        try:
            write_dataset(out, Dataset.from_json({_PIXEL_DATA: pixels}))
        except (ValueError, TypeError, KeyError) as error:
            raise Unusable(f"the pixel data cannot be encoded ({type(error).__name__})") from None
        yield out.getvalue()
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
        raise Unusable("no room for the bulk data")
    content = body.content.content()
    yield from content.chunks() if isinstance(content, FileRange) else map(bytes, content)
