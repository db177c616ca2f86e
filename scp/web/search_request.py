"""From the URL of a search transaction to a Query (PS3.18 8.3.4 and 10.6.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag

from sphere.catalog.asof import AsOf, parse_as_of
from sphere.catalog.match_parse import LISTS
from sphere.catalog.query import Query, below_level
from sphere.catalog.schema import ATTRIBUTES, BY_KEYWORD, COMPUTED, LEVELS, UNIQUE_KEY, Level, level_of
from sphere.conf.errors import QueryError
from sphere.scp.identifier import tag_of
from sphere.scp.web.problem import WebError

MAX_PARAMETERS = 200
OPTIONS = (
    "limit", "offset", "after", "count", "asOf", "fuzzymatching", "emptyvaluematching", "multiplevaluematching",
)  # fmt: skip
NOW = "now"  # of asOf
MAX_DEPTH = 8  # sequences in an attribute path

DEFAULTS: Mapping[Level, tuple[str, ...]] = {
    "PATIENT": (),
    "STUDY": (
        "StudyDate", "StudyTime", "AccessionNumber", "InstanceAvailability", "ModalitiesInStudy",
        "ReferringPhysicianName", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID",
        "StudyID", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances",
    ),
    "SERIES": (
        "InstanceAvailability", "Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber",
        "NumberOfSeriesRelatedInstances", "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime",
    ),
    "IMAGE": (
        "InstanceAvailability", "TimezoneOffsetFromUTC", "SOPClassUID", "SOPInstanceUID", "InstanceNumber", "Rows",
        "Columns", "BitsAllocated", "NumberOfFrames",
    ),
}  # fmt: skip
"""What is returned unasked (PS3.18 Tables 10.6.3-3 to 10.6.3-5), but for what has no column: RequestAttributesSequence
of a series costs the headers of its instances, and is returned when it is asked for."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a search asks for. `limit` None: everything; `after`: unique keys, from the study down, of the answer that
    the first one to be given comes after; `now`: as of the version that is complete when it is asked."""

    query: Query
    limit: int | None = None
    offset: int = 0
    count: bool = False
    as_of: AsOf | None = None
    after: tuple[str, ...] = ()
    now: bool = False


@dataclass(slots=True)
class _Draft:
    """Parameters as far as they are read."""

    match: dict[str, Any] = field(default_factory=dict)
    include: dict[str, Any] = field(default_factory=dict)
    every: bool = False
    options: dict[str, str] = field(default_factory=dict)


def parse_search(parameters: Sequence[tuple[str, str]], level: Level, scope: Mapping[str, str]) -> Search:
    """The search for entities of `level` inside `scope` (unique keys to UIDs, from the path).

    Raises WebError for a parameter that is unknown, repeated or has no right value, QueryError for a key that PS3.4
    C.2.2.2 does not allow.
    """
    if len(parameters) > MAX_PARAMETERS:
        raise WebError(f"a search has at most {MAX_PARAMETERS} parameters")
    draft = _Draft()
    for name, value in parameters:
        _take(draft, name, value)
    match = {name: _with_separators(name, value) for name, value in draft.match.items()}
    for keyword, uid in scope.items():
        tag = f"{tag_of(keyword):08X}"
        if match.get(tag, uid) not in ("", uid):
            raise WebError(f"{keyword} is in the path already")
        match[tag] = uid
    returned = [name for name in _returned(level, scope, every=draft.every) if f"{tag_of(name):08X}" not in match]
    for name, inner in draft.include.items():
        _merge(match, name, inner)
    options = draft.options
    query = Query.build(
        level,
        match,
        return_keys=returned,
        fuzzy_names=_flag(options, "fuzzymatching"),  # PS3.18 8.3.4
        empty_values=_flag(options, "emptyvaluematching"),
        multiple_values=_flag(options, "multiplevaluematching"),
    )
    if below := query.keys_below():  # PS3.18 10.6.1.2: attributes of the target's level and above
        raise below_level(query, below[0])
    return Search(
        query,
        _number(options, "limit"),
        _number(options, "offset") or 0,
        _flag(options, "count"),
        _as_of(options.get("asOf", "")),
        _after(options.get("after", ""), level),
        now=options.get("asOf") == NOW,
    )


def _take(draft: _Draft, name: str, value: str) -> None:
    if name in ("accept", "charset"):  # PS3.18 8.3.3: negotiation, read elsewhere
        return
    if name in OPTIONS:
        if name in draft.options:
            raise WebError(f"parameter {name} stands twice")
        draft.options[name] = value
    elif name == "includefield":
        for path in value.split(","):
            if path == "all":
                draft.every = True
            elif path.lower() == "all":
                raise WebError(f"includefield {path}: all is written in lower case (PS3.18 8.3.4.3)")
            elif path:
                _place(draft.include, path, "")
    else:
        _place(draft.match, name, value)


def _place(tree: dict[str, Any], path: str, value: str) -> None:
    """Put a value at an attribute path: keywords or tags, with a full stop between a sequence and what its item has."""
    *sequences, last = path.split(".")
    if len(sequences) > MAX_DEPTH:
        raise WebError(f"parameter {path[:100]}: too many sequences in one another")
    node = tree
    for name in sequences:
        tag = _known(name, path)
        if _vr(tag) not in ("SQ", ""):
            raise WebError(f"parameter {path[:100]}: {name} is no sequence")
        inner = node.setdefault(f"{tag:08X}", {})
        if not isinstance(inner, dict):
            if inner:
                raise WebError(f"parameter {path[:100]}: {name} has a value beside it, which a sequence has not")
            inner = node[f"{tag:08X}"] = {}
        node = inner
    name = f"{_known(last, path):08X}"
    held = node.get(name)
    if held and value and _vr(int(name, 16)) == "UI":
        value = f"{held},{value}"
    elif held and value:
        raise WebError(f"parameter {path[:100]} stands twice")
    if not held or value:
        node[name] = value


def _known(name: str, path: str) -> int:
    try:
        return tag_of(name)
    except QueryError as error:
        raise WebError(f"unknown parameter {path[:100]!r}: {error}") from None


def _vr(tag: int) -> str:
    try:
        return dictionary_VR(tag)
    except KeyError:
        return ""


def _with_separators(name: str, value: Any) -> Any:
    """UIDs, and keys that may name several values, are separated by commas or backslashes here."""
    if isinstance(value, dict):
        return {inner: _with_separators(inner, one) for inner, one in value.items()}
    tag = int(name, 16)
    if _vr(tag) == "UI" or keyword_for_tag(tag) in LISTS:
        return value.replace(",", "\\")
    return value


def _merge(match: dict[str, Any], name: str, inner: Any) -> None:
    """Have an attribute returned beside what is matched."""
    held = match.setdefault(name, inner)
    if isinstance(held, dict) and isinstance(inner, dict):
        for key, value in inner.items():
            _merge(held, key, value)


def _returned(level: Level, scope: Mapping[str, str], *, every: bool) -> Iterable[str]:
    """Keywords of what is returned unasked: of the level, and of those above that the path does not name."""
    above = LEVELS[1 : LEVELS.index(level) + 1]
    levels = [one for one in above if one == level or UNIQUE_KEY[one] not in scope]
    names = [keyword for one in levels for keyword in DEFAULTS[one]]
    if every:
        ranks = {one: LEVELS.index(one) for one in LEVELS}
        names += [keyword for one in LEVELS[:3] if ranks[one] <= ranks[level] for keyword in ATTRIBUTES[one]]
        names += [keyword for keyword, one in COMPUTED.items() if "STUDY" in (one, level) or ranks[one] <= ranks[level]]
        if level == "IMAGE":
            names += [keyword for keyword in BY_KEYWORD if level_of(keyword) == "IMAGE"]
    return dict.fromkeys(names)


def _number(options: Mapping[str, str], name: str) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise WebError(f"{name} must be a whole number of 0 or more")
    return int(text)


def _flag(options: Mapping[str, str], name: str) -> bool:
    text = options.get(name, "false")
    if text not in ("true", "false"):
        case = " in lower case" if text.lower() in ("true", "false") else ""
        raise WebError(f"{name} must be true or false{case}")
    return text == "true"


def _as_of(text: str) -> AsOf | None:
    return parse_as_of(text) if text not in ("", NOW) else None


def _after(text: str, level: Level) -> tuple[str, ...]:
    place = tuple(text.split("\\")) if text else ()
    if place and len(place) != LEVELS.index(level):
        raise WebError("after must be what the Link of the page before says")
    return place
