"""What must not harm the DIMSE port: garbage, broken senders, strangers, full disks. The receiver goes on each time."""

from __future__ import annotations

import re
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_ECHO, C_FIND, C_STORE

from sphere.catalog.answer import Match
from sphere.catalog.query import Key
from sphere.conf.errors import PeerError
from sphere.conf.settings import Settings
from sphere.scp import client
from sphere.scp.callers import Callers
from sphere.scp.find import FindService
from sphere.scp.handlers import Handlers
from sphere.scp.identifier import build_identifier
from sphere.scp.peers import CallingPolicy
from sphere.scp.server import listen
from sphere.scp.store import MISMATCH, OUT_OF_RESOURCES, StoreService
from sphere.scp.upper import transport
from tests.support.ports import free_port
from tests.support.pynetdicom_user import hold_reactor
from tests.support.raw_peer import RawPeer, identifying, p_data, pdv, store_rq
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import CT_STORAGE, dataset_of, make_instance

pytestmark = pytest.mark.faults

MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
STUDY_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
ABORT = 0x07  # PDU type of an A-ABORT (PS3.8 9.3.8)
SHORT_TIMEOUTS = {"artim_s": 1.0, "network_timeout_s": 1.5}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with running_receiver(tmp_path_factory.mktemp("archive"), {"dimse": SHORT_TIMEOUTS}) as running:
        yield running


def still_serves(receiver: Receiver, folder: Path) -> None:
    """The same process still answers and stores."""
    assert receiver.process.poll() is None, receiver.log
    client.echo(receiver.peer, settings=receiver.settings)
    path = make_instance(folder / "after.dcm")
    [result] = client.store(receiver.peer, [path], settings=receiver.settings)
    assert result.stored, result


def associated(port: int, *classes: str, **options: Any) -> Association:
    """An association in Explicit VR Little Endian."""
    ae = AE(ae_title=options.pop("ae_title", "FAULTY"))
    ae.requested_contexts = [build_context(uid, "1.2.840.10008.1.2.1") for uid in classes]
    return ae.associate("127.0.0.1", port, **options)


def all_that_comes(connection: socket.socket) -> bytes:
    """What the receiver sends until it closes the connection, which it must do before the socket's timeout."""
    received = b""
    while True:
        try:
            data = connection.recv(4096)
        except ConnectionResetError:
            return received
        if not data:
            return received
        received += data


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("an HTTP request", b"GET / HTTP/1.1\r\nHost: pacs\r\n\r\n"),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
        ("every byte", bytes(range(256)) * 64),
        ("zeros", bytes(10_000)),
        ("an empty A-ASSOCIATE-RQ", b"\x01\x00\x00\x00\x00\x44" + bytes(0x44)),
        ("an A-ASSOCIATE-RQ of garbage", b"\x01\x00\x00\x00\x01\x00" + bytes(range(256))),
        ("an A-ASSOCIATE-RQ without end", b"\x01\x00\x00\x00\x01\x00\x00\x01"),
        ("a PDU of 4 GiB", b"\x01\x00\xff\xff\xff\xff" + bytes(10_000)),
        ("P-DATA before an association", b"\x04\x00\x00\x00\x00\x08\x00\x00\x00\x04\x01\x03ab"),
        ("an A-ABORT", b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"),
        ("an A-ASSOCIATE-AC", b"\x02\x00\x00\x00\x00\x44" + bytes(0x44)),
        ("nothing", b""),
    ],
)
def test_garbage_ends_its_connection_only(receiver: Receiver, tmp_path: Path, name: str, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=20) as connection:
        connection.sendall(sent)
        answer = all_that_comes(connection)
    assert answer == b"" or answer[0] == ABORT
    still_serves(receiver, tmp_path)


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("a P-DATA-TF of 4 GiB", b"\x04\x00\xff\xff\xff\xff" + bytes(4096)),
        ("a PDV longer than its PDU", b"\x04\x00\x00\x00\x00\x08\x00\x00\xff\x00\x01\x03ab"),
        ("a PDV of negative length", b"\x04\x00\x00\x00\x00\x08\xff\xff\xff\xff\x01\x03ab"),
        ("a PDV of length 0", b"\x04\x00\x00\x00\x00\x04\x00\x00\x00\x00"),
        ("a command that is none", b"\x04\x00\x00\x00\x00\x0a\x00\x00\x00\x06\x01\x03abcd"),
        ("half a PDU", b"\x04\x00\x00\x00\x10\x00" + bytes(100)),
        ("a command without end", (b"\x04\x00\x00\x00\x10\x06\x00\x00\x10\x02\x01\x01" + bytes(4096)) * 40),
        ("an unknown PDU type", b"\x4e\x00\x00\x00\x00\x04\x00\x00\x00\x00"),
        ("a second A-ASSOCIATE-RQ", b"\x01\x00\x00\x00\x00\x44" + bytes(0x44)),
    ],
)
def test_broken_pdus_on_an_association_abort_it(receiver: Receiver, tmp_path: Path, name: str, sent: bytes) -> None:
    aborted = threading.Event()
    handlers: Any = [(evt.EVT_ABORTED, lambda _: aborted.set()), (evt.EVT_CONN_CLOSE, lambda _: aborted.set())]
    assoc = associated(receiver.port, CT_STORAGE, evt_handlers=handlers)
    assert assoc.is_established
    assoc.dul.socket.socket.sendall(sent)  # type: ignore[union-attr]
    assert aborted.wait(20)
    assoc.abort()
    still_serves(receiver, tmp_path)


