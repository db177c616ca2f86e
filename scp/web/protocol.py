"""HTTP/1.1 on a socket: uvicorn's protocol, with an end to headers that are too long, too many or too slow, and to
connections that are too many, and with bodies that threads write."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sphere.scp.web.wire import GONE, PIECES, Pieces, Wire

log = logging.getLogger(__name__)

MAX_HEAD = 32 << 10  # bytes of request line and headers
MAX_HEADERS = 100


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many connections there are at once: of all clients, and of one address that is none of `spared`."""

    most: int
    of_one: int
    spared: Container[str] = ()

    def refused(self, came: BoundedHttp, others: Sequence[BoundedHttp]) -> str:
        """Why a connection that came cannot be served, or nothing.

        Where it is one too many, one of the `others` on which nobody waits for an answer has to go: the oldest of the
        address that has most. Those that are refused wait for their heads to be told so, as many as are served.
        """
        waiting = [one for one in others if one.crowded]
        if len(waiting) >= self.most:
            min(waiting, key=lambda one: one.since).give_way()
        served = [one for one in others if not one.crowded]
        by_address = Counter(one.address for one in served)
        if by_address[came.address] >= self.of_one and came.address not in self.spared:
            return f"{self.of_one} connections at once are served of one address"
        if len(served) < self.most:
            return ""
        idle = [one for one in served if one.idle]
        if not idle:
            return f"{self.most} connections at once are served"
        max(idle, key=lambda one: (by_address[one.address], -one.since)).give_way()
        return ""


class BoundedHttp(HttpToolsProtocol):
    """Answers 431 to a request whose head exceeds MAX_HEAD or MAX_HEADERS, 408 to one that takes too long for it, and
    503 where `crowd` refuses its connection, or has as many requests under way as connections.

    A head has to be there, and a reader of a response has to read something, within the `timeout_notify` of the uvicorn
    configuration, in seconds. Bodies in pieces (see sphere.scp.web.wire) are written by threads of `writers`.
    """

    def __init__(self, *args: Any, writers: ThreadPoolExecutor, crowd: Crowd, **named: Any) -> None:
        super().__init__(*args, **named)
        self._crowd, self._crowded, self.since = crowd, "", self.loop.time()
        self._answer, self.app = self.app, self._answer_in_pieces
        self._writers = writers
        self._wire: Wire | None = None  # where the transport does not encrypt
        self._head_bytes = 0
        self._in_head = True
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if transport.get_extra_info("ssl_object") is None:
            self._wire = Wire(transport, self._writers, self.config.timeout_notify)
        self._crowded = self._crowd.refused(self, self._others())
        self._await_head()

    def _others(self) -> list[BoundedHttp]:
        """The other connections that are not about to end."""
        others = [one for one in self.connections if isinstance(one, BoundedHttp) and one is not self]
        return [one for one in others if not one.transport.is_closing()]

    @property
    def address(self) -> str:
        """Of the client."""
        return self.client[0] if self.client else ""

    @property
    def crowded(self) -> bool:
        """Whether it is only told that there are too many."""
        return bool(self._crowded)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer on it."""
        return self.cycle is None or self.cycle.response_complete

    def give_way(self) -> None:
        """End it for another one."""
        self._refused = True
        self._stop_waiting()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._wire is not None:
            self._wire.abort()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request's head has at most {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._deadline is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD or len(self.headers) > MAX_HEADERS:
            text = f"a request's head has at most {MAX_HEAD} bytes and {MAX_HEADERS} headers"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)
        elif self._crowded or len(self.tasks) >= self._crowd.most:
            text = self._crowded or f"{self._crowd.most} requests at once are answered"
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{text}: ask again in a while")
        elif not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "this is not HTTP/1.1 as RFC 9112 has it")

    async def _answer_in_pieces(self, scope: Any, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """The application, which may send PIECES, and see whether the client is GONE."""
        wire, cycle = self._wire, getattr(send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle):
            scope["extensions"] = {GONE: lambda: cycle.disconnected}
        if wire is None or not isinstance(cycle, RequestResponseCycle):
            await self._answer(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == PIECES:
                message["sent"], message["whole"] = await self._send_pieces(wire, cycle, message["pieces"])
            else:
                await send(message)

        scope["extensions"][PIECES] = {}
        await self._answer(scope, receive, sending)

    async def _send_pieces(self, wire: Wire, cycle: RequestResponseCycle, pieces: Pieces) -> tuple[int, bool]:
        """Have them written after what was sent before; returns their bytes, and whether the client took all."""
        self.transport.set_write_buffer_limits(0)  # writing is paused until the head is out
        await self.flow.drain()
        self.transport.set_write_buffer_limits()
        if cycle.disconnected:
            await self.loop.run_in_executor(self._writers, pieces.close)
            return 0, False
        sent, whole = await wire.send(pieces, chunked=bool(cycle.chunked_encoding))
        if not whole:
            self.transport.abort()
            await asyncio.sleep(0)  # then `cycle` knows of it
        elif not cycle.chunked_encoding:
            cycle.expected_content_length -= sent
        return sent, whole

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(None)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if self.flow is not None:
            super().resume_writing()

    def _watch_reader(self, left: int | None) -> None:
        """Break off where a client has taken nothing of the `left` bytes that waited the last time."""
        waiting = self.transport.get_write_buffer_size()
        if left is not None and waiting >= left:
            log.warning("response broken off: its reader stands still")
            self.transport.abort()
            return
        self._stalled = self.loop.call_later(self.config.timeout_notify, self._watch_reader, waiting)

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.config.timeout_notify, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request did not come in time")

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Answer and close; what comes after is not looked at."""
        self._refused = True
        self._stop_waiting()
        if self.transport.is_closing():
            return
        log.warning("request refused status=%d: %s", status, detail)
        later = "Retry-After: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        body = orjson.dumps({"type": "about:blank", "title": status.phrase, "status": status, "detail": detail})
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/problem+json\r\n"
            f"{later}Content-Length: {len(body)}\r\nConnection: close\r\nCache-Control: no-store\r\n"
            "Cross-Origin-Resource-Policy: same-origin\r\nX-Content-Type-Options: nosniff\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:  # no other answer is under way
            self.transport.write(head.encode() + body)
        self.transport.close()
