"""What the requests of a process may have at once of something that grows with what they ask for: bytes of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sphere.scp.web.problem import WebError

PATIENCE_S: Final = 20.0  # seconds that a request waits for its turn
WAITING: Final = 8  # requests that wait so: each keeps a thread from others
RETRY_AFTER_S: Final = 10


class Allowance:
    """`total` bytes, given in the order in which they are asked for. Safe to share between threads."""

    def __init__(self, total: int, *, waiting: int = WAITING, patience_s: float = PATIENCE_S) -> None:
        self._total = self._free = total
        self._most, self._patience_s = waiting, patience_s
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def taking(self, size: int, *, patient: bool = False) -> Iterator[None]:
        """Have `size` bytes; who asks for more than there are has all of them, alone.

        Waits until they are there. Raises WebError (503, Retry-After) where too many wait, or that takes too long;
        `patient` waits for ever, for a response that has begun.
        """
        size = min(size, self._total)
        self._take(size, patient=patient)
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()

    def _take(self, size: int, *, patient: bool) -> None:
        turn = object()
        with self._changed:
            if not patient and len(self._queue) >= self._most:
                raise _busy()
            self._queue.append(turn)
            try:
                patience_s = None if patient else self._patience_s
                if not self._changed.wait_for(lambda: self._queue[0] is turn and size <= self._free, patience_s):
                    raise _busy()
                self._free -= size
            finally:
                self._queue.remove(turn)
                self._changed.notify_all()


def _busy() -> WebError:
    return WebError("others have the memory that this needs: ask again later", http=503, retry_after=RETRY_AFTER_S)
