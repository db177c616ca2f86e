"""Without a catalog: the answers of the tables, from headers read for each query."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydicom import dcmread, dcmwrite

from sphere.archive import Archive
from sphere.catalog import files
from sphere.catalog.answer import Match
from sphere.catalog.arrivals import HeadersOfMembers
from sphere.catalog.files import FileQueries
from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Query
from sphere.catalog.schema import LEVELS, Level
from sphere.cli import main
from sphere.conf.errors import CatalogError, SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.storage.local import LocalStorage
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, mixture, new_member, slices
from tests.support.web import serving_web

pytestmark = pytest.mark.unit


def without_catalog(settings: Settings, *, workers: int = 0) -> Settings:
    """The same archive in mode files."""
    catalog = settings.catalog.model_copy(update={"mode": "files", "scan_workers": workers})
    return settings.model_copy(update={"catalog": catalog})


@pytest.fixture(scope="module", params=["keep-first", "replace"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """New instances, copies, other versions, moved and rejected ones, of several patients; extracted."""
    settings = archive(tmp_path_factory.mktemp("mixed"), ingest={"on_conflict": request.param})
    mixture(settings)
    more = [
        changed(data, PatientID=f"P{number % 2}", PatientName=f"Name^{number}", Modality=["MR", "SR"][number % 2])
        for number, data in enumerate(slices(6, seed=7, study=5))
    ]
    land(settings, [new_member(data, second=number) for number, data in enumerate(more)])
    extract(settings)
    return settings


@pytest.fixture(scope="module")
def both(mixed: Settings) -> Iterator[tuple[Queries, Queries]]:
    """The tables, and the bundles."""
    with open_queries(mixed) as tables, open_queries(without_catalog(mixed)) as bundles:
        yield tables, bundles


def told(matches: Iterator[Match]) -> list[Any]:
    return [match.identifier().to_json_dict() for match in matches]


KEYS = {
    "PATIENT": ["PatientName", "NumberOfPatientRelatedStudies", "NumberOfPatientRelatedInstances", "00080060"],
    "STUDY": ["ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances", "StudyDate",
              "SOPClassesInStudy", "NumberOfPatientRelatedInstances", "ReferencedStudySequence", "RetrieveAETitle"],
    "SERIES": ["Modality", "NumberOfSeriesRelatedInstances", "PatientName", "ModalitiesInStudy", "SeriesNumber"],
    "IMAGE": ["InstanceNumber", "PatientComments", "ModalitiesInStudy", "NumberOfSeriesRelatedInstances",
              "NumberOfPatientRelatedStudies", "PixelSpacing", "ImageType", "SOPClassUID"],
}  # fmt: skip
ASKED: list[tuple[Level, dict[str, Any]]] = [
    *((level, {}) for level in LEVELS),
    ("PATIENT", {"PatientName": "name*"}),
    ("PATIENT", {"PatientID": '""'}),
    ("STUDY", {"ModalitiesInStudy": "MR"}),
    ("STUDY", {"NumberOfStudyRelatedInstances": 6}),
    ("STUDY", {"NumberOfPatientRelatedStudies": 1}),
    ("SERIES", {"Modality": "CT", "PatientName": "*"}),
    ("IMAGE", {"PatientComments": "corrected*"}),
    ("IMAGE", {"InstanceNumber": 2, "ModalitiesInStudy": "CT"}),
    ("IMAGE", {"SOPInstanceUID": ["1.2.3"]}),
    ("IMAGE", {"NumberOfPatientRelatedStudies": 1, "Modality": "MR"}),
]


@pytest.mark.parametrize(("level", "match"), ASKED)
def test_the_answers_of_the_tables(both: tuple[Queries, Queries], level: Level, match: dict[str, Any]) -> None:
    tables, bundles = both
    query = Query.build(level, match, return_keys=KEYS[level], empty_values=True)
    expected = told(tables.find(query))
    assert told(bundles.find(query)) == expected
    assert bundles.count(query) == len(expected)
    assert expected or match.keys() & {"SOPInstanceUID", "PatientComments", "PatientID"}


def test_places_are_those_of_the_tables(both: tuple[Queries, Queries]) -> None:
    tables, bundles = both
    every = list(tables.lookup_instances())
    assert list(bundles.lookup_instances()) == every
    one = every[3]
    for wanted in ({"study": [one.StudyInstanceUID]}, {"series": [one.SeriesInstanceUID]},
                   {"sop": [one.SOPInstanceUID, every[0].SOPInstanceUID]}, {"sop": ["1.9"]}):  # fmt: skip
        assert list(bundles.lookup_instances(**wanted)) == list(tables.lookup_instances(**wanted))


@pytest.mark.parametrize("mixed", ["keep-first"], indirect=True)
def test_over_http_as_well(mixed: Settings) -> None:
    answers = []
    for settings in (mixed, without_catalog(mixed)):
        with serving_web(settings) as web:
            studies = web.get("/studies?includefield=PatientComments").json()
            uid = studies[0]["0020000D"]["Value"][0]
            for one in studies:
                del one["00081190"]  # RetrieveURL: another port
            found = web.get(f"/studies/{uid}/metadata").json()
            answers.append((studies, sorted(one["00080018"]["Value"][0] for one in found)))
    assert answers[0] == answers[1]
    assert all(answers[0])


def test_private_keys_on_the_command_line(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    for number, block in enumerate((0x10, 0x1F)):
        dataset = dcmread(BytesIO(slices(2, seed=number, study=number)[number]))
        dataset.add_new(0x00290000 | block, "LO", "ACME")
        dataset.add_new(0x00290001 | block << 8, "LO", f"value {number}")
        buffer = BytesIO()
        dcmwrite(buffer, dataset)
        land(settings, [new_member(buffer.getvalue())])
    config = tmp_path / "sphere.toml"
    config.write_text('[catalog]\nmode = "files"\nscan_workers = 0\n')

    def rows(*keys: str) -> list[dict[str, str]]:
        options = [part for key in keys for part in ("-k", key)]
        run = CliRunner().invoke(main, ["--config", str(config), "find", "--format", "json", *options])
        assert run.exit_code == 0, run.output
        return json.loads(run.stdout)  # type: ignore[no-any-return]

    assert len(rows("0029,0010=ACME", "0029,1001=value*")) == 2
    [one] = rows("0029,0010=ACME", "0029,1001=value 1", "PatientName")
    assert list(one.values()).count("value 1") == 1
    assert rows("0029,0010=OTHER", "0029,1001=value*") == []


def test_what_lands_is_found_at_once_and_uids_narrow_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = without_catalog(archive(tmp_path))
    reads: list[str] = []
    plain = LocalStorage.read

    def counted(self: LocalStorage, path: str, offset: int = 0, length: int | None = None) -> bytes:
        reads.append(path)
        return plain(self, path, offset, length)

    with open_queries(settings) as bundles:
        query = Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"])
        assert bundles.count(query) == 0
        for study in (1, 2):
            land(settings, [new_member(data) for data in slices(3, seed=study, study=study)])
            assert bundles.count(query) == study
        uid = str(next(bundles.find(query)).identifier().StudyInstanceUID)
        monkeypatch.setattr(LocalStorage, "read", counted)
        [found] = bundles.find(Query.build("STUDY", {"StudyInstanceUID": uid}, return_keys=["PatientName"]))
        assert str(found.identifier().StudyInstanceUID) == uid
        assert len([path for path in reads if path.endswith(".tar")]) == 3


def test_the_first_answers_come_before_the_last_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "STEP", 2)
    settings = without_catalog(archive(tmp_path))
    land(settings, [new_member(data) for study in range(12) for data in slices(1, seed=study, study=study)])
    read: list[str] = []
    plain = HeadersOfMembers._header
    monkeypatch.setattr(
        HeadersOfMembers, "_header", lambda self, record: read.append(record.SOPInstanceUID) or plain(self, record)
    )
    with open_queries(settings) as bundles:
        answers = bundles.find(Query.build("IMAGE", {"Modality": "CT"}))
        for number in range(12):
            next(answers)
            assert len(read) == number // 2 * 2 + 2
        assert next(answers, None) is None
        read.clear()
        nothing = Query.build("IMAGE", {"Modality": "NOTHING"})
        assert list(bundles.find(nothing, cancelled=lambda: len(read) >= 6)) == []
        assert len(read) == 6  # although nothing matched
        assert list(bundles.find(Query.build("PATIENT"), cancelled=lambda: len(read) >= 8)) == []


@pytest.mark.parametrize("mixed", ["keep-first"], indirect=True)
def test_processes_beside_this_one_give_the_same_in_order(mixed: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ALONE", 0)
    monkeypatch.setattr(files, "STEP", 1)
    query = Query.build("IMAGE", {"00291001,ACME": '""'}, return_keys=KEYS["IMAGE"], empty_values=True)
    with open_queries(mixed) as tables, open_queries(without_catalog(mixed, workers=1)) as bundles:
        assert isinstance(bundles, FileQueries)
        expected = told(tables.find(query))
        answers = bundles.find(query)
        first = next(answers)
        assert [first.identifier().to_json_dict(), *told(answers)] == expected
        cancelled = bundles.find(query)
        next(cancelled)
        cancelled.close()
        pool = bundles._scanner._pool
        assert pool is not None
        [process] = pool._processes.values()
        process.kill()
        process.join()
        with pytest.raises(CatalogError, match="ask again"):
            list(bundles.find(query))
        assert told(bundles.find(query)) == expected


@pytest.fixture
def two_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study is a step, and every step is for a process beside this one."""
    monkeypatch.setattr(files, "ALONE", 0)
    monkeypatch.setattr(files, "STEP", 1)


