"""One Query for every protocol, and how a C-FIND identifier becomes one (PS3.4 C.4.1).

Limits that later features lift: fuzzy matching of person names, empty-value and multiple-value matching and time zone
adjustment (the other extended negotiations of PS3.4 C.5.1.1.1) are fields to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset

from sphere.catalog.identifier import Element, elements, first_text
from sphere.catalog.match import DateRange, Exact, Test, TimeRange
from sphere.catalog.match_parse import parse_value
from sphere.catalog.predicate import AnyItem, Compare, Moment, Node, Predicate
from sphere.catalog.schema import LEVELS, UNIQUE_KEY, Level, level_of
from sphere.conf.errors import QueryError

Model = Literal["PATIENT_ROOT", "STUDY_ROOT", "PATIENT_STUDY_ONLY"]

MODEL_LEVELS: Mapping[Model, tuple[Level, ...]] = {
    "PATIENT_ROOT": ("PATIENT", "STUDY", "SERIES", "IMAGE"),
    "STUDY_ROOT": ("STUDY", "SERIES", "IMAGE"),
    "PATIENT_STUDY_ONLY": ("PATIENT", "STUDY"),
}
"""The levels of each information model (PS3.4 C.6.1 to C.6.3)."""

QUERY_RETRIEVE_LEVEL = 0x00080052
SPECIFIC_CHARACTER_SET = 0x00080005
_NOT_KEYS = frozenset((QUERY_RETRIEVE_LEVEL, SPECIFIC_CHARACTER_SET, 0x00080201))  # and TimezoneOffsetFromUTC

ANSWERED = frozenset(("RetrieveAETitle", "InstanceAvailability"))
"""Keys that the service answers itself, at every level (PS3.4 C.4.1.1.3.2)."""

DATE_TIME_PAIRS = (
    ("StudyDate", "StudyTime"),
    ("SeriesDate", "SeriesTime"),
    ("AcquisitionDate", "AcquisitionTime"),
    ("ContentDate", "ContentTime"),
    ("PatientBirthDate", "PatientBirthTime"),
)
"""Dates and times that combined date-time matching takes together (PS3.4 C.2.2.2.5.4)."""


@dataclass(frozen=True, slots=True)
class Key:
    """One attribute that a query names: to match, where `test` or an item's key asks something, and to return.

    `vr` is that of PS3.6, or of the identifier where PS3.6 does not know the tag; `keyword` is "" then. A sequence
    has the keys of its one item as `items`; without any, the whole sequence is returned.
    """

    tag: int
    keyword: str
    vr: str
    test: Test | None = None
    items: tuple[Key, ...] = ()

    @property
    def name(self) -> str:
        """Keyword, else the tag as (gggg,eeee): what an error message calls it."""
        return self.keyword or f"({self.tag >> 16:04X},{self.tag & 0xFFFF:04X})"

    def node(self) -> Node | None:
        """What the key asks; None where it matches everything."""
        if self.items:
            nodes = tuple(node for node in (key.node() for key in self.items) if node is not None)
            return AnyItem(self.tag, self.keyword, nodes) if nodes else None
        return Compare(self.tag, self.keyword, self.vr, self.test) if self.test is not None else None


@dataclass(frozen=True, slots=True)
class Query:
    """A question to the query service: entities of `level` that match every key.

    `model` says which unique keys the answers carry. A `relational` query may leave out the unique keys above its
    level (PS3.4 C.4.1.2.2.1).
    """

    level: Level
    model: Model
    keys: tuple[Key, ...]
    relational: bool = False
    combined_datetime: bool = False

    @classmethod
    def build(
        cls,
        level: Level,
        match: Mapping[str, Any] | None = None,
        *,
        return_keys: Iterable[str] = (),
        model: Model | None = None,
        relational: bool = True,
        combined_datetime: bool = False,
    ) -> Query:
        """A query from keywords (or "GGGGEEEE" tags) and values: text as in a C-FIND identifier, a number, a date, a
        list of UIDs, or a mapping for the item of a sequence.

        `model` defaults to STUDY_ROOT, at PATIENT level to PATIENT_ROOT. Raises QueryError for unknown keywords,
        values that their VR does not allow, and what PS3.4 C.4.1 forbids.
        """
        keys = [_built(name, value) for name, value in (match or {}).items()]
        named = {key.tag for key in keys}
        keys += [key for key in (_built(name, "") for name in dict.fromkeys(return_keys)) if key.tag not in named]
        model = model or ("PATIENT_ROOT" if level == "PATIENT" else "STUDY_ROOT")
        query = cls(level, model, tuple(keys), relational, combined_datetime)
        _check(query)
        return query

    def predicate(self) -> Predicate:
        """What the keys ask, as nodes that must all hold; not of the keys that the service answers itself."""
        moments = tuple(self._moments())
        taken = {tag for moment in moments for tag in (moment.date_tag, moment.time_tag)}
        nodes = (key.node() for key in self.keys if key.tag not in taken and key.keyword not in ANSWERED)
        return (*(node for node in nodes if node is not None), *moments)

    def _moments(self) -> Iterable[Moment]:
        keys = {key.keyword: key for key in self.keys} if self.combined_datetime else {}
        for date_keyword, time_keyword in DATE_TIME_PAIRS:
            day, time = keys.get(date_keyword), keys.get(time_keyword)
            if day and time and isinstance(day.test, DateRange) and isinstance(time.test, TimeRange):
                yield _moment(day, day.test, time, time.test)


def _moment(day_key: Key, days: DateRange, time_key: Key, times: TimeRange) -> Moment:
    """One range of two: an end that has no date is open, whatever its time; one without a time takes the whole day."""
    low = f"{days.low:%Y%m%d}{times.low or '00'}" if days.low else None
    high = f"{days.high:%Y%m%d}{times.high or '235960.999999'}" if days.high else None
    return Moment(day_key.tag, day_key.keyword, time_key.tag, time_key.keyword, low, high)


def parse_identifier(
    identifier: Dataset, *, model: Model, relational: bool = False, combined_datetime: bool = False
) -> Query:
    """The query of a C-FIND identifier, its text decoded by its Specific Character Set.

    `relational` and `combined_datetime` say what extended negotiation agreed on. Raises QueryError (0xA900) with the
    offending tags for a missing or foreign QueryRetrieveLevel, missing or multiple unique keys above the level, keys
    with a value below it, and values that their VR does not allow (PS3.4 C.4.1.1 to C.4.1.3).
    """
    level = _level(identifier, model)
    keys = tuple(_key(element) for element in elements(identifier) if element.tag not in _NOT_KEYS)
    query = Query(level, model, keys, relational, combined_datetime)
    _check(query)
    return query


def _level(identifier: Dataset, model: Model) -> Level:
    text = first_text(identifier, QUERY_RETRIEVE_LEVEL)
    for level in LEVELS:
        if text == level:
            if level not in MODEL_LEVELS[model]:
                raise QueryError(f"QueryRetrieveLevel {level} is not in this model", offending=(QUERY_RETRIEVE_LEVEL,))
            return level
    said = "is missing" if not text else "is none of PATIENT, STUDY, SERIES, IMAGE"
    raise QueryError(f"QueryRetrieveLevel {said}", offending=(QUERY_RETRIEVE_LEVEL,))


def _key(element: Element) -> Key:
    keyword = keyword_for_tag(element.tag)
    if element.items is None:
        return _tested(element.tag, keyword, element.vr, element.text)
    if len(element.items) > 1:
        raise QueryError(f"{keyword or 'sequence'}: a sequence key has one item", offending=(element.tag,))
    items = tuple(_key(inner) for item in element.items for inner in item)
    return Key(element.tag, keyword, "SQ", None, items)


def _tested(tag: int, keyword: str, vr: str, text: str) -> Key:
    key = Key(tag, keyword, vr)
    try:
        test = parse_value(text, vr, keyword=keyword)
    except ValueError as error:
        raise QueryError(f"{key.name}: {error}", offending=(tag,)) from None
    return Key(tag, keyword, vr, test)


def _built(name: str, value: Any) -> Key:
    tag = tag_for_keyword(name) if name else None
    if tag is None:
        try:
            tag = int(name, 16) if len(name) == 8 else None
        except ValueError:
            tag = None
    if tag is None:
        raise QueryError(f"{name!r} is neither a keyword of PS3.6 nor a tag GGGGEEEE")
    keyword, vr = keyword_for_tag(tag), _dictionary_vr(tag)
    if isinstance(value, Mapping):
        return Key(tag, keyword, "SQ", None, tuple(_built(inner, one) for inner, one in value.items()))
    return Key(tag, keyword, vr) if vr == "SQ" else _tested(tag, keyword, vr, _as_text(value))


def _dictionary_vr(tag: int) -> str:
    try:
        return dictionary_VR(tag)
    except KeyError:
        return "UN"


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, date):
        return f"{value:%Y%m%d}"
    if isinstance(value, (list, tuple)):
        return "\\".join(_as_text(one) for one in value)
    return str(value)


def _check(query: Query) -> None:
    """The rules of PS3.4 C.4.1.2 and C.4.1.3 for where keys may have a value."""
    levels = MODEL_LEVELS[query.model]
    if query.level not in levels:
        raise QueryError(f"level {query.level} is not in model {query.model}", offending=(QUERY_RETRIEVE_LEVEL,))
    if not query.relational:
        _check_unique_keys(query, levels[: levels.index(query.level)])
    depth = LEVELS.index(query.level)
    for key in query.keys:
        level = level_of(key.keyword)
        if level is not None and LEVELS.index(level) > depth and key.node() is not None:
            raise QueryError(f"{key.name} is a key of {level}, below {query.level}", offending=(key.tag,))


def _check_unique_keys(query: Query, above: Iterable[Level]) -> None:
    by_keyword = {key.keyword: key for key in query.keys}
    for level in above:
        name = UNIQUE_KEY[level]
        tag = tag_for_keyword(name) or 0
        key = by_keyword.get(name)
        if key is None or key.test is None:
            raise QueryError(f"{name} must have a value at level {query.level}", offending=(tag,))
        if not isinstance(key.test, Exact) or len(key.test.texts) != 1:
            raise QueryError(f"{name} must be a single value at level {query.level}", offending=(tag,))
