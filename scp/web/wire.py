"""A body that a thread writes to the socket itself: its bytes are not handed to the event loop, nor copied there.

It is asked for by one ASGI message more, ``{"type": PIECES, "pieces": generator}``, between the start of a response
and its last ``http.response.body``; PIECES is in `scope["extensions"]` where it can be. When `send` returns,
``message["sent"]`` says how many bytes of them went out, and ``message["whole"]`` whether the client took all: where
not, nothing can follow.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Final

from starlette.types import Message

log = logging.getLogger(__name__)

PIECES: Final = "sphere.response.pieces"
GONE: Final = "sphere.client.gone"
"""In `scope["extensions"]`: a function that says, to any thread, whether the client has closed the connection."""
GATHERED: Final = 64 << 10  # bytes below which pieces wait for the next ones, to go out with them
BUFFERS: Final = 256  # pieces of one system call

Pieces = Generator[bytes | memoryview, None, None]


def sent_by(message: Message) -> int:
    """Bytes of a response's body that went out with an ASGI message that was sent."""
    return int(message["sent"]) if message["type"] == PIECES else len(message.get("body", b""))


class Wire:
    """The socket of a connection, for a thread that writes to it. To be used on the event loop."""

    def __init__(self, transport: asyncio.Transport, writers: ThreadPoolExecutor, idle_s: float) -> None:
        """`writers`: a thread for each response that may be under way. `idle_s`: seconds that a reader may take
        nothing."""
        self._transport, self._writers, self._idle_s = transport, writers, idle_s
        self._written: socket.socket | None = None

    async def send(self, pieces: Pieces, *, chunked: bool) -> tuple[int, bool]:
        """Write the pieces and close them, both in the thread; returns their bytes, and whether the client took all.

        Nothing of the transport's own may wait to be written, and nothing else be written meanwhile. Raises what the
        pieces raise.
        """
        # a copy: the transport may be closed meanwhile, and its descriptor become that of another connection
        copy = socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno()))
        copy.settimeout(self._idle_s)
        self._written = copy
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._writers, _write, copy, pieces, chunked)
        except BaseException:  # also where the task is cancelled: the thread has to end
            self.abort()
            raise
        finally:
            self._written = None

    def abort(self) -> None:
        """End the connection under a thread that writes to it."""
        if self._written is not None:
            with suppress(OSError):  # it has ended
                self._written.shutdown(socket.SHUT_RDWR)


def _write(link: socket.socket, pieces: Pieces, chunked: bool) -> tuple[int, bool]:
    sent = size = 0
    waiting: list[bytes | memoryview] = []
    with link, closing(pieces):
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= GATHERED or len(waiting) == BUFFERS:
                if not _send(link, waiting, size if chunked else 0):
                    return sent, False
                sent, size, waiting = sent + size, 0, []
        return sent + size, not size or _send(link, waiting, size if chunked else 0)


def _send(link: socket.socket, buffers: Sequence[bytes | memoryview], chunk: int) -> bool:
    """Write all of it, as one chunk (RFC 9112 7.1) of so many bytes unless that is 0; whether the client took it."""
    left = [memoryview(one) for one in ((b"%x\r\n" % chunk, *buffers, b"\r\n") if chunk else buffers)]
    try:
        while left:
            taken = link.sendmsg(left)
            while left and taken >= len(left[0]):
                taken -= len(left[0])
                del left[0]
            if taken:
                left[0] = left[0][taken:]
    except TimeoutError:
        log.warning("response broken off: its reader stands still")
        return False
    except OSError:  # it has gone
        return False
    return True
