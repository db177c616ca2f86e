"""A table of many hundred queries over real files: QIDO-RS, C-FIND over an association and Spark SQL find the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pydicom
import pytest
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as STUDY_ROOT  # type: ignore[attr-defined]
from pyspark.sql import SparkSession

from sphere.catalog.schema import UNIQUE_KEY, Level, level_of
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.media import import_files
from sphere.ingest.storage import open_storage
from sphere.jobs.session import register_tables
from sphere.scp.identifier import build_identifier
from tests.conftest import CORPUS
from tests.support.asked import (
    KEYWORDS,
    TABLE,
    Asked,
    by_tag,
    inside,
    moments,
    named,
    pairs,
    private,
    single,
)
from tests.support.extracted import extract
from tests.support.headers import packaged_files
from tests.support.landing import archive, table_rows
from tests.support.pynetdicom_user import hold_reactor
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import make_instance
from tests.support.web import Web, serving_web

pytestmark = [pytest.mark.spark, pytest.mark.filterwarnings("ignore")]

PATH: dict[Level, str] = {"STUDY": "/studies", "SERIES": "/series", "IMAGE": "/instances"}
CHARSETS = sorted((Path(pydicom.__file__).parent / "data" / "charset_files").glob("chr*.dcm"))
AE_TITLE = "QUERIES"
SIGNS = ["a*b", "axb", "a?b", 'x="y"', "a = b", "100%_", "it's [1]", "Größe ß", "^a|b$", "a+b (c)"]
"""Texts with what matching, URLs, SQL and regular expressions give a meaning."""
SOUNDS: list[tuple[str, str]] = [
    ("jerome", "PatientName = 'Buc^Jérôme'"),
    ("Buk jerom", "PatientName = 'Buc^Jérôme'"),
    ("ruediger", "PatientName = 'Äneas^Rüdiger'"),
    ("rudiger äneas", "PatientName = 'Äneas^Rüdiger'"),
    ("yamada tarou", "PatientName LIKE 'Yamada^Tarou=%'"),
    ("jamada", "PatientName LIKE 'Yamada^Tarou=%'"),
    ("山田", "PatientName LIKE '%=山田^%'"),
    ("hong gildong", "PatientName LIKE 'Hong^Gildong=%'"),
    ("xiaodong", "PatientName LIKE 'Wang^XiaoDong=%'"),
    ("Διον", "PatientName = 'Διονυσιος'"),
]
"""Names by their sound, and whose they are."""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("queries")
    settings = archive(folder, archive={"ae_title": AE_TITLE})
    paths = [path for path in sorted(CORPUS.rglob("*")) if path.is_file() and path.stat().st_size < 2 << 20]
    (folder / "made").mkdir()
    for number, text in enumerate(SIGNS):
        said = {"StudyDescription": text, "SeriesDescription": text, "ImageComments": f"{text}\\{number}"}
        paths.append(
            make_instance(folder / "made" / f"{number}.dcm", SpecificCharacterSet="ISO_IR 192", StudyID="SIGNS", **said)
        )
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    try:
        list(import_files([*packaged_files(), *CHARSETS, *paths], writer, memory_bytes=4 << 20, only_dicom=True))
    finally:
        writer.close()
    extract(settings)
    with serving_web(settings) as running:
        yield running


@pytest.fixture(scope="module")
def receiver(web: Web) -> Iterator[Receiver]:
    place = web.settings.archive.state_dir.parent
    with running_receiver(place, {"archive": {"ae_title": AE_TITLE}, "extract": {"every_s": 0}}) as running:
        yield running


def queries(web: Web) -> dict[str, list[Asked]]:
    """By what they are about."""
    tables = {level: table_rows(web.settings, name) for level, name in TABLE.items()}
    for level, keywords in KEYWORDS.items():
        assert all(level_of(keyword) in (level, "PATIENT") for keyword in keywords)
    names = [(str(one.PatientName), tuple(charset or ())) for one, charset in map(_with_charset, CHARSETS) if charset]
    texts = [Asked("IMAGE", (("ImageComments", f"{text}\\{number}"),), f"ImageComments = '{_sql(text)}\\\\{number}'")
             for number, text in enumerate(SIGNS) if not set(text) & set("*?")]  # fmt: skip
    fuzzy = [Asked("STUDY", (("PatientName", text),), sql, fuzzy=True) for text, sql in SOUNDS]
    return {
        "single": list(single(tables)), "by tag": list(by_tag(tables)), "pairs": list(pairs(tables)),
        "moments": list(moments(tables)), "inside": list(inside(tables)), "private": list(private(tables)),
        "names": list(named(names)), "backslashes": texts, "fuzzy": fuzzy,
    }  # fmt: skip


def _sql(text: str) -> str:
    return text.replace("'", "\\'")


def _with_charset(path: Path) -> tuple[pydicom.Dataset, list[str] | None]:
    dataset = pydicom.dcmread(path)
    given = dataset.get("SpecificCharacterSet")
    charset = [given] if isinstance(given, str) else list(given or [])
    return dataset, charset if "PatientName" in dataset and "StudyInstanceUID" in dataset else None


def test_three_doors_give_the_same_answers(web: Web, receiver: Receiver, spark: SparkSession) -> None:
    table = queries(web)
    counts = {name: len(several) for name, several in table.items()}
    assert counts["single"] >= 200 and counts["pairs"] >= 60 and counts["inside"] >= 40, counts
    assert min(counts.values()) >= 7, counts
    register_tables(spark, web.settings)
    wrong, found = [], dict.fromkeys(table, 0)
    everything = [(name, one) for name, several in table.items() for one in several]
    expected = by_sql(spark, [one for _, one in everything])
    negotiated = sorted(everything, key=lambda pair: (pair[1].fuzzy, pair[1].combined))
    for (fuzzy, combined), group in groupby(negotiated, key=lambda pair: (pair[1].fuzzy, pair[1].combined)):
        with (
            associated(receiver, ExplicitVRLittleEndian, fuzzy=fuzzy, combined=combined) as explicit,
            associated(receiver, ImplicitVRLittleEndian, fuzzy=fuzzy, combined=combined) as implicit,
        ):
            for name, one in group:
                found[name] += len(expected[one])
                doors = {"C-FIND": by_find(explicit, one), "C-FIND in implicit VR": by_find(implicit, one)}
                if not combined:  # QIDO-RS has no such matching
                    doors["QIDO-RS"] = by_qido(web, one)
                wrong += [(door, one, sorted(answer ^ expected[one])) for door, answer in doors.items()
                          if answer != expected[one]]  # fmt: skip
    assert not wrong, "\n".join(map(str, [len(wrong), counts, *wrong[:80]]))
    assert all(found[name] >= counts[name] for name in table), (found, counts)  # nearly every one finds something


INTERPRETED = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}
"""One statement of hundreds of conditions is run once: compiled, it would take longer."""


def by_sql(spark: SparkSession, several: list[Asked]) -> dict[Asked, set[str]]:
    """All of one level in one statement; in another one, of which studies the conditions on `studies` are true."""
    found: dict[Asked, set[str]] = {}
    above = [one for one in several if one.above]
    with configured(spark, INTERPRETED):
        studies = dict(
            zip(above, sets(spark, "studies", [(one.above, "StudyInstanceUID") for one in above]), strict=True)
        )
        for level in TABLE:
            of_level = [one for one in several if one.level == level]
            wanted = [(one.sql, f"struct({UNIQUE_KEY[level]}, StudyInstanceUID)") for one in of_level]
            for one, rows in zip(of_level, sets(spark, TABLE[level], wanted), strict=True):
                found[one] = {uid for uid, study in rows if not one.above or study in studies[one]}
    return found


def sets(spark: SparkSession, table: str, wanted: list[tuple[str, str]]) -> list[list[Any]]:
    """What is of each (condition, expression) in the rows of a table."""
    columns = ", ".join(f"collect_set(CASE WHEN {condition} THEN {what} END)" for condition, what in wanted)
    row = spark.sql(f"SELECT {columns} FROM {table}").first()
    assert row is not None
    return list(row)


@contextmanager
def configured(spark: SparkSession, options: dict[str, str]) -> Iterator[None]:
    """With these options of the session."""
    before = {name: spark.conf.get(name) for name in options}
    for name, value in options.items():
        spark.conf.set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            spark.conf.set(name, value)


def by_qido(web: Web, one: Asked) -> set[str]:
    fuzzy = [("fuzzymatching", "true")] if one.fuzzy else []
    response = web.get(f"{PATH[one.level]}?{urlencode([*one.keys, *fuzzy])}")
    assert response.status_code in (200, 204), (one, response.text)
    tag = {"STUDY": "0020000D", "SERIES": "0020000E", "IMAGE": "00080018"}[one.level]
    return {match[tag]["Value"][0] for match in response.json()} if response.content else set()


@contextmanager
def associated(receiver: Receiver, syntax: UID, *, fuzzy: bool, combined: bool) -> Iterator[Association]:
    """With relational queries, and what else is wished, negotiated (PS3.4 C.5.1.1)."""
    wanted = SOPClassExtendedNegotiation()
    wanted.sop_class_uid = STUDY_ROOT
    wanted.service_class_application_information = bytes((1, combined, fuzzy))
    entity = AE()
    entity.add_requested_context(STUDY_ROOT, syntax)
    association = entity.associate("127.0.0.1", receiver.port, ae_title=AE_TITLE, ext_neg=[wanted])
    assert association.is_established
    yield association
    association.release()


def by_find(association: Association, one: Asked) -> set[str]:
    keys = {name: text.replace(",", "\\") if name.endswith("UID") else text for name, text in one.keys}
    identifier = build_identifier(keys, one.level)
    if one.charset:
        identifier.SpecificCharacterSet = list(one.charset)
    hold_reactor(association)  # each request lets go of it at its end
    *found, (last, _) = association.send_c_find(identifier, STUDY_ROOT)
    assert last.Status == 0, (one, hex(last.Status), last.get("ErrorComment"))
    assert all(answer is not None for _, answer in found), one
    return {str(answer[UNIQUE_KEY[one.level]].value) for _, answer in found if answer is not None}
