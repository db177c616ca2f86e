"""The identifier of a C-MOVE or C-GET request: unique keys, and nothing else (PS3.4 C.4.2.2, C.4.3.2, Y.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.dataset import Dataset

from sphere.catalog.identifier import Element, elements
from sphere.catalog.schema import Level
from sphere.conf.errors import QueryError
from sphere.scp.contexts import RetrieveModel

LEVEL = 0x00080052
UNIQUE: Mapping[Level, int] = {
    "PATIENT": 0x00100020,
    "STUDY": 0x0020000D,
    "SERIES": 0x0020000E,
    "IMAGE": 0x00080018,
}
NAMES = {0x00100020: "PatientID", 0x0020000D: "StudyInstanceUID", 0x0020000E: "SeriesInstanceUID",
         0x00080018: "SOPInstanceUID", LEVEL: "QueryRetrieveLevel"}  # fmt: skip
LEVELS: Mapping[RetrieveModel, tuple[Level, ...]] = {
    "PATIENT_ROOT": ("PATIENT", "STUDY", "SERIES", "IMAGE"),
    "STUDY_ROOT": ("STUDY", "SERIES", "IMAGE"),
    "PATIENT_STUDY_ONLY": ("PATIENT", "STUDY"),
    "INSTANCE_ROOT": ("IMAGE",),
}
_NOT_KEYS = frozenset((LEVEL, 0x00080005, 0x00080201, 0x00080053))  # character set, time zone, Query/Retrieve View
_UID_CHARACTERS = frozenset("0123456789.")


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be retrieved: instances for which every key that is not empty holds."""

    level: Level
    patient: str = ""
    study: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    sop: tuple[str, ...] = ()


def parse_selection(identifier: Dataset, *, model: RetrieveModel, relational: bool = False) -> Selection:
    """What an identifier selects; raises QueryError (0xA900) with the offending tags.

    Wrong are: no or a foreign QueryRetrieveLevel; no value of the level's unique key, or one that is no UID; keys with
    a value below the level; a missing or multiple unique key above it, unless `relational`; any other attribute with a
    value. PatientID may narrow a Study Root request, as many users send it. Attributes without value are passed over.
    """
    given = _given(identifier)
    level = _level(given, LEVELS[model])
    keys = {name: _values(given[tag]) for name, tag in UNIQUE.items() if tag in given}
    _check_others(given)
    levels = LEVELS[model]
    depth = levels.index(level)
    if not keys.get(level):
        raise _wrong(UNIQUE[level], f"must have a value at level {level}")
    for below in levels[depth + 1 :]:
        if keys.get(below):
            raise _wrong(UNIQUE[below], f"is a key below level {level}")
    for above in levels[:depth]:
        if not relational and len(keys.get(above, ())) != 1:
            raise _wrong(UNIQUE[above], f"must be a single value at level {level}")
    patients = keys.get("PATIENT", ())
    if len(patients) > 1:
        raise _wrong(UNIQUE["PATIENT"], "must be a single value")
    return Selection(
        level, "".join(patients), keys.get("STUDY", ()), keys.get("SERIES", ()), keys.get("IMAGE", ())
    )  # fmt: skip


def _given(identifier: Dataset) -> dict[int, Element]:
    try:
        return {element.tag: element for element in elements(identifier)}
    except Exception as error:  # noqa: BLE001  pydicom raises whatever the bytes make of it
        raise QueryError(f"identifier cannot be decoded ({type(error).__name__})") from None


def _level(given: Mapping[int, Element], levels: tuple[Level, ...]) -> Level:
    text = given[LEVEL].text.strip(" \0") if LEVEL in given else ""
    for level in levels:
        if text == level:
            return level
    raise _wrong(LEVEL, f"must be one of {', '.join(levels)}" if text else "is missing")


def _values(element: Element) -> tuple[str, ...]:
    values = tuple(value.strip(" \0") for value in element.text.split("\\"))
    if element.tag == UNIQUE["PATIENT"]:
        return tuple(value for value in values if value)
    found = tuple(dict.fromkeys(value for value in values if value))
    for value in found:
        if len(value) > 64 or not _UID_CHARACTERS.issuperset(value):
            raise _wrong(element.tag, "has a value that is no UID")
    return found


def _check_others(given: Mapping[int, Element]) -> None:
    keys = set(UNIQUE.values()) | _NOT_KEYS
    others = tuple(tag for tag, element in given.items() if tag not in keys and (element.text or element.items))
    if others:
        raise QueryError("only unique keys may have a value in a retrieve request", offending=others)


def _wrong(tag: int, what: str) -> QueryError:
    return QueryError(f"{NAMES[tag]} {what}", offending=(tag,))
