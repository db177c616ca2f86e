"""From the text of a key to what it asks: the matching of PS3.4 C.2.2.2 that its VR and its value call for."""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final

from sphere.catalog.fuzzy import FuzzyName
from sphere.catalog.match import (
    DATETIME_RE,
    TIME_RE,
    TRAILING_ONLY_VRS,
    WILD_CARD_VRS,
    DateRange,
    Empty,
    Exact,
    InstantRange,
    Number,
    PersonName,
    Test,
    TimeRange,
    WildCard,
    instant,
    normal_name,
)
from sphere.conf.uids import UID

INTEGER_VRS: Final = frozenset(("IS", "US", "SS", "UL", "SL", "SV", "UV", "US or SS", "US or OW", "US or SS or OW"))
DECIMAL_VRS: Final = frozenset(("DS", "FD", "FL"))
NOT_MATCHED_VRS: Final = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "OB or OW"))
LISTS: Final = frozenset(("ModalitiesInStudy",))
"""Keys other than UIDs that may name several values without negotiation: any of them matches, as clients expect."""
MULTIPLE_VALUE_VRS: Final = frozenset(("AE", "AS", "AT", "CS", "LO", "PN", "SH", "UC"))
"""Value representations that multiple value matching is defined for (PS3.4 C.2.2.2.8)."""
TWO_QUOTES: Final = '""'
"""The key of empty value matching (PS3.4 C.2.2.2.7)."""

