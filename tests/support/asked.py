"""Queries made of the values that an archive has, each with what it asks in Spark SQL, written without our matcher."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from sphere.catalog.schema import BY_KEYWORD, UNIQUE_KEY, Level

TABLE: dict[Level, str] = {"STUDY": "studies", "SERIES": "series", "IMAGE": "instances"}
KEYWORDS: dict[Level, tuple[str, ...]] = {
    "STUDY": ("StudyInstanceUID", "StudyDate", "AccessionNumber", "StudyID", "StudyDescription", "PatientID",
              "PatientName", "PatientSex", "PatientBirthDate", "PatientAge", "ReferringPhysicianName",
              "ModalitiesInStudy", "NumberOfStudyRelatedInstances", "NumberOfStudyRelatedSeries"),
    "SERIES": ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription", "SeriesDate", "BodyPartExamined",
               "Manufacturer", "ManufacturerModelName", "StationName", "ProtocolName", "PatientPosition",
               "NumberOfSeriesRelatedInstances"),
    "IMAGE": ("SOPInstanceUID", "SOPClassUID", "InstanceNumber", "ContentDate", "AcquisitionDate", "Rows", "Columns",
              "BitsAllocated", "PhotometricInterpretation", "ImageType", "NumberOfFrames", "SliceThickness", "KVP"),
}  # fmt: skip
MOMENTS: dict[Level, tuple[str, str]] = {
    "STUDY": ("StudyDate", "StudyTime"),
    "SERIES": ("SeriesDate", "SeriesTime"),
    "IMAGE": ("ContentDate", "ContentTime"),
}
VALUES = 3  # of an attribute
SHORT = frozenset(("CS", "SH", "LO", "UI"))  # what keys inside items and private ones are of
_TIME = "^[0-9]{2}([0-9]{2}([0-9]{2}([.][0-9]{1,6})?)?)?$"
Row = Mapping[str, Any]
Tables = Mapping[Level, Sequence[Row]]


@dataclass(frozen=True)
class Asked:
    """One query: its keys (keyword, tag, or path with full stops), and what it asks of the table of its level in SQL.

    `above` is a condition on the table `studies`. `charset` is that of the identifier, `fuzzy` and `combined` are
    negotiated.
    """

    level: Level
    keys: tuple[tuple[str, str], ...]
    sql: str
    above: str = ""
    charset: tuple[str, ...] = ()
    fuzzy: bool = False
    combined: bool = False


def sql_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def single(tables: Tables) -> Iterator[Asked]:
    """Each attribute of each level, in each kind of matching that it has."""
    for level, keywords in KEYWORDS.items():
        for keyword in keywords:
            values = {one for row in tables[level] for one in _each(row.get(keyword)) if askable(one)}
            plain = {one for one in values if not isinstance(one, str) or _is_plain(one)}
            for value in chain(_some(plain, VALUES), _some(values - plain, 2 * VALUES)):
                yield from (Asked(level, ((keyword, text),), sql) for text, sql in forms(keyword, value))


def by_tag(tables: Tables) -> Iterator[Asked]:
    """Some of the same by tag."""
    for one in list(single(tables))[::17]:
        [(keyword, text)] = one.keys
        if tag := tag_for_keyword(keyword):
            yield Asked(one.level, ((f"{tag:08X}", text),), one.sql)


def pairs(tables: Tables) -> Iterator[Asked]:
    """Two keys of one level that one entity has; and a key of an instance or series with one of its study."""
    for level, keywords in KEYWORDS.items():
        rows = sorted(tables[level], key=lambda row: str(row[UNIQUE_KEY[level]]))
        for number, row in enumerate(rows[:: max(1, len(rows) // 30)]):
            first, *others = _present(row, keywords, number)
            one, more = _form(row, first, number), _form(row, others[number % len(others)], number + 1)
            yield Asked(level, (one[0], more[0]), f"({one[1]}) AND ({more[1]})")
            study = next((it for it in tables["STUDY"] if it["StudyInstanceUID"] == row["StudyInstanceUID"]), None)
            if level != "STUDY" and study is not None and number % 3 == 0:
                above = _form(study, _present(study, KEYWORDS["STUDY"], number)[0], number)
                yield Asked(level, (one[0], above[0]), f"({one[1]})", above=above[1])


def moments(tables: Tables) -> Iterator[Asked]:
    """A range of dates and one of times, each for itself, and as one range of moments (PS3.4 C.2.2.2.5.4)."""
    for level, (day, time) in MOMENTS.items():
        found = sorted({(row[day], row[time].strip()) for row in tables[level] if _has_moment(row, day, time)})
        for at, (first, began) in enumerate(found[:: max(1, len(found) // 8)]):
            last, ended = found[min(len(found) - 1, found.index((first, began)) + 3)]
            for low, high in ((began[:4], ""), ("", began[:6]), tuple(sorted((began[:6], ended[:6])))):
                keys = ((day, f"{first:%Y%m%d}-{last:%Y%m%d}"), (time, f"{low}-{high}"))
                between = f"{_clock(time)} BETWEEN '{low.ljust(12, '0')}' AND '{(high or '24').ljust(12, '9')}'"
                sql = f"{day} BETWEEN DATE'{first}' AND DATE'{last}' AND trim({time}) RLIKE '{_TIME}' AND {between}"
                yield Asked(level, keys, sql)
            if at % 2:
                keys = ((day, f"{first:%Y%m%d}-{last:%Y%m%d}"), (time, f"{began[:6]}-{ended[:6]}"))
                low, high = f"{first:%Y%m%d}{began[:6]}", f"{last:%Y%m%d}{ended[:6]}"
                moment = f"concat(date_format({day}, 'yyyyMMdd'), {_clock(time)})"
                sql = f"trim({time}) RLIKE '{_TIME}' AND {moment} BETWEEN '{low:0<20}' AND '{high:9<20}'"
                yield Asked(level, keys, sql, combined=True)


def inside(tables: Tables) -> Iterator[Asked]:
    """What the items of sequences have, at one and two levels, and two keys of one item."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in tables["IMAGE"]:
        _collect(found, (), json.loads(row["dataset"]))
    paths = sorted(found)
    deep = [path for path in paths if len(path) > 1]
    for number, path in enumerate([*paths[:: max(1, len(paths) // 25)], *deep[:: max(1, len(deep) // 15)]]):
        items = found[path]
        item = items[number % len(items)]
        tags = sorted(item)
        one, other = tags[number % len(tags)], tags[(number + 1) % len(tags)]
        yield _of_items(path, {one: item[one]})
        if one != other:
            yield _of_items(path, {one: item[one], other: item[other]})
        if len(item[one]) > 3 and dictionary_VR(int(one, 16)) != "UI":
            yield _of_items(path, {one: item[one][:3] + "*"})


def private(tables: Tables) -> Iterator[Asked]:
    """Private attributes, by their tags."""
    found: dict[str, set[str]] = {}
    for row in tables["IMAGE"]:
        for tag, element in json.loads(row["dataset"]).items():
            if int(tag, 16) >> 16 & 1 and int(tag, 16) & 0xFFFF > 0xFF and element["vr"] in SHORT - {"UI"}:
                texts = (one for one in element.get("Value", ()) if isinstance(one, str) and askable(one))
                found.setdefault(tag, set()).update(texts)
    tags = sorted(tag for tag, values in found.items() if values)
    for tag in tags[:: max(1, len(tags) // 15)]:
        value = min(found[tag]).strip()
        texts = f"from_json(get_json_object(dataset, '$.{tag}.Value'), 'array<string>')"
        for text in (value, f"{value[:2]}*"):
            yield Asked("IMAGE", ((tag, text),), f"exists({texts}, v -> {like('v', text)})")


def named(charsets: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[Asked]:
    """Names, with the character sets in which their identifiers are."""
    for name, charset in charsets:
        yield Asked("STUDY", (("PatientName", name),), _names(name, "PatientName"), charset=charset)
        if "=" in name:
            group = name.split("=")[1]
            yield Asked("STUDY", (("PatientName", group),), _names(group, "PatientName"), charset=charset)
            text = f"={group.partition('^')[0]}*"
            sql = f"startswith(get(split(PatientName, '='), 1), {sql_text(text[1:-1])})"
            yield Asked("STUDY", (("PatientName", text),), sql, charset=charset)


def askable(value: Any) -> bool:
    """Whether a value can be the value of a key."""
    return not isinstance(value, str) or bool(value.strip(" *?\\") and value.isprintable() and "\\" not in value)


def like(column: str, text: str) -> str:
    """The wild cards of a text (PS3.4 C.2.2.2.4) as a regular expression, or equality."""
    if not set(text) & set("*?"):
        return f"trim({column}) = {sql_text(text)}"
    pattern = "".join({"*": ".*", "?": "."}.get(one, re.escape(one)) for one in text)
    return f"trim({column}) RLIKE {sql_text(f'(?s)^{pattern}$')}"


def forms(keyword: str, value: Any) -> Iterator[tuple[str, str]]:
    """(value of the key, the same in SQL) of each kind of matching that an attribute has."""
    column = BY_KEYWORD.get(keyword)
    several = column.multiple if column else keyword == "ModalitiesInStudy"
    vr = column.vr if column else "CS" if isinstance(value, str) else "IS"

    def sql(condition: str) -> str:
        return f"exists({keyword}, x -> {condition.format('x')})" if several else condition.format(keyword)

    if isinstance(value, date):
        day = f"{value:%Y%m%d}"
        yield day, sql(f"{{}} = DATE'{value}'")
        yield f"{day}-", sql(f"{{}} >= DATE'{value}'")
        yield f"-{day}", sql(f"{{}} <= DATE'{value}'")
        yield f"19900101-{day}", sql(f"{{}} BETWEEN DATE'1990-01-01' AND DATE'{value}'")
    elif not isinstance(value, str):
        yield str(value), sql(f"{{}} = {value!r}")
    elif vr == "UI":
        yield value, sql(f"{{}} = {sql_text(value)}")
        yield f"{value},1.2.3", sql(f"{{}} IN ({sql_text(value)}, '1.2.3')")
    elif vr == "PN":
        text = value.strip()
        yield text.swapcase() if text.isascii() else text, _names(text, keyword)
        if "=" not in text[:4]:
            yield f"{text[:4]}*", f"exists({_groups(keyword)}, g -> startswith(g, {sql_text(text[:4].lower())}))"
    else:
        text, name = value.strip(), "x" if several else keyword
        asked = [text, f"{text[:3]}*", f"?{text[1:]}"] if vr != "AS" else [text]  # AS has no wild cards
        for one in asked:
            if one.strip("*"):
                yield one, f"exists({keyword}, x -> {like(name, one)})" if several else like(name, one)


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_plain(text: str) -> bool:
    return text.isascii() and not set(text) & set('*?="')


def _some(values: Iterable[Any], count: int) -> list[Any]:
    ordered = sorted(values, key=str)
    return ordered[:: max(1, len(ordered) // count)][:count]


def _present(row: Row, keywords: Sequence[str], number: int) -> list[str]:
    """Attributes that a row has, another one first for each number."""
    found = [keyword for keyword in keywords if any(map(askable, _each(row.get(keyword))))]
    at = number % len(found)
    return found[at:] + found[:at]


def _form(row: Row, keyword: str, number: int) -> tuple[tuple[str, str], str]:
    value = next(filter(askable, _each(row[keyword])))
    several = list(forms(keyword, value))
    text, sql = several[number % len(several)]
    return (keyword, text), sql


def _has_moment(row: Row, day: str, time: str) -> bool:
    return row.get(day) is not None and bool(re.match(r"\d{6}", (row.get(time) or "").strip()))


def _clock(time: str) -> str:
    """A time with all its digits."""
    return f"rpad(replace(trim({time}), '.', ''), 12, '0')"


def _groups(keyword: str) -> str:
    """The component groups of a name, without trailing delimiters (PS3.5 6.2.1.2)."""
    return f"transform(split(lower(trim({keyword})), '='), g -> regexp_replace(g, '\\\\^+$', ''))"


def _names(text: str, keyword: str) -> str:
    groups = [sql_text(group.rstrip("^").lower()) for group in text.split("=")]
    if len(groups) == 1:
        return f"array_contains({_groups(keyword)}, {groups[0]})"
    tests = [f"get({_groups(keyword)}, {at}) = {group}" for at, group in enumerate(groups) if group != "''"]
    return " AND ".join(tests)


def _collect(found: dict[tuple[str, ...], list[dict[str, str]]], path: tuple[str, ...], header: Row) -> None:
    """By paths of sequences the short texts of their items."""
    for tag, element in header.items():
        if element["vr"] != "SQ" or not keyword_for_tag(int(tag, 16)) or len(path) > 1:
            continue
        for item in element.get("Value", ())[:2]:
            texts = {
                inner: one["Value"][0].strip()
                for inner, one in item.items()
                if one["vr"] in SHORT and keyword_for_tag(int(inner, 16)) and _is_text(one.get("Value"))
            }
            if texts and texts not in found.setdefault((*path, tag), []):
                found[(*path, tag)].append(texts)
            _collect(found, (*path, tag), item)
    for empty in [path for path, items in found.items() if not items]:
        del found[empty]


def _is_text(values: Any) -> bool:
    return bool(values) and isinstance(values[0], str) and askable(values[0])


def _of_items(path: tuple[str, ...], asked: Mapping[str, str]) -> Asked:
    """A query for an item at the path that has all of these."""
    fields = ", ".join(f"`{tag}`: struct<Value: array<string>>" for tag in asked)
    schema, at = f"struct<{fields}>", f"i{len(path) - 1}"
    test = " AND ".join(f"exists({at}.`{tag}`.Value, v -> {like('v', text)})" for tag, text in asked.items())
    for depth in range(len(path) - 1, 0, -1):
        schema = f"struct<`{path[depth]}`: struct<Value: array<{schema}>>>"
        test = f"exists(i{depth - 1}.`{path[depth]}`.Value, i{depth} -> {test})"
    items = f"from_json(get_json_object(dataset, '$.{path[0]}.Value'), 'array<{schema}>')"
    names = [keyword_for_tag(int(tag, 16)) for tag in path]
    keys = tuple((".".join((*names, keyword_for_tag(int(tag, 16)))), text) for tag, text in asked.items())
    return Asked("IMAGE", keys, f"exists({items}, i0 -> {test})")
