"""What is recorded of a request over HTTP."""

from __future__ import annotations

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphere.catalog.audit import AuditJournal, told
from sphere.scp.web.wire import sent_by

TOUCHING: Final = ("/dicom-web/", "/wado", "/annotations", "/status/arrivals", "/status/quarantine")
"""Paths whose requests touch data: of `/status`, what names studies and files."""


class Audited:
    """ASGI middleware that records who asked for what, how much went out, and how it ended."""

    def __init__(self, app: ASGIApp, journal: AuditJournal) -> None:
        self._app, self._journal = app, journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(TOUCHING):
            await self._app(scope, receive, send)
            return
        began, status, sent, ended = time.monotonic(), 0, 0, False
        state = scope.setdefault("state", {})

        async def watched(message: Message) -> None:
            nonlocal status, sent, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)
            sent += sent_by(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._journal.add(
                who=state.get("who", ""),
                role=state.get("role", ""),
                address=scope["client"][0] if scope.get("client") else "",
                method=scope["method"],
                path=told(scope["path"]),
                query=told(scope.get("query_string", b"").decode("latin-1")),
                status=status,
                outcome=_outcome(status) if ended else "broken off",
                entities=state.get("found", 0),
                bytes=sent,
                seconds=round(time.monotonic() - began, 3),
            )


def _outcome(status: int) -> str:
    if status in (401, 403):
        return "refused"
    return "failed" if status >= 400 else "done"
