"""Processes that convert data sets for a receiver: a decoder that crashes, hangs or swells costs one sub-operation.

`python -m sphere.scp.retrieve.transcoder` is the body of one. Requests and answers on its pipes are a line of JSON and
the bytes that it counts; it ends when its parent does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
from typing import IO, Any

import orjson

from sphere.conf import logs
from sphere.scp.retrieve.transcode import NotConverted, convert

WORKERS = 2  # processes of a receiver
CONVERT_S = 120.0  # seconds that one data set may take
MEMORY = 4 << 30  # bytes of address space of a process
MAX_SOURCE = 1 << 30  # bytes of a data set to be converted


class Transcoder:
    """Converts in up to WORKERS processes, which are started when they are needed. Safe to share between threads."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(WORKERS)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            while self._idle:
                self._idle.pop().stop()

    def convert(self, dataset: bytes, source: str, target: str) -> bytes:
        """As `transcode.convert`; raises NotConverted also when the process crashed or took too long."""
        with self._places:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            try:
                worker = worker or _Worker()
                answer = worker.convert(dataset, source, target)
            except OSError:
                if worker is not None:
                    worker.stop()
                raise NotConverted("the decoder crashed, or took too long or too much memory") from None
            with self._lock:
                self._idle.append(worker)
        if isinstance(answer, str):
            raise NotConverted(answer)
        return answer


class _Worker:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def convert(self, dataset: bytes, source: str, target: str) -> bytes | str:
        """The bytes, or why not; raises OSError when the process did not answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        killer = threading.Timer(CONVERT_S, self._process.kill)
        killer.daemon = True
        killer.start()
        try:
            _write(self._process.stdin, {"source": source, "target": target}, dataset)
            answer, data = _read(self._process.stdout)
        except EOFError:
            raise OSError("the process ended") from None
        finally:
            killer.cancel()
        return str(answer["error"]) if "error" in answer else data

    def stop(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not yet written goes nowhere
                    pipe.close()
        self._process.wait()


def _write(pipe: IO[bytes], fields: dict[str, Any], data: bytes) -> None:
    pipe.write(orjson.dumps({**fields, "size": len(data)}) + b"\n")
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    line = pipe.readline()
    fields: dict[str, Any] = orjson.loads(line) if line.endswith(b"\n") else {"size": 1}
    data = pipe.read(fields["size"])
    if len(data) < fields["size"]:
        raise EOFError
    return fields, data


def main() -> None:
    """Answer requests until standard input ends."""
    from sphere.scp.libraries import prepare_libraries

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold a patient's image
    prepare_libraries()
    logs.quiet(everything=True)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    while True:
        try:
            request, dataset = _read(sys.stdin.buffer)
        except EOFError:
            return
        try:
            converted = convert(dataset, request["source"], request["target"])
        except NotConverted as error:
            _write(answers, {"error": str(error)}, b"")
        else:
            _write(answers, {}, converted)


if __name__ == "__main__":
    main()
