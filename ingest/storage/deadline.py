"""Calls that may never return, each given a limited time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

IDLE = 8  # threads kept for later calls


class Deadline:
    """Runs calls one after another in a thread of its own.

    hdfs-native waits without end for DataNodes that died at the wrong moment. A call that takes longer than its time
    raises TimeoutError and is left to itself; so does every later one, as the first may still be using its objects:
    it is `stuck`.
    """

    def __init__(self) -> None:
        self._work: _Work | None = None
        self.stuck = False

    def __call__(self, limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns or raises; TimeoutError after `limit_s` seconds."""
        if self.stuck:
            raise TimeoutError("an earlier call has not returned")
        if self._work is None:
            self._work = _Work()
        work = self._work
        work.call = (function, arguments)
        work.asked.release()
        if not work.answered.acquire(timeout=limit_s):
            self.stuck = True
            work.call = None
            raise TimeoutError(f"no answer within {limit_s:.0f} s")
        if work.error is not None:
            raise work.error
        return work.result

    def end(self) -> None:
        """Let the thread go; the next call makes a new one."""
        work, self._work = self._work, None
        if work is not None:
            work.call = None
            work.asked.release()


class LimitedCalls:
    """Runs calls of many threads at once, each in a thread of its own, kept for a later call where it returns in time.

    A call that takes longer raises TimeoutError and is left to itself: its thread ends when it returns.
    """

    def __init__(self) -> None:
        self._idle: list[Deadline] = []

    def __call__(self, limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns or raises; TimeoutError after `limit_s` seconds."""
        try:
            call = self._idle.pop()
        except IndexError:
            call = Deadline()
        try:
            return call(limit_s, function, *arguments)
        finally:
            if call.stuck or len(self._idle) >= IDLE:
                call.end()
            else:
                self._idle.append(call)


class _Work:
    """What the thread and its callers share; the thread holds nothing else, so that an appender can be collected."""

    def __init__(self) -> None:
        self.call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.asked, self.answered = threading.Lock(), threading.Lock()  # held until released by the other side
        self.asked.acquire()
        self.answered.acquire()
        threading.Thread(target=self._serve, name="hdfs-call", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.asked.acquire()
            call = self.call
            if call is None:
                return
            self.result = self.error = None
            try:
                self.result = call[0](*call[1])
            except BaseException as error:  # noqa: BLE001  it is raised again where the call was asked for
                self.error = error
            del call
            self.answered.release()
