"""An end for a process whose storage does not answer: hdfs-native may wait without end for a DataNode that died."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def watched(alive_at: Callable[[], float], *, stuck_s: float, work: str) -> Iterator[None]:
    """Meanwhile this process ends, with status 1, where the monotonic time `alive_at` is `stuck_s` seconds ago;
    `work` is what begins anew when somebody starts it again."""
    over = threading.Event()

    def watch() -> None:
        while time.monotonic() - alive_at() < stuck_s:
            if over.wait(1):
                return
        log.error("the storage has not answered for %.0f s: %s begins anew", stuck_s, work)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch").start()
    try:
        yield
    finally:
        over.set()
