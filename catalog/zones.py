"""Time zone adjustment of queries (PS3.4 C.4.1.2.2.4): dates and times of an entity as a clock of the asker shows them.

An entity's DA and TM are local time at its TimezoneOffsetFromUTC (PS3.3 C.12.1.1.8); one without an offset is taken to
be in the zone of whoever asks. A date goes with its time (`PAIRS`): without a valid partner, neither is moved. Dates of
birth are dates of a calendar and never moved. A DT that says no offset itself is given that of its entity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime, timedelta
from typing import Any, Final

from sphere.catalog.match import DATETIME_RE, TIME_RE, time_text

TIMEZONE: Final = 0x00080201  # TimezoneOffsetFromUTC
OFFSET_RE: Final = r"[+-](?:0\d|1[0-4])[0-5]\d"

PAIRS: Final[Mapping[str, str]] = {
    "StudyDate": "StudyTime",
    "SeriesDate": "SeriesTime",
    "AcquisitionDate": "AcquisitionTime",
    "ContentDate": "ContentTime",
    "InstanceCreationDate": "InstanceCreationTime",
    "PerformedProcedureStepStartDate": "PerformedProcedureStepStartTime",
    "PerformedProcedureStepEndDate": "PerformedProcedureStepEndTime",
    "PresentationCreationDate": "PresentationCreationTime",
}
"""Dates and the times that go with them."""

DATE_OF: Final = {time: day for day, time in PAIRS.items()}


def minutes_of(offset: str) -> int | None:
    """Minutes east of UTC of "&ZZXX"; None where it is not that."""
    text = offset.strip(" \0")
    if not re.fullmatch(OFFSET_RE, text, re.ASCII):
        return None
    minutes = int(text[1:3]) * 60 + int(text[3:])
    return -minutes if text[0] == "-" else minutes


def text_of(minutes: int) -> str:
    """Minutes east of UTC as "&ZZXX"."""
    sign, rest = ("-", -minutes) if minutes < 0 else ("+", minutes)
    return f"{sign}{rest // 60:02}{rest % 60:02}"


def moved(day: date | None, time: Any, stored: Any, asked: int) -> tuple[date | None, Any]:
    """A date and its time in the zone `asked` (minutes east of UTC); `stored` is the entity's offset, if it has one."""
    offset = minutes_of(stored) if isinstance(stored, str) else None
    text = time_text(time) if isinstance(time, str) else None
    if day is None or text is None or offset is None or offset == asked:
        return day, time
    hhmm = text[:4].ljust(4, "0")
    try:
        moment = datetime(day.year, day.month, day.day, int(hhmm[:2]), int(hhmm[2:]))
        moment += timedelta(minutes=asked - offset)
    except OverflowError:  # the ends of the calendar
        return day, time
    return moment.date(), f"{moment:%H%M}{text[4:]}"


def moved_sql(day: str, time: str, stored: str, asked: int) -> tuple[str, str]:
    """What `moved` computes, over SQL expressions: that of the date and that of the time."""
    text = f"replace({time}, ':', '')"
    hhmm = f"rpad({text}[1:4], 4, '0')"
    offset = _minutes_sql(stored)
    moment = (
        f"(CAST({day} AS TIMESTAMP) + to_minutes(TRY_CAST({hhmm}[1:2] AS INTEGER) * 60 "
        f"+ TRY_CAST({hhmm}[3:4] AS INTEGER) + ({asked}) - {offset}))"
    )
    moves = f"({day} IS NOT NULL AND regexp_full_match({text}, '{TIME_RE}') AND {offset} <> ({asked}))"
    return (
        f"CASE WHEN {moves} THEN CAST({moment} AS DATE) ELSE {day} END",
        f"CASE WHEN {moves} THEN strftime({moment}, '%H%M') || {text}[5:] ELSE {time} END",
    )


def _minutes_sql(stored: str) -> str:
    value = f"(TRY_CAST({stored}[2:3] AS INTEGER) * 60 + TRY_CAST({stored}[4:5] AS INTEGER))"
    signed = f"(CASE WHEN {stored}[1:1] = '-' THEN -{value} ELSE {value} END)"
    return f"(CASE WHEN regexp_full_match({stored}, '{OFFSET_RE}') THEN {signed} END)"


def dated(value: Any, stored: Any, asked: int) -> Any:
    """A DT that says its UTC offset: its own, else that of its entity, else that of the asker."""
    if not isinstance(value, str) or not re.fullmatch(DATETIME_RE, value, re.ASCII) or value[-5:-4] in ("+", "-"):
        return value
    known = isinstance(stored, str) and minutes_of(stored) is not None
    return value + (stored if known else text_of(asked))


def dated_sql(x: str, stored: str, asked: int) -> str:
    """What `dated` computes, over SQL expressions."""
    offset = f"CASE WHEN regexp_full_match({stored}, '{OFFSET_RE}') THEN {stored} ELSE '{text_of(asked)}' END"
    return (
        f"CASE WHEN regexp_full_match({x}, '{DATETIME_RE}') AND {x}[-5:-5] NOT IN ('+', '-') "
        f"THEN {x} || {offset} ELSE {x} END"
    )
