"""What was deleted is not shown: every answer is that of an archive which never had it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from sphere.catalog.files import FileQueries
from sphere.catalog.grant import Grant
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.catalog.tombstones import Tombstones, open_tombstones
from sphere.conf.errors import CatalogError, StorageError
from sphere.conf.settings import Settings
from sphere.ingest.storage.local import LocalStorage
from tests.support.examples import examples
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices
from tests.unit.test_recent import POOL, everything
from tests.unit.test_recent import archive as plain_archive

pytestmark = pytest.mark.unit

STUDIES = tuple([changed(data, PatientID="SYN7") for data in slices(5 - seed, seed=seed)] for seed in (2, 3))
"""Two studies of one patient."""
UIDS = [new_member(versions[0]).SOPInstanceUID for versions in POOL]
STEPS = st.tuples(
    st.integers(0, len(POOL) - 1),
    st.integers(0, 2),
    st.sampled_from(("store", "store", "delete", "restore", "extract")),
)


def uid_of(data: bytes) -> str:
    return new_member(data).SOPInstanceUID


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = archive(tmp_path)
    land(settings, [new_member(data) for data in STUDIES[0]])
    extract(settings)
    land(settings, [new_member(data) for data in STUDIES[1]])
    return settings


@pytest.fixture
def graves(settings: Settings) -> Iterator[Tombstones]:
    one = open_tombstones(settings)
    yield one
    one.close()


@pytest.mark.parametrize("policy", ["keep-first", "replace"])
@effort(max_examples=examples(3), deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, min_size=2, max_size=10))
def test_answers_are_those_of_an_archive_without_it(
    policy: Literal["keep-first", "replace"], steps: list[tuple[int, int, str]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        now = plain_archive(Path(name), ingest={"on_conflict": policy})
        later = plain_archive(
            Path(name),
            ingest={"on_conflict": policy},
            archive={"state_dir": "later"},
            catalog={"root": (Path(name) / "later" / "catalog").as_uri()},
        )
        deleted: set[str] = set()
        graves = open_tombstones(now)
        with QueryService(now) as service:
            for number, (which, version, what) in enumerate(steps):
                uid, versions = UIDS[which], POOL[which]
                if what == "store":
                    land(now, [new_member(versions[version % len(versions)], second=number)])
                elif what == "extract":
                    extract(now)
                elif what == "delete":
                    graves.delete(list(service.lookup_instances(sop=[uid])), by="test")
                    deleted |= graves.deleted([uid])
                else:
                    graves.restore([uid], by="test")
                    deleted.discard(uid)
                service.count(Query.build("STUDY", {"PatientID": "SYN*"}))
            seen = everything(service, "1.2.3", UIDS[0])
        extract(later, only=lambda record: record.SOPInstanceUID not in deleted)
        with QueryService(later) as reference:
            assert seen == everything(reference, "1.2.3", UIDS[0])
        graves.close()


def counts(service: QueryService | FileQueries) -> dict[str, int]:
    """By level, how many there are; and the instances that the roll-up of the patient says."""
    found = {level: service.count(Query.build(level)) for level in ("PATIENT", "STUDY", "SERIES", "IMAGE")}
    query = Query.build("PATIENT", return_keys=["NumberOfPatientRelatedInstances"])
    total = sum(match.identifier().NumberOfPatientRelatedInstances for match in service.find(query))
    return {**found, "total": total}


def expected(patients: int, studies: int, instances: int) -> dict[str, int]:
    return {"PATIENT": patients, "STUDY": studies, "SERIES": studies, "IMAGE": instances, "total": instances}


@pytest.mark.parametrize("mode", ["delta", "files"])
def test_deleted_and_restored_in_every_process(settings: Settings, graves: Tombstones, mode: str) -> None:
    opened: Any = QueryService if mode == "delta" else FileQueries
    with opened(settings) as one, opened(settings) as other:
        assert counts(one) == counts(other) == expected(1, 2, 5)
        graves.delete(list(one.lookup_instances(sop=[uid_of(STUDIES[0][1])])), by="test")
        assert counts(one) == counts(other) == expected(1, 2, 4)
        graves.delete(list(one.lookup_instances(study=[new_member(STUDIES[1][0]).StudyInstanceUID])), by="test")
        assert counts(one) == counts(other) == expected(1, 1, 2)
        assert list(one.lookup_instances(sop=[uid_of(STUDIES[1][0])])) == []
        with opened(settings) as late:
            assert counts(late) == expected(1, 1, 2)
        graves.delete(list(one.lookup_instances()), by="test")
        assert counts(one) == counts(other) == expected(0, 0, 0)
        graves.restore([found.SOPInstanceUID for found in list(graves.find())], by="test")
        assert counts(one) == counts(other) == expected(1, 2, 5)


def test_what_arrives_though_it_is_deleted_is_not_shown(settings: Settings, graves: Tombstones) -> None:
    with QueryService(settings) as service:
        graves.delete(list(service.lookup_instances()), by="test")
        land(settings, [new_member(data, second=9) for data in (*STUDIES[0], *STUDIES[1])])
        assert counts(service) == expected(0, 0, 0)
        extract(settings)
        assert counts(service) == expected(0, 0, 0)
        graves.restore([uid_of(STUDIES[0][0])], by="test")
        assert counts(service) == expected(1, 1, 1)


def test_headers_are_not_shown(settings: Settings, graves: Tombstones) -> None:
    study = new_member(STUDIES[0][0]).StudyInstanceUID
    with QueryService(settings) as service:
        graves.delete(list(service.lookup_instances(sop=[uid_of(STUDIES[0][0])])), by="test")
        found = [one.SOPInstanceUID for one, _ in service.lookup_headers(study=study)]
        assert sorted(found) == sorted(uid_of(data) for data in STUDIES[0][1:])
        assert list(service.lookup_headers(study=study, sop=uid_of(STUDIES[0][0]))) == []


def test_earlier_versions_do_not_show_it(settings: Settings, graves: Tombstones) -> None:
    extract(settings)
    with QueryService(settings) as service:
        assert service.count(Query.build("IMAGE"), as_of=0) == 3
        graves.delete(list(service.lookup_instances(sop=[uid_of(STUDIES[0][0])])), by="test")
        assert service.count(Query.build("IMAGE"), as_of=0) == 2
        assert service.count(Query.build("IMAGE"), as_of=1) == 4
        query = Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"])
        [study] = service.find(query, as_of=0)
        assert study.identifier().NumberOfStudyRelatedInstances == 2
        assert uid_of(STUDIES[0][0]) not in [one.SOPInstanceUID for one in service.lookup_instances(as_of=0)]
    with QueryService(settings) as anew:
        assert anew.count(Query.build("IMAGE"), as_of=0) == 2


def test_who_sees_a_part_does_not_see_it(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    land(settings, [replace(new_member(data), collections=("trial",)) for data in STUDIES[0]])
    extract(settings)
    graves = open_tombstones(settings)
    with QueryService(settings) as service:
        part = service.restricted(Grant(frozenset({"trial"})))
        assert part.count(Query.build("IMAGE")) == 3
        graves.delete(list(service.lookup_instances(sop=[uid_of(STUDIES[0][0])])), by="test")
        assert part.count(Query.build("IMAGE")) == 2
        [study] = part.find(Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"]))
        assert study.identifier().NumberOfStudyRelatedInstances == 2
    graves.close()


def test_nothing_is_answered_before_it_is_known_what_was_deleted(
    settings: Settings, graves: Tombstones, monkeypatch: pytest.MonkeyPatch
) -> None:
    with QueryService(settings) as service:
        graves.delete(list(service.lookup_instances()), by="test")
    walk = LocalStorage.walk

    def refuse(self: LocalStorage, prefix: str = "", **more: Any) -> Any:
        if prefix.startswith("tombstones"):
            raise StorageError("the folder is away")
        return walk(self, prefix, **more)

    with QueryService(settings) as service:
        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, "walk", refuse)
            with pytest.raises(CatalogError, match="what was deleted cannot be read: the folder is away"):
                service.count(Query.build("IMAGE"))
        assert service.count(Query.build("IMAGE")) == 0
        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, "walk", refuse)
            assert service.count(Query.build("IMAGE")) == 0
