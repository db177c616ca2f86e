"""Requests for commitment that wait: what several threads of a receiver do to the same one."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.errors import StorageError
from sphere.scp.commitment.transactions import Reference, Transaction, Transactions

pytestmark = pytest.mark.unit

WANTED = Transaction(
    uid="1.2.3", requester="MODALITY", address="127.0.0.1", references=(Reference("1.2", "1.2.1"),), received=1.0,
    due=2.0,
)  # fmt: skip


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
    [waiting] = transactions.due()
    assert (waiting.uid, waiting.references) == (WANTED.uid, WANTED.references)
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_left_of_what_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(StorageError, match="No space left"):
        Transactions(tmp_path).accept(WANTED)
    assert list(tmp_path.iterdir()) == []
