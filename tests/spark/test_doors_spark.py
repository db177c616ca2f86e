"""Spark SQL is one more door: a query written as an analyst would, over the tables that extraction made, finds what the
index, C-FIND, QIDO-RS, the mode without a catalog and the reference find, over generated archives and queries."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from pydicom import dcmread
from pyspark.sql import SparkSession

from sphere.catalog.queries import open_queries
from sphere.jobs.extract import run
from sphere.jobs.session import register_tables
from tests.support.doors import Doors, held_to_the_reference
from tests.support.drawn import PROFILE, below, generated, queries
from tests.support.examples import LONG, examples
from tests.support.landing import archive, land, new_member
from tests.support.reference import LEVEL, MULTIPLE, VR, Asked, answer

pytestmark = [pytest.mark.spark, pytest.mark.filterwarnings("ignore")]

SELECTED = "i.StudyInstanceUID, i.SeriesInstanceUID, i.SOPInstanceUID"
FROM = {
    "PATIENT": "SELECT coalesce(p.PatientID, '') FROM patients p",
    "STUDY": "SELECT t.StudyInstanceUID FROM studies t",
    "SERIES": "SELECT s.StudyInstanceUID, s.SeriesInstanceUID FROM series s JOIN studies t USING (StudyInstanceUID)",
    "IMAGE": f"SELECT {SELECTED} FROM instances i "
    "JOIN series s USING (StudyInstanceUID, SeriesInstanceUID) JOIN studies t USING (StudyInstanceUID)",
}
HAVING = {
    "PATIENT": ("p.patient_key", "t.patient_key"),
    "STUDY": ("t.StudyInstanceUID", "s.StudyInstanceUID"),
    "SERIES": ("(s.StudyInstanceUID, s.SeriesInstanceUID)", "i.StudyInstanceUID, i.SeriesInstanceUID"),
}
"""By what an entity is said to have others below it that match."""
NOT_COLUMNS = ("AcquisitionDateTime", "ProcedureCodeSequence")
TIME = r"^([01]\\d|2[0-3])([0-5]\\d(([0-5]\\d|60)(\\.\\d{1,6})?)?)?$"


def sql_of(asked: Asked) -> str | None:
    """The query in Spark SQL; None for what SQL over the columns does not ask."""
    if asked.combined_datetime or asked.zone is not None:
        return None
    if any(not isinstance(name, str) or name in NOT_COLUMNS for name in asked.keys):
        return None
    keys = {name: text for name, text in asked.keys.items() if text.strip("*")}
    lower = [name for name in below(asked) if name in keys]
    conditions = [_condition(asked, name, text) for name, text in keys.items() if name not in lower]
    if lower:
        key, found = HAVING[asked.level]
        tests = " AND ".join(_condition(asked, name, keys[name]) for name in lower)
        conditions.append(f"{key} IN ({FROM['IMAGE'].replace(SELECTED, found)} WHERE {tests})")
    return " WHERE ".join([FROM[asked.level], *([" AND ".join(conditions)] if conditions else [])])


def _condition(asked: Asked, name: str, text: str) -> str:
    """Of a key; an attribute of a level above is that of its table."""
    column = ("p" if asked.level == "PATIENT" and LEVEL[name] == 0 else "ttsi"[LEVEL[name]]) + f".{name}"
    vr, several = VR.get(name, "LO"), name in MULTIPLE
    if asked.empty_values and text == '""':
        if several:
            return f"NOT coalesce(exists({column}, x -> trim(x) != ''), false)"
        return f"{column} IS NULL" if vr in ("DA", "IS", "DS") else f"coalesce(trim({column}), '') = ''"
    test = _TESTS.get(vr, _text)
    if several and asked.multiple_values and "\\" in text:
        parts = [f"exists({column}, x -> {test('x', part)})" for part in text.split("\\")]
        return f"coalesce({' AND '.join(parts)}, false)"
    return f"exists({column}, x -> {test('x', text)})" if several else test(column, text)


def _text(x: str, text: str) -> str:
    return f"trim({x}) LIKE {_like(text.strip(' '))}"


def _long_text(x: str, text: str) -> str:
    return f"rtrim({x}) LIKE {_like(text.rstrip(' '))}"


def _like(pattern: str) -> str:
    """A pattern of PS3.4 C.2.2.2.4 as one of SQL."""
    plain = re.sub(r"([%_!])", r"!\1", pattern)
    return _quoted(plain.replace("*", "%").replace("?", "_")) + " ESCAPE '!'"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _name(x: str, text: str) -> str:
    """A component group against any group of the name; several groups against those in their places."""
    clean = "regexp_replace(array_join(transform(split(g, '\\\\^'), c -> trim(c)), '^'), '\\\\^+$', '')"
    groups = f"transform(split(lower({x}), '='), g -> {clean})"
    keys = [re.sub(r"\^+$", "", "^".join(map(str.strip, one.split("^")))) for one in text.lower().split("=")]
    if len(keys) == 1:
        return f"exists({groups}, g -> {_group('g', keys[0])})"
    placed = [_group(f"coalesce(get({groups}, {n}), '')", one) for n, one in enumerate(keys) if one.strip("*")]
    return f"({x} IS NOT NULL AND {' AND '.join(placed)})"


def _group(g: str, key: str) -> str:
    """Empty components at the end are no components: `^*` at the end may stand for none."""
    tests = [f"{g} LIKE {_like(key)}"]
    while key.endswith("^*"):
        key = key[:-2]
        tests.append(f"{g} LIKE {_like(key)}")
    return "(" + " OR ".join(tests) + ")"


def _day(x: str, text: str) -> str:
    low, sign, high = text.strip(" ").partition("-")
    low, high = (f"to_date('{one}', 'yyyyMMdd')" if one else "" for one in (low, high if sign else low))
    return " AND ".join(
        [f"{x} IS NOT NULL", *([f"{x} >= {low}"] if low else []), *([f"{x} <= {high}"] if high else [])]
    )


def _time(x: str, text: str) -> str:
    """As digits: what is not said of a stored time is 0, of the end of a range all that it may be."""
    plain = f"replace({x}, ':', '')"
    digits = f"rpad(replace({plain}, '.', ''), 12, '0')"
    low, sign, high = text.strip(" ").replace(":", "").partition("-")
    high = high if sign else low
    tests = [f"trim({plain}) RLIKE '{TIME}'"]
    if low:
        tests.append(f"{digits} >= '{low.replace('.', ''):0<12}'")
    if high:
        tests.append(f"{digits} <= '{(high.replace('.', '') + 'hh5960999999'[len(high.replace('.', '')) :])[:12]}'")
    return " AND ".join(tests)


def _number(x: str, text: str) -> str:
    return f"{x} = CAST({_quoted(text)} AS DOUBLE)"


def _uid(x: str, text: str) -> str:
    return f"{x} IN ({', '.join(map(_quoted, text.split(chr(92))))})"


_TESTS: dict[str, Callable[[str, str], str]] = {
    "UI": _uid, "PN": _name, "DA": _day, "TM": _time, "IS": _number, "DS": _number, "LT": _long_text,
}  # fmt: skip


@pytest.fixture(scope="module")
def doors(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """All of it is catalogued, by Spark."""
    files = generated(3)
    base = archive(tmp_path_factory.mktemp("doors"), archive={"ae_title": "DOORS"})
    land(base, [new_member(data, second=number) for number, data in enumerate(files)])
    run(spark, base)
    register_tables(spark, base)
    for name in ("patients", "studies", "series", "instances"):
        spark.table(name).cache()
    catalog = base.catalog.model_copy(update={"mode": "files", "scan_workers": 0})
    with open_queries(base) as tables, open_queries(base.model_copy(update={"catalog": catalog})) as bundles:
        yield Doors(base, [dcmread(io.BytesIO(data)) for data in files], tables, bundles)
    for name in ("patients", "studies", "series", "instances"):
        spark.table(name).unpersist()


def _in_sql(asked: Asked) -> bool:
    return sql_of(asked) is not None and _is_allowed(asked)


@settings(parent=PROFILE, derandomize=not LONG, max_examples=examples(40))
@given(asked=queries().filter(_in_sql))
def test_spark_sql_finds_what_every_door_finds(doors: Doors, spark: SparkSession, asked: Asked) -> None:
    held_to_the_reference(doors, asked)
    sql = sql_of(asked) or ""
    found = sorted(tuple(row) for row in spark.sql(sql).collect())
    expected: list[Any] = answer(doors.datasets, asked)
    if asked.level == "PATIENT":
        expected = sorted((key[1],) if key[0] == "id" else ("",) for key in expected)
    assert found == expected, sql


def _is_allowed(asked: Asked) -> bool:
    """Whether no key is refused: two quotes where empty values were not agreed on, a list with wild cards."""
    for name, text in asked.keys.items():
        if not asked.empty_values and text == '""' and VR.get(name) in ("DA", "TM", "DT", "IS", "DS"):
            return False
        if "\\" in text and ({"*", "?"} & set(text) or name not in MULTIPLE):
            return False
    return True
