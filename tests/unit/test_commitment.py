"""Requests for commitment that wait: what several threads of a receiver do to the same one."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.errors import StorageError
from sphere.scp.commitment import transactions as module
from sphere.scp.commitment.transactions import Reference, Transaction, Transactions

pytestmark = pytest.mark.unit

WANTED = Transaction(
    uid="1.2.3", requester="MODALITY", address="127.0.0.1", references=(Reference("1.2", "1.2.1"),), received=1.0,
    due=2.0,
)  # fmt: skip


def kept(transactions: Transactions) -> list[Transaction]:
    return [found for one in transactions.waiting() if (found := transactions.read(one)) is not None]


def test_the_same_request_again_while_its_report_is_put_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written and neither has renamed: each has its own file to rename."""
    transactions = Transactions(tmp_path)
    transactions.accept(WANTED)
    both, dump = threading.Barrier(2), json.dump

    def dump_and_meet(*args: Any) -> None:
        dump(*args)
        both.wait(timeout=60)

    monkeypatch.setattr(json, "dump", dump_and_meet)
    with ThreadPoolExecutor(2) as pool:
        accepted = pool.submit(transactions.accept, WANTED)
        put_off = pool.submit(transactions.again, WANTED, after_s=-1, tries=1)
        assert accepted.result() == WANTED
        put_off.result()
    [waiting] = kept(transactions)
    assert (waiting.uid, waiting.references) == (WANTED.uid, WANTED.references)
    assert len(list(tmp_path.iterdir())) == 1


def test_two_requests_with_one_uid_at_once_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both could look before either has written, one would take the place of the other."""
    both, read = threading.Barrier(2), module._read

    def read_and_meet(path: Path) -> Transaction | None:
        found = read(path)
        with contextlib.suppress(threading.BrokenBarrierError):  # as it should be: the other waits for its turn
            both.wait(timeout=0.2)
        return found

    monkeypatch.setattr(module, "_read", read_and_meet)
    other = replace(WANTED, references=(Reference("1.2", "1.2.2"),))
    with ThreadPoolExecutor(2) as pool:
        accepted = list(pool.map(Transactions(tmp_path).accept, (WANTED, other)))
    assert sorted(one.duplicate for one in accepted) == [False, True]
    assert {one.references for one in kept(Transactions(tmp_path))} == {WANTED.references, other.references}


def test_nothing_is_left_of_what_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(StorageError, match="No space left"):
        Transactions(tmp_path).accept(WANTED)
    assert list(tmp_path.iterdir()) == []


def test_what_waits_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda path: reads.append(path) or read(path))
    transactions = Transactions(tmp_path)
    for number in range(30):
        transactions.accept(replace(WANTED, uid=f"1.2.{number}", received=float(number)))
    reads.clear()
    for _ in range(5):
        assert [one.received for one in transactions.waiting()] == list(range(30))
    assert len(reads) == 30
    transactions.done(replace(WANTED, uid="1.2.0"))
    transactions.again(replace(WANTED, uid="1.2.1", received=1.0), after_s=5, tries=1)
    assert [one.received for one in transactions.waiting()] == list(range(1, 30))
    assert len(reads) == 31
