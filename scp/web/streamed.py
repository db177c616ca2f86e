"""Responses whose bodies are made while they are sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Mapping

import anyio
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from sphere.scp.web.wire import PIECES

Body = Generator[bytes | memoryview, None, None]


class Streamed(StreamingResponse):
    """A body from a generator that runs in threads and is closed there, whatever becomes of the client.

    What it holds (a reading thread, a cursor of the catalog) ends with it, and never on the event loop.
    """

    def __init__(
        self, body: Body, status: int = 200, headers: Mapping[str, str] | None = None, media_type: str | None = None
    ) -> None:
        super().__init__(iterate_in_threadpool(body), status, headers, media_type)
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if PIECES in scope.get("extensions", {}) and scope["method"] != "HEAD":
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            message: Message = {"type": PIECES, "pieces": self._body}
            await send(message)
            if message["whole"]:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        try:
            if scope["method"] == "HEAD":
                self.body_iterator = _nothing()
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._body.close)


async def _nothing() -> AsyncIterator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for piece in nothing:
        yield piece
