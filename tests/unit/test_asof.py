"""Queries against an earlier catalog: a cohort can be asked again."""

from __future__ import annotations

import io
import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from deltalake import DeltaTable
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom.dsutils import encode

import sphere
from sphere.archive import Archive
from sphere.catalog import index as index_module
from sphere.catalog import index_folder
from sphere.catalog.asof import parse_as_of
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.cli import main
from sphere.conf.errors import CatalogError, QueryError, Refused
from sphere.conf.settings import Settings, Snapshot
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import open_storage
from sphere.scp.find import FindAnswer, FindRequest, FindService
from sphere.scp.policy import Policy
from sphere.scp.retrieve.identifier import Selection
from sphere.scp.retrieve.locate import Locator
from tests.support.catalog import archive
from tests.support.extracted import extract
from tests.support.landing import changed, land, new_member, slices
from tests.support.web import serving_web

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Three batches of two instances; then one more and another version of one, which are not extracted."""
    settings = archive(tmp_path_factory.mktemp("grown"))
    data = slices(7)
    for batch in range(3):
        writer = BundleWriter(open_storage(settings.storage.root), settings)
        for number in (2 * batch, 2 * batch + 1):
            writer.store(new_member(data[number], second=number))
        writer.close()
        extract(settings)
        time.sleep(0.002)
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    writer.store(new_member(data[6], second=6))
    writer.store(new_member(changed(data[0], PatientComments="later"), second=7))
    writer.close()
    return settings


def committed(settings: Settings, version: int) -> datetime:
    """When a version of `bundles` was committed."""
    history = DeltaTable(f"{settings.catalog_root}/bundles").history()
    [millis] = [commit["timestamp"] for commit in history if commit["version"] == version]
    return datetime.fromtimestamp(millis / 1000, timezone.utc)


def test_versions_and_times(grown: Settings) -> None:
    with QueryService(grown) as service:
        query = Query.build("IMAGE")
        assert service.count(query) == 7
        for version in (0, 1, 2):
            at = committed(grown, version)
            naive = at.replace(tzinfo=None)
            counts = [service.count(query, as_of=when) for when in (version, at, naive, at + timedelta(milliseconds=1))]
            assert counts == [2 * version + 2] * 4
            assert len(list(service.lookup_instances(as_of=version))) == 2 * version + 2
            [study] = service.find(Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"]), as_of=version)
            assert study.identifier().NumberOfStudyRelatedInstances == 2 * version + 2
        assert service.count(query) == 7


@pytest.mark.parametrize("as_of", [3, -1, datetime(2001, 1, 1), datetime(2001, 1, 1, tzinfo=timezone.utc)])
def test_no_such_version(grown: Settings, as_of: Any) -> None:
    with QueryService(grown) as service, pytest.raises(CatalogError, match="versions 0 to 2 are known"):
        service.count(Query.build("STUDY"), as_of=as_of)


def test_nothing_extracted(tmp_path: Path) -> None:
    with QueryService(archive(tmp_path)) as service, pytest.raises(CatalogError, match="nothing was extracted yet"):
        service.count(Query.build("STUDY"), as_of=0)


def test_few_earlier_indexes_are_kept(grown: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index_module, index_folder):
        monkeypatch.setattr(module, "PAST", 1)
    folder = grown.archive.state_dir / "index"
    for path in folder.glob("past-*"):
        path.unlink()
    with QueryService(grown) as service:
        for version in (0, 1, 2, 0):
            assert service.count(Query.build("IMAGE"), as_of=version) == 2 * version + 2
        assert len(list(folder.glob("past-*"))) <= 1
        [kept] = folder.glob("past-*")
    kept.write_bytes(b"damaged")
    with QueryService(grown) as service:
        assert service.count(Query.build("IMAGE"), as_of=0) == 2


def test_an_earlier_version_is_looked_up_once_a_while(grown: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    plain = index_folder.snapshots_as_of
    monkeypatch.setattr(index_folder, "snapshots_as_of", lambda *a: looks.append(a[2]) or plain(*a))
    soon = datetime.now(timezone.utc)
    with QueryService(grown) as service:
        for as_of in (0, 1, 0, soon, soon):
            service.count(Query.build("STUDY"), as_of=as_of)
    assert looks == [0, 1, soon, soon]  # what is committed now may belong to a time of now


def test_python_api(grown: Settings) -> None:
    opened: Archive = sphere.Archive(grown)
    asked = {"as_of": 1, "return_keys": ["NumberOfSeriesRelatedInstances"]}
    [series] = opened.find("SERIES", {"Modality": "CT"}, **asked)  # type: ignore[arg-type]
    assert series["NumberOfSeriesRelatedInstances"] == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        ("2026-01-31", datetime(2026, 1, 31)),
        ("2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=timezone.utc)),
        ("2026-01-31T12:00:00+01:00", datetime(2026, 1, 31, 11, tzinfo=timezone.utc)),
    ],
)
def test_versions_and_times_as_text(text: str, expected: Any) -> None:
    assert parse_as_of(text) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "-1", "1.5", "2026-13-01"])
def test_neither_version_nor_time(text: str) -> None:
    with pytest.raises(QueryError, match="neither a version"):
        parse_as_of(text)


def identifier(**attributes: str) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def test_an_ae_title_is_bound_to_a_snapshot(grown: Settings) -> None:
    """C-FIND and C-MOVE under that title answer from there; so does the answer's RetrieveAETitle; nothing is stored."""
    bound = [Snapshot(ae_title="FIRST", as_of=0), Snapshot(ae_title="NEVER", as_of=99)]
    asked = identifier(QueryRetrieveLevel="STUDY", NumberOfStudyRelatedInstances="", RetrieveAETitle="")
    with QueryService(grown) as service:
        finds, locator = FindService(service, bound), Locator(service, bound)

        def answers(called: str) -> list[FindAnswer]:
            data = encode(asked, False, True) or b""
            request = FindRequest(
                model="STUDY_ROOT", identifier=data, transfer_syntax=ExplicitVRLittleEndian, called_ae=called
            )
            return list(finds.answers(request, cancelled=lambda: False))

        for called, title, count in (("FIRST", "FIRST", 2), ("TESTED", "TESTED", 7), ("OTHER", "TESTED", 7)):
            [answer] = answers(called)
            assert answer.identifier is not None
            assert answer.identifier.RetrieveAETitle == title
            assert answer.identifier.NumberOfStudyRelatedInstances == count
            study = str(answer.identifier.StudyInstanceUID)
            assert len(locator.locate(Selection("STUDY", study=(study,)), called)) == count
        [unknown] = answers("NEVER")
        assert (unknown.status, unknown.comment) == (
            0x0110,
            "the catalog has no version as of 99: versions 0 to 2 are known",
        )
        with pytest.raises(CatalogError, match="no version as of 99"):
            locator.locate(Selection("STUDY", study=(study,)), "NEVER")
    policy = Policy(grown.model_copy(update={"snapshots": tuple(bound)}))
    member = new_member(slices(1)[0])
    assert policy.admit(member, via="dimse", called_ae="TESTED") is member
    with pytest.raises(Refused, match="FIRST is a snapshot"):
        policy.admit(member, via="dimse", called_ae="FIRST")


