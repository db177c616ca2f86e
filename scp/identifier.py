"""C-FIND identifiers, and keys of queries, from keys as people write them: attribute (keyword or tag, dotted inside
sequences) to value."""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Mapping
from typing import Any

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, keyword_dict, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from sphere.catalog.match_parse import TWO_QUOTES
from sphere.catalog.query import NO_VALUE
from sphere.catalog.schema import Level
from sphere.conf.errors import QueryError
from sphere.ingest.header.values import NUMBERS

DEFAULT_KEYS: dict[Level, tuple[str, ...]] = {  # what is asked for where nothing is said
    "PATIENT": ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    "STUDY": (
        "StudyInstanceUID", "StudyDate", "StudyTime", "PatientID", "PatientName", "AccessionNumber",
        "ModalitiesInStudy", "StudyDescription", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances",
    ),
    "SERIES": (
        "StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription",
        "NumberOfSeriesRelatedInstances",
    ),
    "IMAGE": ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "InstanceNumber"),
}  # fmt: skip

_TAG = re.compile(r"\(?([0-9A-Fa-f]{4}),?([0-9A-Fa-f]{4})\)?")
_PRIVATE = re.compile(r"[0-9A-Fa-f]{8},.+")
_BINARY_FLOATS = ("FL", "FD")
_BINARY_INTEGERS = tuple(vr for vr in NUMBERS if vr not in _BINARY_FLOATS)


def build_identifier(keys: Mapping[str, str], level: Level) -> Dataset:
    """The identifier that asks for `keys`: attribute (keyword or tag, dotted inside sequences) to value, "" for any.

    Raises QueryError for an attribute that is unknown or a value that its VR cannot hold.
    """
    identifier = Dataset()
    if not all(value.isascii() for value in keys.values()):
        identifier.SpecificCharacterSet = "ISO_IR 192"
    identifier.QueryRetrieveLevel = level
    for name, value in keys.items():
        _add(identifier, name.split("."), value)
    return identifier


def parse_keys(keys: Mapping[str, str]) -> dict[str, Any]:
    """The same keys as `Query.build` takes them: sequences as mappings, private attributes with the creator that the
    keys beside them name for their block (PS3.5 7.8.1), or that is their own ("GGGGEEEE,CREATOR").

    Raises QueryError for an attribute that is unknown, no sequence, or given twice.
    """
    tree: dict[str, Any] = {}
    for name, value in keys.items():
        *sequences, last = (name,) if _PRIVATE.fullmatch(name) else name.split(".")
        node = tree
        for one in sequences:
            tag = tag_of(one)
            if _vr_of(tag, "") != "SQ" and not tag >> 16 & 1:
                raise QueryError(f"{one} is not a sequence: it has no {last}", offending=(tag,))
            node = node.setdefault(f"{tag:08X}", {})
            if not isinstance(node, dict):
                raise QueryError(f"{one} is given twice", offending=(tag,))
        plain = name if _PRIVATE.fullmatch(name) else f"{tag_of(last):08X}"
        if plain in node:
            raise QueryError(f"{name} is given twice")
        node[plain] = value
    return _with_creators(tree)


def _with_creators(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Private keys named by the creators that are keys too, which ask nothing more then."""
    named: dict[str, Any] = {}
    used = set()
    for name, value in keys.items():
        block = f"{name[:4]}00{name[4:6]}"
        private = len(name) == 8 and int(name[:4], 16) & 1 and name[4:6] != "00"
        if private and (creator := str(keys.get(block, "")).strip(" ")):
            used.add(block)
            name = f"{name},{creator}"
        named[name] = _with_creators(value) if isinstance(value, dict) else value
    return {name: value for name, value in named.items() if name not in used}


def _add(dataset: Dataset, path: list[str], value: str) -> None:
    tag = tag_of(path[0])
    vr = _vr_of(tag, value)
    if tag in dataset and (len(path) == 1 or not dataset[tag].value):
        raise QueryError(f"{path[0]} is given twice", offending=(tag,))
    if len(path) > 1:
        if vr != "SQ":
            raise QueryError(f"{path[0]} is not a sequence: it has no {path[1]}", offending=(tag,))
        if tag not in dataset:
            dataset[tag] = DataElement(tag, "SQ", Sequence([Dataset()]))
        _add(dataset[tag].value[0], path[1:], value)
    elif vr == "SQ" and value:
        raise QueryError(f"{path[0]} {NO_VALUE}", offending=(tag,))
    elif vr == "SQ":
        dataset[tag] = DataElement(tag, "SQ", Sequence())
    else:
        dataset[tag] = _element(path[0], tag, vr, value)


def _element(name: str, tag: int, vr: str, value: str) -> DataElement:
    """A key; wild cards and ranges are no values of their VR, and are sent all the same."""
    if value == TWO_QUOTES and vr in ("IS", "DS"):  # empty value matching; pydicom would refuse it
        element = DataElement(tag, vr, None)
        element._value = value
        return element
    try:
        if vr in _BINARY_INTEGERS:
            converted: object = int(value) if value else None
        else:
            converted = float(value) if value and vr in _BINARY_FLOATS else value or None
        if value and vr in NUMBERS:
            struct.pack(f"<{NUMBERS[vr]}", converted)
        return DataElement(tag, vr, converted, validation_mode=IGNORE)
    except ValueError:
        raise QueryError(f"{name}: {value!r} is not a number", offending=(tag,)) from None
    except (struct.error, OverflowError):
        raise QueryError(f"{name}: {value} is too large for {vr}", offending=(tag,)) from None


def tag_of(name: str) -> int:
    """The tag of a keyword, or of a tag as text (0010,0020 or 00100020); raises QueryError."""
    if match := _TAG.fullmatch(name):
        return int(match[1] + match[2], 16)
    if name and (tag := tag_for_keyword(name)) is not None:  # retired elements of PS3.6 have no keyword
        return tag
    near = difflib.get_close_matches(name, keyword_dict, n=1)
    hint = f"; did you mean {near[0]}?" if any(near) else ""
    raise QueryError(f"{name!r} is neither a DICOM keyword nor a tag{hint}")


def _vr_of(tag: int, value: str) -> str:
    """The VR of a key; of "US or SS" the one that holds the number."""
    try:
        first, *others = dictionary_VR(tag).split(" or ")
    except KeyError:
        return "LO"  # private: the peer looks it up by tag, and text is what keys mostly are
    return "SS" if "SS" in others and value.startswith("-") else first
