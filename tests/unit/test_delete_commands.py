"""`sphere delete` and `sphere undelete`: what they choose, what they refuse to do, and that each is recorded."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result
from pydicom.dataset import Dataset

import sphere
from sphere.catalog.tombstones import open_tombstones
from sphere.cli import main
from sphere.conf.errors import BadRequest, NotThere
from sphere.conf.loading import load
from sphere.conf.settings import Settings
from sphere.ingest.records import MemberRecord
from tests.support.landing import changed, land, new_member, slices

pytestmark = pytest.mark.unit


@pytest.fixture
def records(config: Path) -> list[MemberRecord]:
    """Three instances of one study, and two of another patient's, none of them extracted."""
    theirs = [changed(data, PatientID="4711", StudyInstanceUID="1.2.840.99") for data in slices(2, seed=2, study=1)]
    return land(load(config, environ={}), [new_member(data) for data in [*slices(3, seed=1), *theirs]])


def call(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(config), *arguments])


def deleted(config: Path) -> dict[str, str]:
    """Reasons by SOP Instance UID."""
    with closing(open_tombstones(load(config, environ={}))) as tombstones:
        return {one.SOPInstanceUID: one.reason for one in tombstones.find()}


def audited(settings: Settings) -> list[tuple[str, str, int]]:
    folder = Path(settings.storage.root.removeprefix("file://")) / "audit"
    lines = [orjson.loads(line) for path in sorted(folder.rglob("*.jsonl")) for line in path.read_bytes().splitlines()]
    assert all(line["who"].startswith("cli:") and line["path"].startswith("studies/") for line in lines)
    in_time = sorted(lines, key=lambda line: str(line["at"]))
    return [(line["method"], line["outcome"], line["entities"]) for line in in_time]


def test_delete_and_undelete(config: Path, records: list[MemberRecord]) -> None:
    study = records[0].StudyInstanceUID
    result = call(config, "delete", "--study", study, "--reason", "consent withdrawn", "--yes")
    assert (result.exit_code, result.stdout.splitlines()[0][:40]) == (0, "3 instances of 1 series in 1 studies (0."), (
        result
    )
    assert deleted(config) == {one.SOPInstanceUID: "consent withdrawn" for one in records[:3]}
    told = orjson.loads(call(config, "status", "--json").stdout)
    assert (told["deleted"], told["deletions_waiting"]) == (3, True)
    assert "taken out of the rows above yet" in call(config, "status").stdout
    assert "deleted     3 instances" in call(config, "status").stdout
    result = call(config, "undelete", "--series", records[0].SeriesInstanceUID)
    assert (result.exit_code, result.stdout[:6]) == (0, "3 are ")
    assert deleted(config) == {}
    assert "deleted" not in call(config, "status").stdout
    assert audited(load(config, environ={})) == [("DELETE", "done", 3), ("UNDELETE", "done", 3)]


def test_series_instances_and_keys(config: Path, records: list[MemberRecord]) -> None:
    both = ["--series", records[3].SeriesInstanceUID, "--instance", records[0].SOPInstanceUID]
    assert call(config, "delete", *both, "--yes").exit_code == 0
    assert deleted(config).keys() == {records[0].SOPInstanceUID, *(one.SOPInstanceUID for one in records[3:])}
    assert call(config, "undelete", *both).exit_code == 0
    assert call(config, "delete", "--where", "PatientID=4711", "--where", "Modality=CT", "--yes").exit_code == 0
    assert deleted(config).keys() == {one.SOPInstanceUID for one in records[3:]}
    result = call(config, "delete", "--where", "PatientID=nobody", "--yes")
    assert (result.exit_code, result.stdout) == (0, "nothing matches\n")


def test_it_says_how_many_annotations_refer_to_it(config: Path, records: list[MemberRecord], tmp_path: Path) -> None:
    file = tmp_path / "mask"
    file.write_bytes(b"mask")
    one, other, last = records[:3]
    for uid in (one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID, last.SOPInstanceUID):
        assert call(config, "annotate", "add", str(file), "--uid", uid).exit_code == 0
    first = call(config, "delete", "--instance", one.SOPInstanceUID, "--yes")
    assert "1 annotations refer to what was deleted: only admins are shown them" in first.stdout
    assert "annotations" not in call(config, "delete", "--instance", other.SOPInstanceUID, "--yes").stdout
    assert "3 annotations refer" in call(config, "delete", "--study", one.StudyInstanceUID, "--yes").stdout
    listed = call(config, "annotate", "list", "--uid", one.StudyInstanceUID, "--format", "json")
    assert len(orjson.loads(listed.stdout)) == 4, "who has the archive itself is an admin"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["delete"], 2, "say what to delete"),
        (["delete", "--study", "1.2", "--where", "PatientID=1", "--yes"], 2, "say what to delete"),
        (["delete", "--study", "1.2*", "--yes"], 2, "is not a UID"),
        (["delete", "--where", "PatientID", "--yes"], 2, "PatientID: this value chooses everything"),
        (["delete", "--where", "NoSuchKey=1", "--yes"], 2, "sphere: "),
        (["delete", "--study", "1.2.3", "--yes"], 1, "there is nothing here of StudyInstanceUID 1.2.3"),
        (["undelete"], 2, "say what to show again"),
        (["undelete", "--instance", "1.2.3"], 1, "nothing is deleted of SOPInstanceUID 1.2.3"),
    ],
)
def test_what_is_refused_deletes_nothing(
    config: Path, records: list[MemberRecord], arguments: list[str], status: int, message: str
) -> None:
    result = call(config, *arguments)
    assert result.exit_code == status
    assert message in result.output
    assert deleted(config) == {}


