"""Storage Commitment: what is promised is what the bundles hold, and the report comes, whatever happens in between."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.association import Association

from sphere.scp import client
from tests.support.dicom_tools import running_orthanc
from tests.support.ports import free_port
from tests.support.pynetdicom_user import hold_reactor
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import CT_STORAGE, make_instance

pytestmark = pytest.mark.interop

PUSH, WELL_KNOWN = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"


@dataclass(frozen=True)
class Report:
    """A received N-EVENT-REPORT."""

    event: int
    transaction: str
    kept: tuple[str, ...]
    failed: dict[str, int]

    @classmethod
    def of(cls, event: Any) -> Report:
        data = event.event_information
        kept = tuple(str(item.ReferencedSOPInstanceUID) for item in data.get("ReferencedSOPSequence", ()))
        failed = {str(one.ReferencedSOPInstanceUID): one.FailureReason for one in data.get("FailedSOPSequence", ())}
        return cls(event.event_type, str(data.TransactionUID), kept, failed)


def information(*references: tuple[str, str], transaction: str = "") -> Dataset:
    """What is asked for, by SOP class and instance."""
    dataset = Dataset()
    dataset.TransactionUID = transaction or generate_uid()
    dataset.ReferencedSOPSequence = []
    for sop_class, uid in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        dataset.ReferencedSOPSequence.append(item)
    return dataset


@contextmanager
def requester(port: int) -> Iterator[queue.Queue[Report]]:
    """A modality that listens for reports on associations of ours."""
    reports: queue.Queue[Report] = queue.Queue()

    def take(event: Any) -> tuple[int, None]:
        reports.put(Report.of(event))
        return 0x0000, None

    ae = AE(ae_title="MODALITY")
    ae.add_supported_context(PUSH, scu_role=True, scp_role=True)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, take)])
    assert server is not None
    try:
        yield reports
    finally:
        server.shutdown()


def asked(
    receiver: Receiver, *wanted: Dataset, action: int = 1, instance: str = WELL_KNOWN, title: str = "MODALITY"
) -> list[int]:
    """Requests over one association, which is released at once; their statuses."""
    ae = AE(ae_title=title)
    ae.add_requested_context(PUSH)
    assoc = ae.associate("127.0.0.1", receiver.port)
    hold_reactor(assoc)
    statuses = [assoc.send_n_action(one, action, PUSH, instance)[0].Status for one in wanted]
    assoc.release()
    return statuses


@contextmanager
def archive(base: Path, port: int, uids: Sequence[str], **options: Any) -> Iterator[Receiver]:
    """A receiver that holds CT instances, and knows the modality on `port`."""
    base.mkdir(exist_ok=True)
    files = [make_instance(base / f"{uid}.dcm", SOPInstanceUID=uid, EncapsulatedDocument=bytes(900)) for uid in uids]
    peers = [{"name": "modality", "ae_title": "MODALITY", "host": "127.0.0.1", "port": port}]
    with running_receiver(base / "archive", {"peers": peers}, **options) as receiver:
        assert all(result.stored for result in client.store(receiver.peer, files, settings=receiver.settings))
        yield receiver


def waiting(receiver: Receiver) -> int:
    return len(list((receiver.settings.archive.state_dir / "commitment").glob("*.json")))


def nothing_waits(receiver: Receiver) -> bool:
    """Whether every report has been answered, or is within 20 s."""
    deadline = time.monotonic() + 20
    while waiting(receiver) and time.monotonic() < deadline:
        time.sleep(0.05)
    return waiting(receiver) == 0


def test_on_the_same_association(tmp_path: Path) -> None:
    reports: queue.Queue[Report] = queue.Queue()

    def take(event: Any) -> tuple[int, None]:
        reports.put(Report.of(event))
        return 0x0000, None

    wanted = information((CT_STORAGE, "1.2.1"), (CT_STORAGE, "1.2.9"), (MR_STORAGE, "1.2.2"), (CT_STORAGE, "../etc"))
    with archive(tmp_path, free_port(), ["1.2.1", "1.2.2"]) as receiver:
        assoc = associated(receiver, take)
        assert assoc.send_n_action(wanted, 1, PUSH, WELL_KNOWN)[0].Status == 0x0000
        report = reports.get(timeout=30)
        assert report == Report(
            2, wanted.TransactionUID, ("1.2.1",), {"1.2.9": 0x0112, "1.2.2": 0x0119, "../etc": 0x0112}
        )
        good = information((CT_STORAGE, "1.2.1"), (CT_STORAGE, "1.2.2"))
        assert assoc.send_n_action(good, 1, PUSH, WELL_KNOWN)[0].Status == 0x0000
        assert reports.get(timeout=30) == Report(1, good.TransactionUID, ("1.2.1", "1.2.2"), {})
        assert nothing_waits(receiver)  # pynetdicom hands the report over before it answers it: not to be released yet
        assoc.release()


def associated(receiver: Receiver, take: Any) -> Association:
    ae = AE(ae_title="NOBODY")
    ae.add_requested_context(PUSH)
    assoc = ae.associate("127.0.0.1", receiver.port, evt_handlers=[(evt.EVT_N_EVENT_REPORT, take)])
    assert assoc.is_established
    return assoc


def test_on_a_new_association_and_what_is_damaged(tmp_path: Path) -> None:
    """A byte of a stored instance is changed behind the archive's back: it is not committed."""
    port = free_port()
    with archive(tmp_path, port, ["1.2.1", "1.2.2"]) as receiver, requester(port) as reports:
        record = next(one for one in receiver.members() if one.SOPInstanceUID == "1.2.2")
        bundle = tmp_path / "archive" / "storage" / record.bundle
        with bundle.open("r+b") as file:
            file.seek(record.offset + record.length - 1)
            file.write(b"X")
        wanted = information((CT_STORAGE, "1.2.1"), (CT_STORAGE, "1.2.2"))
        assert asked(receiver, wanted) == [0x0000]
        assert reports.get(timeout=30) == Report(2, wanted.TransactionUID, ("1.2.1",), {"1.2.2": 0x0110})
        assert "damaged instance=" in receiver.log and "1.2.2" not in receiver.log


