"""Calls that hang are given up, and what they use is not touched again."""

from __future__ import annotations

import threading

import pytest

from sphere.ingest.storage.deadline import Deadline

pytestmark = pytest.mark.unit


def test_results_and_errors_come_back() -> None:
    call = Deadline()
    assert [call(60, divmod, number, 3) for number in range(5)] == [divmod(number, 3) for number in range(5)]
    with pytest.raises(ZeroDivisionError, match="by zero"):
        call(60, divmod, 1, 0)
    assert call(60, len, b"12") == 2
    call.end()
    call.end()
    assert call(60, len, b"123") == 3
    call.end()


def test_a_call_that_hangs() -> None:
    call = Deadline()
    hang = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        call(0.01, hang.wait)
    with pytest.raises(TimeoutError, match="an earlier call has not returned"):
        call(60, len, b"")
    hang.set()
    call.end()


def test_threads_end() -> None:
    call = Deadline()
    thread = call(60, threading.current_thread)
    call.end()
    thread.join(60)
    assert not thread.is_alive()