@pytest.mark.usefixtures("two_beside")
def test_two_processes_give_the_answers_of_the_tables(mixed: Settings) -> None:
    with open_queries(mixed) as tables, open_queries(without_catalog(mixed, workers=2)) as bundles:
        for level, match in ASKED:
            query = Query.build(level, match, return_keys=KEYS[level], empty_values=True)
            expected = told(tables.find(query))
            assert told(bundles.find(query)) == expected, (level, match)
            assert bundles.count(query) == len(expected)
        assert list(bundles.lookup_instances()) == list(tables.lookup_instances())
        assert len(_pool(bundles)._processes) == 2


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """STUDIES studies of one instance, not in the order of their UIDs."""
    settings = without_catalog(archive(tmp_path_factory.mktemp("many")), workers=2)
    land(settings, [new_member(slices(1, seed=study, study=study)[0]) for study in reversed(range(STUDIES))])
    return settings


STUDIES = 40
AHEAD = 2 * 2 + 1  # steps that two processes are given before their first result is awaited


@pytest.mark.usefixtures("two_beside")
def test_two_processes_give_matches_as_they_come(many: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    plain = files._steps
    monkeypatch.setattr(files, "_steps", lambda members: (given.append(part) or part for part in plain(members)))
    query = Query.build("IMAGE", {"Modality": "CT"}, relational=True)
    with open_queries(many) as bundles:
        uids = []
        for number, found in enumerate(bundles.find(query), 1):
            uids.append(str(found.identifier().StudyInstanceUID))
            assert len(given) <= min(STUDIES, number - 1 + AHEAD), "no further ahead than that"
        assert (len(uids), uids) == (STUDIES, sorted(uids))
        given.clear()
        gone = bundles.find(query)
        next(gone)
        gone.close()
        assert len(given) <= AHEAD, "nothing is read for who is gone"
        assert told(bundles.find(query, cancelled=lambda: True)) == []


@pytest.mark.usefixtures("two_beside")
def test_one_of_two_processes_dies(many: Settings) -> None:
    """Queries at work say so; those that come after them are answered, and not disturbed by who notices late."""
    query = Query.build("IMAGE", {"Modality": "CT"}, relational=True)
    with open_queries(many) as bundles, ThreadPoolExecutor(2) as threads:
        expected = told(bundles.find(query))
        assert len(expected) == STUDIES
        broken = _pool(bundles)
        one, other = broken._processes.values()
        for process in (one, other):
            os.kill(process.pid or 0, signal.SIGSTOP)
        asked = [threads.submit(told, bundles.find(query)) for _ in range(2)]
        while len(broken._pending_work_items) < 2 * AHEAD:
            time.sleep(0.01)
        one.kill()
        os.kill(other.pid or 0, signal.SIGCONT)
        for answers in asked:
            with pytest.raises(CatalogError, match="a process that reads headers died; ask again"):
                answers.result(30)
        after = bundles.find(query)
        assert next(after).identifier().to_json_dict() == expected[0]
        assert isinstance(bundles, FileQueries)
        bundles._scanner._drop(broken)  # as who waited for another step of it
        assert told(after) == expected[1:]
        assert _pool(bundles) is not broken
        other.join(30)
        assert not other.is_alive(), "nobody is left of those who were two"


def _pool(bundles: Queries) -> ProcessPoolExecutor:
    assert isinstance(bundles, FileQueries)
    pool = bundles._scanner._pool
    assert pool is not None
    return pool


def test_what_needs_a_catalog_says_so(tmp_path: Path) -> None:
    settings = from_dict({"catalog": {"mode": "files"}}, base=tmp_path)
    with Archive(settings) as opened:
        assert list(opened.find("STUDY")) == []
        for call in (opened.spark, opened.extract, lambda: opened.sql("SELECT 1")):
            with pytest.raises(SettingsError, match=r'catalog.mode is "files": there are no tables'):
                call()
        with pytest.raises(CatalogError, match="no earlier states are kept"):
            list(opened.find("STUDY", as_of=1))
    config = tmp_path / "sphere.toml"
    config.write_text('[catalog]\nmode = "files"\n')
    result = CliRunner().invoke(main, ["--config", str(config), "extract"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert CliRunner().invoke(main, ["--config", str(config), "find"]).stdout.strip().endswith("(0 rows)")
