"""Destinations that die, refuse, or say nothing, and requesters that change their mind: counts right, nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt

from sphere.conf.loading import from_dict
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp import client
from sphere.scp.client import retrieve as retrieve_client
from sphere.scp.client.retrieve import Progress
from sphere.scp.contexts import GET_MODELS, MOVE_MODELS
from sphere.scp.store import StoreAnswer, StoreRequest
from sphere.scp.upper.command import C_GET_RQ, C_MOVE_RQ, C_STORE_RQ
from sphere.scp.upper.outgoing import Outgoing
from sphere.scp.upper.requestor import Proposed, connect
from tests.support.ports import free_port
from tests.support.receiver import ROOT, Receiver, running_receiver
from tests.support.samples import CT_STORAGE, dataset_of, make_instance

pytestmark = pytest.mark.faults

TOTAL = 20
STUDY = "1.2.3.4"
IDENTIFIER = b"\x08\x00\x52\x00\x06\x00\x00\x00STUDY " + b"\x20\x00\x0d\x00\x08\x00\x00\x00" + b"1.2.3.4\0"
Handler = Callable[[Any], int]


@contextmanager
def destination(port: int, handler: Handler) -> Iterator[None]:
    """A C-STORE SCP that answers what `handler` says."""
    ae = AE(ae_title="DEST")
    ae.add_supported_context(CT_STORAGE, ExplicitVRLittleEndian)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, handler)])
    assert server is not None
    try:
        yield
    finally:
        server.shutdown()


@contextmanager
def archive(base: Path, port: int, *, rows: int = 16, total: int = TOTAL, seal_mib: int = 256) -> Iterator[Receiver]:
    """An archive with one study of `total` instances that knows a destination on `port`."""
    base.mkdir(exist_ok=True)
    tables = {
        "peers": [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port}],
        "dimse": {"dimse_timeout_s": 2.0, "artim_s": 2.0},
        "storage": {"seal_mib": seal_mib},
    }
    pixels = {
        "Rows": rows, "Columns": 512, "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "SamplesPerPixel": 1,
        "PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2", "PixelData": bytes(rows * 1024),
    }  # fmt: skip
    series = generate_uid()
    files = [
        make_instance(
            base / f"{number}.dcm", StudyInstanceUID=STUDY, SeriesInstanceUID=series, SOPInstanceUID=f"1.2.3.{number}",
            **pixels,
        )
        for number in range(1, total + 1)
    ]  # fmt: skip
    with running_receiver(base / "archive", tables) as receiver:
        assert all(result.stored for result in client.store(receiver.peer, files, settings=receiver.settings))
        yield receiver


def patient(receiver: Receiver) -> Settings:
    """Settings of a client that waits: the first query of a receiver has much to load, on a busy machine for long."""
    dimse = receiver.settings.dimse.model_copy(update={"dimse_timeout_s": 30.0})
    return receiver.settings.model_copy(update={"dimse": dimse})


def moved(receiver: Receiver, total: int = TOTAL, destination: str = "DEST") -> Progress:
    """The final response of a C-MOVE of the study; the counts of each response add up."""
    keys = {"StudyInstanceUID": STUDY}
    settings = patient(receiver)
    last = None
    for last in retrieve_client.move(receiver.peer, keys, settings=settings, destination=destination):
        if last.pending:
            assert last.remaining + last.completed + last.failed + last.warning == total
    assert last is not None and not last.pending
    return last


def test_a_destination_that_refuses_half(tmp_path: Path) -> None:
    port = free_port()

    def refuse_odd(event: Any) -> int:
        return 0xA700 if int(str(event.request.AffectedSOPInstanceUID)[-1]) % 2 else 0x0000

    with destination(port, refuse_odd), archive(tmp_path / "a", port) as receiver:
        last = moved(receiver)
    assert (last.status, last.completed, last.failed, last.warning) == (0xB000, TOTAL // 2, TOTAL // 2, 0)
    assert set(last.failed_uids) == {f"1.2.3.{number}" for number in range(1, TOTAL + 1, 2)}
    assert "status 0xA700" in last.comment


@pytest.mark.parametrize(
    ("status", "final"), [(0xB007, (0xB000, 0, 0, TOTAL)), (0xA900, (0xA702, 0, TOTAL, 0))], ids=["warns", "refuses"]
)
def test_a_destination_that_answers_all_alike(tmp_path: Path, status: int, final: tuple[int, ...]) -> None:
    port = free_port()
    with destination(port, lambda event: status), archive(tmp_path / "a", port) as receiver:
        last = moved(receiver)
    assert (last.status, last.completed, last.failed, last.warning) == final


def test_a_destination_that_aborts_now_and_then_costs_one_instance_each_time(tmp_path: Path) -> None:
    port = free_port()
    asked = []

    def abort_every_seventh(event: Any) -> int:
        asked.append(event)
        if len(asked) % 7 == 0:
            event.assoc.abort()
        return 0x0000

    with destination(port, abort_every_seventh), archive(tmp_path / "a", port) as receiver:
        last = moved(receiver)
    assert (last.status, last.completed, last.failed) == (0xB000, TOTAL - 2, 2)
    assert len(last.failed_uids) == 2


def test_a_destination_that_is_gone_after_some(tmp_path: Path) -> None:
    port = free_port()
    asked = []

    def leave(event: Any) -> int:
        asked.append(event)
        if len(asked) == 6:
            server.shutdown()
            event.assoc.abort()
        return 0x0000

    ae = AE(ae_title="DEST")
    ae.add_supported_context(CT_STORAGE, ExplicitVRLittleEndian)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, leave)])
    with archive(tmp_path / "a", port) as receiver:
        last = moved(receiver)
    assert (last.status, last.completed, last.failed) == (0xB000, 5, TOTAL - 5)
    assert len(last.failed_uids) == TOTAL - 5


def test_a_destination_that_is_killed_half_way(tmp_path: Path) -> None:
    """SIGKILL before the sixth is answered: it and the rest have failed, and are named."""
    port = free_port()
    command = [sys.executable, "-m", "tests.support.mortal_peer", str(port), "6"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with archive(tmp_path / "a", port) as receiver:
            last = moved(receiver)
            assert process.wait(60) == -signal.SIGKILL
            assert moved(receiver).status == 0xA702  # the archive goes on, and says so
    finally:
        process.kill()
        process.wait()
    assert (last.status, last.completed, last.failed) == (0xB000, 5, TOTAL - 5)
    assert len(set(last.failed_uids)) == TOTAL - 5


def test_a_destination_that_never_answers_costs_one_timeout(tmp_path: Path) -> None:
    port = free_port()
    awake = threading.Event()
    asked = []

    def sleep(event: Any) -> int:
        asked.append(event)
        awake.wait(20)
        return 0x0000

    with destination(port, sleep), archive(tmp_path / "a", port) as receiver:
        last = moved(receiver)
        awake.set()
    assert (last.status, last.completed, last.failed, len(asked)) == (0xA702, 0, TOTAL, 1)
    assert len(last.failed_uids) == TOTAL


def test_nobody_there_and_nobody_known(tmp_path: Path) -> None:
    with archive(tmp_path / "a", free_port()) as receiver:
        last = moved(receiver)
        assert (last.status, last.failed) == (0xA702, TOTAL)
        last = moved(receiver, destination="NOBODY")
        assert (last.status, last.failed) == (0xA801, 0)


def test_cancel_is_answered_with_what_remains(tmp_path: Path) -> None:
    port = free_port()
    asked = []

    def slow(event: Any) -> int:
        asked.append(event)
        time.sleep(0.05)
        return 0x0000

    with destination(port, slow), archive(tmp_path / "a", port) as receiver:
        sop_class = next(uid for uid, model in MOVE_MODELS.items() if model == "STUDY_ROOT")
        with connect(receiver.peer, patient(receiver), [Proposed(sop_class, ("1.2.840.10008.1.2",))]) as association:
            context = association.user_contexts[0]
            command = {
                "AffectedSOPClassUID": sop_class, "CommandField": C_MOVE_RQ, "Priority": 0, "MoveDestination": "DEST"
            }  # fmt: skip
            number = association.send(context, command, Outgoing.of(IDENTIFIER))
            responses = [association.response(C_MOVE_RQ, number).command for _ in range(3)]
            association.cancel(context, number)
            while responses[-1]["Status"] == 0xFF00:
                responses.append(association.response(C_MOVE_RQ, number).command)
    last = responses[-1]
    assert last["Status"] == 0xFE00
    done, left = last["NumberOfCompletedSuboperations"], last["NumberOfRemainingSuboperations"]
    assert done + left == TOTAL and left > 0 and done == len(asked) >= 3


def test_cancel_of_a_c_get_sends_nothing_more(tmp_path: Path) -> None:
    """The third instance is answered after the C-CANCEL: the fourth is ready by then, and stays here."""
    sop_class = next(uid for uid, model in GET_MODELS.items() if model == "STUDY_ROOT")
    proposed = [
        Proposed(sop_class, ("1.2.840.10008.1.2",)),
        Proposed(CT_STORAGE, (str(ExplicitVRLittleEndian),), as_scp=True),
    ]
    command = {"AffectedSOPClassUID": sop_class, "CommandField": C_GET_RQ, "Priority": 0}
    taken, responses = 0, []
    with archive(tmp_path / "a", free_port()) as receiver, connect(receiver.peer, patient(receiver), proposed) as asked:
        context = next(one for one in asked.user_contexts if one.abstract_syntax == sop_class)
        number = asked.send(context, command, Outgoing.of(IDENTIFIER))
        while not responses or responses[-1]["Status"] == 0xFF00:
            message = asked.receive()
            if message.command["CommandField"] == C_STORE_RQ:
                taken += 1
                if taken == 3:
                    asked.cancel(context, number)
                asked.respond(message, 0x0000)
            else:
                responses.append(message.command)
            asked.finish(message)
    counts = [responses[-1][f"NumberOf{what}Suboperations"] for what in ("Completed", "Failed", "Remaining")]
    assert (responses[-1]["Status"], taken, counts) == (0xFE00, 3, [3, 0, TOTAL - 3])


@pytest.mark.parametrize("tool", ["move", "get"])
def test_a_bundle_that_lost_its_end_costs_the_instances_that_were_there(tmp_path: Path, tool: str) -> None:
    port = free_port()
    with destination(port, lambda event: 0x0000), archive(tmp_path / "a", port) as receiver:
        members = sorted(receiver.members(), key=lambda one: one.offset)
        bundle = Path(receiver.settings.storage.root.removeprefix("file://")) / members[0].bundle
        os.truncate(bundle, members[12].offset + members[12].length - 1)
        store = SimpleNamespace(land=lambda request: StoreAnswer(0x0000))
        keys = {"StudyInstanceUID": STUDY}
        if tool == "move":
            last = moved(receiver)
        else:
            *_, last = retrieve_client.get(receiver.peer, keys, settings=patient(receiver), store=store)
    assert (last.status, last.completed, last.failed) == (0xB000, 12, TOTAL - 12)
    assert set(last.failed_uids) == {one.SOPInstanceUID for one in members[12:]}


def test_memory_is_flat(tmp_path: Path) -> None:
    """200 instances of 512 kB: the receiver's own memory grows by the windows that are read ahead, no more."""
    port = free_port()
    peak = 0
    with destination(port, lambda event: 0x0000), archive(tmp_path / "a", port, rows=512, total=200) as receiver:
        process = psutil.Process(receiver.process.pid)
        moved(receiver, 200)
        before = process.memory_full_info().uss
        stop = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.05):
                peak = max(peak, process.memory_full_info().uss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        last = moved(receiver, 200)
        stop.set()
        watcher.join()
    assert last.completed == 200
    assert peak - before < 24 << 20 and peak < 160 << 20


def test_a_study_in_many_bundles_comes_whole_and_few_are_open(tmp_path: Path) -> None:
    """40 instances of 512 kB in bundles of 1 MiB."""
    port, total = free_port(), 40
    got: dict[str, bytes] = {}
    opened: list[int] = []

    def keep(event: Any) -> int:
        got[str(event.request.AffectedSOPInstanceUID)] = event.request.DataSet.getvalue()
        reads = [one for one in process.open_files() if one.path.endswith(".tar") and one.mode == "r"]
        opened.append(len(reads))
        return 0x0000

    with destination(port, keep), archive(tmp_path / "a", port, rows=512, total=total, seal_mib=1) as receiver:
        process = psutil.Process(receiver.process.pid)
        bundles = {one.bundle for one in receiver.members()}
        last = moved(receiver, total)
    assert (last.status, last.completed) == (0x0000, total)
    assert got == {f"1.2.3.{n}": dataset_of(tmp_path / "a" / f"{n}.dcm") for n in range(1, total + 1)}
    assert len(bundles) >= 10 and len(opened) == total and max(opened) <= 4


def test_who_leaves_in_the_middle_of_a_c_get_costs_nothing(tmp_path: Path) -> None:
    class Leaves:
        """Takes three instances, then dies."""

        taken = 0

        def land(self, request: StoreRequest) -> StoreAnswer:
            self.taken += 1
            if self.taken > 3:
                raise ConnectionError("enough")
            return StoreAnswer(0x0000)

    with archive(tmp_path / "a", free_port()) as receiver:
        keys = {"StudyInstanceUID": STUDY}
        with pytest.raises(ConnectionError, match="enough"):
            list(retrieve_client.get(receiver.peer, keys, settings=patient(receiver), store=Leaves()))
        store = Leaves()
        store.taken = -100
        *_, last = retrieve_client.get(receiver.peer, keys, settings=patient(receiver), store=store)
        assert (last.status, last.completed, store.taken) == (0x0000, TOTAL, TOTAL - 100)


def test_who_reads_no_further_results_leaves_in_order(tmp_path: Path) -> None:
    """The second instance is under way then: its answer comes before that to the release."""
    port, events = free_port(), []
    files = [
        make_instance(tmp_path / f"{n}.dcm", StudyInstanceUID=STUDY, SOPInstanceUID=f"1.2.3.{n}") for n in (1, 2, 3)
    ]

    def slow(event: Any) -> int:
        events.append("asked")
        time.sleep(0.2)
        return 0x0000

    ae = AE(ae_title="DEST")
    ae.add_supported_context(CT_STORAGE, ExplicitVRLittleEndian)
    ends = [(kind, lambda event: events.append(event.event.name)) for kind in (evt.EVT_RELEASED, evt.EVT_ABORTED)]
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, slow), *ends])
    assert server is not None
    peer = Peer(name="dest", ae_title="DEST", host="127.0.0.1", port=port)
    results = client.store(peer, files, settings=from_dict({}, base=tmp_path))
    assert next(results).stored
    results.close()
    deadline = time.monotonic() + 10
    while len(events) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    server.shutdown()
    assert events == ["asked", "asked", "EVT_RELEASED"]


def test_the_same_peer(tmp_path: Path) -> None:
    """An archive may be told to send to itself: it has those bytes already, and keeps them once."""
    port = free_port()
    tables = {
        "dimse": {"port": port},
        "peers": [{"name": "me", "ae_title": "SPHERE", "host": "127.0.0.1", "port": port}],
    }
    path = make_instance(tmp_path / "1.dcm", StudyInstanceUID=STUDY)
    with running_receiver(tmp_path / "a", tables) as receiver:
        me: Peer = receiver.peer
        assert [result.stored for result in client.store(me, [path], settings=receiver.settings)] == [True]
        last = moved(receiver, 1, "SPHERE")
        assert (last.status, last.completed, len(receiver.members())) == (0x0000, 1, 1)
