"""What browsers are told of every answer, and what they tell of who asks: nothing here is for pages of elsewhere."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OURS: Final = frozenset(("same-origin", "none"))  # Sec-Fetch-Site of our own pages, and of an address that was typed
ALWAYS: Final = ((b"cross-origin-resource-policy", b"same-origin"), (b"x-content-type-options", b"nosniff"))
CACHE: Final = b"cache-control"
ASKED_AGAIN: Final = (CACHE, b"private, no-cache")
KEPT_NOWHERE: Final = (CACHE, b"no-store")


def is_foreign(scope: Scope) -> bool:
    """Whether a browser says that a page of another origin asks (Sec-Fetch-Site of W3C Fetch Metadata, Origin of
    RFC 6454). Other clients say neither."""
    headers = Headers(scope=scope)
    if headers.get("sec-fetch-site", "none") not in OURS:
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        named = urlsplit(origin.lower())
    except ValueError:
        return True
    return (named.scheme, named.netloc) != (scope.get("scheme", "http"), headers.get("host", "").lower())


class Sheltered:
    """ASGI middleware: no page of another origin may embed an answer, no browser guess its type, and no cache give it
    without asking here again; what has no entity tag is not kept at all. What an answer says of it itself, stands."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sheltered(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                said = {name for name, _ in headers}
                headers += [one for one in ALWAYS if one[0] not in said]
                if CACHE not in said:
                    headers.append(ASKED_AGAIN if b"etag" in said else KEPT_NOWHERE)
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, sheltered)
