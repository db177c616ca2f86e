"""Answers: one matched entity as a C-FIND response identifier holds it (PS3.4 C.4.1.1.3.2)."""

from __future__ import annotations

import struct
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import format_number_as_ds

from sphere.catalog.match_header import Header, tag_in
from sphere.catalog.query import ANSWERED, QUERY_RETRIEVE_LEVEL, SPECIFIC_CHARACTER_SET, Key, Query
from sphere.catalog.schema import Level
from sphere.catalog.zones import TIMEZONE, text_of
from sphere.ingest.header.values import NUMBERS

UTF_8 = "ISO_IR 192"
RETRIEVE_AE_TITLE = 0x00080054


@dataclass(frozen=True, slots=True)
class Match:
    """One entity that matched: the keys asked for, with its values.

    `columns` holds values in column form (lists for several), `header` the DICOM JSON elements of the keys that no
    column holds. Where `more` is set, the next match, or the end, is at hand.
    """

    level: Level
    keys: tuple[Key, ...]
    columns: Mapping[int, Any]
    header: Header
    retrieve_ae_title: str
    timezone: int | None = None
    more: bool = False

    def identifier(self) -> Dataset:
        """The keys asked for, zero length where the entity has no value, the unique keys of its level and above, and
        the level; text in UTF-8."""
        identifier = Dataset()
        _add(identifier, SPECIFIC_CHARACTER_SET, "CS", UTF_8)
        _add(identifier, QUERY_RETRIEVE_LEVEL, "CS", self.level)
        _add(identifier, RETRIEVE_AE_TITLE, "AE", self.retrieve_ae_title)
        if self.timezone is not None:
            _add(identifier, TIMEZONE, "SH", text_of(self.timezone))
        for key in self.keys:
            if key.tag in self.columns:
                _add(identifier, key.tag, key.vr, self.columns[key.tag])
            elif key.is_creator:
                _add(identifier, key.tag, "LO", key.creator)
            elif element := self.header.get(f"{tag_in(self.header, key.tag, key.creator):08X}"):
                identifier.add(_element_or_empty(key, element))
            else:
                _add(identifier, key.tag, key.vr, None)
        return identifier


def constants_of(query: Query, ae_title: str) -> Mapping[int, str] | None:
    """Values that every entity has, by tag; None where a key asks for others (PS3.4 C.4.1.1.3.2)."""
    asked = [key for key in query.keys if key.keyword in ANSWERED]
    if not asked:
        return {}
    known = {"RetrieveAETitle": ae_title, "InstanceAvailability": "ONLINE"}
    if any(key.test is not None and not key.test.matches(known[key.keyword]) for key in asked):
        return None
    return {key.tag: known[key.keyword] for key in asked}


def _element_or_empty(key: Key, element: Mapping[str, Any]) -> DataElement:
    """A DICOM JSON element; zero length where it holds something that its VR cannot (an IS of "1A")."""
    try:
        return _element(key, element)
    except (ValueError, TypeError, OverflowError):
        return DataElement(key.tag, element.get("vr", key.vr), None, validation_mode=IGNORE)


def _element(key: Key, element: Mapping[str, Any]) -> DataElement:
    """A DICOM JSON element; of a sequence only the attributes that the key's item names, if it names any."""
    vr = element.get("vr", key.vr)
    if "InlineBinary" in element:  # as it is stored; pydicom would read a UN by its dictionary
        return DataElement(key.tag, vr, b64decode(element["InlineBinary"]), validation_mode=IGNORE)
    if vr != "SQ":
        return DataElement.from_json(Dataset, f"{key.tag:08X}", vr, *_json_value(element))
    items = [_item(key, item) for item in element.get("Value") or [] if item is not None]
    return DataElement(key.tag, "SQ", items, validation_mode=IGNORE)


def _json_value(element: Mapping[str, Any]) -> tuple[Any, str | None]:
    for name in ("Value", "InlineBinary"):
        if name in element:
            return element[name], name
    return None, None


def _item(key: Key, header: Header) -> Dataset:
    item = Dataset()
    for name, element in header.items() if not key.items else ():
        item.add(_element_or_empty(Key(int(name, 16), "", "UN"), element))
    for inner in key.items:
        element = header.get(f"{tag_in(header, inner.tag, inner.creator):08X}")
        if inner.is_creator:
            _add(item, inner.tag, "LO", inner.creator)
        elif element:
            item.add(_element_or_empty(inner, element))
        else:
            _add(item, inner.tag, inner.vr, None)
    return item


def _add(dataset: Dataset, tag: int, vr: str, value: Any) -> None:
    if vr.startswith("US or "):
        low = min(value, default=0) if isinstance(value, list) else value or 0
        vr = "SS" if low < 0 else "US"
    if value is None or not _fits(value, vr):
        texts: Any = [] if vr == "SQ" else None
    else:
        texts = [_wire(one, vr) for one in value] if isinstance(value, list) else _wire(value, vr)
    dataset.add(DataElement(tag, "OB" if vr == "OB or OW" else vr, texts, validation_mode=IGNORE))


def _fits(value: Any, vr: str) -> bool:
    """Whether a value in column form can be written with a VR: its attribute may have been stored with another."""
    values = value if isinstance(value, list) else [value]
    try:
        if vr in NUMBERS:
            struct.pack(f"<{len(values)}{NUMBERS[vr]}", *values)
        elif vr == "AT":
            return all(0 <= int(one, 16) < 1 << 32 for one in values)
    except (ValueError, TypeError, OverflowError, struct.error):
        return False
    return True


def _wire(value: Any, vr: str) -> Any:
    """A value in column form as pydicom takes it: dates as YYYYMMDD, decimals as DS text, tags as numbers."""
    if value is None:  # an empty value, also between others
        return ""
    if isinstance(value, date):
        return f"{value.year:04}{value:%m%d}"
    if vr == "DS":
        return decimal_text(value)
    if vr == "AT" and isinstance(value, str):
        return int(value, 16)
    return value


def decimal_text(value: float) -> str:
    """The shortest text of a number that DS can hold (16 characters)."""
    text = repr(float(value)).removesuffix(".0")
    return text if len(text) <= 16 else format_number_as_ds(value)