def test_a_claimed_length_costs_no_memory(receiver: Receiver) -> None:
    process = psutil.Process(receiver.process.pid)
    before = process.memory_info().rss
    connections = [socket.create_connection(("127.0.0.1", receiver.port), timeout=20) for _ in range(30)]
    for connection in connections:
        connection.sendall(b"\x01\x00\xff\xff\xff\xff" + bytes(1000))
    for connection in connections:
        all_that_comes(connection)
        connection.close()
    assert process.memory_info().rss - before < 64 << 20


def test_a_sender_that_dies_in_the_middle_of_a_data_set_leaves_nothing(receiver: Receiver, tmp_path: Path) -> None:
    before = len(receiver.members())
    data = dataset_of(make_instance(tmp_path / "one.dcm", EncapsulatedDocument=bytes(12 << 20)))
    request = C_STORE()
    request.MessageID, request.Priority = 1, 0
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CT_STORAGE, "1.2.3.4"
    request.DataSet = BytesIO(data)
    assoc = associated(receiver.port, CT_STORAGE, evt_handlers=[(evt.EVT_DATA_SENT, _Dies(10 << 20))])
    assoc.dimse.send_msg(request, 1)
    assoc.join(30)
    still_serves(receiver, tmp_path)
    assert len(receiver.members()) == before + 1
    assert "1.2.3.4" not in {record.SOPInstanceUID for record in receiver.members()}


class _Dies:
    """Closes the connection hard when that many bytes have been sent."""

    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, event: Any) -> None:
        self._left -= len(event.data)
        if self._left < 0:
            event.assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)


def test_an_idle_association_is_aborted(receiver: Receiver, tmp_path: Path) -> None:
    closed = threading.Event()
    assoc = associated(receiver.port, CT_STORAGE, evt_handlers=[(evt.EVT_CONN_CLOSE, lambda _: closed.set())])
    assert closed.wait(20)
    assoc.join(10)
    still_serves(receiver, tmp_path)


def test_a_data_set_that_does_not_parse_is_kept_with_a_warning(receiver: Receiver) -> None:
    assoc = associated(receiver.port, CT_STORAGE)
    request = C_STORE()
    request.MessageID, request.Priority = 1, 0
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CT_STORAGE, "1.2.3.5"
    garbage = bytes(range(256)) * 20
    request.DataSet = BytesIO(garbage)
    response = exchange(assoc, request)
    assert response.Status == MISMATCH
    assert response.ErrorComment == "stored, but the data set has no readable SOP Instance UID"
    [record] = [record for record in receiver.members() if record.SOPInstanceUID == "1.2.3.5"]
    assert receiver.dataset_bytes(record) == garbage


