"""Memory that requests have to wait for: in turn, never more than there is, and refused where too many wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from sphere.scp.web.allowance import RETRY_AFTER_S, Allowance
from sphere.scp.web.problem import WebError

pytestmark = pytest.mark.unit


class Counted:
    """What is had at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    @contextmanager
    def having(self, size: int) -> Iterator[None]:
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)
        yield
        with self._lock:
            self.now -= size


def test_never_more_than_there_is_and_everybody_in_the_end() -> None:
    allowance, counted = Allowance(10, waiting=100, patience_s=60), Counted()

    def work(size: int) -> int:
        with allowance.taking(size), counted.having(min(size, 10)):
            threading.Event().wait(0.001)
        return size

    sizes = [1, 3, 7, 10, 25] * 20
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, sizes)) == sizes
    assert 0 < counted.most <= 10
    with allowance.taking(10):
        pass


def test_too_many_that_wait_are_refused_and_so_is_who_waits_too_long() -> None:
    allowance, refused = Allowance(10, waiting=1, patience_s=0.2), []

    def ask() -> None:
        try:
            with allowance.taking(1):
                pass
        except WebError as error:
            refused.append((error.http, error.retry_after))

    with allowance.taking(10):
        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert refused == [(503, RETRY_AFTER_S)] * 5
    ask()
    assert len(refused) == 5, "what was not had is not missing"


def test_the_patient_are_not_refused_and_a_large_one_is_not_overtaken() -> None:
    allowance, order = Allowance(10, waiting=0, patience_s=0.01), []
    waits = threading.Event()

    def ask(size: int) -> None:
        waits.set()
        with allowance.taking(size, patient=True):
            order.append(size)

    with ExitStack() as held, ThreadPoolExecutor(2) as pool:
        held.enter_context(allowance.taking(5, patient=True))
        large = pool.submit(ask, 10)
        while not allowance._queue:
            waits.wait(0.01)
        small = pool.submit(ask, 1)
        while len(allowance._queue) < 2:
            waits.wait(0.01)
        assert order == []
        held.close()
        large.result(10)
        small.result(10)
    assert order == [10, 1]


def test_what_fails_gives_back() -> None:
    allowance = Allowance(10, waiting=1, patience_s=0.01)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), allowance.taking(10):
            raise ZeroDivisionError
