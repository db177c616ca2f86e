"""Attribute matching of PS3.4 C.2.2.2: what a key asks of one value, for SQL and for Python side by side.

Each test takes a value in *column form*, the form that a typed column holds: text (insignificant spaces removed, see
`column_value` and the index), a number, or a date. ``sql(x)`` gives an expression over the SQL expression `x` and the
values to bind to its ``?``; ``matches(value)`` says the same of one Python value. User text is only ever bound.
An empty value (null) matches no test: only universal matching (no test at all) finds it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cached_property
from typing import Any, Final

from sphere.catalog.wild import Wild

Value = str | int | float | date
"""One value in column form."""

Sql = tuple[str, list[Any]]
"""An SQL expression and the values of its ``?``, in order."""

WILD_CARD_VRS: Final = frozenset(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"))
"""Value representations that wild card matching is defined for (PS3.4 C.2.2.2.4)."""

TRAILING_ONLY_VRS: Final = frozenset(("LT", "ST", "UC", "UR", "UT"))
"""Text whose leading spaces are significant (PS3.5 Table 6.2-1)."""

TIME_RE: Final = r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:(?:[0-5]\d|60)(?:\.\d{1,6})?)?)?"
"""A TM of PS3.5, without the colons of older versions."""

DATETIME_RE: Final = (
    r"[12]\d{3}(?:(?:0[1-9]|1[0-2])(?:[0-3]\d(?:[0-2]\d(?:[0-5]\d(?:[0-5]\d(?:\.\d{1,6})?)?)?)?)?)?"
    r"(?:[+-](?:0\d|1[0-4])[0-5]\d)?"
)
"""A DT of PS3.5: at least the year; a UTC offset of -1200 to +1400 may follow."""


class Test(ABC):
    """What a key asks of one value of an attribute."""

    @abstractmethod
    def sql(self, x: str) -> Sql:
        """The test as an SQL expression over `x`."""

    @abstractmethod
    def matches(self, value: Value) -> bool:
        """Whether a value passes."""


@dataclass(frozen=True)
class Exact(Test):
    """Single value matching, or list of UID matching (PS3.4 C.2.2.2.1 and C.2.2.2.2): equal to one of `texts`."""

    texts: tuple[str, ...]

    def sql(self, x: str) -> Sql:
        if len(self.texts) == 1:
            return f"{x} = ?", [self.texts[0]]
        return f"{x} IN ({', '.join('?' * len(self.texts))})", list(self.texts)

    def matches(self, value: Value) -> bool:
        return value in self.texts


@dataclass(frozen=True)
class Empty(Test):
    """Empty value matching (PS3.4 C.2.2.2.7): the attribute is absent or has no value; no value passes.

    `sphere.catalog.predicate` and `sphere.catalog.match_header` ask it of the attribute as a whole.
    """

    def sql(self, x: str) -> Sql:
        return f"({x} IS NULL)", []

    def matches(self, value: Value) -> bool:
        return False


@dataclass(frozen=True)
class Number(Test):
    """Single value matching of a numeric attribute: equal as a number, however it is written.

    `signed` is the number that the same bytes are if they are signed, where the key does not say.
    """

    number: int | float
    signed: int | None = None

    def sql(self, x: str) -> Sql:
        return (f"{x} = ?", [self.number]) if self.signed is None else (f"{x} IN (?, ?)", [self.number, self.signed])

    def matches(self, value: Value) -> bool:
        return value == self.number or (self.signed is not None and value == self.signed)


@dataclass(frozen=True)
class WildCard(Test):
    """Wild card matching (PS3.4 C.2.2.2.4): ``*`` stands for any characters, ``?`` for exactly one; case matters."""

    pattern: str

    def sql(self, x: str) -> Sql:
        escaped = re.sub(r"([\\%_])", r"\\\1", self.pattern)
        return rf"{x} LIKE ? ESCAPE '\'", [escaped.replace("*", "%").replace("?", "_")]

    def matches(self, value: Value) -> bool:
        return self._wild.matches(str(value))

    @cached_property
    def _wild(self) -> Wild:
        return Wild(self.pattern)


@dataclass(frozen=True)
class PersonName(Test):
    """Matching of a person name (PN), single value or wild card, of names normalised by `normal_name`.

    One group matches the Alphabetic, the Ideographic or the Phonetic group of the value; several (the key contains
    ``=``) match the groups in their places, an empty one matching anything. A wild card ends with its group.
    ``DOE^*`` also finds ``DOE``, as the delimiters of trailing empty components may be left out (PS3.5 6.2.1.2).
    """

    groups: tuple[str, ...]

    def sql(self, x: str) -> Sql:
        literal = max((text for group in self.groups for text in re.split(r"[*?]", _shortest(group))), key=len)
        if not literal:
            return f"regexp_matches({x}, ?)", [self._regex()]
        # Looking for a part that every match has costs a tenth of the expression.
        return f"(contains({x}, ?) AND regexp_matches({x}, ?))", [literal, self._regex()]

    def matches(self, value: Value) -> bool:
        groups = normal_name(str(value)).split("=")
        if len(self._wild) == 1:
            return any(one.matches(group) for one in self._wild[0] for group in groups)
        pairs = zip(self._wild, groups, strict=False)
        return len(groups) >= len(self._wild) and all(any(one.matches(group) for one in ways) for ways, group in pairs)

    @cached_property
    def _wild(self) -> tuple[tuple[Wild, ...], ...]:
        """The patterns of which one must match, of each group."""
        return tuple(tuple(map(Wild, _alternatives(group))) for group in self.groups)

    def _regex(self) -> str:
        """A regular expression for RE2, which takes time by the length of what it reads, whatever the expression."""
        body = "=".join(_group_regex(group) for group in self.groups)
        start = "(?:^|=)" if len(self.groups) == 1 else "^"
        return f"{start}{body}(?:=|$)"


@dataclass(frozen=True)
class DateRange(Test):
    """Range matching of DA (PS3.4 C.2.2.2.5.1), both ends included; None leaves an end open."""

    low: date | None
    high: date | None

    def sql(self, x: str) -> Sql:
        return _between(x, self.low, self.high)

    def matches(self, value: Value) -> bool:
        return isinstance(value, date) and _within(value, self.low, self.high)


@dataclass(frozen=True)
class TimeRange(Test):
    """Range matching of TM (PS3.4 C.2.2.2.5.2), both ends included; None leaves an end open.

    Times are compared as text: `low` in its shortest form, `high` with all six digits of the fraction. A stored time
    of less precision ("10") stands for its first moment.
    """

    low: str | None
    high: str | None

    def sql(self, x: str) -> Sql:
        text = f"replace({x}, ':', '')"
        compared, values = _between(text, self.low, self.high)
        return f"(regexp_full_match({text}, '{TIME_RE}') AND {compared})", values

    def matches(self, value: Value) -> bool:
        text = time_text(value)
        return text is not None and _within(text, self.low, self.high)


@dataclass(frozen=True)
class InstantRange(Test):
    """Range matching of DT (PS3.4 C.2.2.2.5.3), both ends included; None leaves an end open.

    `low` and `high` are moments in UTC, without tzinfo. A value without a UTC offset is taken as UTC, one of less
    precision as its first moment.
    """

    low: datetime | None
    high: datetime | None

    def sql(self, x: str) -> Sql:
        digits = rf"regexp_extract({x}, '^\d+')"
        base = f"try_strptime({digits} || substr('00000101000000', length({digits}) + 1), '%Y%m%d%H%M%S')"
        fraction = rf"CAST(rpad(regexp_extract({x}, '\.(\d+)', 1), 6, '0') AS BIGINT)"
        zone = rf"regexp_extract({x}, '[+-]\d\d\d\d$')"
        minutes = f"TRY_CAST({zone}[1:3] AS INTEGER) * 60 + TRY_CAST({zone}[1:1] || {zone}[4:5] AS INTEGER)"
        offset = f"to_minutes(coalesce({minutes}, 0))"
        compared, values = _between(f"({base} + to_microseconds({fraction}) - {offset})", self.low, self.high)
        return f"CASE WHEN regexp_full_match({x}, '{DATETIME_RE}') THEN {compared} ELSE false END", values

    def matches(self, value: Value) -> bool:
        moment = instant(str(value))
        return moment is not None and _within(moment, self.low, self.high)


def _between(x: str, low: Any, high: Any) -> Sql:
    bounds = [(f"{x} >= ?", low), (f"{x} <= ?", high)]
    kept = [(text, value) for text, value in bounds if value is not None]
    return "(" + " AND ".join(text for text, _ in kept) + ")", [value for _, value in kept]


def _within(value: Any, low: Any, high: Any) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _group_regex(group: str) -> str:
    signs = {"*": "[^=]*", "?": "[^=]"}
    ways = [
        "".join(signs.get(part) or re.escape(part) for part in re.split(r"([*?])", text) if part)
        for text in _alternatives(group)
    ]
    return f"(?:{'|'.join(ways)})"


def _alternatives(group: str) -> tuple[str, ...]:
    """The patterns of which one must match a group: components that are wild to their end may be left out."""
    shortest = _shortest(group)
    if shortest == group:
        return (group or "*",)  # an empty group asks nothing
    return shortest, f"{shortest}^*"  # ^*^* is a ^* too


def _shortest(group: str) -> str:
    """A group without trailing components that are wild: what every match has."""
    while group.endswith("^*"):
        group = group[:-2]
    return group


def fold(text: str) -> str:
    """`text` without the difference of upper and lower case, character by character (no length changes).

    Equals ``lower(upper(text))`` of DuckDB for every character of Unicode; a test says so.
    """
    return text.lower() if text.isascii() else "".join(map(_fold_character, text))


def _fold_character(character: str) -> str:
    upper = character.upper()
    lower = (upper if len(upper) == 1 else character).lower()
    return lower if len(lower) == 1 else lower[0]


def normal_name(text: str) -> str:
    """A person name for comparison: folded, without spaces around components nor empty ones at the end."""
    groups = (map(_stripped, group.split("^")) for group in fold(text).split("="))
    return "=".join(["^".join(components).rstrip("^") for components in groups]).rstrip("=")


def _stripped(component: str) -> str:
    return component.strip(" ")


def normal_name_sql(x: str) -> str:
    """What `normal_name` computes, over the SQL expression `x`."""
    spaced = rf"regexp_replace(trim(lower(upper({x}))), ' *([\^=]) *', '\1', 'g')"
    return rf"rtrim(regexp_replace({spaced}, '\^+(=|$)', '\1', 'g'), '=')"


def time_text(value: Value) -> str | None:
    """A valid TM without colons, else None."""
    text = str(value).replace(":", "")
    return text if re.fullmatch(TIME_RE, text, re.ASCII) else None


_INSTANT_PARTS = re.compile(r"(\d+)(?:\.(\d+))?(?:([+-])(\d\d)(\d\d))?", re.ASCII)


def instant(text: str, zone: int = 0) -> datetime | None:
    """The first moment of a DT in UTC, without tzinfo; None where it is not valid.

    One without a UTC offset is in `zone`, minutes east of UTC.
    """
    if not re.fullmatch(DATETIME_RE, text, re.ASCII):
        return None
    found = _INSTANT_PARTS.fullmatch(text)
    assert found is not None, text
    digits, fraction, sign, hours, minutes = found.groups()
    try:
        moment = datetime.strptime(digits + "00000101000000"[len(digits) :], "%Y%m%d%H%M%S")
    except ValueError:  # 30 February
        return None
    moment += timedelta(microseconds=int((fraction or "").ljust(6, "0")))
    if sign is None:
        return moment - timedelta(minutes=zone)
    offset = timedelta(hours=int(hours), minutes=int(minutes))
    return moment + offset if sign == "-" else moment - offset