def test_a_class_of_another_presentation_context_is_kept_with_a_warning(receiver: Receiver, tmp_path: Path) -> None:
    """Over an association for CT: an MR that its command calls MR, and one that its command calls CT."""
    for number, sop_class, comment in [
        (1, MR_STORAGE, "stored, but its presentation context is of another SOP class"),
        (2, CT_STORAGE, "stored, but the data set names another SOP class"),
    ]:
        uid = f"1.2.7.{number}"
        peer = RawPeer.connect(receiver.port)
        peer.associate()
        data = identifying(uid, sop_class=MR_STORAGE)
        peer.send(p_data(pdv(3, 3, store_rq(uid, sop_class=sop_class))) + p_data(pdv(3, 2, data)))
        response = peer.response()
        assert (response["Status"], response["ErrorComment"]) == (MISMATCH, comment)
        peer.release()
        [record] = [record for record in receiver.members() if record.SOPInstanceUID == uid]
        assert record.SOPClassUID == MR_STORAGE
        assert receiver.dataset_bytes(record) == data


@pytest.mark.parametrize("instance", ["../../etc/passwd", "1.2." + "3" * 80, "a b/c\\d", "1..2."])
def test_uids_that_are_none_reach_no_path(receiver: Receiver, tmp_path: Path, instance: str) -> None:
    """They are kept as bytes with a warning, for quarantine; no name of a file or of a member has anything of them."""
    base = receiver.log_path.parent
    around = set(base.parent.iterdir())
    peer = RawPeer.connect(receiver.port)
    peer.associate()
    for commanded, named in ((instance, ""), ("1.2.3.6", instance)):  # by the command alone, then by the data set
        data = identifying(named) + instance.encode()  # bytes of their own
        assert peer.store(commanded, [data + bytes(len(data) % 2)]) == MISMATCH
        record = receiver.members()[-1]
        assert record.SOPInstanceUID == (named.partition("\\")[0] or commanded)
    peer.release()
    root = base / "storage"
    with tarfile.open(root / record.bundle, ignore_zeros=True) as tar:
        names = tar.getnames()
    assert names and all(PLAIN_NAME.fullmatch(name) for name in names), names
    files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    assert record.bundle in files and all(PLAIN_FILE.fullmatch(name) for name in files), files
    assert {path.name for path in base.iterdir()} <= {"storage", "state", receiver.log_path.name}
    assert set(base.parent.iterdir()) - around <= {tmp_path}
    still_serves(receiver, tmp_path)


PLAIN_NAME = re.compile(r"([0-9.]+\.dcm|[0-9a-f]{64}\.bin)")
PLAIN_FILE = re.compile(r"(bundles/\d{4}/\d\d/\d\d/[0-9A-Za-z-]+\.(tar|journal)|audit/[0-9A-Za-z/.-]+)")


def exchange(assoc: Association, request: Any) -> Any:
    """Send a message in the first context and wait for what comes back; the association is over then."""
    hold_reactor(assoc)
    assoc.dimse.send_msg(request, 1)
    _, response = assoc.dimse.get_msg(block=True)
    assoc.abort()
    return response


VERIFICATION = "1.2.840.10008.1.1"


@pytest.mark.parametrize(
    ("kind", "sop_class", "contexts", "status"),
    [
        (C_STORE, CT_STORAGE, (STUDY_FIND, CT_STORAGE), 0x0122),  # in a context of another service
        (C_STORE, VERIFICATION, (CT_STORAGE, VERIFICATION), 0x0122),  # no Success for what is not stored
        (C_FIND, CT_STORAGE, (CT_STORAGE,), 0x0122),
        (C_FIND, STUDY_FIND, (CT_STORAGE, STUDY_FIND), 0x0122),
        (C_ECHO, CT_STORAGE, (CT_STORAGE,), 0x0122),
    ],
)
def test_messages_of_another_service_are_refused(
    receiver: Receiver, tmp_path: Path, kind: Any, sop_class: str, contexts: tuple[str, ...], status: int
) -> None:
    message = kind()
    message.MessageID, message.AffectedSOPClassUID = 1, sop_class
    if kind is C_STORE:
        message.Priority, message.AffectedSOPInstanceUID = 0, "1.2.3.6"
        message.DataSet = BytesIO(dataset_of(make_instance(tmp_path / "one.dcm")))
    if kind is C_FIND:
        message.Priority, message.Identifier = 0, BytesIO(b"\x08\x00\x52\x00CS\x06\x00STUDY ")
    response = exchange(associated(receiver.port, *contexts), message)
    assert response.Status == status
    assert "1.2.3.6" not in {record.SOPInstanceUID for record in receiver.members()}
    still_serves(receiver, tmp_path)


