"""Matching evaluated plainly from PS3.4 C.2.2.2 on pydicom data sets: what every door of the archive is held to.

Nothing of the project is used, so that a mistake of its matcher is not repeated here. Slow and without cleverness. An
archive is a list of data sets in the order of their arrival.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta, timezone
from typing import Any

from pydicom.dataset import Dataset

LEVEL = {  # of the PS3.3 module that defines the attribute
    "PatientID": 0, "PatientName": 0, "PatientSex": 0, "PatientComments": 0,
    "StudyInstanceUID": 1, "StudyDate": 1, "StudyTime": 1, "AccessionNumber": 1, "StudyDescription": 1,
    "PhysiciansOfRecord": 1, "ReferringPhysicianName": 1,
    "SeriesInstanceUID": 2, "Modality": 2, "SeriesDate": 2, "SeriesTime": 2, "SeriesNumber": 2,
    "SOPInstanceUID": 3, "InstanceNumber": 3, "ImageType": 3, "ContentDate": 3, "ContentTime": 3,
    "AcquisitionDateTime": 3, "SliceThickness": 3, "ImageComments": 3, "PixelPaddingValue": 3,
}  # fmt: skip
VR = {
    "PatientName": "PN", "PhysiciansOfRecord": "PN", "ReferringPhysicianName": "PN",
    "StudyDate": "DA", "SeriesDate": "DA", "ContentDate": "DA",
    "StudyTime": "TM", "SeriesTime": "TM", "ContentTime": "TM", "AcquisitionDateTime": "DT",
    "SeriesNumber": "IS", "InstanceNumber": "IS", "SliceThickness": "DS",
    "StudyInstanceUID": "UI", "SeriesInstanceUID": "UI", "SOPInstanceUID": "UI", "ImageComments": "LT",
    "PixelPaddingValue": "US or SS",
}  # fmt: skip
PRIVATE_VR = {0x01: "LO", 0x02: "US", 0x03: "PN", 0x04: "FD"}
"""Of private attributes, by the last byte of their tags."""
NUMBERS = ("IS", "DS", "US or SS", "US", "FD")
MULTIPLE = {"PhysiciansOfRecord", "ImageType"}
PAIRS = {"StudyDate": "StudyTime", "SeriesDate": "SeriesTime", "ContentDate": "ContentTime"}
LEVELS = ("PATIENT", "STUDY", "SERIES", "IMAGE")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


@dataclass(frozen=True)
class Asked:
    """A query: keys to text; nested keys as mappings; private ones as (group, byte, creator)."""

    level: str
    keys: Mapping[Any, Any]
    empty_values: bool = False
    multiple_values: bool = False
    combined_datetime: bool = False
    zone: int | None = None  # minutes east of UTC
    fuzzy: bool = False  # person names by their sound


def answer(archive: Sequence[Dataset], asked: Asked) -> list[tuple[str, ...]]:
    """The unique keys (a patient's: ID and first study) of the entities that match, sorted."""
    depth = LEVELS.index(asked.level)
    own = replace(asked, keys={name: text for name, text in asked.keys.items() if _level(name, depth) <= depth})
    return sorted(
        key
        for key, members in _groups_of(archive, asked.level)
        if _matches(_entity(archive, members, depth), own) and any(_has_below(archive, one, asked) for one in members)
    )


def _level(name: Any, depth: int) -> int:
    """The level of a key; what has none, or is private, is of the level asked for."""
    return LEVEL.get(name, depth) if isinstance(name, str) else depth


def _has_below(archive: Sequence[Dataset], instance: Dataset, asked: Asked) -> bool:
    """Whether an instance, its series and its study have what is asked of the levels below (PS3.4 C.4.1.3.2.1)."""
    depth = LEVELS.index(asked.level)
    for level in range(depth + 1, len(LEVELS)):
        keys = {name: text for name, text in asked.keys.items() if _level(name, depth) == level}
        near = [one for one in archive if all(one[name] == instance[name] for name in UIDS[:level])]
        if keys and not _matches(_entity(archive, near, level), replace(asked, keys=keys)):
            return False
    return True


Entity = Callable[..., list[Any]]
"""From an attribute (and the level it is taken at, where that is not its own) to its values, as they stand in the data
set that counts."""


def _groups_of(archive: Sequence[Dataset], level: str) -> Iterable[tuple[tuple[str, ...], list[Dataset]]]:
    """The entities of a level, each with its instances in the order of their arrival."""
    depth = LEVELS.index(level)
    groups: dict[tuple[str, ...], list[Dataset]] = {}
    for dataset in archive:
        study, series = str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)
        keys = (("",), (study,), (study, series), (study, series, str(dataset.SOPInstanceUID)))
        key = _patient(archive, study) if depth == 0 else keys[depth]
        groups.setdefault(key, []).append(dataset)
    return groups.items()


