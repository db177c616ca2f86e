"""Recent arrivals: found at once, never twice, counts right, and always what extraction will say."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from sphere.catalog import index, recent
from sphere.catalog.query import Query
from sphere.catalog.schema import TABLES, Level
from sphere.catalog.service import QueryService
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.local import LocalStorage
from tests.support import catalog
from tests.support.examples import examples
from tests.support.extracted import extract
from tests.support.headers import packaged_files
from tests.support.landing import changed, new_member, slices

pytestmark = pytest.mark.unit

ASKED: dict[Level, tuple[str, ...]] = {
    "PATIENT": ("PatientName", "PatientID", "NumberOfPatientRelatedStudies", "NumberOfPatientRelatedInstances"),
    "STUDY": (
        "PatientName",
        "StudyDate",
        "ModalitiesInStudy",
        "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances",
        "NumberOfPatientRelatedStudies",
        "PatientComments",
        "StudyDescription",
    ),
    "SERIES": ("Modality", "SeriesNumber", "NumberOfSeriesRelatedInstances", "PatientID", "RequestAttributesSequence"),
    "IMAGE": ("InstanceNumber", "ImageType", "PatientID", "SeriesNumber", "PatientComments", "PixelSpacing"),
}


def archive(folder: Path, **sections: Any) -> Settings:
    return from_dict({**sections, "archive": {"ae_title": "TESTED", **sections.get("archive", {})}}, base=folder)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return archive(tmp_path / "a b")


@pytest.fixture
def writer(settings: Settings) -> Iterator[BundleWriter]:
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    yield writer
    writer.close()


def answers(service: QueryService, level: Level, match: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The answers, which must be as many as `count` says."""
    query = Query.build(level, match or {}, return_keys=ASKED[level])
    found = [match.identifier().to_json_dict() for match in service.find(query)]
    assert service.count(Query.build(level, match or {})) == len(found)
    return found


def everything(service: QueryService, study: str, uid: str) -> dict[str, Any]:
    """Answers of every kind, in an order that is theirs alone where they have one."""
    result: dict[str, Any] = {}
    for level in get_args(Level):
        for match in ({}, {"PatientComments": "*other*"}, {"PatientID": "SYN*", "NumberOfPatientRelatedStudies": 1}):
            result[f"{level} {match}"] = answers(service, level, match)
        for below in ({"SeriesInstanceUID": "1.2.3.1"}, {"Modality": "CT", "InstanceNumber": 2}):  # of relational ones
            result[f"{level} {below}"] = answers(service, level, below)
    result["study"] = answers(service, "IMAGE", {"StudyInstanceUID": study, "InstanceNumber": 1})
    result["instance"] = answers(service, "IMAGE", {"SOPInstanceUID": uid})
    result["stored"] = list(service.lookup_instances())
    return result


