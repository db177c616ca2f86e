"""Snapshots behind AE titles, and an archive without a catalog, asked by DCMTK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from tests.support.dicom_tools import run_tool, running_storescp
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.receiver import Receiver, running_receiver

pytestmark = pytest.mark.interop

MANY = 450  # more than one process answers by itself


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """Two batches of two instances of a study, extracted one after the other; then one more."""
    folder = tmp_path_factory.mktemp("snapshots")
    settings, data = archive(folder), slices(5)
    for batch in (data[:2], data[2:4]):
        land(settings, [new_member(one) for one in batch])
        extract(settings)
    land(settings, [new_member(data[4])])
    tables = {
        "extract": {"every_s": 0},
        "snapshots": [{"ae_title": "FIRST", "as_of": 0}, {"ae_title": "NEVER", "as_of": 9}],
    }
    with running_receiver(folder, tables) as receiver:
        yield receiver


def count(port: int, called: str, folder: Path, *, key: str = "NumberOfStudyRelatedInstances") -> list[str]:
    """What findscu is told of that key of each study."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", "PatientName=*", "-k", key, "-k", "StudyInstanceUID"]
    run = run_tool("findscu", "-v", "-S", "-aec", called, "-X", "-od", folder, *keys, "127.0.0.1", port)
    assert "(Success)" in run.stdout, run.stdout
    return [str(pydicom.dcmread(path)[key].value) for path in sorted(folder.glob("rsp*.dcm"))]


def test_a_snapshot_answers_and_sends_what_was_there(snapshots: Receiver, tmp_path: Path) -> None:
    port = snapshots.port
    assert count(port, "SPHERE", tmp_path / "now") == ["5"]
    assert count(port, "FIRST", tmp_path / "then") == ["2"]
    assert count(port, "FIRST", tmp_path / "title", key="RetrieveAETitle") == ["FIRST"]
    [uid] = {record.StudyInstanceUID for record in snapshots.members()}
    for called, expected in (("SPHERE", 5), ("FIRST", 2)):
        got = tmp_path / called
        got.mkdir()
        run = run_tool("getscu", "-S", "-aec", called, "-od", got, "-k", "QueryRetrieveLevel=STUDY",
                       "-k", f"StudyInstanceUID={uid}", "127.0.0.1", port)  # fmt: skip
        assert (run.returncode, len(list(got.iterdir()))) == (0, expected), run.stdout


def test_a_snapshot_that_is_not_known_fails_and_none_takes_instances(snapshots: Receiver, tmp_path: Path) -> None:
    run = run_tool("findscu", "-v", "-S", "-aec", "NEVER", "-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID",
                   "127.0.0.1", snapshots.port)  # fmt: skip
    assert "0x110" in run.stdout, run.stdout
    (tmp_path / "new.dcm").write_bytes(slices(6)[5])
    stored = run_tool("storescu", "-v", "-aec", "FIRST", "127.0.0.1", snapshots.port, tmp_path / "new.dcm")
    assert "0x0124" in stored.stdout or "0x124" in stored.stdout or "NotAuthorized" in stored.stdout, stored.stdout
    assert len(snapshots.members()) == 5


def test_an_archive_without_a_catalog(tmp_path: Path) -> None:
    """Found, counted and sent from the bundles, what is stored meanwhile too; with a process beside the receiver."""
    folder = tmp_path / "archive"
    for study in range(MANY // 50):
        land(archive(folder), [new_member(data) for data in slices(50, seed=study, study=study)])
    with running_storescp(tmp_path / "got") as destination:
        tables = {
            "catalog": {"mode": "files", "scan_workers": 1},
            "peers": [{"name": "there", "ae_title": "THERE", "host": "127.0.0.1", "port": destination}],
        }
        with running_receiver(folder, tables) as receiver:
            assert count(receiver.port, "SPHERE", tmp_path / "all") == ["50"] * (MANY // 50)
            uid = receiver.members()[0].StudyInstanceUID
            (tmp_path / "new.dcm").write_bytes(slices(51, seed=0, study=0)[50])
            stored = run_tool("storescu", "-aec", "SPHERE", "127.0.0.1", receiver.port, tmp_path / "new.dcm")
            assert stored.returncode == 0, stored.stdout
            assert sorted(count(receiver.port, "SPHERE", tmp_path / "more"))[-1] == "51"
            moved = run_tool("movescu", "-S", "-aec", "SPHERE", "-aem", "THERE", "-k", "QueryRetrieveLevel=STUDY",
                             "-k", f"StudyInstanceUID={uid}", "127.0.0.1", receiver.port)  # fmt: skip
            assert moved.returncode == 0, moved.stdout
            assert len(list((tmp_path / "got").iterdir())) == 51
    assert not (folder / "storage" / "catalog").exists()
