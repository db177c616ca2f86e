"""Building DICOM bytes element by element, wrong ones too, and comparing a header with what pydicom reads."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import pydicom
from pydicom import dcmread
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from sphere.ingest.header import Header, HeaderReader, Rejected
from sphere.ingest.header.columns import Column
from sphere.ingest.part10 import LONG_VRS, file_meta

EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_BE = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"

Element = bytes


def _tag(tag: int | str) -> int:
    number = tag_for_keyword(tag) if isinstance(tag, str) else tag
    assert number is not None, tag
    return int(number)


def element(tag: int | str, vr: str, value: bytes, *, length: int | None = None, order: str = "<") -> Element:
    """An explicit VR element (little endian unless `order` says otherwise); `length` overrides the true one."""
    group, number = divmod(_tag(tag), 0x10000)
    count = len(value) if length is None else length
    if vr.encode() in LONG_VRS:
        return struct.pack(f"{order}HH2sHI", group, number, vr.encode(), 0, count) + value
    return struct.pack(f"{order}HH2sH", group, number, vr.encode(), count) + value


def implicit(tag: int | str, value: bytes, *, length: int | None = None, order: str = "<") -> Element:
    """An implicit VR element."""
    group, number = divmod(_tag(tag), 0x10000)
    return struct.pack(f"{order}HHI", group, number, len(value) if length is None else length) + value


def item(*elements: Element, undefined: bool = False) -> bytes:
    """A sequence item."""
    body = b"".join(elements)
    if undefined:
        return b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + body + b"\xfe\xff\x0d\xe0\0\0\0\0"
    return b"\xfe\xff\x00\xe0" + struct.pack("<I", len(body)) + body


def sequence(tag: int | str, *items: bytes, undefined: bool = False, vr: str = "SQ") -> Element:
    """An explicit VR little endian sequence."""
    body = b"".join(items)
    if undefined:
        return element(tag, vr, body + b"\xfe\xff\xdd\xe0\0\0\0\0", length=0xFFFFFFFF)
    return element(tag, vr, body)


def text(tag: int | str, vr: str, value: str) -> Element:
    """An explicit VR little endian element of text, padded to an even length."""
    raw = value.encode("latin-1")
    return element(tag, vr, raw + (b"\0" if vr == "UI" else b" ") * (len(raw) % 2))


IDENTITY = (
    text("SOPClassUID", "UI", "1.2.840.10008.5.1.4.1.1.7"),
    text("SOPInstanceUID", "UI", "1.2.3.4"),
    text("StudyInstanceUID", "UI", "1.2.3"),
    text("SeriesInstanceUID", "UI", "1.2.3.1"),
)


IMPLICIT_BODY = b"".join(
    implicit(tag, value)
    for tag, value in (
        ("SOPClassUID", b"1.2.840.10008.5.1.4.1.1.7\0"),
        ("SOPInstanceUID", b"1.2.3.4\0"),
        ("PatientName", b"Doe^Jane"),
        ("StudyInstanceUID", b"1.2.3\0"),
        ("SeriesInstanceUID", b"1.2.3.1\0"),
        ("PixelRepresentation", b"\x01\0"),
        ("SmallestImagePixelValue", b"\xff\xff"),
    )
)
"""A data set in implicit VR."""


def instance(*elements: Element, syntax: str = EXPLICIT_LE, identity: tuple[Element, ...] = IDENTITY) -> bytes:
    """A Part 10 file of explicit VR little endian elements, in the order of their tags, with the identifying UIDs."""
    ordered = sorted((*identity, *elements), key=lambda raw: struct.unpack_from("<HH", raw))
    return part10(b"".join(ordered), syntax=syntax)


def part10(dataset: bytes, *, syntax: str = EXPLICIT_LE) -> bytes:
    """A Part 10 file around data set bytes."""
    meta = file_meta(sop_class_uid="1.2.840.10008.5.1.4.1.1.7", sop_instance_uid="1.2.3.4", transfer_syntax_uid=syntax)
    return meta + dataset


@dataclass
class Source:
    """A member in memory that counts what is fetched of it."""

    data: bytes
    fetched: list[tuple[int, int]] = field(default_factory=list)

    def fetch(self, offset: int, count: int) -> bytes:
        """Bytes of the member, as HeaderReader asks for them."""
        self.fetched.append((offset, count))
        return self.data[offset : offset + count]


def read(data: bytes, *, prefix: int = 16_384, max_header: int = 1 << 26) -> Header | Rejected:
    """What a new HeaderReader makes of a member given its first `prefix` bytes."""
    source = Source(data)
    return HeaderReader(max_header=max_header).read(data[:prefix], size=len(data), fetch=source.fetch)


def header(data: bytes, **how: int) -> Header:
    """As `read`, where a row is expected."""
    found = read(data, **how)
    assert isinstance(found, Header), found
    return found


def dataset(found: Header) -> dict[str, Any]:
    """What a header has as DICOM JSON."""
    told: dict[str, Any] = orjson.loads(found.dataset)
    return told


def packaged_files() -> list[Path]:
    """pydicom's packaged real files."""
    packaged = Path(pydicom.__file__).parent / "data" / "test_files"
    return sorted(path for path in packaged.rglob("*") if path.is_file())


