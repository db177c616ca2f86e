"""Many who ask for all instances of a hospital and read nothing: the processes that serve hold a page for each.

A real catalog, real processes; what is asked for is sorted and joined. Kept in DuckDB, the answers of ten readers took
all the memory that the queries of a process have, and no other query was answered.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack

import psutil  # type: ignore[import-untyped]
import pytest
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from sphere.conf.settings import Settings
from sphere.scp.upper import command
from tests.bench import hospital_catalog
from tests.bench.hospital import Hospital
from tests.bench.query_client import STUDY_ROOT_FIND, Association, association, question
from tests.bench.query_servers import web
from tests.support.raw_peer import RawPeer, associate_rq, p_data, pdv
from tests.support.receiver import running_receiver

pytestmark = pytest.mark.faults

STUDIES = 1_000
READERS = 16
FIRST = 4
"""Readers that are there before: the allocator keeps what sorts at the same time took."""
GROWTH_MIB = 8 * READERS
"""A page as objects, as bytes and on its way to the socket, and a thread; all that they ask for takes 200."""
KEYS = ("SOPInstanceUID", "InstanceNumber", "PatientID", "StudyDescription", "SeriesDescription", "Modality")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Hospital]:
    return hospital_catalog.kept(tmp_path_factory.mktemp("hospital"), STUDIES)


def uss(pid: int) -> float:
    """MiB that are the process's own."""
    return float(psutil.Process(pid).memory_full_info().uss) / (1 << 20)


def relational(port: int) -> RawPeer:
    """An association on which instances may be asked for without their study, of a peer with small buffers."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", port))
    peer, extension = RawPeer(sock), SOPClassExtendedNegotiation()
    extension.sop_class_uid, extension.service_class_application_information = STUDY_ROOT_FIND, b"\x01"
    syntax = ImplicitVRLittleEndian
    peer.associate(associate_rq([STUDY_ROOT_FIND], called="TESTED", syntax=syntax, ours=[extension]))
    return peer


def everything() -> bytes:
    """A C-FIND-RQ for all instances, with what their study and series say."""
    fields = {"AffectedSOPClassUID": STUDY_ROOT_FIND, "CommandField": command.C_FIND_RQ, "MessageID": 1, "Priority": 0,
              "CommandDataSetType": 0}  # fmt: skip
    identifier = question("IMAGE", {**dict.fromkeys(KEYS, ""), "PatientName": "*"})
    return p_data(pdv(1, 3, command.encode(fields))) + p_data(pdv(1, 2, identifier))


def test_c_find(made: tuple[Settings, Hospital]) -> None:
    settings, hospital = made
    tables = {"archive": {"ae_title": "TESTED"}, "extract": {"every_s": 0}}
    with running_receiver(settings.archive.state_dir.parent, tables) as receiver, ExitStack() as stack:
        peers = [relational(receiver.port) for _ in range(1 + FIRST + READERS)]
        for peer in peers:
            stack.callback(peer.close)
        identifier = question("IMAGE", {**dict.fromkeys(KEYS, ""), "PatientName": "*"})
        assert Association(peers.pop()).ask(identifier).answers == hospital.instances  # caches are warm
        before = 0.0
        for some in (peers[:FIRST], peers[FIRST:]):
            before = uss(receiver.process.pid)
            for peer in some:
                peer.send(everything())
            for peer in some:
                assert peer.sock.recv(1, socket.MSG_PEEK), "the first answers"
        growth = uss(receiver.process.pid) - before
        print(f"{growth:.0f} MiB for {READERS} readers")
        assert growth < GROWTH_MIB, f"{growth:.0f} MiB"
        with association(receiver.port, "TESTED") as other:
            key = hospital.study_values["AccessionNumber"][5].as_py()
            assert other.ask(question("STUDY", {"AccessionNumber": key, "StudyInstanceUID": ""})).answers == 1
            assert other.ask(question("STUDY", {"PatientName": "*a*", "StudyInstanceUID": ""})).answers > 100
        found = [_uid(answer) for answer in _answers(peers[-1])]
        assert (len(set(found)), found) == (hospital.instances, sorted(found)), "each once, in order"


def _answers(peer: RawPeer) -> list[bytes]:
    """The identifiers that a slow reader reads in the end."""
    answers = []
    with peer.sock.makefile("rb", buffering=1 << 20) as stream:
        while True:
            head = stream.read(6)
            body = stream.read(int.from_bytes(head[2:], "big"))
            while body:
                length = int.from_bytes(body[:4], "big")
                value, body = body[4 : 4 + length], body[4 + length :]
                if not value[1] & 1:
                    answers.append(value[2:])
                elif not command.decode(value[2:])["Status"]:
                    return answers


def _uid(answer: bytes) -> bytes:
    """What orders an answer: the study, the series and the instance."""
    found = []
    for tag in (b"\x20\x00\x0d\x00", b"\x20\x00\x0e\x00", b"\x08\x00\x18\x00"):
        at = answer.index(tag) + 4
        length = int.from_bytes(answer[at : at + 4], "little")
        found.append(answer[at + 4 : at + 4 + length].rstrip(b"\0"))
    return b"\0".join(found)


def test_qido(made: tuple[Settings, Hospital]) -> None:
    settings, hospital = made
    path = "/dicom-web/instances?PatientName=*&includefield=StudyDescription&includefield=SeriesDescription"
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    with web(settings) as (port, pid), ExitStack() as stack:

        def ask() -> socket.socket:
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(60)
            sock.connect(("127.0.0.1", port))
            sock.sendall(request)
            return sock

        def read(sock: socket.socket) -> int:
            with sock.makefile("rb", buffering=1 << 20) as stream:
                return sum(line.count(b'"00080018"') for line in stream)

        assert read(ask()) == hospital.instances  # caches are warm
        before, readers = 0.0, []
        for count in (FIRST, READERS):
            before = uss(pid)
            readers = [ask() for _ in range(count)]
            for sock in readers:
                assert sock.recv(1, socket.MSG_PEEK), "the first answers"
        growth = uss(pid) - before
        print(f"{growth:.0f} MiB for {READERS} readers")
        assert growth < GROWTH_MIB, f"{growth:.0f} MiB"
        assert read(readers[0]) == hospital.instances