def variants() -> list[list[bytes]]:
    """Some instances of two studies, each with versions of other bytes that change or move it."""
    first, second = slices(2, seed=1), slices(2, seed=2, study=1)
    pool = []
    for data in (*first, *second):
        moved = changed(data, StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.1")
        pool.append([data, changed(data, PatientComments="another text", PatientID="SYN2"), moved])
    pool.append([b"no DICOM at all" * 20])
    return pool


POOL = variants()
STORES = st.tuples(
    st.integers(0, len(POOL) - 1), st.integers(0, 2), st.integers(0, 3), st.sampled_from(("store", "store", "extract"))
)


@pytest.mark.parametrize("policy", ["keep-first", "replace"])
@effort(max_examples=examples(4), deadline=None, suppress_health_check=list(HealthCheck))
@given(stores=st.lists(STORES, min_size=1, max_size=8))
def test_answers_are_those_after_extraction(
    policy: Literal["keep-first", "replace"], stores: list[tuple[int, int, int, str]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        now = archive(Path(name), ingest={"on_conflict": policy})
        later = archive(
            Path(name),
            ingest={"on_conflict": policy},
            archive={"state_dir": "later"},
            catalog={"root": (Path(name) / "later" / "catalog").as_uri()},
        )
        writer = BundleWriter(open_storage(now.storage.root), now)
        with QueryService(now) as service:
            for number, (which, version, jitter, what) in enumerate(stores):
                versions = POOL[which]
                data = versions[version % len(versions)]
                writer.store(new_member(data, second=number - 1.5 * jitter))
                service.count(Query.build("STUDY", {"PatientID": "SYN*"}))
                if what == "extract":
                    extract(now)
            extract(later)
            uid = POOL[0][0]
            study = "1.2.3"
            seen = everything(service, study, str(_uid(uid)))
            with QueryService(later) as reference:
                assert seen == everything(reference, study, str(_uid(uid)))
        writer.close()


def _uid(data: bytes) -> str:
    return new_member(data).SOPInstanceUID


def test_found_when_stored(settings: Settings, writer: BundleWriter) -> None:
    with QueryService(settings) as service:
        assert answers(service, "IMAGE") == []
        for number, data in enumerate(slices(3), 1):
            writer.store(new_member(data))
            assert len(answers(service, "IMAGE")) == number
            [study] = answers(service, "STUDY", {"StudyInstanceUID": new_member(data).StudyInstanceUID})
            assert study["00201208"]["Value"] == [number]


def test_bundles_begun_and_sealed_while_serving(settings: Settings) -> None:
    with QueryService(settings) as service:
        for number, data in enumerate(slices(4), 1):
            writer = BundleWriter(open_storage(settings.storage.root), settings)
            writer.store(new_member(data))
            assert len(answers(service, "IMAGE")) == number
            writer.close()
            assert len(answers(service, "IMAGE")) == number


def test_never_twice_in_the_middle_of_a_batch(settings: Settings, writer: BundleWriter) -> None:
    members = [new_member(data) for data in slices(4)]
    for member in members:
        writer.store(member)
    extract(settings)
    more = [new_member(data) for data in slices(6)]
    stored: list[MemberRecord] = [writer.store(member) for member in more[4:]]
    shown = {member.SOPInstanceUID for member in members} | {stored[0].SOPInstanceUID}
    bundles = catalog.table_positions(settings)
    extract(settings, only=lambda record: record.SOPInstanceUID in shown)
    catalog.write_table(settings, TABLES["bundles"], bundles)
    with QueryService(settings) as service:
        assert len(answers(service, "IMAGE")) == 6
        assert answers(service, "STUDY")[0]["00201208"]["Value"] == [6]
        writer.store(more[5])
        assert len(answers(service, "IMAGE")) == 6


def test_no_more_than_the_bound_is_held(
    settings: Settings, writer: BundleWriter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recent, "MAX_MEMBERS", 2)
    monkeypatch.setattr(recent, "CHUNK", 1)
    monkeypatch.setattr(index, "REFRESH_WAIT_S", 60.0)  # the index at hand has only what the bound allows
    for data in slices(4):
        writer.store(new_member(data))
    with QueryService(settings) as service:
        assert len(answers(service, "IMAGE")) == 2
        assert len(answers(service, "IMAGE")) == 2
        extract(settings)
        assert len(answers(service, "IMAGE")) == 4
    assert caplog.text.count("wait for extraction") == 1


def test_an_older_version_sent_anew_does_not_come_back(tmp_path: Path) -> None:
    settings = archive(tmp_path, ingest={"on_conflict": "replace"})
    old, corrected = POOL[0][:2]
    with QueryService(settings) as service:
        for number, data in enumerate((old, corrected, old)):
            writer = BundleWriter(open_storage(settings.storage.root), settings)
            writer.store(new_member(data, second=number))
            writer.close()
            if number < 2:
                extract(settings)
        [found] = answers(service, "IMAGE")
        assert found["00104000"]["Value"] == ["another text"]


def test_bytes_that_are_not_published_yet(
    settings: Settings, writer: BundleWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "RETRY_S", 0.0)
    read = LocalStorage.read

    def hidden(self: LocalStorage, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return b"" if path.endswith(".tar") else read(self, path, offset, length)

    member = new_member(slices(1)[0])
    with QueryService(settings) as service:
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "read", hidden)
            writer.store(member)
            [found] = answers(service, "IMAGE", {"SOPInstanceUID": member.SOPInstanceUID})
            assert "Value" not in found["00100020"], "the journal knows no PatientID"
            assert answers(service, "STUDY")[0]["00201208"]["Value"] == [1]
        [found] = answers(service, "IMAGE", {"StudyInstanceUID": member.StudyInstanceUID})
        assert found["00100020"]["Value"]
        assert len(answers(service, "STUDY", {"PatientID": found["00100020"]["Value"][0]})) == 1


def test_threads_that_store_and_ask(settings: Settings, writer: BundleWriter) -> None:
    data = slices(24)
    missed: list[int] = []
    with QueryService(settings) as service:

        def store(part: int) -> None:
            for one in data[part::3]:
                uid = writer.store(new_member(one)).SOPInstanceUID
                if len(answers(service, "IMAGE", {"SOPInstanceUID": uid})) != 1:
                    missed.append(part)

        threads = [threading.Thread(target=store, args=(part,)) for part in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            [*study] = service.find(Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"]))
            assert len(study) <= 1
        for thread in threads:
            thread.join()
        assert not missed
        assert answers(service, "STUDY")[0]["00201208"]["Value"] == [24]


def test_a_damaged_journal_hides_no_other(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    first, second = slices(2)
    for data in (first, second):
        writer = BundleWriter(open_storage(settings.storage.root), settings)
        record = writer.store(new_member(data))
        if data is first:
            with (
                (Path(settings.storage.root.removeprefix("file://").replace("%20", " ")) / record.bundle)
                .with_suffix(".journal")
                .open("ab") as journal
            ):
                journal.write(b"no record\n")
            writer.close()
    with QueryService(settings) as service:
        assert len(answers(service, "IMAGE")) == 1
    writer.close()
    assert caplog.text.count("leave out a bundle") == 1


def test_dates_of_several_values(settings: Settings, writer: BundleWriter) -> None:
    dates = ["20240101", "20240201"]
    data = changed(slices(1)[0], DateOfLastCalibration=dates, PatientBirthDate="")
    writer.store(new_member(data))
    with QueryService(settings) as service:
        query = Query.build("SERIES", return_keys=("DateOfLastCalibration", "PatientBirthDate"), relational=True)
        [found] = [match.identifier() for match in service.find(query)]
    assert list(found.DateOfLastCalibration) == dates


def test_the_packaged_files_are_answered_before_and_after_extraction(settings: Settings, writer: BundleWriter) -> None:
    """Whatever real headers hold goes through the overlay too."""
    for file in packaged_files():
        writer.store(new_member(file.read_bytes()))
    with QueryService(settings) as service:
        before = {level: service.count(Query.build(level)) for level in get_args(Level)}
    assert before["IMAGE"] > 20
    extract(settings)
    with QueryService(settings) as service:
        assert {level: service.count(Query.build(level)) for level in get_args(Level)} == before