def _patient(archive: Sequence[Dataset], study: str) -> tuple[str, ...]:
    """Studies of one PatientID are one patient; one without it is a patient of its own."""
    known = _first([one for one in archive if one.StudyInstanceUID == study], "PatientID")
    return ("id", str(known[0])) if known else ("study", study)


def _entity(archive: Sequence[Dataset], members: list[Dataset], depth: int) -> Entity:
    def values(name: Any, level: int | None = None) -> list[Any]:
        if level is None:
            level = LEVEL.get(name, depth) if isinstance(name, str) else depth
        if level == 3:
            return _values(members[0], name)
        if depth == 0:
            return _first(members, name) if name not in LEVEL else _of_studies(members, name)
        if level >= depth:
            return _first(members, name)
        one = members[0]
        near = [other for other in archive if other.StudyInstanceUID == one.StudyInstanceUID]
        if level == 2:
            near = [other for other in near if other.SeriesInstanceUID == one.SeriesInstanceUID]
        return _first(near, name)

    return values


def _of_studies(members: list[Dataset], name: str) -> list[Any]:
    """Of the studies in the order in which they began, the first that has a value."""
    studies = dict.fromkeys(str(one.StudyInstanceUID) for one in members)
    for uid in studies:
        if found := _first([one for one in members if one.StudyInstanceUID == uid], name):
            return found
    return []


def _first(members: list[Dataset], name: Any) -> list[Any]:
    return next((found for found in (_values(one, name) for one in members) if found), [])


def _values(dataset: Dataset, name: Any) -> list[Any]:
    if isinstance(name, tuple):
        group, byte, creator = name
        try:
            element = dataset.private_block(group, creator)[byte]
        except KeyError:
            return []
    elif name in dataset:
        element = dataset[name]
    else:
        return []
    if element.VR == "SQ":
        return list(element.value)
    many = element.value if element.VM > 1 else [element.value]
    texts = [str(one) if one is not None else "" for one in many]
    return [one for one in texts if one.strip(" ")] and texts


def _matches(entity: Entity, asked: Asked) -> bool:
    left = dict(asked.keys)
    for day, time in PAIRS.items() if asked.combined_datetime else ():
        both = left.get(day) and left.get(time) and '""' not in (left[day], left[time])
        if both and not _moment(entity, day, time, left.pop(day), left.pop(time), asked):
            return False
    return all(_key(entity, name, text, asked) for name, text in left.items())


def _key(entity: Entity, name: Any, text: Any, asked: Asked) -> bool:
    if isinstance(text, Mapping):
        plain = Asked("IMAGE", {}, asked.empty_values, asked.multiple_values)
        return any(
            all(_key(lambda inner, item=item: _values(item, inner), inner, one, plain) for inner, one in text.items())
            for item in entity(name)
        ) or not any(one.strip("*") for one in text.values())
    if not text.strip("*"):
        return True
    vr = VR.get(name, "LO") if isinstance(name, str) else PRIVATE_VR[name[1]]
    values = _adjusted(entity, name, asked)
    if asked.empty_values and text == '""':
        return not any(value.strip(" ") for value in values)
    if asked.fuzzy and vr == "PN" and not _words(text):
        return True
    if asked.multiple_values and name in MULTIPLE and "\\" in text:
        return all(any(_value(value, one, vr, asked) for value in values) for one in text.split("\\") if one.strip(" "))
    if vr == "DT":
        offset = _offset(entity, name) if asked.zone is not None else None
        return any(_date_time(value, text, asked.zone or 0, offset) for value in values)
    return any(_value(value, text, vr, asked) for value in values)


def _adjusted(entity: Entity, name: Any, asked: Asked) -> list[str]:
    """The values, a date or time with a partner in the zone that is asked for."""
    if asked.zone is not None:
        for day, time in PAIRS.items():
            if name in (day, time):
                moved = _moved(entity, day, time, asked.zone)
                if moved is not None:
                    return [f"{moved[0]:%Y%m%d}" if name == day else moved[1]]
    return [str(one) for one in entity(name)]


