"""One Query for every protocol, and how a C-FIND identifier becomes one (PS3.4 C.4.1)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset

from sphere.catalog.as_stored import AsStored, parse_as_stored
from sphere.catalog.identifier import Element, elements
from sphere.catalog.match import DateRange, Exact, Number, Test, TimeRange
from sphere.catalog.match_parse import Rules, parse_values
from sphere.catalog.predicate import AnyItem, Compare, CompareStored, Moment, Node, Predicate
from sphere.catalog.schema import LEVELS, UNIQUE_KEY, Level, level_of
from sphere.catalog.zones import PAIRS, TIMEZONE, minutes_of
from sphere.conf.errors import QueryError
from sphere.conf.memo import remembered
from sphere.ingest.header.dictionary import private_vr, standard_vr

Model = Literal["PATIENT_ROOT", "STUDY_ROOT", "PATIENT_STUDY_ONLY"]

MODEL_LEVELS: Mapping[Model, tuple[Level, ...]] = {
    "PATIENT_ROOT": ("PATIENT", "STUDY", "SERIES", "IMAGE"),
    "STUDY_ROOT": ("STUDY", "SERIES", "IMAGE"),
    "PATIENT_STUDY_ONLY": ("PATIENT", "STUDY"),
}
"""The levels of each information model (PS3.4 C.6.1 to C.6.3)."""

QUERY_RETRIEVE_LEVEL = 0x00080052
SPECIFIC_CHARACTER_SET = 0x00080005
QUERY_RETRIEVE_VIEW = 0x00080053  # of a conversion that is not offered (PS3.4 C.4.1.1.3.1)
_NOT_KEYS = frozenset((QUERY_RETRIEVE_LEVEL, SPECIFIC_CHARACTER_SET, TIMEZONE, QUERY_RETRIEVE_VIEW))

ANSWERED = frozenset(("RetrieveAETitle", "InstanceAvailability"))
"""Keys that the service answers itself, at every level (PS3.4 C.4.1.1.3.2)."""

NO_VALUE = "is a sequence: it has no value, what is in it has"
"""What is said of a sequence key that has one: it would match everything."""

DATE_TIME_PAIRS = (*PAIRS.items(), ("PatientBirthDate", "PatientBirthTime"))
"""Dates and times that combined date-time matching takes together (PS3.4 C.2.2.2.5.4)."""


@dataclass(frozen=True, slots=True)
class Features:
    """What extended negotiation of a FIND class agreed on (PS3.4 Table C.5-1)."""

    relational: bool = False
    combined_datetime: bool = False
    fuzzy_names: bool = False
    timezone_adjustment: bool = False
    empty_values: bool = False
    multiple_values: bool = False


NO_FEATURES = Features()


@dataclass(frozen=True, slots=True)
class Key:
    """One attribute that a query names: to match, where `test` or an item's key asks something, and to return.

    `vr` is that of PS3.6, or of the identifier where PS3.6 does not know the tag; `keyword` is "" then, and `as_stored`
    is what it asks. Every one of `further` must hold too (multiple value matching). A sequence has the keys of its one
    item as `items`; without any, the whole sequence is returned. A private attribute has the `creator` that the
    identifier names for its block; the creator's own element asks nothing.
    """

    tag: int
    keyword: str
    vr: str
    test: Test | None = None
    items: tuple[Key, ...] = ()
    further: tuple[Test, ...] = ()
    creator: str = ""
    as_stored: AsStored | None = None

    @property
    def name(self) -> str:
        """Keyword, else the tag as (gggg,eeee): what an error message calls it."""
        return self.keyword or f"({self.tag >> 16:04X},{self.tag & 0xFFFF:04X})"

    @property
    def asks(self) -> bool:
        """Whether `nodes` may hold anything."""
        return self.test is not None or self.as_stored is not None or bool(self.items or self.further)

    @property
    def is_creator(self) -> bool:
        """Whether this is the element that reserves a private block (PS3.5 7.8.1)."""
        return is_creator(self.tag)

    def nodes(self) -> tuple[Node, ...]:
        """What the key asks, all of which must hold; nothing where it matches everything."""
        if self.items:
            nodes = tuple(node for key in self.items for node in key.nodes())
            return (AnyItem(self.tag, self.keyword, nodes, self.creator),) if nodes else ()
        if self.as_stored is not None:
            return (CompareStored(self.tag, self.as_stored, self.creator),)
        tests = (*(() if self.test is None else (self.test,)), *self.further)
        return tuple(Compare(self.tag, self.keyword, self.vr, test, self.creator) for test in tests)


def is_creator(tag: int) -> bool:
    """Whether a tag is that of a private creator: (gggg,0010-00FF) of an odd group."""
    return bool(tag >> 16 & 1) and 0x10 <= tag & 0xFFFF <= 0xFF


@dataclass(frozen=True, slots=True)
class Query:
    """A question to the query service: entities of `level` that match every key.

    `model` says which unique keys the answers carry. A `relational` query may leave out the unique keys above its
    level, and have keys of levels below (PS3.4 C.4.1.2.2.1). With a `timezone` (minutes east of UTC), dates and times
    are matched and answered as a clock there shows them (see sphere.catalog.zones).
    """

    level: Level
    model: Model
    keys: tuple[Key, ...]
    relational: bool = False
    combined_datetime: bool = False
    timezone: int | None = None

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
        fuzzy_names: bool = False,
        empty_values: bool = False,
        multiple_values: bool = False,
        timezone: str = "",
    ) -> Query:
        """A query from keywords (or "GGGGEEEE" tags) and values: text as in a C-FIND identifier, a number, a date, a
        list of UIDs, or a mapping for the item of a sequence. "GGGGEEEE,CREATOR" is the private attribute of this
        creator, wherever a data set has its block.

        `model` defaults to STUDY_ROOT, at PATIENT level to PATIENT_ROOT. `empty_values` gives `""` its meaning, and
        `multiple_values` a list, as extended negotiation does; `timezone` ("+0100") adjusts dates and times. Raises
        QueryError for unknown keywords, values that their VR does not allow, and what PS3.4 C.4.1 forbids.
        """
        zone = _zone(timezone) if timezone else None
        rules = Rules(fuzzy_names, empty_values, multiple_values, zone)
        keys = [_built(name, value, rules) for name, value in (match or {}).items()]
        named = {(key.tag, key.creator) for key in keys}
        told = [_built(name, "", rules) for name in dict.fromkeys(return_keys)]
        keys += [key for key in told if (key.tag, key.creator) not in named]
        model = model or ("PATIENT_ROOT" if level == "PATIENT" else "STUDY_ROOT")
        query = cls(level, model, tuple(keys), relational, combined_datetime, zone)
        _check(query)
        return query

    def predicate(self) -> Predicate:
        """What the keys of the level and those above it ask, as nodes that must all hold; not of the keys that the
        service answers itself."""
        return self._nodes([key for key in self.keys if key.asks and not self._is_below(key)])

    def below(self) -> Predicate:
        """What the keys of lower levels ask: that the entity has, say, a series that passes its nodes and, in this very
        series, an instance that passes the others (PS3.4 C.4.1.3.2.1)."""
        keys = self.keys_below()
        return self._nodes(keys) if keys else ()

    def keys_below(self) -> list[Key]:
        """The keys of lower levels that ask something."""
        return [key for key in self.keys if key.asks and self._is_below(key) and key.nodes()]

    def of_lowest(self) -> Query:
        """The query for entities of the lowest level that a key is of: what matches this query has one that matches
        that. Keys are left out of which two levels may say two things: what is no column's, and attributes of a
        patient, whose studies may differ."""
        levels = {level_of(key.keyword) for key in self.keys_below()}
        lowest = next((level for level in reversed(LEVELS) if level in levels), self.level)
        return replace(self, level=lowest, keys=tuple(key for key in self.keys if self._holds_below(key)))

    def _is_below(self, key: Key) -> bool:
        level = level_of(key.keyword)
        return level is not None and LEVELS.index(level) > LEVELS.index(self.level)

    def _holds_below(self, key: Key) -> bool:
        level = level_of(key.keyword)
        return level is not None and (self.level != "PATIENT" or level != "PATIENT" or key.keyword == "PatientID")

    def _nodes(self, keys: Sequence[Key]) -> Predicate:
        moments = tuple(self._moments(keys)) if self.combined_datetime else ()
        taken = {tag for moment in moments for tag in (moment.date_tag, moment.time_tag)}
        left = [key for key in keys if key.tag not in taken and key.keyword not in ANSWERED]
        return (*(node for key in left for node in key.nodes()), *moments)

    def _moments(self, given: Sequence[Key]) -> Iterable[Moment]:
        keys = {key.keyword: key for key in given}
        for date_keyword, time_keyword in DATE_TIME_PAIRS:
            day, time = keys.get(date_keyword), keys.get(time_keyword)
            if day and time and isinstance(day.test, DateRange) and isinstance(time.test, TimeRange):
                yield _moment(day, day.test, time, time.test)


def _moment(day_key: Key, days: DateRange, time_key: Key, times: TimeRange) -> Moment:
    """One range of two: an end that has no date is open, whatever its time; one without a time takes the whole day."""
    low = f"{days.low:%Y%m%d}{times.low or '00'}" if days.low else None
    high = f"{days.high:%Y%m%d}{times.high or '235960.999999'}" if days.high else None
    return Moment(day_key.tag, day_key.keyword, time_key.tag, time_key.keyword, low, high)


def parse_identifier(identifier: Dataset, *, model: Model, features: Features = NO_FEATURES) -> Query:
    """The query of a C-FIND identifier, its text decoded by its Specific Character Set; see parse_elements."""
    return parse_elements(elements(identifier), model=model, features=features)


def parse_elements(given: Sequence[Element], *, model: Model, features: Features = NO_FEATURES) -> Query:
    """The query of the elements of a C-FIND identifier.

    `features` says what extended negotiation agreed on. Raises QueryError (0xA900) with the offending tags for a
    missing or foreign QueryRetrieveLevel, missing or multiple unique keys above the level, and keys with a value below
    it, where relational queries were not agreed on, and values that their VR does not allow (PS3.4 C.4.1.1 to C.4.1.3).
    """
    level = _level(_first_text(given, QUERY_RETRIEVE_LEVEL), model)
    zone = _zone(_first_text(given, TIMEZONE)) if features.timezone_adjustment else None
    rules = _rules(features, zone)
    keys = _keys([element for element in given if element.tag not in _NOT_KEYS], rules)
    query = Query(level, model, keys, features.relational, features.combined_datetime, zone)
    _check(query)
    return query


@functools.lru_cache(256)
def _rules(features: Features, zone: int | None) -> Rules:
    return Rules(features.fuzzy_names, features.empty_values, features.multiple_values, zone)


def _zone(text: str) -> int | None:
    """The time zone that a query names, in minutes east of UTC."""
    minutes = minutes_of(text)
    if text and minutes is None:
        raise QueryError("TimezoneOffsetFromUTC is not an offset &ZZXX", offending=(TIMEZONE,))
    return minutes


def _first_text(given: Sequence[Element], tag: int) -> str:
    for element in given:
        if element.tag == tag:
            return element.text.strip(" \0")
    return ""


def _level(text: str, model: Model) -> Level:
    for level in LEVELS:
        if text == level:
            if level not in MODEL_LEVELS[model]:
                raise QueryError(f"QueryRetrieveLevel {level} is not in this model", offending=(QUERY_RETRIEVE_LEVEL,))
            return level
    said = "is missing" if not text else "is none of PATIENT, STUDY, SERIES, IMAGE"
    raise QueryError(f"QueryRetrieveLevel {said}", offending=(QUERY_RETRIEVE_LEVEL,))


def _keys(given: Iterable[Element], rules: Rules) -> tuple[Key, ...]:
    """The keys of an identifier or an item; private ones with the creators that it names (PS3.5 7.8.1)."""
    given = tuple(given)
    if not any(one.tag >> 16 & 1 for one in given):
        return tuple([_key(one, "", rules) for one in given])
    creators = {(one.tag >> 16, one.tag & 0xFF): one.text.strip(" \0") for one in given if is_creator(one.tag)}
    return tuple(_key(one, creators.get((one.tag >> 16, one.tag >> 8 & 0xFF), ""), rules) for one in given)


def _key(element: Element, creator: str, rules: Rules) -> Key:
    if is_creator(element.tag):
        return Key(element.tag, "", "LO", creator=element.text.strip(" \0"))
    if not element.text and element.items is None:
        return _universal(element.tag, element.vr, creator)
    keyword = keyword_for_tag(element.tag)
    if element.items is None:
        key = Key(element.tag, keyword, element.vr, creator=creator)
        return _tested(key, element.text, rules, said=element.said, raw=element.raw)
    if len(element.items) > 1:
        raise QueryError(f"{keyword or 'sequence'}: a sequence key has one item", offending=(element.tag,))
    items = tuple(key for item in element.items for key in _keys(item, rules))
    return Key(element.tag, keyword, "SQ", items=items, creator=creator)


@remembered(4096)
def _universal(tag: int, vr: str, creator: str) -> Key:
    """A key that asks nothing, as most are."""
    return Key(tag, keyword_for_tag(tag), vr, creator=creator)


def _tested(key: Key, text: str, rules: Rules, *, said: str = "", raw: bytes | None = None) -> Key:
    vm = dictionary_VM(key.tag) if key.keyword else "1"
    try:
        if not standard_vr(key.tag):
            return replace(key, as_stored=parse_as_stored(text, said=said, raw=raw, rules=rules))
        tests = parse_values(text, key.vr, keyword=key.keyword, vm=vm, rules=rules)
    except ValueError as error:
        raise QueryError(f"{key.name}: {error}", offending=(key.tag,)) from None
    if tests and raw and key.vr.startswith("US or SS"):
        tests = tuple(map(_of_either_sign, tests))
    return Key(key.tag, key.keyword, key.vr, tests[0] if tests else None, (), tests[1:], key.creator)


def _of_either_sign(test: Test) -> Test:
    """Two bytes that do not say whether they are a US or an SS, as in implicit VR: what is stored says it."""
    if isinstance(test, Number) and test.number >= 1 << 15:
        return Number(test.number, int(test.number) - (1 << 16))
    return test


def _built(name: str, value: Any, rules: Rules) -> Key:
    plain, _, creator = name.partition(",")
    tag = _tag(plain)
    if tag is None or (creator and not (tag >> 16 & 1 and tag & 0xFFFF > 0xFF)):
        raise QueryError(f"{name!r} is neither a keyword of PS3.6 nor a tag GGGGEEEE, nor a private GGGGEEEE,CREATOR")
    keyword, vr = keyword_for_tag(tag), private_vr(tag, creator) or "UN" if creator else _dictionary_vr(tag)
    key = Key(tag, keyword, vr, creator=creator)
    if isinstance(value, Mapping):
        if vr not in ("SQ", "UN"):
            raise QueryError(f"{key.name} is not a sequence: it has no items", offending=(tag,))
        items = tuple(_built(inner, one, rules) for inner, one in value.items())
        return replace(key, vr="SQ", items=items)
    if vr != "SQ":
        return _tested(key, _as_text(value), rules)
    if value is not None and value != "":
        raise QueryError(f"{key.name} {NO_VALUE}", offending=(tag,))
    return key


def _tag(name: str) -> int | None:
    tag = tag_for_keyword(name) if name else None
    if tag is not None:
        return tag
    try:
        return int(name, 16) if len(name) == 8 else None
    except ValueError:
        return None


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
    for key in query.keys_below():
        if not query.relational or level_of(key.keyword) not in levels:
            raise below_level(query, key)


def below_level(query: Query, key: Key) -> QueryError:
    """What is said of a key that its query may not have."""
    return QueryError(f"{key.name} is a key of {level_of(key.keyword)}, below {query.level}", offending=(key.tag,))


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
