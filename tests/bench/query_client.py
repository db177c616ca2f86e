"""C-FIND as the benchmark asks any server: identifiers encoded before, answers counted and not decoded."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.dsutils import encode

from sphere.catalog.schema import Level
from sphere.conf.settings import Peer, from_dict
from sphere.scp.identifier import build_identifier
from sphere.scp.upper.command import C_FIND_RQ
from sphere.scp.upper.outgoing import Outgoing
from sphere.scp.upper.requestor import Proposed, Requested, connect

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PENDING = (0xFF00, 0xFF01)


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


@contextmanager
def association(port: int, ae_title: str) -> Iterator[Requested]:
    """An association with a server of this machine."""
    peer = Peer(name="bench", ae_title=ae_title, host="127.0.0.1", port=port)
    proposed = [Proposed(STUDY_ROOT_FIND, (str(ImplicitVRLittleEndian),))]
    with connect(peer, from_dict({"archive": {"ae_title": "BENCH"}}, base=Path.cwd()), proposed) as requested:
        yield requested


def ask(requested: Requested, identifier: bytes) -> Asked:
    """Put one question and read its answers to the end."""
    [context] = requested.user_contexts
    command = {"CommandField": C_FIND_RQ, "Priority": 0, "AffectedSOPClassUID": STUDY_ROOT_FIND}
    began = time.perf_counter()
    number = requested.send(context, command, Outgoing.of(identifier))
    first, answers = 0.0, 0
    while True:
        message = requested.response(C_FIND_RQ, number)
        status = message.command["Status"]
        requested.finish(message)
        first = first or time.perf_counter() - began
        if status not in PENDING:
            assert status == 0, f"0x{status:04X}"
            return Asked(first, time.perf_counter() - began, answers)
        answers += 1


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
                ask(requested, chance.choice(questions))
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


def percentile(times: Sequence[float], share: float) -> float:
    """The value below which `share` of the times are."""
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]