def test_an_accepted_request_survives_kill_9(tmp_path: Path) -> None:
    """The modality is away when its report is due; the receiver is killed; the next one delivers."""
    port = free_port()
    wanted, other = information((CT_STORAGE, "1.2.1")), information((CT_STORAGE, "1.2.7"))
    other.TransactionUID = wanted.TransactionUID
    with archive(tmp_path, port, ["1.2.1"], clean=False) as receiver:
        assert asked(receiver, wanted) == [0x0000]
        assert asked(receiver, wanted, other) == [0x0000, 0x0000]  # the same again, and its UID for something else
        receiver.process.kill()
        receiver.process.wait()
        assert waiting(receiver) == 2
    with requester(port) as reports, archive(tmp_path, port, ["1.2.1"]) as receiver:
        found = {report.event: report for report in (reports.get(timeout=60), reports.get(timeout=60))}
        assert found[1] == Report(1, wanted.TransactionUID, ("1.2.1",), {})
        assert found[2] == Report(2, wanted.TransactionUID, (), {"1.2.7": 0x0131})
        assert nothing_waits(receiver)


def test_requests_that_break_the_rules(tmp_path: Path) -> None:
    empty = Dataset()
    empty.TransactionUID = "1.2"
    good = information((CT_STORAGE, "1.2.1"))
    with archive(tmp_path, free_port(), []) as receiver:
        assert asked(receiver, good, action=2) == [0x0123]
        assert asked(receiver, good, instance="1.2.3") == [0x0112]
        assert asked(receiver, empty, information()) == [0x0115, 0x0115]
        assert waiting(receiver) == 0


def test_orthanc_asks(tmp_path: Path) -> None:
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", {"sphere": ("SPHERE", port)}) as orthanc:
        peers = [{"name": "orthanc", "ae_title": "ORTHANC", "host": "127.0.0.1", "port": orthanc.dicom_port}]
        with running_receiver(tmp_path / "archive", {"dimse": {"port": port}, "peers": peers}):
            path = make_instance(tmp_path / "one.dcm", SOPInstanceUID="1.2.1")
            identity = orthanc.post("/instances", path.read_bytes())["ID"]
            orthanc.post("/modalities/sphere/store", [identity])
            for uids, status in ((["1.2.1"], "Success"), (["1.2.1", "1.2.8"], "Failure")):
                references = [{"SOPClassUID": CT_STORAGE, "SOPInstanceUID": uid} for uid in uids]
                asked = orthanc.post("/modalities/sphere/storage-commitment", {"DicomInstances": references})
                deadline = time.monotonic() + 60
                while (answer := orthanc.get(f"/storage-commitment/{asked['ID']}"))["Status"] == "Pending":
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                assert answer["Status"] == status, answer
                assert [one["SOPInstanceUID"] for one in answer["Success"]] == ["1.2.1"]
