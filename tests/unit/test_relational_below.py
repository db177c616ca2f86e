"""Relational queries with keys of levels below their own (PS3.4 C.4.1.3.2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sphere.catalog.grant import Grant
from sphere.catalog.index import IndexCache
from sphere.catalog.plan import make_plan
from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Query
from sphere.catalog.schema import Level
from sphere.catalog.service import QueryService
from sphere.catalog.tombstones import open_tombstones
from sphere.conf.errors import QueryError
from sphere.scp.web.search_request import parse_search
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices

pytestmark = pytest.mark.unit

INSTANCES = (  # study, series, number of the instance, patient, date, modality, body part
    ("1", "1", 1, "P", "20240101", "CT", "CHEST"),
    ("1", "1", 2, "P", "20240101", "CT", "CHEST"),
    ("1", "2", 3, "P", "20240101", "MR", "HEAD"),
    ("2", "1", 1, "P", "20250101", "MR", "CHEST"),
    ("3", "1", 2, "Q", "20240101", "CT", "HEAD"),
    ("4", "1", 1, "", "20240101", "CT", "CHEST"),
)


def members() -> list[Any]:
    data = slices(len(INSTANCES))
    return [
        new_member(
            changed(
                one, StudyInstanceUID=f"9.{study}", SeriesInstanceUID=f"9.{study}.{series}", InstanceNumber=number,
                SOPInstanceUID=f"9.{study}.{series}.{number}", PatientID=patient, StudyDate=day, Modality=modality,
                BodyPartExamined=part,
            ),
            second=second,
        )
        for second, (one, (study, series, number, patient, day, modality, part)) in enumerate(
            zip(data, INSTANCES, strict=True)
        )
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["extracted", "recent", "files"])
def queries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queries]:
    settings = archive(tmp_path_factory.mktemp("below"))
    land(settings, members())
    if request.param == "extracted":
        extract(settings)
    catalog = {"mode": "files", "scan_workers": 0} if request.param == "files" else {}
    with open_queries(settings.model_copy(update={"catalog": settings.catalog.model_copy(update=catalog)})) as opened:
        yield opened


def found(queries: Queries, level: Level, keys: dict[str, Any], **more: Any) -> list[str]:
    """What identifies the entities that match: their UIDs, of patients their IDs."""
    query = Query.build(level, keys, model="PATIENT_ROOT", **more)
    names = {"PATIENT": "PatientID", "STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID"}
    answers = [one.identifier() for one in queries.find(query)]
    assert queries.count(query) == len(answers)
    assert all(not answer[key.tag].value for answer in answers for key in query.keys_below()), "of lower levels"
    return [str(answer[names[level]].value or "") for answer in answers]


@pytest.mark.parametrize(
    ("level", "keys", "expected"),
    [
        ("STUDY", {"Modality": "CT"}, ["9.1", "9.3", "9.4"]),
        ("STUDY", {"Modality": "MR", "BodyPartExamined": "CHEST"}, ["9.2"]),  # not of two series of 9.1
        ("STUDY", {"Modality": "CT", "InstanceNumber": "3"}, []),  # which is of another series
        ("STUDY", {"Modality": "CT", "InstanceNumber": "2"}, ["9.1", "9.3"]),
        ("STUDY", {"StudyInstanceUID": ["9.1", "9.4"], "InstanceNumber": "2"}, ["9.1"]),
        ("STUDY", {"PatientID": "P", "Modality": "MR"}, ["9.1", "9.2"]),
        ("STUDY", {"StudyDate": "20240101", "Modality": "MR"}, ["9.1"]),
        ("STUDY", {"SeriesInstanceUID": "9.2.1"}, ["9.2"]),
        ("STUDY", {"SOPInstanceUID": ["9.3.1.2", "9.1.2.3"]}, ["9.1", "9.3"]),
        ("STUDY", {"Modality": "US"}, []),
        ("SERIES", {"InstanceNumber": "1"}, ["9.1.1", "9.2.1", "9.4.1"]),
        ("SERIES", {"Modality": "CT", "InstanceNumber": "2"}, ["9.1.1", "9.3.1"]),
        ("PATIENT", {"StudyDate": "20250101-"}, ["P"]),
        ("PATIENT", {"StudyDate": "20240101"}, ["", "P", "Q"]),
        ("PATIENT", {"StudyDate": "20240101", "Modality": "MR"}, ["P"]),
        ("PATIENT", {"StudyDate": "20250101", "Modality": "CT"}, []),  # which is of another study
        ("PATIENT", {"PatientID": "P", "Modality": "CT"}, ["P"]),
        ("PATIENT", {"PatientID": "P", "StudyDate": "20250101", "Modality": "CT"}, []),
        ("PATIENT", {"PatientID": "Q", "InstanceNumber": "1"}, []),
        ("PATIENT", {"InstanceNumber": "2", "BodyPartExamined": "HEAD"}, ["Q"]),
        ("PATIENT", {"PatientName": "*", "SOPInstanceUID": "9.4.1.1"}, [""]),
    ],
)
def test_one_and_the_same_entity_below_has_all_of_them(
    queries: Queries, level: Level, keys: dict[str, Any], expected: list[str]
) -> None:
    assert found(queries, level, keys) == expected


def test_a_date_and_its_time_below_are_one_moment(queries: Queries) -> None:
    asked = {"StudyDate": "20231231-20240101", "StudyTime": "0000-0000"}
    assert found(queries, "PATIENT", asked, combined_datetime=True) == []
    assert found(queries, "PATIENT", asked | {"StudyTime": "0000-2359"}, combined_datetime=True) == ["", "P", "Q"]


def test_an_earlier_catalog_knows_no_later_series(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    for part in (members()[:2], members()[2:]):
        land(settings, part)
        extract(settings)
    with QueryService(settings) as service:
        for keys in ({"Modality": "MR"}, {"InstanceNumber": "3"}, {"StudyInstanceUID": "9.1", "Modality": "MR"}):
            query = Query.build("STUDY", keys)
            assert service.count(query) > service.count(query, as_of=0) == 0


def test_what_is_deleted_or_not_granted_is_not_below(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    land(settings, members())
    extract(settings)
    late = {"SeriesInstanceUID": "9.3.2", "SOPInstanceUID": "9.3.2.7", "InstanceNumber": 7, "Modality": "US"}
    land(settings, [new_member(changed(slices(1)[0], StudyInstanceUID="9.3", **late), second=9)])
    graves = open_tombstones(settings)
    with QueryService(settings) as service:
        part = service.restricted(Grant(series=frozenset(["9.1.2", "9.3.1"])))
        assert (found(service, "STUDY", {"Modality": "US"}), found(part, "STUDY", {"Modality": "US"})) == (["9.3"], [])
        assert found(part, "STUDY", {"Modality": "CT"}) == ["9.3"]
        assert found(part, "STUDY", {"InstanceNumber": "3"}) == ["9.1"]
        assert found(part, "PATIENT", {"InstanceNumber": "2"}) == ["Q"]
        graves.delete(list(service.lookup_instances(sop=["9.3.2.7", "9.1.1.2", "9.4.1.1"])), by="test")
        assert found(service, "STUDY", {"Modality": "US"}) == []
        assert found(service, "STUDY", {"Modality": "CT"}) == ["9.1", "9.3"]
        assert found(service, "STUDY", {"Modality": "CT", "InstanceNumber": "2"}) == ["9.3"]
        graves.restore(["9.1.1.2"], by="test")
        assert found(service, "SERIES", {"Modality": "CT", "InstanceNumber": "2"}) == ["9.1.1", "9.3.1"]
    graves.close()


def test_only_the_files_of_candidates_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of instances, where other keys leave few studies; all of them else."""
    settings = archive(tmp_path)
    land(settings, members())
    extract(settings)
    asked: list[Any] = []
    whole = "sphere.catalog.layers.Layer.instance_files"
    monkeypatch.setattr(whole, lambda self, uids: asked.append(uids) or self.index.files.all())
    with QueryService(settings) as service:
        index = service._indexes.current()
        object.__setattr__(index, "rows", None)  # whose answer it would be otherwise
        assert found(service, "STUDY", {"PatientID": "P", "InstanceNumber": "1"}) == ["9.1", "9.2"]
        assert found(service, "PATIENT", {"PatientName": "nobody", "InstanceNumber": "1"}) == []
        assert all(uids is not None for uids in asked), asked
        assert found(service, "STUDY", {"InstanceNumber": "3"}) == ["9.1"]
        assert asked[-1] is None


def test_a_catalog_without_the_column_says_so(tmp_path: Path) -> None:
    """As one that an earlier version made."""
    settings = archive(tmp_path)
    land(settings, members())
    extract(settings)
    cache = IndexCache(settings)
    index = cache.current()
    with pytest.raises(QueryError, match="InstanceNumber below STUDY: this catalog has no column") as caught:
        make_plan(Query.build("STUDY", {"InstanceNumber": "1"}), index.instance_columns - {"InstanceNumber"})
    assert (caught.value.dimse, caught.value.offending) == (0xA900, (0x00200013,))
    cache.close()


def test_a_search_over_http_has_no_keys_below() -> None:
    with pytest.raises(QueryError, match="Modality is a key of SERIES, below STUDY"):
        parse_search([("Modality", "CT")], "STUDY", {})
    assert parse_search([("Modality", "")], "STUDY", {}).query.below() == ()


def test_an_archive_that_has_no_catalog_yet(tmp_path: Path) -> None:
    with QueryService(archive(tmp_path)) as service:
        assert found(service, "STUDY", {"Modality": "CT"}) == []
        assert found(service, "PATIENT", {"InstanceNumber": "1"}) == []
