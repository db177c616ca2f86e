"""Where instances are, found by a process of its own: what an index takes of memory stays out of who asks only now and
then, and goes with that process when nothing was asked for a while.

`python -m sphere.catalog.lookup_process` is its body: settings and requests come on standard input, each answer is a
line of JSON.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple
from typing import IO, TYPE_CHECKING, Any, Final

import orjson

from sphere.catalog.stored import StoredInstance
from sphere.conf.errors import CatalogError, SphereError, StorageError
from sphere.conf.handed import handed, take_over
from sphere.conf.settings import Settings

if TYPE_CHECKING:  # what a process is to do without, it must not have loaded before it says so
    from sphere.catalog.queries import LateQueries

IDLE_S: Final = 20.0  # seconds after which a process that nobody asks ends
_CANNOT: Final = "the process that looks up instances ended"


class LookupProcess:
    """`lookup_instances` of `queries`: by them where they are open, and otherwise by a process that is started when it
    is needed. Thread-safe, one request at a time."""

    def __init__(self, settings: Settings, queries: LateQueries) -> None:
        self._settings, self._queries = settings, queries
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def lookup_instances(self, *, sop: Sequence[str]) -> Iterator[StoredInstance]:
        """Where the instances with these SOPInstanceUIDs are, in the order of the bundles. Raises CatalogError, and
        StorageError."""
        if self._queries.is_open:
            return self._queries.lookup_instances(sop=sop)
        return iter(self._asked(list(sop)))

    def close(self) -> None:
        """End the process; who waits for its answer gets a CatalogError."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def _asked(self, sop: list[str]) -> list[StoredInstance]:
        with self._lock:
            answer = self._answer(sop) or self._answer(sop)  # one that ended, as nobody had asked it, is begun anew
        told: dict[str, Any] = orjson.loads(answer or b'{"error":"%b"}' % _CANNOT.encode())
        if "error" in told:
            raise (StorageError if told.get("storage") else CatalogError)(told["error"])
        return [StoredInstance(*one) for one in told["found"]]

    def _answer(self, sop: list[str]) -> bytes:
        """A line, b"" where the process ended before."""
        if self._closed:
            return b""
        process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(pickle.dumps(sop))
            process.stdin.flush()
            if (line := process.stdout.readline()).endswith(b"\n"):
                return line
        self._process = None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not yet written goes nowhere
                pipe.close()
        return b""

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=process.wait, daemon=True, name="lookup").start()  # it ends by itself
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(handed(self._settings))
        return process


def main() -> None:
    """Answer until standard input ends, or nothing comes for IDLE_S."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who asks decides
    requests = os.fdopen(0, "rb", buffering=0)
    settings = take_over(requests)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    from sphere.catalog.queries import open_queries

    with open_queries(settings, apart=True) as queries:
        serve(requests, answers, lambda sop: queries.lookup_instances(sop=sop))


def serve(requests: IO[bytes], answers: IO[bytes], look: Callable[[list[str]], Iterator[StoredInstance]]) -> None:
    """Answer each request, a pickled list of SOPInstanceUIDs."""
    while select.select([requests], [], [], IDLE_S)[0]:
        try:
            sop = pickle.load(requests)
        except EOFError:  # who asks has ended
            return
        told: dict[str, Any]
        try:
            told = {"found": [astuple(one) for one in look(sop)]}
        except SphereError as error:
            told = {"error": str(error), "storage": isinstance(error, StorageError)}
        except Exception as error:  # noqa: BLE001  a defect of ours is told, not waited for
            told = {"error": f"internal error ({type(error).__name__})"}
        answers.write(orjson.dumps(told) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
