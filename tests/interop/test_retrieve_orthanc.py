"""Orthanc as destination, as requester, and as the peer that `sphere move` and `sphere get` pull from."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from pydicom.uid import ExplicitVRLittleEndian

from sphere.cli import main
from sphere.ingest.header import identify
from sphere.scp import client
from sphere.template import render
from tests.support.dicom_tools import Orthanc, part10_dataset, running_orthanc
from tests.support.ports import free_port
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import dataset_of, make_instance

pytestmark = pytest.mark.interop


@contextmanager
def both(base: Path) -> Iterator[tuple[Orthanc, Receiver, Path]]:
    """An Orthanc and an archive that know each other, and the settings file of the archive."""
    port = free_port()
    with running_orthanc(base / "orthanc", {"sphere": ("SPHERE", port)}) as orthanc:
        peer = {"name": "orthanc", "ae_title": "ORTHANC", "host": "127.0.0.1", "port": orthanc.dicom_port}
        with running_receiver(base / "archive", {"dimse": {"port": port}, "peers": [peer]}) as receiver:
            config = base / "archive" / "sphere.toml"
            peers = "".join(f"\n{key} = {json.dumps(value)}" for key, value in peer.items())
            config.write_text(f"{render({'dimse.port': port})}\n[[peers]]{peers}\n")
            yield orthanc, receiver, config


def studies(base: Path) -> list[Path]:
    """Three studies of four instances each: numbers 1.1.1.1 to 1.3.1.4."""
    base.mkdir(exist_ok=True)
    return [
        make_instance(
            base / f"{study}-{number}.dcm", StudyInstanceUID=f"1.{study}", SeriesInstanceUID=f"1.{study}.1",
            SOPInstanceUID=f"1.{study}.1.{number}", PatientID=f"P{study}",
        )
        for study in (1, 2, 3)
        for number in (1, 2, 3, 4)
    ]  # fmt: skip


def call(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(config), *arguments])


def held(receiver: Receiver) -> list[str]:
    return sorted(one.SOPInstanceUID for one in receiver.members())


def test_orthanc_asks_and_receives(tmp_path: Path) -> None:
    with both(tmp_path) as (orthanc, receiver, _):
        files = studies(tmp_path / "f")
        assert all(one.stored for one in client.store(receiver.peer, files, settings=receiver.settings))
        orthanc.post(
            "/modalities/sphere/move",
            {"Level": "Study", "Resources": [{"StudyInstanceUID": "1.1"}, {"StudyInstanceUID": "1.2"}], "Timeout": 60},
        )
        instances = orthanc.get("/instances")
        assert len(instances) == 8
        came = {
            one["MainDicomTags"]["SOPInstanceUID"]: part10_dataset(orthanc.file(one["ID"]))
            for one in (orthanc.get(f"/instances/{instance}") for instance in instances)
        }
    assert came == {f"1.{n // 4 + 1}.1.{n % 4 + 1}": dataset_of(path) for n, path in enumerate(files[:8])}


def test_get_and_move_from_orthanc(tmp_path: Path) -> None:
    """One study by C-GET, then what is missing of all by C-MOVE: nothing comes twice."""
    files = studies(tmp_path / "files")
    with both(tmp_path) as (orthanc, receiver, config):
        for path in files:
            orthanc.post("/instances", path.read_bytes())
        result = call(config, "get", "orthanc", "-k", "StudyInstanceUID=1.1")
        assert result.exit_code == 0, result.output
        assert "1 asked for, 0 already here: 4 instances sent, 0 failed" in result.output
        by_uid = {identify(path.read_bytes(), size=path.stat().st_size).SOPInstanceUID: path for path in files}
        for one in receiver.members():
            assert one.source_aet == "ORTHANC" and one.TransferSyntaxUID == ExplicitVRLittleEndian
            assert receiver.dataset_bytes(one) == part10_dataset(by_uid[one.SOPInstanceUID].read_bytes())
        listed = tmp_path / "uids.txt"
        listed.write_text("1.1\n1.2 # the second\n1.3\n")
        arguments = ["move", "orthanc", "--to", "SPHERE", "--from", str(listed), "--existing", "--pause", "0.1"]
        result = call(config, *arguments)
        assert result.exit_code == 0, result.output
        assert "3 asked for, 1 already here: 8 instances sent, 0 failed" in result.output
        deadline = time.monotonic() + 10
        while len(held(receiver)) < 12 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert held(receiver) == sorted(by_uid)
        result = call(config, *arguments)
        assert "3 asked for, 3 already here: 0 instances sent, 0 failed" in result.output
        result = call(config, "move", "orthanc", "--to", "SPHERE", "--level", "PATIENT", "-k", "PatientID=P1")
        assert "4 instances sent" in result.output


def test_get_of_what_is_missing_at_every_level(tmp_path: Path) -> None:
    """A list for each level, then all with --existing: only what is not here is asked for."""
    with both(tmp_path) as (orthanc, receiver, config):
        for path in studies(tmp_path / "files"):
            orthanc.post("/instances", path.read_bytes())
        lists = {"IMAGE": "1.1,1.1.1,1.1.1.2\n", "SERIES": "1.2 1.2.1\n", "STUDY": "1.1\n1.2\n1.3\n"}
        told = []
        for level, lines in lists.items():
            listed = tmp_path / f"{level}.txt"
            listed.write_text(lines)
            result = call(config, "get", "orthanc", "--level", level, "--from", str(listed), "--existing")
            assert result.exit_code == 0, result.output
            told.append(result.output.splitlines()[-1])
        assert told == [
            "1 asked for, 0 already here: 1 instances sent, 0 failed",
            "1 asked for, 0 already here: 4 instances sent, 0 failed",
            "3 asked for, 1 already here: 7 instances sent, 0 failed",
        ]
        assert len(held(receiver)) == len(set(held(receiver))) == 12
        rows = {
            level: json.loads(call(config, "find", "orthanc", "--level", level, *keys, "--format", "json").stdout)
            for level, keys in FIND.items()
        }
    assert {level: len(found) for level, found in rows.items()} == {"PATIENT": 1, "STUDY": 3, "SERIES": 1, "IMAGE": 4}
    assert {row["SOPInstanceUID"] for row in rows["IMAGE"]} == {f"1.2.1.{number}" for number in (1, 2, 3, 4)}


FIND = {
    "PATIENT": ["--model", "patient", "-k", "PatientID=P2"],
    "STUDY": ["-k", "StudyInstanceUID"],
    "SERIES": ["-k", "StudyInstanceUID=1.2", "-k", "SeriesInstanceUID"],
    "IMAGE": ["-k", "StudyInstanceUID=1.2", "-k", "SeriesInstanceUID=1.2.1", "-k", "SOPInstanceUID"],
}


def test_what_orthanc_has_as_table_csv_and_json(tmp_path: Path) -> None:
    with both(tmp_path) as (orthanc, _, config):
        for path in studies(tmp_path / "files")[::4]:
            orthanc.post("/instances", path.read_bytes())
        ask = ["find", "orthanc", "-k", "StudyInstanceUID=1.1\\1.3", "-k", "PatientID", "--format"]
        shown = {kind: call(config, *ask, kind) for kind in ("table", "csv", "json")}
        none = call(config, "find", "orthanc", "-k", "PatientID=NOBODY", "--format", "json")
    assert [result.exit_code for result in (*shown.values(), none)] == [0] * 4, shown["table"].output
    expected = {("1.1", "P1"), ("1.3", "P3")}
    for rows in (json.loads(shown["json"].stdout), list(csv.DictReader(io.StringIO(shown["csv"].stdout)))):
        assert len(rows) == 2
        assert {(row["StudyInstanceUID"], row["PatientID"]) for row in rows} == expected
    lines = shown["table"].stdout.splitlines()
    assert lines[-1] == "(2 rows)" and {"StudyInstanceUID", "PatientID"} <= set(lines[0].split())
    assert all(
        sum(study in line.split() and patient in line.split() for line in lines) == 1 for study, patient in expected
    )
    assert json.loads(none.stdout) == []


def test_what_failed_is_listed_with_its_reason(tmp_path: Path) -> None:
    with both(tmp_path) as (orthanc, _, config):
        orthanc.post("/instances", studies(tmp_path / "files")[0].read_bytes())
        arguments = ["-k", "StudyInstanceUID=1.1", "--tries", "1"]
        result = call(config, "move", "orthanc", "--to", "NOBODY", *arguments)
        assert result.exit_code == 1
        assert "STUDY 1.1" in result.output and "status 0x" in result.output
        result = call(config, "get", f"ORTHANC@127.0.0.1:{free_port()}", *arguments)
        assert result.exit_code == 1 and "cannot connect" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["move", "orthanc", "-k", "StudyInstanceUID=1"], "Missing option '--to'"),
        (["get", "orthanc"], "either -k KEYWORD=VALUE, or --from FILE"),
        (["get", "nobody", "-k", "StudyInstanceUID=1"], "neither a name in the settings"),
    ],
)
def test_wrong_calls(tmp_path: Path, arguments: list[str], message: str) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text('[[peers]]\nname = "orthanc"\nae_title = "ORTHANC"\nhost = "127.0.0.1"\n')
    result = call(config, *arguments)
    assert result.exit_code == 2 and message in result.output
