"""What is deleted, asked for and sent again over DIMSE by DCMTK, and by who asks for Storage Commitment."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from pathlib import Path
from queue import Queue

import pydicom
import pytest
from pyspark.sql import SparkSession

from sphere.catalog.tombstones import open_tombstones
from sphere.ingest.header import identify
from sphere.jobs.compact import run as compact
from sphere.jobs.extract import run
from tests.interop.test_storage_commitment import Report, asked, information, requester
from tests.support.dicom_tools import run_tool, running_storescp
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.ports import free_port
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import CT_STORAGE

pytestmark = pytest.mark.interop

SLICES = slices(4, seed=51)
UIDS = [identify(data, size=len(data)).SOPInstanceUID for data in SLICES]
STUDY = identify(SLICES[0], size=len(SLICES[0])).StudyInstanceUID


def found(receiver: Receiver, folder: Path, called: str = "SPHERE") -> list[int]:
    """Numbers of instances of each study that C-FIND gives."""
    folder.mkdir()
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", "NumberOfStudyRelatedInstances", "-k", "StudyInstanceUID"]
    run = run_tool("findscu", "-v", "-S", "-aec", called, "-X", "-od", folder, *keys, "127.0.0.1", receiver.port)
    assert "(Success)" in run.stdout, run.stdout
    read = [pydicom.dcmread(path) for path in sorted(folder.glob("rsp*.dcm"))]
    return [int(one.NumberOfStudyRelatedInstances) for one in read]


def got(receiver: Receiver, folder: Path, called: str = "SPHERE") -> int:
    """Instances that C-GET of the study brings."""
    folder.mkdir()
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY}"]
    run_tool("getscu", "-S", "-aec", called, "-od", folder, *keys, "127.0.0.1", receiver.port)
    return len(list(folder.iterdir()))


def test_no_service_shows_or_takes_what_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    settings = archive(folder)
    land(settings, [new_member(data) for data in SLICES[:2]])
    extract(settings)
    land(settings, [new_member(data) for data in SLICES[2:]])
    (tmp_path / "again.dcm").write_bytes(SLICES[0])
    with running_storescp(tmp_path / "moved") as destination, requester(port := free_port()) as reports:
        tables = {
            "extract": {"every_s": 0},
            "snapshots": [{"ae_title": "FIRST", "as_of": 0}],
            "peers": [
                {"name": "there", "ae_title": "THERE", "host": "127.0.0.1", "port": destination},
                {"name": "modality", "ae_title": "MODALITY", "host": "127.0.0.1", "port": port},
            ],
        }
        with running_receiver(folder, tables) as receiver:
            assert (found(receiver, tmp_path / "f1"), got(receiver, tmp_path / "g1")) == ([4], 4)
            graves = open_tombstones(receiver.settings)
            graves.delete([identify(SLICES[at], size=len(SLICES[at])) for at in (0, 2)], by="test")
            assert (found(receiver, tmp_path / "f2"), got(receiver, tmp_path / "g2")) == ([2], 2)
            assert found(receiver, tmp_path / "f3", "FIRST") == [1]
            assert got(receiver, tmp_path / "g3", "FIRST") == 1
            moved = run_tool("movescu", "-S", "-aec", "SPHERE", "-aem", "THERE", "-k", "QueryRetrieveLevel=STUDY",
                             "-k", f"StudyInstanceUID={STUDY}", "127.0.0.1", receiver.port)  # fmt: skip
            assert (moved.returncode, len(list((tmp_path / "moved").iterdir()))) == (0, 2), moved.stdout
            committed_and_refused(receiver, reports, tmp_path / "again.dcm")
            graves.restore(UIDS, by="test")
            graves.close()
            stored = run_tool("storescu", "-v", "-aec", "SPHERE", "127.0.0.1", receiver.port, tmp_path / "again.dcm")
            assert stored.returncode == 0, stored.stdout
            assert (found(receiver, tmp_path / "f4"), got(receiver, tmp_path / "g4")) == ([4], 4)


@pytest.mark.spark
def test_services_go_on_while_bytes_go_and_do_not_show_what_is_gone(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    settings = archive(folder)
    land(settings, [new_member(data) for data in SLICES])
    run(spark, settings)
    (tmp_path / "again.dcm").write_bytes(SLICES[0])
    with requester(port := free_port()) as reports:
        peers = [{"name": "modality", "ae_title": "MODALITY", "host": "127.0.0.1", "port": port}]
        tables = {"extract": {"every_s": 0}, "snapshots": [{"ae_title": "FIRST", "as_of": 0}], "peers": peers}
        with running_receiver(folder, tables) as receiver:
            assert got(receiver, tmp_path / "g1") == 4
            with closing(open_tombstones(receiver.settings)) as graves:
                graves.delete([identify(SLICES[at], size=len(SLICES[at])) for at in (0, 2)], by="test")
            assert got(receiver, tmp_path / "g2") == 2
            run(spark, settings)
            kept = files(tmp_path / "g2")
            steps: list[str] = []

            def on_step(name: str, *_: object) -> None:
                where = tmp_path / f"during-{len(steps)}"
                steps.append(name)
                assert got(receiver, where) == 2
                assert files(where) == kept

            report = compact(settings, after=timedelta(), on_step=on_step)
            assert (report.instances, report.rewritten, "rename" in steps) == (2, 1, True)
            assert (found(receiver, tmp_path / "f1"), got(receiver, tmp_path / "g3")) == ([2], 2)
            assert got(receiver, tmp_path / "g4", "FIRST") == 2
            assert files(tmp_path / "g3") == files(tmp_path / "g4") == kept
            committed_and_refused(receiver, reports, tmp_path / "again.dcm")
            assert len(receiver.members()) == 2


def files(folder: Path) -> dict[str, bytes]:
    """What was retrieved, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def committed_and_refused(receiver: Receiver, reports: Queue[Report], again: Path) -> None:
    """Commitment has the second and the fourth only; the first, in the file `again`, is not let in."""
    asked(receiver, information(*((CT_STORAGE, uid) for uid in UIDS)))
    report = reports.get(timeout=60)
    assert sorted(report.kept) == sorted((UIDS[1], UIDS[3]))
    assert report.failed == {UIDS[0]: 0x0112, UIDS[2]: 0x0112}
    before = len(receiver.members())
    stored = run_tool("storescu", "-v", "-aec", "SPHERE", "127.0.0.1", receiver.port, again)
    assert any(text in stored.stdout for text in ("0x0124", "0x124", "NotAuthorized")), stored.stdout
    assert len(receiver.members()) == before
