"""Segmentations, reports, presentation states and key objects as annotations of what they refer to, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sphere.catalog.cohorts import Cohorts
from sphere.ingest.header import identify
from sphere.ingest.storage import open_storage
from sphere.scp.web.tokens import Tokens
from tests.support.landing import archive, changed, land, new_member
from tests.support.viewed import gradient_ct, key_objects, presentation, report, segmentation
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

OTHER = "2.25.7"  # the series of the second half of the images
LATER = "2.25.70"  # a later study of the patient
NOBODYS = "2.25.90"  # a study of somebody else
BOTH = {"SEG", "SR", "PR", "KO"}


@dataclass
class Referred:
    """Two series of one study, what refers to them, and key objects of two other studies, one of the same patient."""

    web: Web
    images: list[Any]
    uids: dict[str, str]
    tokens: dict[str, str] = field(default_factory=dict)

    def rows(self, uid: str, *, token: str = "", **asked: str) -> list[dict[str, Any]]:
        """GET /annotations."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = f"http://127.0.0.1:{self.web.port}/annotations"
        answer = self.web.client.get(url, params={"uid": uid, **asked}, headers=headers)
        rows: list[dict[str, Any]] = answer.json()
        assert answer.status_code == 200, rows
        assert answer.headers["x-total-count"] == str(len(rows))
        return rows


def found(rows: list[dict[str, Any]]) -> set[tuple[str, str, int]]:
    """Type, referenced series and how many instances of each row."""
    return {(row["type"], row["SeriesInstanceUID"], len(row["instances"])) for row in rows}


@pytest.fixture(scope="module")
def referred(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Referred]:
    settings = archive(tmp_path_factory.mktemp("referred"))
    images = gradient_ct(4)
    images[2:] = [changed(data, SeriesInstanceUID=OTHER, SeriesNumber=2) for data in images[2:]]
    files = {
        "SEG": segmentation(images[:2]),
        "SR": report(images[:1]),
        "PR": presentation(images[:2]),
        "KO": key_objects(images[1:3]),
    }
    files["KO later"] = changed(
        files["KO"], StudyInstanceUID=LATER, SeriesInstanceUID=LATER + ".1", SOPInstanceUID=LATER + ".1.1"
    )
    files["KO nobody's"] = changed(
        files["KO"],
        PatientID="NOBODY",
        StudyInstanceUID=NOBODYS,
        SeriesInstanceUID=NOBODYS + ".1",
        SOPInstanceUID=NOBODYS + ".1.1",
    )
    land(settings, [new_member(data) for data in (*images, *files.values())])
    names = {what: identify(data, size=len(data)).SOPInstanceUID for what, data in files.items()}
    with serving_web(settings) as web:
        yield Referred(web, [identify(data, size=len(data)) for data in images], names)


def test_of_a_study_its_series_and_instances(referred: Referred) -> None:
    first, second, third, last = referred.images
    of_first = {
        ("SEG", first.SeriesInstanceUID, 2),
        ("SR", first.SeriesInstanceUID, 1),
        ("PR", first.SeriesInstanceUID, 2),
        ("KO", first.SeriesInstanceUID, 1),
    }
    assert found(referred.rows(first.StudyInstanceUID)) == of_first | {("KO", OTHER, 1)}
    assert found(referred.rows(first.SeriesInstanceUID)) == of_first
    assert found(referred.rows(OTHER)) == {("KO", OTHER, 1)}
    assert {kind for kind, *_ in found(referred.rows(first.SOPInstanceUID))} == {"SEG", "SR", "PR"}
    assert {kind for kind, *_ in found(referred.rows(second.SOPInstanceUID))} == {"SEG", "PR", "KO"}
    assert found(referred.rows(third.SOPInstanceUID)) == {("KO", OTHER, 1)}
    assert referred.rows(last.SOPInstanceUID) == []


@pytest.mark.parametrize("kind", sorted(BOTH))
def test_by_type_and_level(referred: Referred, kind: str) -> None:
    first, second, *_ = referred.images
    uid = first.SOPInstanceUID if kind != "KO" else second.SOPInstanceUID
    rows = referred.rows(uid, type=kind)
    assert referred.uids[kind] in {row["id"] for row in rows} and {row["type"] for row in rows} == {kind}
    assert all(uid in row["instances"] and row["media_type"] == "application/dicom" for row in rows)
    assert referred.rows(uid, type=kind, level="series") == rows and referred.rows(uid, type=kind, level="study") == []
    for row in rows:
        answer = referred.web.client.get(f"http://127.0.0.1:{referred.web.port}{row['href']}")
        assert answer.status_code == 200 and row["id"].encode() in answer.content


def test_of_another_study_of_the_patient_and_of_nobody_else(referred: Referred) -> None:
    ids = {row["id"] for row in referred.rows(OTHER, type="KO")}
    assert ids == {referred.uids["KO"], referred.uids["KO later"]}
    assert referred.rows(LATER) == [], "nothing refers to it"


def test_a_researcher_is_shown_the_objects_that_are_granted(referred: Referred) -> None:
    storage = open_storage(referred.web.settings.storage.root)
    first, second, *_ = referred.images
    of_kind = {row["type"]: row for row in referred.rows(second.SOPInstanceUID)}
    segmentations = of_kind["SEG"]["href"].split("/series/")[1].split("/")[0]
    Cohorts(storage).create("some", "series", [first.SeriesInstanceUID, segmentations], "test")
    Cohorts(storage).create("later", "study", [LATER], "test")
    some, later, all_of_it = (
        Tokens(storage).create(name, "researcher", None, cohorts=cohorts)
        for name, cohorts in (("a", ["some"]), ("b", ["later"]), ("c", ["some", "later"]))
    )
    for uid in (first.StudyInstanceUID, first.SeriesInstanceUID, second.SOPInstanceUID):
        rows = referred.rows(uid, token=some)
        assert found(rows) == {("SEG", first.SeriesInstanceUID, 2)}, uid
        assert referred.rows(uid, token=later) == [], "what it is linked to is not granted"
    assert {row["id"] for row in referred.rows(second.SOPInstanceUID, token=all_of_it)} == {
        referred.uids["SEG"],
        referred.uids["KO later"],
    }
    assert referred.rows(OTHER, token=some) == [] == referred.rows(first.StudyInstanceUID, token=some, type="PR")