def pydicom_dataset(path: Path) -> Dataset:
    """The header as pydicom reads it."""
    return dcmread(path, force=True, stop_before_pixels=True)


def typed_differences(values: Mapping[str, Any], dataset: Dataset, columns: tuple[Column, ...]) -> Iterator[str]:
    """Columns whose value is not what pydicom reads at the first level, or in a shared functional group else."""
    shared = _shared(dataset)
    for column in columns:
        moved = column.tag not in dataset and column.keyword in values
        holder = shared.get(column.tag, dataset) if moved else dataset
        try:
            expected = holder.get(column.keyword)
        except (ValueError, TypeError, OverflowError):
            expected = None
        wanted = list(expected) if isinstance(expected, (list, MultiValue)) else [expected]
        wanted = [_plain(column, value) for value in (wanted if column.multiple else wanted[:1])]
        given = values.get(column.keyword)
        found = given if isinstance(given, list) else [given]
        if all(value is None for value in wanted) and given is None:
            continue
        if len(found) != len(wanted) or not all(map(same, found, wanted)):
            yield f"{column.keyword}: {given!r} where pydicom has {expected!r}"


def _shared(dataset: Dataset) -> dict[int, Dataset]:
    """The item of a shared functional group that has an attribute, by its tag; of groups with one item only."""
    found: dict[int, Dataset] = {}
    for item in dataset.get("SharedFunctionalGroupsSequence") or ():
        for group in item:
            if group.VR == "SQ" and len(group.value) == 1:
                found |= dict.fromkeys(map(int, group.value[0].keys()), group.value[0])
    return found


def _plain(column: Column, value: Any) -> Any:
    """A value of pydicom as the column's type has it; None where it cannot be typed."""
    if value is None or value == "":
        return None
    if column.vr == "DA":
        digits = str(value).replace(".", "")
        try:
            return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
        except ValueError:
            return None
    if column.vr == "AT":
        return f"{value:08X}"
    if str(column.arrow) not in ("double", "int64") and not isinstance(value, (int, float)):
        return str(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return None if column.vr in ("IS", "DS") else str(value)


def same(found: Any, wanted: Any) -> bool:
    """Whether two values are equal but for blanks at the ends and the last digit of a float."""
    if isinstance(found, str) and isinstance(wanted, str):
        return found.strip(" \0") == wanted.strip(" \0")
    if isinstance(found, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(found, wanted, rel_tol=1e-12) or (found != found and wanted != wanted)
    return bool(found == wanted)


def json_differences(found: Mapping[str, Any], dataset: Dataset, path: str = "") -> Iterator[str]:
    """Elements of DICOM JSON that differ from pydicom's reading; bulk data and what pydicom cannot read aside."""
    wanted = {f"{tag:08X}" for tag in tuple(dataset.keys()) if _readable(dataset, tag)}
    for key in sorted(found.keys() | wanted):
        number = int(key, 16)
        if number & 0xFFFF == 0 or number >> 16 >= 0x7FE0:
            continue
        where = f"{path}{key} {keyword_for_tag(number)}"
        if key not in wanted:
            if number not in dataset:
                yield f"{where}: pydicom has none"
        elif key not in found:
            yield f"{where}: missing"
        else:
            yield from _element_differences(found[key], dataset[number], where)


def _readable(dataset: Dataset, tag: Any) -> bool:
    try:
        return dataset[tag] is not None
    except (ValueError, TypeError, OverflowError):
        return False


def _element_differences(found: Mapping[str, Any], wanted: Any, where: str) -> Iterator[str]:
    if found["vr"] != wanted.VR:
        yield f"{where}: VR {found['vr']} where pydicom has {wanted.VR}"
    elif wanted.VR == "SQ":
        items = found.get("Value", [])
        if len(items) != len(wanted.value):
            yield f"{where}: {len(items)} items where pydicom has {len(wanted.value)}"
        for index, (inner, other) in enumerate(zip(items, wanted.value, strict=False)):
            yield from json_differences(inner, other, f"{where}[{index}]/")
    elif "BulkDataURI" not in found:
        try:
            given = wanted.to_json_dict(None, 1024)
        except ValueError:  # a number that is none: the reader keeps the text
            return
        ours = [_json_plain(value) for value in found.get("Value", [found.get("InlineBinary")])]
        theirs = [_json_plain(value) for value in given.get("Value", [given.get("InlineBinary")])]
        if len(ours) != len(theirs) or not all(map(same, ours, theirs)):
            yield f"{where}: {ours} where pydicom has {theirs}"


def _json_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: group.strip(" \0") for key, group in value.items() if group.strip(" \0")} or None
    return None if value == "" else value