def test_one_wrong_uid_deletes_nothing(config: Path, records: list[MemberRecord]) -> None:
    there = ["--instance", records[0].SOPInstanceUID]
    assert call(config, "delete", *there, "--instance", "1.2.3", "--yes").exit_code == 1
    assert deleted(config) == {}


@pytest.mark.parametrize(
    "key", ["PatientName= ", "PatientName=^", "PatientName====", "PatientName=**", "PatientSex=*",
            "ModalitiesInStudy=\\", "RequestAttributesSequence", "RequestAttributesSequence.RequestedProcedureID=",
            "RetrieveAETitle=SPHERE", "00091001=*", "0009,1001="],
)  # fmt: skip
def test_a_value_that_matches_everything(config: Path, records: list[MemberRecord], key: str) -> None:
    for keys in (["--where", key], ["--where", "PatientID=4711", "--where", key]):
        result = call(config, "delete", *keys, "--yes")
        assert (result.exit_code, "chooses everything" in result.output) == (2, True), result.output
    assert deleted(config) == {}


@pytest.mark.parametrize(
    ("key", "count"),
    [("TimezoneOffsetFromUTC=+0100", 1), ("SpecificCharacterSet=ISO_IR 144", 1), ("PatientComments=\"\"", 5),
     ("RequestAttributesSequence.RequestedProcedureID=R*", 1), ("ImageType=OTHER\\DERIVED", 2)],
)  # fmt: skip
def test_find_is_its_preview(config: Path, records: list[MemberRecord], key: str, count: int) -> None:
    """The same keys find the same instances, those too that C-FIND passes over."""
    item = Dataset()
    item.RequestedProcedureID = "R1"
    one, two = slices(2, seed=9)
    types = {"ImageType": ["DERIVED", "PRIMARY", "OTHER"]}
    sequence = {"RequestAttributesSequence": [item]}
    changes = {"TimezoneOffsetFromUTC": "+0100", "SpecificCharacterSet": "ISO_IR 144", "PatientComments": "A1"}
    land(load(config, environ={}), [new_member(changed(one, **types, **sequence, **changes)),
                                    new_member(changed(two, **types, PatientComments="A2"))])  # fmt: skip
    found = call(config, "find", "--level", "IMAGE", "-k", key, "-k", "SOPInstanceUID", "--format", "json")
    assert len(orjson.loads(found.stdout)) == count, found.output
    result = call(config, "delete", "--where", key, "--yes")
    assert result.stdout.startswith(f"{count} instances"), result.output
    assert set(deleted(config)) == {one["SOPInstanceUID"] for one in orjson.loads(found.stdout)}


def test_without_a_terminal_it_needs_yes(config: Path, records: list[MemberRecord]) -> None:
    result = call(config, "delete", "--study", records[0].StudyInstanceUID)
    assert result.exit_code == 2
    assert "--yes deletes them" in result.output
    assert deleted(config) == {}


@pytest.mark.parametrize(("answer", "count"), [("y\n", 3), ("n\n", 0), ("", 0)])
def test_on_a_terminal_it_asks(
    config: Path, records: list[MemberRecord], answer: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphere.delete_commands._is_terminal", lambda: True)
    arguments = ["--config", str(config), "delete", "--study", records[0].StudyInstanceUID]
    result = CliRunner().invoke(main, arguments, input=answer)
    assert result.exit_code == (0 if count else 1)
    assert "3 instances of 1 series in 1 studies" in result.output
    assert len(deleted(config)) == count


def test_from_python(config: Path, records: list[MemberRecord]) -> None:
    with sphere.open(config) as archive:
        assert archive.delete(study=[records[0].StudyInstanceUID], reason="test") == 3
        assert archive.delete(where={"PatientID": "4711"}) == 2
        assert archive.buried()
        assert archive.undelete(sop=[records[0].SOPInstanceUID]) == 1
        with pytest.raises(NotThere, match="nothing is deleted of SOPInstanceUID"):
            archive.undelete(sop=[records[0].SOPInstanceUID])
        with pytest.raises(BadRequest, match="chooses everything"):
            archive.delete(where={})
    assert len(deleted(config)) == 4
