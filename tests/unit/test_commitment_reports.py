"""Reports of commitment: nothing ends who reports, and a requester that is silent holds up nobody else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.errors import PeerError
from sphere.conf.loading import from_dict
from sphere.scp.commitment.queues import BACK_OFF_S, Outcome, Queues
from sphere.scp.commitment.report import Reporter
from sphere.scp.commitment.transactions import Reference, Transaction, Transactions, Waiting
from sphere.scp.commitment.verify import COMMITTED, Verifier

pytestmark = pytest.mark.unit


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def waiting(requester: str, *numbers: int) -> list[Waiting]:
    return [Waiting(f"{requester}{number}", requester, float(number), 0.0, number) for number in numbers]


def test_a_silent_requester_holds_up_its_own_reports_only() -> None:
    clock, told, tried, given_up = Clock(), list[str](), list[str](), list[str]()
    silent = threading.Event()

    def report(one: Waiting) -> Outcome:
        if one.requester != "DEAD":
            told.append(one.name)
            return Outcome(after_s=float("inf"))
        tried.append(one.name)
        silent.wait(60)
        return Outcome(reachable=False, after_s=5.0)

    queues = Queues(report, lambda one: given_up.append(one.name), most=2, clock=clock)
    everything = waiting("DEAD", *range(20)) + waiting("MODALITY", 1, 2)
    queues.look(everything)
    wait(lambda: told == ["MODALITY1", "MODALITY2"])
    wait(lambda: tried == ["DEAD0"])
    silent.set()
    wait(lambda: given_up == [f"DEAD{number}" for number in range(1, 20)])
    for number, pause_s in enumerate([*BACK_OFF_S, BACK_OFF_S[-1]]):
        wait(lambda: not any(one.busy for one in queues._requesters.values()))
        clock.now += pause_s - 0.1
        queues.look(everything)
        assert len(tried) == number + 1  # nothing was begun
        clock.now += 0.2
        queues.look(everything)
        wait(lambda: len(tried) == number + 2)  # noqa: B023
    assert told == ["MODALITY1", "MODALITY2"]


def test_so_many_at_once() -> None:
    at_once, most, lock, go_on = 0, 0, threading.Lock(), threading.Event()
    told: list[str] = []

    def report(one: Waiting) -> Outcome:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        go_on.wait(60)
        with lock:
            at_once -= 1
            told.append(one.name)
        return Outcome(after_s=float("inf"))

    queues = Queues(report, lambda one: None, most=3)
    everything = [one for number in range(10) for one in waiting(f"R{number}-", 1)]
    queues.look(everything)
    wait(lambda: at_once == 3)
    go_on.set()
    while len(told) < 10:
        queues.look(everything)
        time.sleep(0.01)
    assert (len(told), most) == (10, 3)


def test_a_defect_ends_no_reports() -> None:
    told: list[str] = []

    def report(one: Waiting) -> Outcome:
        told.append(one.name)
        raise ZeroDivisionError

    queues = Queues(report, lambda one: None, most=1)
    for _ in range(3):
        queues.look(waiting("MODALITY", 1, 2, 3))
        wait(lambda: not any(one.busy for one in queues._requesters.values()))
    assert told == ["MODALITY1", "MODALITY2", "MODALITY3"]


class Committed:
    """Has everything."""

    def check(self, references: tuple[Reference, ...]) -> Iterator[tuple[Reference, int]]:
        return iter([(one, COMMITTED) for one in references])


@pytest.fixture
def transactions(tmp_path: Path) -> Transactions:
    (tmp_path / "commitment").mkdir()
    return Transactions(tmp_path / "commitment")


@pytest.fixture
def reporter(tmp_path: Path, transactions: Transactions, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reporter]:
    monkeypatch.setattr("sphere.scp.commitment.report.LOOK_S", 0.01)
    reports = Reporter(from_dict({}, base=tmp_path), tmp_path / "commitment", transactions, Committed())  # type: ignore[arg-type]
    thread = threading.Thread(target=reports.run, daemon=True)
    thread.start()
    yield reports
    assert thread.is_alive()
    reports.stop()
    thread.join(60)
    assert not thread.is_alive()


def accept(transactions: Transactions, uid: str) -> None:
    transactions.accept(
        Transaction(
            uid=uid,
            requester="MODALITY",
            address="127.0.0.1",
            references=(Reference("1.2", uid),),
            received=time.time(),
            due=0.0,
        )
    )


def test_a_disk_that_is_full_while_a_report_is_put_off(
    reporter: Reporter, transactions: Transactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again although nothing could be written, and so are later ones."""
    monkeypatch.setattr("sphere.scp.commitment.report.BACK_OFF_S", (0.0,))
    monkeypatch.setattr("sphere.scp.commitment.queues.BACK_OFF_S", (0.0,))
    told, full, sent, dump = list[str](), True, 0, json.dump

    def write(*arguments: Any) -> None:
        if full and arguments[0]["tries"]:
            raise OSError(28, "No space left on device")
        dump(*arguments)

    def send(transaction: Transaction, verdicts: dict[Reference, int]) -> bool:
        nonlocal sent
        sent += 1
        if full:
            raise PeerError("silent")
        told.append(transaction.uid)
        return True

    monkeypatch.setattr(json, "dump", write)
    monkeypatch.setattr(reporter, "_sent", send)
    accept(transactions, "1.2.3")
    wait(lambda: sent >= 3)
    full = False
    accept(transactions, "1.2.4")
    wait(lambda: sorted(told) == ["1.2.3", "1.2.4"])
    wait(lambda: transactions.waiting() == [])


def test_a_file_that_stays_is_no_second_report(
    reporter: Reporter, transactions: Transactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def stays(path: Path, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", stays)
    monkeypatch.setattr(reporter, "_sent", lambda transaction, verdicts: told.append(transaction.uid) or True)
    accept(transactions, "1.2.3")
    wait(lambda: told == ["1.2.3"])
    accept(transactions, "1.2.4")
    wait(lambda: len(told) > 1)
    assert told == ["1.2.3", "1.2.4"]


def test_a_folder_that_cannot_be_read_for_a_while(
    reporter: Reporter, transactions: Transactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, look, failed = list[str](), transactions.waiting, 0

    def fails() -> list[Waiting]:
        nonlocal failed
        failed += 1
        if failed <= 3:
            raise OSError(5, "Input/output error")
        return look()

    monkeypatch.setattr(reporter, "_sent", lambda transaction, verdicts: told.append(transaction.uid) or True)
    monkeypatch.setattr(transactions, "waiting", fails)
    accept(transactions, "1.2.3")
    wait(lambda: told == ["1.2.3"])
    assert failed > 3


def test_of_peers_with_one_title_the_one_that_asked_is_told(tmp_path: Path) -> None:
    """Also where the settings have its name, not its address."""
    peers = [
        {"name": name, "ae_title": "CT", "host": host, "port": 104}
        for name, host in (("away", "192.0.2.1"), ("here", "localhost"), ("by-address", "127.0.0.2"))
    ]
    settings = from_dict({"peers": peers}, base=tmp_path)
    reporter = Reporter(settings, tmp_path, Transactions(tmp_path), Verifier(None, None))  # type: ignore[arg-type]
    for address, name in (("127.0.0.1", "here"), ("127.0.0.2", "by-address"), ("192.0.2.9", "away")):
        transaction = Transaction(
            uid="1.2", requester="CT", address=address, references=(), received=0.0, due=0.0
        )  # fmt: skip
        assert reporter._peer(transaction).name == name
