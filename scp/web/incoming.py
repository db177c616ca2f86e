"""Bodies of requests while they come, with an end to slow ones, and where their parts wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from anyio import to_thread
from starlette.requests import Request

from sphere.ingest.members import FileRange
from sphere.ingest.part10 import read_file_meta
from sphere.scp.upper.dataset import MAX_FRAGMENTS, ArrivingDataSet, Budget, WaitingFile
from sphere.scp.web.problem import WebError

PIECE: Final = 1 << 20  # bytes handed on at once
MAX_META: Final = 64 << 10  # bytes in which File Meta Information must end
PATIENT_S: Final = 3600.0  # seconds that a body may take for each GiB that came, and for the first


async def pieces(request: Request, idle_s: float) -> AsyncIterator[bytes]:
    """The body in pieces of about PIECE bytes.

    Raises WebError: 408 where nothing comes for `idle_s` seconds or all takes too long, 400 where the client goes away.
    """
    waiting, size, came = [], 0, 0
    begun = asyncio.get_running_loop().time()
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), idle_s)
        except asyncio.TimeoutError:
            raise WebError("the body did not come in time", http=408) from None
        if message["type"] == "http.disconnect":
            raise WebError("the client went away before its body had come")
        data = message.get("body", b"")
        waiting.append(data)
        size += len(data)
        came += len(data)
        if asyncio.get_running_loop().time() - begun > PATIENT_S * (1 + came / (1 << 30)):
            raise WebError("the body comes too slowly", http=408)
        last = not message.get("more_body", False)
        if size >= PIECE or last:
            yield b"".join(waiting)
            waiting, size = [], 0
        if last:
            return


async def take_in(body: AsyncIterator[bytes], feed: Callable[[bytes], None]) -> None:
    """Feed a body piece by piece in threads, one at a time; the next piece comes meanwhile.

    Raises what both raise, and ends only when nothing is being fed any more. Where a piece is refused, no further one
    is waited for.
    """
    feeding: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    feeding.set_result(None)  # nothing was fed yet
    coming = asyncio.ensure_future(_next(body))
    try:
        while True:
            await asyncio.wait((coming, feeding), return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
            piece = await coming
            await feeding
            if piece is None:
                return
            feeding = asyncio.ensure_future(to_thread.run_sync(feed, piece))
            coming = asyncio.ensure_future(_next(body))
    finally:
        coming.cancel()
        await asyncio.gather(coming, feeding, return_exceptions=True)


async def _next(body: AsyncIterator[bytes]) -> bytes | None:
    async for piece in body:
        return piece
    return None


class ArrivingBody:
    """One part: small ones in memory, as long as the budget of the process lets them, large ones in a nameless file.

    `file`: shared with the parts before and after it, where many wait at once: each would take a descriptor.
    """

    def __init__(self, folder: Path, budget: Budget, file: WaitingFile | None = None) -> None:
        self._budget, self._taken = budget, 0
        self.content = ArrivingDataSet(folder, file)

    @property
    def size(self) -> int:
        return self.content.size

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        if self.content.in_memory or not self.size:
            if self.content.fragments < MAX_FRAGMENTS and self._budget.take(len(data)):
                self._taken += len(data)
            else:
                self.content.spill()
                self._give()
        self.content.add(memoryview(data))

    def discard(self) -> None:
        """Give memory and file back."""
        self.content.discard()
        self._give()

    def tobytes(self, limit: int, what: str) -> bytes:
        """All of it, which must not be more than `limit` bytes; raises WebError (413), StorageError, OSError."""
        if self.size > limit:
            raise WebError(f"{what} has at most {limit >> 20} MiB", http=413)
        if self.content.error is not None:
            raise self.content.error
        return self.content.tobytes()

    def _give(self) -> None:
        self._budget.give(self._taken)
        self._taken = 0


class ArrivingFile:
    """A DICOM Part 10 file: what comes before the data set, kept as it came, and the data set."""

    def __init__(self, make: Callable[[], ArrivingBody]) -> None:
        self._head = b""
        self._begun = False
        self.preamble = b""
        self.TransferSyntaxUID = ""
        self.is_part10 = True
        self.dataset = make()

    def add(self, data: bytes) -> None:
        """The next bytes."""
        if self._begun:
            self.dataset.add(data)
            return
        self._head += data
        if len(self._head) >= MAX_META or read_file_meta(self._head).complete:
            self.end()

    def end(self) -> None:
        """There are no more bytes, or enough of them to know where the data set begins."""
        if self._begun:
            return
        self._begun = True
        meta = read_file_meta(self._head)
        self.is_part10 = meta.has_prefix
        self.TransferSyntaxUID = meta.TransferSyntaxUID
        self.preamble = self._head[: meta.dataset_offset]
        self.dataset.add(memoryview(self._head)[meta.dataset_offset :])
        self._head = b""

    @property
    def stored(self) -> list[memoryview] | FileRange:
        """The data set, for the store service."""
        return self.dataset.content.content()