def _offset(entity: Entity, of: str) -> timezone | None:
    """The UTC offset of what an attribute belongs to."""
    text = entity("TimezoneOffsetFromUTC", LEVEL[of])
    found = re.fullmatch(r"([+-])(\d\d)(\d\d)", str(text[0])) if text else None
    if found is None:
        return None
    minutes = int(found[2]) * 60 + int(found[3])
    return timezone(timedelta(minutes=-minutes if found[1] == "-" else minutes))


def _moved(entity: Entity, day: str, time: str, zone: int) -> tuple[date, str] | None:
    days, times = entity(day), entity(time)
    offset = _offset(entity, day)
    start = _micros(times[0], first=True) if times else None
    if not days or start is None or offset is None:
        return None
    text = times[0].strip(" ").replace(":", "")
    local = datetime.strptime(days[0] + (text + "00")[:4], "%Y%m%d%H%M").replace(tzinfo=offset)
    there = local.astimezone(timezone(timedelta(minutes=zone)))
    return there.date(), f"{there:%H%M}" + text[4:]


def _value(value: str, text: str, vr: str, asked: Asked) -> bool:
    if vr == "UI":
        return value in text.split("\\")
    if vr == "PN":
        return _sounds_like(value, text) if asked.fuzzy else _name(value, text)
    if vr == "DA":
        return _between(value, *_ends(text.strip(" ")))
    if vr == "TM":
        low, high = _ends(text.strip(" "))
        at = _micros(value, first=True)
        ends = _micros(low, first=True) if low else 0, _micros(high, first=False) if high else None
        return at is not None and ends[0] is not None and ends[0] <= at and (ends[1] is None or at <= ends[1])
    if vr in NUMBERS:
        return float(value) == float(text)
    if vr == "LT":
        return _wild(value.rstrip(" "), text.rstrip(" "))
    return _wild(value.strip(" "), text.strip(" "))


def _date_time(value: str, text: str, zone: int, offset: timezone | None) -> bool:
    asked_in = timezone(timedelta(minutes=zone))
    stored = _instants(value, offset or asked_in)
    low, high = _ends(text)
    if stored is None:
        return False
    after = not low or _instants(low, asked_in)[0] <= stored[0]  # type: ignore[index]
    return after and (not high or stored[0] < _instants(high, asked_in)[1])  # type: ignore[index]


def _instants(text: str, zone: timezone) -> tuple[datetime, datetime] | None:
    """The first moment of a DT, and the one after its last."""
    found = re.fullmatch(r"(\d{4})(\d\d)?(\d\d)?(\d\d)?(\d\d)?(\d\d)?([+-])?(\d\d)?(\d\d)?", text)
    if found is None:
        return None
    numbers = [int(one) for one in found.groups()[:6] if one is not None]
    if found[7]:
        minutes = int(found[8]) * 60 + int(found[9])
        zone = timezone(timedelta(minutes=-minutes if found[7] == "-" else minutes))
    try:
        start = datetime(*(numbers + [1, 1, 0, 0, 0][len(numbers) - 1 :]), tzinfo=zone)  # type: ignore[arg-type,misc]
    except ValueError:
        return None
    if len(numbers) == 1:
        return start, start.replace(year=start.year + 1)
    if len(numbers) == 2:
        return start, (start + timedelta(days=32)).replace(day=1)
    return start, start + {3: timedelta(1), 4: timedelta(hours=1), 5: timedelta(minutes=1), 6: timedelta(0, 1)}[
        len(numbers)
    ]


def _ends(text: str) -> tuple[str, str]:
    low, sign, high = text.partition("-")
    return (low, high) if sign else (text, text)


def _between(value: str, low: str, high: str) -> bool:
    return (not low or value >= low) and (not high or value <= high)


def _micros(text: str, *, first: bool) -> int | None:
    """Microseconds into the day of the first or last moment of a TM; None where it is none."""
    found = re.fullmatch(r"(\d\d)(?:(\d\d)(?:(\d\d)(?:\.(\d{1,6}))?)?)?", text.strip(" ").replace(":", ""))
    if found is None or int(found[1]) > 23 or int(found[2] or 0) > 59 or int(found[3] or 0) > 60:
        return None
    hour, minute, second, part = found.groups()
    if first:
        return _total(int(hour), int(minute or 0), int(second or 0), int((part or "").ljust(6, "0")))
    return _total(int(hour), int(minute or 59), int(second or 60), int((part or "").ljust(6, "9")))


def _total(hour: int, minute: int, second: int, micros: int) -> int:
    """Ordered as times are: a leap second comes before the next minute."""
    return ((hour * 60 + minute) * 61 + second) * 1_000_000 + micros


