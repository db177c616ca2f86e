"""A table of more than 200 queries over real files: QIDO-RS, C-FIND and Spark SQL find the same entities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import quote

import pytest
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian
from pyspark.sql import SparkSession

from sphere.catalog.query import Features
from sphere.catalog.schema import BY_KEYWORD, UNIQUE_KEY, Level, level_of
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.media import import_files
from sphere.ingest.storage import open_storage
from sphere.jobs.session import register_tables
from sphere.scp.find import FindRequest, FindService
from sphere.scp.identifier import build_identifier
from tests.conftest import CORPUS
from tests.support.extracted import extract
from tests.support.headers import packaged_files
from tests.support.landing import archive, table_rows
from tests.support.web import Web, serving_web

pytestmark = [pytest.mark.spark, pytest.mark.filterwarnings("ignore")]

TABLE: dict[Level, str] = {"STUDY": "studies", "SERIES": "series", "IMAGE": "instances"}
PATH: dict[Level, str] = {"STUDY": "/studies", "SERIES": "/series", "IMAGE": "/instances"}
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
VALUES = 3  # of an attribute


@dataclass(frozen=True)
class Asked:
    """One query: its key, and what it asks in SQL."""

    level: Level
    keyword: str
    value: str
    sql: str


def sql_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def table(settings: Any) -> Iterator[Asked]:
    """Queries made of the values that the tables have."""
    for level, keywords in KEYWORDS.items():
        rows = table_rows(settings, TABLE[level])
        for keyword in keywords:
            assert level_of(keyword) in (level, "PATIENT"), keyword
            values = {one for row in rows for one in _each(row.get(keyword)) if _askable(one)}
            for value in sorted(values, key=str)[:: max(1, len(values) // VALUES)][:VALUES]:
                yield from (Asked(level, keyword, text, sql) for text, sql in forms(level, keyword, value))


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _askable(value: Any) -> bool:
    return not isinstance(value, str) or bool(value.strip() and not set(value) & set('*?\\="') and value.isascii())


def forms(level: Level, keyword: str, value: Any) -> Iterator[tuple[str, str]]:
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
        plain = value.strip().rstrip("^").lower()
        yield value.strip().swapcase(), sql(f"regexp_replace(lower(trim({{}})), '\\\\^+$', '') = {sql_text(plain)}")
        yield f"{plain[:4]}*", sql(f"startswith(lower(trim({{}})), {sql_text(plain[:4])})")
    else:
        text = value.strip()
        yield text, sql(f"trim({{}}) = {sql_text(text)}")
        if vr == "AS":  # no wild cards (PS3.4 C.2.2.2.4)
            return
        yield f"{text[:3]}*", sql(f"startswith(trim({{}}), {sql_text(text[:3])})")
        ends = f"length(trim({{0}})) = {len(text)} AND endswith(trim({{0}}), {sql_text(text[1:])})"
        yield f"?{text[1:]}", sql(ends)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("queries"))
    paths = [path for path in sorted(CORPUS.rglob("*")) if path.is_file() and path.stat().st_size < 2 << 20]
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    try:
        list(import_files([*packaged_files(), *paths], writer, memory_bytes=4 << 20, only_dicom=True))
    finally:
        writer.close()
    extract(settings)
    with serving_web(settings) as running:
        yield running


def test_three_doors_give_the_same_answers(web: Web, spark: SparkSession) -> None:
    queries = list(table(web.settings))
    assert len(queries) >= 200
    register_tables(spark, web.settings)
    by_sql: dict[Asked, set[str]] = {}
    for level in TABLE:
        of_level = [one for one in queries if one.level == level]
        key = UNIQUE_KEY[level]
        sets = ", ".join(f"collect_set(CASE WHEN {one.sql} THEN {key} END)" for one in of_level)
        row = spark.sql(f"SELECT {sets} FROM {TABLE[level]}").first()
        assert row is not None
        by_sql |= {one: set(found) for one, found in zip(of_level, row, strict=True)}
    found = 0
    for one in queries:
        expected = by_sql[one]
        found += len(expected)
        assert by_qido(web, one) == expected, one
        assert by_find(web, one) == expected, one
    assert found > len(queries)  # nearly every one of them finds something


def by_qido(web: Web, one: Asked) -> set[str]:
    response = web.get(f"{PATH[one.level]}?{one.keyword}={quote(one.value)}")
    assert response.status_code in (200, 204), (one, response.text)
    tag = {"STUDY": "0020000D", "SERIES": "0020000E", "IMAGE": "00080018"}[one.level]
    return {match[tag]["Value"][0] for match in response.json()} if response.content else set()


def by_find(web: Web, one: Asked) -> set[str]:
    value = one.value.replace(",", "\\") if one.keyword.endswith("UID") else one.value
    identifier = build_identifier({one.keyword: value}, one.level)
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = False, True
    write_dataset(out, identifier)
    request = FindRequest(
        model="STUDY_ROOT",
        identifier=out.getvalue(),
        transfer_syntax=ExplicitVRLittleEndian,
        features=Features(relational=True),
    )
    answers = FindService(web.services.finder).answers(request, cancelled=lambda: False)  # type: ignore[arg-type]
    found = list(answers)
    assert all(answer.identifier is not None for answer in found), (one, [answer.comment for answer in found])
    return {str(answer.identifier[UNIQUE_KEY[one.level]].value) for answer in found if answer.identifier is not None}