def test_a_request_that_lacks_what_it_must_have_is_refused(receiver: Receiver, tmp_path: Path) -> None:
    request = C_STORE()
    request.MessageID, request.Priority, request.AffectedSOPClassUID = 1, 0, CT_STORAGE
    request.DataSet = BytesIO(b"\x08\x00\x05\x00CS\x00\x00")
    assoc = associated(receiver.port, CT_STORAGE)
    assert exchange(assoc, request).Status == 0xC000  # cannot understand (PS3.4 Table B.2-1)
    still_serves(receiver, tmp_path)


def test_one_association_too_many_is_told_so(tmp_path: Path) -> None:
    with running_receiver(tmp_path / "archive", {"dimse": {"max_associations": 2}}) as receiver:
        held = [associated(receiver.port, CT_STORAGE) for _ in range(2)]
        refused = associated(receiver.port, CT_STORAGE)
        assert refused.is_rejected
        answer = refused.acceptor.primitive
        assert answer is not None
        assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)  # transient, local limit exceeded
        with pytest.raises(PeerError, match="rejected the association: Local limit exceeded"):
            client.echo(receiver.peer, settings=receiver.settings)
        for assoc in held:
            assoc.release()
        still_serves(receiver, tmp_path)


def test_connections_far_beyond_the_limit_are_closed_unread(tmp_path: Path) -> None:
    with running_receiver(tmp_path / "archive", {"dimse": {"max_associations": 1, "artim_s": 3}}) as receiver:
        connections = [socket.create_connection(("127.0.0.1", receiver.port), timeout=20) for _ in range(60)]
        assert [all_that_comes(connection) for connection in connections] == [b""] * 60
        for connection in connections:
            connection.close()
        wait_until_it_answers(receiver)
        for _ in range(20):  # each at once after the one before it: its only place is free by then
            client.echo(receiver.peer, settings=receiver.settings)
        still_serves(receiver, tmp_path)


def wait_until_it_answers(receiver: Receiver) -> None:
    """Return when there is room for an association again, within 20 s."""
    deadline = time.monotonic() + 20
    while True:
        try:
            client.echo(receiver.peer, settings=receiver.settings)
            return
        except PeerError:
            assert time.monotonic() < deadline, receiver.log
            time.sleep(0.1)


def test_a_full_disk_is_a_failure_status_and_nothing_is_lost(tmp_path: Path) -> None:
    """No file of the receiver may grow above 1 MiB: the bundle is full after a few instances."""
    small = [make_instance(tmp_path / f"{n}.dcm", EncapsulatedDocument=bytes([n]) * 150_000) for n in range(12)]
    large = make_instance(tmp_path / "large.dcm", EncapsulatedDocument=bytes(2 << 20))
    with running_receiver(tmp_path / "archive", file_size_limit=1 << 20) as receiver:
        results = list(client.store(receiver.peer, [*small[:4], large, *small[4:]], settings=receiver.settings))
        by_path = {result.source: result for result in results}
        assert by_path[large].status == OUT_OF_RESOURCES
        assert "status 0xA700 (" in by_path[large].error
        assert {result.status for result in results} == {0, OUT_OF_RESOURCES}
        stored = [Path(result.source) for result in results if result.stored]
        assert len(stored) >= 8
        assert stored[-1] == small[-1] or by_path[small[-2]].stored  # it goes on in a new bundle
        kept = [receiver.dataset_bytes(record) for record in receiver.members()]
        assert kept == [dataset_of(path) for path in stored]


class Served:
    """A receiver's server inside this process, with services of the test's own."""

    def __init__(self, settings: Settings, policy: Any, finder: Any) -> None:
        handlers = Handlers(Callers(settings, policy), StoreService(None), FindService(finder))  # type: ignore[arg-type]
        self._server = listen(settings, handlers)
        self.port = self._server.port
        threading.Thread(target=self._server.serve, daemon=True).start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.stop()


class Nobody(CallingPolicy):
    """Knows no caller, as the real policy does away from loopback."""

    def admits(self, ae_title: str, address: str) -> bool:
        return False