def _moment(entity: Entity, day: str, time: str, days: str, times: str, asked: Asked) -> bool:
    stored_day, stored_time = _adjusted(entity, day, asked), _adjusted(entity, time, asked)
    at = _micros(stored_time[0], first=True) if stored_time else None
    if not stored_day or at is None:
        return False
    (day_low, day_high), (time_low, time_high) = _ends(days), _ends(times)
    moment = stored_day[0], at
    low = (day_low, _micros(time_low, first=True) if time_low else 0) if day_low else None
    high = (day_high, _micros(time_high, first=False) if time_high else 10**12) if day_high else None
    return (low is None or moment >= low) and (high is None or moment <= high)


def _wild(value: str, pattern: str) -> bool:
    """Wild card matching, one character after the other (PS3.4 C.2.2.2.4)."""
    if not pattern:
        return not value
    if pattern[0] == "*":
        return any(_wild(value[at:], pattern[1:]) for at in range(len(value) + 1))
    return bool(value) and pattern[0] in ("?", value[0]) and _wild(value[1:], pattern[1:])


def _groups(name: str) -> list[str]:
    """Component groups for comparison: upper case and spaces aside, without empty components at the end."""
    groups = []
    for group in name.lower().split("="):
        parts = [part.strip(" ") for part in group.split("^")]
        while parts and not parts[-1]:
            parts.pop()
        groups.append("^".join(parts))
    while groups and not groups[-1]:
        groups.pop()
    return groups


def _name(value: str, key: str) -> bool:
    keys, groups = _groups(key), _groups(value)
    if len(keys) == 1:
        return any(_group(group, keys[0]) for group in groups)
    padded = groups + [""] * (len(keys) - len(groups))
    return all(not one.strip("*") or _group(padded[number], one) for number, one in enumerate(keys))


def _group(group: str, key: str) -> bool:
    while True:
        if _wild(group, key):
            return True
        if not key.endswith("^*"):
            return False
        key = key[:-2]


SPELLINGS = (  # of one sound each, as docs/decisions/0019 has them
    "ai ay ei ey aj ej", "f ph pf v w", "ks cks chs x", "k ck ch kh c q", "s tsch sch sh sz cz ts tz z ß", "t th dt d",
    "p b", "g gh dj", "u ue ou oo", "o oe au œ", "a ae aa æ", "i ie ee y j",
)  # fmt: skip
_SOUND = {spelling: group.split() for group in SPELLINGS for spelling in group.split()}
_PLAIN = str.maketrans("øłđðþıħ", "olddtih")


def _letters(text: str) -> str:
    """Lower case without accents."""
    bare = (one for one in unicodedata.normalize("NFD", text.lower()) if not "\u0300" <= one <= "\u036f")
    return "".join(bare).translate(_PLAIN)


def _words(text: str) -> list[str]:
    """What spaces and delimiters separate; of a key, without those that say nothing."""
    return [word for word in re.split("[-^=,.'’ ]", _letters(text)) if word.strip("*")]


def _sounds_like(value: str, key: str) -> bool:
    """Whether each word of the key begins some word of the name."""
    return all(any(_begins(_heard(one), word) for word in _words(value)) for one in _words(key))


def _heard(word: str) -> list[list[str]]:
    """The sounds of a word of the key, each as its spellings; the longest one is read, a sound once, no silent h."""
    sounds: list[list[str]] = []
    while word:
        spelling = next((word[:n] for n in (4, 3, 2, 1) if word[:n] in _SOUND), word[0])
        word = word[len(spelling) :]
        sound = _SOUND.get(spelling, [spelling])
        if not (sounds and (sound == sounds[-1] or spelling == "h")):
            sounds.append(sound)
    return sounds


def _begins(sounds: list[list[str]], word: str) -> bool:
    """Whether a word of a name begins with the sounds, each spelled any way, once or more often, and then any h."""
    if not sounds:
        return True
    if sounds[0] == ["*"]:
        return any(_begins(sounds[1:], word[at:]) for at in range(len(word) + 1))
    if sounds[0] == ["?"]:
        return bool(word) and _begins(sounds[1:], word[1:])
    for spelling in sounds[0]:
        if word.startswith(spelling):
            rest = word[len(spelling) :]
            if _begins(sounds, rest) or any(
                _begins(sounds[1:], rest[at:]) for at in range(len(rest) - len(rest.lstrip("h")) + 1)
            ):
                return True
    return False