def test_command_line(grown: Settings, tmp_path: Path) -> None:
    config = tmp_path / "sphere.toml"
    state = grown.archive.state_dir
    config.write_text(f'[archive]\nstate_dir = "{state}"\n[storage]\nroot = "{grown.storage.root}"\n')

    def sphere_find(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["--config", str(config), "find", "--format", "json", *arguments])

    for options, count in (
        ((), "7"),
        (("--as-of", "1"), "4"),
        (("--as-of", f"{committed(grown, 0).isoformat()}"), "2"),
    ):
        result = sphere_find("--level", "SERIES", "-k", "PatientName=*", *options)
        assert result.exit_code == 0, result.output
        [row] = json.loads(result.stdout)
        assert row["NumberOfSeriesRelatedInstances"] == count
        assert row["Modality"] == "CT"
    assert json.loads(sphere_find("-k", 'PatientComments=""', "--as-of", "0").stdout) != []
    result = sphere_find("--as-of", "9")
    assert (result.exit_code, result.stderr.strip()) == (
        1, "sphere: the catalog has no version as of 9: versions 0 to 2 are known",
    )  # fmt: skip
    assert "neither a version" in sphere_find("--as-of", "monday").stderr
    refused = sphere_find("WARD@127.0.0.1:11112", "--as-of", "1")
    assert (refused.exit_code, "leave PEER out" in refused.stderr) == (2, True)