class ManyStudies:
    """A catalog of `count` studies that remembers how many were asked for, and whether the query was closed.

    It gives the first few, and the others once `go_on` is set: what the peer does in between comes before their end,
    as they are far more than the sockets hold.
    """

    FIRST = 10

    def __init__(self, count: int) -> None:
        self.count = count
        self.given = 0
        self.go_on = threading.Event()
        self.closed = threading.Event()

    def find(self, query: Any, **_: Any) -> Iterator[Match]:
        try:
            for number in range(self.count):
                if number == self.FIRST:
                    assert self.go_on.wait(60)
                self.given += 1
                yield study(f"1.2.{number}")
        finally:
            self.closed.set()


UID_AND_DESCRIPTION = (Key(0x0020000D, "StudyInstanceUID", "UI"), Key(0x00081030, "StudyDescription", "LO"))


def study(uid: Any) -> Match:
    """A study as the query service gives it."""
    return Match("STUDY", UID_AND_DESCRIPTION, {0x0020000D: uid, 0x00081030: "x" * 1000}, {}, "SPHERE")


class OddStudies:
    """A catalog whose third study, the first time it is asked, holds what no element can."""

    def __init__(self) -> None:
        self.asked = 0

    def find(self, query: Any, **_: Any) -> Iterator[Match]:
        self.asked += 1
        odd: Any = object() if self.asked == 1 else "1.2.3"
        yield from map(study, ("1.2.1", "1.2.2", odd, "1.2.4"))


@pytest.fixture
def served_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"dimse": settings.dimse.model_copy(update={"port": free_port()})})


def test_a_stranger_is_rejected(served_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "GRACE_S", 60.0)  # pynetdicom looks at its socket when the machine has time for it
    with Served(served_settings, Nobody(()), ManyStudies(0)) as served:
        assoc = associated(served.port, CT_STORAGE, ae_title="STRANGER")
        assert assoc.is_rejected
        answer = assoc.acceptor.primitive
        assert answer is not None
        assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, 3)  # calling AE title not recognised


def test_a_cancelled_query_stops_at_its_source(served_settings: Settings) -> None:
    catalog = ManyStudies(100_000)
    with Served(served_settings, CallingPolicy(()), catalog) as served:
        assoc = associated(served.port, STUDY_FIND)
        hold_reactor(assoc)
        statuses = []
        for status, _ in assoc.send_c_find(build_identifier({}, "STUDY"), STUDY_FIND, msg_id=7):
            statuses.append(status.Status)
            if len(statuses) == 5:
                assoc.send_c_cancel(7, query_model=STUDY_FIND)
                catalog.go_on.set()
        assoc.release()
    assert statuses[-1] == 0xFE00
    assert set(statuses[:-1]) == {0xFF00}
    assert catalog.given < catalog.count
    assert catalog.closed.is_set()


def test_a_reader_that_stops_reading_costs_some_answers_only(served_settings: Settings) -> None:
    catalog = ManyStudies(100_000)
    with Served(served_settings, CallingPolicy(()), catalog) as served:
        assoc = associated(served.port, STUDY_FIND)
        hold_reactor(assoc)
        answers = assoc.send_c_find(build_identifier({}, "STUDY"), STUDY_FIND)
        next(answers)
        assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        catalog.go_on.set()
        assert catalog.closed.wait(20)
        assoc.abort()
    assert catalog.given < catalog.count


def test_an_answer_that_cannot_be_encoded_fails_its_query_only(served_settings: Settings) -> None:
    with Served(served_settings, CallingPolicy(()), OddStudies()) as served:
        assoc = associated(served.port, STUDY_FIND)
        asked = []
        for _ in range(2):
            hold_reactor(assoc)
            asked.append(list(assoc.send_c_find(build_identifier({}, "STUDY"), STUDY_FIND)))
        assoc.release()
    assert [[status.Status for status, _ in answers] for answers in asked] == [
        [0xFF00, 0xFF00, 0xC000],
        [0xFF00, 0xFF00, 0xFF00, 0xFF00, 0],
    ]
    assert re.fullmatch(r"internal error \(\w+\)", asked[0][-1][0].ErrorComment)