MAX_PATTERN: Final = 1024
"""Characters of a key with wild cards, and of a person name (PS3.5: 194): what the index evaluates has its limits."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
DECIMAL: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class Rules:
    """What changes the meaning of a key's text, where extended negotiation agreed on it (PS3.4 C.5.1.1.1).

    `timezone` is the zone of date-times without a UTC offset, in minutes east of UTC.
    """

    fuzzy_names: bool = False
    empty_values: bool = False
    multiple_values: bool = False
    timezone: int | None = None


PLAIN: Final = Rules()


def parse_values(text: str, vr: str, *, keyword: str = "", vm: str = "1", rules: Rules = PLAIN) -> tuple[Test, ...]:
    """The tests that the text of a key of value representation `vr` asks for, of which each must pass with some value
    of the attribute; none is universal matching.

    Raises ValueError, with a reason, for a text that is not allowed for this VR.
    """
    text = text.rstrip(" \0") if vr in TRAILING_ONLY_VRS else text.strip(" \0")
    if not text.strip("*"):
        return ()
    if vr in NOT_MATCHED_VRS:
        raise ValueError(f"attributes of VR {vr} cannot be matched")
    if rules.empty_values and text == TWO_QUOTES:
        return (Empty(),)
    if len(text) > MAX_PATTERN and (vr == "PN" or set(text) & {"*", "?"}):
        raise ValueError(f"a person name, and a value with wild cards, has at most {MAX_PATTERN} characters")
    if "\\" in text and vr not in TRAILING_ONLY_VRS - {"UC"}:
        return _several(text, vr, keyword, rules.multiple_values and vm != "1")
    test = _parse(text, vr, rules)
    return (test,) if test is not None else ()


def _parse(text: str, vr: str, rules: Rules) -> Test | None:
    if vr == "PN" and rules.fuzzy_names:
        return FuzzyName.parse(text)
    if vr == "DT":
        return _instant(text, rules.timezone or 0)
    return _PARSERS.get(vr, _wild if vr in WILD_CARD_VRS or vr == "UN" else _text)(text)


def _several(text: str, vr: str, keyword: str, every: bool) -> tuple[Test, ...]:
    """A list of UIDs; the values that must all be there; or a list of which any may be."""
    parts = [part.strip(" ") for part in text.split("\\")]
    if vr == "UI":
        return (_uids(parts),)
    every = every and vr in MULTIPLE_VALUE_VRS
    if not every and keyword not in LISTS:
        raise ValueError("only a UID may be a list of values")
    if any(set(part) & {"*", "?"} for part in parts):
        raise ValueError("a list of values takes no wild cards")
    given = tuple(dict.fromkeys(part for part in parts if part))
    if not every:
        return (Exact(given),) if given else ()
    tests = (_parse(part, vr, PLAIN) for part in given)
    return tuple(test for test in tests if test is not None)


def _uids(parts: list[str]) -> Test:
    for part in parts:
        if not UID.fullmatch(part):
            raise ValueError("is not a UID (PS3.5 9.1)")
    return Exact(tuple(dict.fromkeys(parts)))


def _uid(text: str) -> Test:
    return _uids([text])


def _text(text: str) -> Test:
    return Exact((text,))


def _wild(text: str) -> Test:
    return WildCard(text) if set(text) & {"*", "?"} else Exact((text,))


def _name(text: str) -> Test | None:
    groups = normal_name(text).split("=")
    if len(groups) > 3:
        raise ValueError("a person name has at most three groups")
    return PersonName(tuple(groups)) if any(group.strip("*") for group in groups) else None


def _integer(text: str) -> Test:
    if not _INTEGER.fullmatch(text):
        raise ValueError("is not an integer")
    return Number(int(text))


def _decimal(text: str) -> Test:
    if not DECIMAL.fullmatch(text):
        raise ValueError("is not a number")
    return Number(float(text))


def _date(text: str) -> Test:
    low, high = _range(text)
    return DateRange(_day(low), _day(high))


def _day(text: str) -> date | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{8}", text):
        raise ValueError("is not a date YYYYMMDD or a range of dates")
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        raise ValueError("is not a date of the calendar") from None


def _range(text: str) -> tuple[str, str]:
    """The two ends of ``A-B``, ``A-``, ``-B``; of ``A`` twice the same."""
    low, sign, high = text.partition("-")
    if not sign:
        return text, text
    if not low and not high:
        raise ValueError("a range needs at least one end")
    return low.strip(" "), high.strip(" ")


def _time(text: str) -> Test:
    low, high = (end.replace(":", "") for end in _range(text))
    for end in (low, high):
        if end and not re.fullmatch(TIME_RE, end, re.ASCII):
            raise ValueError("is not a time HHMMSS.FFFFFF or a range of times")
    return TimeRange(_first_moment(low) if low else None, _last_moment(high) if high else None)


def _first_moment(text: str) -> str:
    """The shortest way to write a time: every stored time of that moment or later compares as not less."""
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    if fraction:
        return f"{whole}.{fraction}"
    while len(whole) > 2 and whole.endswith("00"):
        whole = whole[:-2]
    return whole


def _last_moment(text: str) -> str:
    """The last microsecond of a time of any precision, in full; of a minute, that of its leap second."""
    whole, _, fraction = text.partition(".")
    return f"{whole}{'5960'[len(whole) - 2 :]}.{fraction.ljust(6, '9')}"


_INSTANT_RANGE = re.compile(f"({DATETIME_RE})?-({DATETIME_RE})?", re.ASCII)


def _instant(text: str, zone: int) -> Test:
    """A DT or a range of them; a hyphen that can be the sign of a UTC offset is one (PS3.4 C.2.2.2.5.3)."""
    if re.fullmatch(DATETIME_RE, text, re.ASCII):
        return InstantRange(_instant_low(text, zone), _instant_high(text, zone))
    found = _INSTANT_RANGE.fullmatch(text)
    if found is None or not any(found.groups()):
        raise ValueError("is not a date-time YYYYMMDDHHMMSS.FFFFFF&ZZXX or a range of them")
    low, high = found.groups()
    return InstantRange(_instant_low(low, zone) if low else None, _instant_high(high, zone) if high else None)


def _instant_low(text: str, zone: int) -> datetime:
    moment = instant(text, zone)
    if moment is None:
        raise ValueError("is not a date-time of the calendar")
    return moment


def _instant_high(text: str, zone: int) -> datetime:
    """The last microsecond of a DT of any precision."""
    parts = re.match(r"([0-9]+)(?:\.([0-9]+))?", text)
    assert parts is not None, text
    digits, fraction = parts.groups()
    low = _instant_low(text, zone)
    days = {4: 366 if monthrange(int(digits[:4]), 2)[1] == 29 else 365, 8: 1}
    if len(digits) == 6:
        days[6] = monthrange(int(digits[:4]), int(digits[4:]))[1]
    seconds = {10: 3600, 12: 60, 14: 1}
    step = timedelta(days=days.get(len(digits), 0), seconds=seconds.get(len(digits), 0))
    if fraction:
        step = timedelta(microseconds=10 ** (6 - len(fraction)))
    return low + step - timedelta(microseconds=1)


_PARSERS: dict[str, Callable[[str], Test | None]] = {
    "DA": _date,
    "TM": _time,
    "UI": _uid,
    "PN": _name,
    **dict.fromkeys(INTEGER_VRS, _integer),
    **dict.fromkeys(DECIMAL_VRS, _decimal),
}