NAMES = ("Before^Anna", "After^Anna", "Later^Anna")
"""Of a patient, in the first batch, the second one, and what came since."""


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two instances that were sent again with another name, twice; the last time they were not extracted."""
    settings = archive(tmp_path_factory.mktemp("renamed"))
    replacing = settings.ingest.model_copy(update={"on_conflict": "replace"})
    settings = settings.model_copy(update={"ingest": replacing})
    for batch, name in enumerate(NAMES):
        members = enumerate(changed(one, PatientName=name) for one in slices(2))
        land(settings, [new_member(data, second=10 * batch + number) for number, data in members])
        if batch < 2:
            extract(settings)
            time.sleep(0.002)
    return settings


@pytest.mark.parametrize("by", ["version", "time"])
def test_what_was_replaced_is_answered_as_it_was(renamed: Settings, by: str) -> None:
    """At every level, whether the name is asked for or given back, and with the bytes of then."""
    at: list[Any] = [0, 1, None] if by == "version" else [committed(renamed, 0), committed(renamed, 1), None]
    storage = open_storage(renamed.storage.root)
    with QueryService(renamed) as service:
        for when, name in zip(at, NAMES, strict=True):
            for level, count in (("PATIENT", 1), ("STUDY", 1), ("SERIES", 1), ("IMAGE", 2)):
                for wanted in NAMES:
                    query = Query.build(
                        level,  # type: ignore[arg-type]
                        {"PatientName": f"{wanted.partition('^')[0]}*"},
                        model="PATIENT_ROOT" if level == "PATIENT" else "STUDY_ROOT",
                        return_keys=["PatientName"],
                    )
                    found = [str(match.identifier().PatientName) for match in service.find(query, as_of=when)]
                    assert found == [name] * (count if wanted == name else 0), (level, when, wanted)
                    assert service.count(query, as_of=when) == len(found)
            stored = list(service.lookup_instances(as_of=when))
            files = [storage.read(one.bundle, one.offset, one.length) for one in stored]
            assert [str(dcmread(io.BytesIO(file)).PatientName) for file in files] == [name] * 2
            headers = [
                json.loads(header) for _, header in service.lookup_headers(study=stored[0].StudyInstanceUID, as_of=when)
            ]
            assert [one["00100010"]["Value"] for one in headers] == [[{"Alphabetic": name}]] * 2


def test_what_was_replaced_over_every_door(renamed: Settings, tmp_path: Path) -> None:
    """`sphere find --as-of`, `?asOf=`, and AE titles that are bound to a version and to a time."""
    config = tmp_path / "sphere.toml"
    config.write_text(
        f'[archive]\nstate_dir = "{renamed.archive.state_dir}"\n[storage]\nroot = "{renamed.storage.root}"\n'
        '[ingest]\non_conflict = "replace"\n'
    )
    first, second = (committed(renamed, version).isoformat() for version in (0, 1))
    for options, name in (
        (("--as-of", "0"), NAMES[0]), (("--as-of", first), NAMES[0]), (("--as-of", "1"), NAMES[1]),
        (("--as-of", second), NAMES[1]), ((), NAMES[2]),
    ):  # fmt: skip
        asked = ["--config", str(config), "find", "--format", "json", "-k", "PatientName=*^Anna", *options]
        result = CliRunner().invoke(main, asked)
        assert [row["PatientName"] for row in json.loads(result.stdout)] == [name], result.output
    with serving_web(renamed) as web:
        for params, name in (
            ({"asOf": "0"}, NAMES[0]), ({"asOf": first}, NAMES[0]), ({"asOf": "1"}, NAMES[1]), ({}, NAMES[2]),
        ):  # fmt: skip
            [study] = web.get("/studies", params={"PatientID": "*", "includefield": "PatientName"} | params).json()
            assert study["00100010"]["Value"] == [{"Alphabetic": name}]
            assert web.get("/studies", params={"PatientName": name} | params).status_code == 200
            for other in set(NAMES) - {name}:
                assert web.get("/studies", params={"PatientName": other} | params).status_code == 204
    bound = [Snapshot(ae_title="FIRST", as_of=0), Snapshot(ae_title="SECOND", as_of=committed(renamed, 1))]
    asked_for = identifier(QueryRetrieveLevel="STUDY", PatientName="*^Anna", StudyInstanceUID="")
    storage = open_storage(renamed.storage.root)
    with QueryService(renamed) as service:
        finds, locator = FindService(service, bound), Locator(service, bound)
        for called, name in zip(("FIRST", "SECOND", "TESTED"), NAMES, strict=True):
            data = encode(asked_for, False, True) or b""
            request = FindRequest(
                model="STUDY_ROOT", identifier=data, transfer_syntax=ExplicitVRLittleEndian, called_ae=called
            )
            [answer] = finds.answers(request, cancelled=lambda: False)
            assert answer.identifier is not None and answer.identifier.PatientName == name
            sent = locator.locate(Selection("STUDY", study=(str(answer.identifier.StudyInstanceUID),)), called)
            files = [storage.read(one.bundle, one.offset, one.length) for one in sent]
            assert [str(dcmread(io.BytesIO(file)).PatientName) for file in files] == [name] * 2
