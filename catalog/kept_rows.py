"""Rows of a sorted statement, taken out of DuckDB before the first is given: a slow reader holds a page.

DuckDB keeps what it sorted, in the memory that all queries of the process share, until the last row is read: ten peers
that ask for 100,000 instances each and read nothing would take all of it. So the rows go to a file without a name
beside the index, from which they are read a page at a time; a few stay in memory.
See docs/decisions/0018-index-at-scale.md.
"""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import duckdb

from sphere.catalog.cancel import Cancelled, never
from sphere.conf.errors import CatalogError

PAGE = 256
"""Answers fetched at once: what a slow reader costs."""
IN_MEMORY = 1 << 18
"""Bytes of rows up to which they need no file."""
AT_ONCE = 2
"""Broad statements of a process that sort at the same time: each may take half of its memory before it goes to disk."""
LOOK_S = 0.1
"""Seconds between looks whether who waits for that has cancelled."""

IDLE: AbstractContextManager[None] = nullcontext()

_turns = threading.BoundedSemaphore(AT_ONCE)


def streamed(
    cursor: duckdb.DuckDBPyConnection, cancelled: Cancelled, busy: AbstractContextManager[None] = IDLE
) -> Iterator[list[Any]]:
    """Pages as DuckDB finds them; it works within `busy` (see sphere.catalog.interrupt)."""
    while not cancelled():
        with busy:
            rows = cursor.fetchmany(PAGE)
        if not rows:
            return
        yield rows


def kept(
    cursor: duckdb.DuckDBPyConnection,
    folder: Path,
    cancelled: Cancelled = never,
    done: Callable[[], object] = never,
    busy: AbstractContextManager[None] = IDLE,
) -> Iterator[list[Any]]:
    """Pages of what a cursor has sorted; `done` is called when DuckDB has given the last one, before the first is. It
    works within `busy`.

    Raises CatalogError where they cannot be kept.
    """
    with busy:
        rows = cursor.fetchmany(PAGE)
    if len(rows) < PAGE:
        done()
        yield rows
        return
    with SpooledTemporaryFile(IN_MEMORY, dir=str(folder)) as file:
        sizes: deque[int] = deque()
        try:
            while rows:
                if cancelled():
                    return
                sizes.append(file.write(pickle.dumps(rows, pickle.HIGHEST_PROTOCOL)))
                with busy:
                    rows = cursor.fetchmany(PAGE)
            done()
            file.seek(0)
            while sizes and not cancelled():
                yield pickle.loads(file.read(sizes.popleft()))  # written above, and nobody else has the file
        except OSError as error:
            raise CatalogError(f"the answers of a broad query cannot be kept in {folder}: {error.strerror}") from None


@contextmanager
def turn(cancelled: Cancelled) -> Iterator[Callable[[], object]]:
    """Wait until few other broad statements sort; gives what to call when that is over, which the end does as well."""
    has = False
    while not has and not cancelled():
        has = _turns.acquire(timeout=LOOK_S)

    def over() -> None:
        nonlocal has
        if has:
            has = False
            _turns.release()

    try:
        yield over
    finally:
        over()
