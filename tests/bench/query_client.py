"""C-FIND as the benchmark asks any server: identifiers encoded before, answers counted and not decoded."""

from __future__ import annotations

import multiprocessing
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.dsutils import encode

from sphere.catalog.schema import Level
from sphere.scp.identifier import build_identifier
from sphere.scp.upper.command import C_FIND_RQ
from sphere.scp.upper.command import encode as encode_command
from tests.support.raw_peer import RawPeer, associate_rq, p_data, pdv

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PENDING = (0xFF00, 0xFF01)
STATUS = b"\0\0\0\x09\x02\0\0\0"  # the head of (0000,0900), as a command set has it


@dataclass(frozen=True, slots=True)
class Asked:
    """What one query took: seconds to the first and to the last answer, and how many there were."""

    first_s: float
    last_s: float
    answers: int


def question(level: Level, keys: dict[str, str]) -> bytes:
    """An encoded identifier."""
    encoded = encode(build_identifier(keys, level), is_implicit_vr=True, is_little_endian=True)
    assert encoded is not None
    return encoded


class Association:
    """The least that asks a query: it shares the processors with the servers, and what it takes is in every figure."""

    def __init__(self, peer: RawPeer) -> None:
        self._sock = peer.sock
        self._number = 0
        self._received = memoryview(bytearray(1 << 18))

    def ask(self, identifier: bytes) -> Asked:
        """Put one question and read its answers to the end."""
        self._number = self._number % 0xFFFF + 1
        fields = {
            "AffectedSOPClassUID": STUDY_ROOT_FIND, "CommandField": C_FIND_RQ, "MessageID": self._number,
            "Priority": 0, "CommandDataSetType": 0,
        }  # fmt: skip
        message = p_data(pdv(1, 3, encode_command(fields))) + p_data(pdv(1, 2, identifier))
        began = time.perf_counter()
        self._sock.sendall(message)
        first = 0.0
        for answers, status in enumerate(self._statuses()):
            first = first or time.perf_counter() - began
            if status not in PENDING:
                assert status == 0, f"0x{status:04X}"
                return Asked(first, time.perf_counter() - began, answers)
        raise AssertionError

    def _statuses(self) -> Iterator[int]:
        """Of each response, as its command set comes; data sets are passed over."""
        view, at, end = self._received, 0, 0
        while True:
            while end - at < 6 or end - at < 6 + int.from_bytes(view[at + 2 : at + 6], "big"):
                view[: end - at] = view[at:end]
                at, end = 0, end - at
                count = self._sock.recv_into(view[end:])
                assert count, "the server closed the association"
                end += count
            body = bytes(view[at : at + 6 + int.from_bytes(view[at + 2 : at + 6], "big")])
            assert body[0] == 4, f"PDU type {body[0]}"
            at += len(body)
            if body[11] & 1:  # a command set, whole in its PDU
                place = body.rindex(STATUS) + len(STATUS)
                yield int.from_bytes(body[place : place + 2], "little")


@contextmanager
def association(port: int, ae_title: str) -> Iterator[Association]:
    """An association with a server of this machine."""
    peer = RawPeer.connect(port, timeout=120)
    peer.associate(associate_rq([STUDY_ROOT_FIND], called=ae_title, syntax=ImplicitVRLittleEndian, max_pdu=1 << 17))
    try:
        yield Association(peer)
        peer.release()
    finally:
        peer.close()


class Web:
    """A connection that asks QIDO-RS, kept open."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, path: str, *, counted: bytes = b'"0020000D"') -> Asked:
        """GET, and read the answers to the end: as many as `counted` stands in them."""
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/dicom+json\r\n\r\n".encode()
        began = time.perf_counter()
        self._sock.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._sock.recv(1 << 16)
        head, _, body = received.partition(b"\r\n\r\n")
        first, lines = time.perf_counter() - began, head.lower().split(b"\r\n")
        assert b" 200 " in lines[0] or b" 204 " in lines[0], lines[0]
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        while len(body) < length:
            body += self._sock.recv(1 << 16)
        return Asked(first, time.perf_counter() - began, body.count(counted))

    def close(self) -> None:
        """End the connection."""
        self._sock.close()


def together(port: int, ae_title: str, questions: Sequence[bytes], *, clients: int, seconds: float) -> float:
    """Queries/s that `clients` associations get at once; they live in two processes, beside the servers."""
    context = multiprocessing.get_context("spawn")
    rates: Any = context.Queue()
    start = context.Barrier(2)
    halves = [
        context.Process(target=_clients, args=((port, ae_title), questions, clients // 2, seconds, start, rates, half))
        for half in (0, 1)
    ]
    for process in halves:
        process.start()
    total = sum(float(rates.get(timeout=seconds + 120)) for _ in halves)
    for process in halves:
        process.join()
    return total


def _clients(
    server: tuple[int, str], questions: Sequence[bytes], clients: int, seconds: float, start: Any, rates: Any, seed: int
) -> None:
    counts = [0] * clients

    def one(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        with association(*server) as requested:
            gate.wait()
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                requested.ask(chance.choice(questions))
                counts[number] += 1

    gate = threading.Barrier(clients + 1)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    gate.wait()
    for thread in threads:
        thread.join()
    rates.put(sum(counts) / seconds)


@contextmanager
def looping(port: int, ae_title: str, questions: Sequence[bytes], *, clients: int) -> Iterator[Any]:
    """`clients` processes that ask on and on until the end; gives a shared number, of the answers that they had."""
    context = multiprocessing.get_context("spawn")
    answers, stop, begun = context.Value("q", 0), context.Event(), context.Barrier(clients + 1)
    processes = [
        context.Process(target=_loop, args=((port, ae_title), questions, answers, stop, begun, number))
        for number in range(clients)
    ]
    for process in processes:
        process.start()
    begun.wait(120)
    try:
        yield answers
    finally:
        stop.set()
        for process in processes:
            process.join()


def _loop(server: tuple[int, str], questions: Sequence[bytes], answers: Any, stop: Any, begun: Any, seed: int) -> None:
    chance = random.Random(seed)
    with association(*server) as requested:
        requested.ask(questions[0])
        begun.wait(120)
        while not stop.is_set():
            found = requested.ask(chance.choice(questions)).answers
            with answers.get_lock():
                answers.value += found


def percentile(times: Sequence[float], share: float) -> float:
    """The value below which `share` of the times are."""
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]
