"""How many searches a caller has at once: over all connections, until their answers are sent (web.max_queries)."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from sphere.scp.web.operations import PREFIX
from sphere.scp.web.problem import problem

log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 1
SEARCHES: Final = re.compile(PREFIX + "/(studies(/[^/]+/(series(/[^/]+/instances)?|instances))?|series|instances)")
"""Paths of the search transaction (PS3.18 Table 10.6.1-1)."""


class Fair:
    """ASGI middleware: 429 (RFC 6585 4) for a search of who has `most` of them under way; 0: any number.

    A caller is a token or a subject of the provider, else an address. All of it happens on the event loop.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._most or scope["type"] != "http" or not SEARCHES.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        caller = caller_of(scope)
        if self._under_way[caller] >= self._most:
            log.warning("search refused: its caller has %d under way", self._most)
            response = problem(429, f"{self._most} searches at once are answered: wait for the end of one")
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
            await response(scope, receive, send)
            return
        self._under_way[caller] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way[caller] -= 1
            if not self._under_way[caller]:
                del self._under_way[caller]


def caller_of(scope: Scope) -> str:
    """Whose share a request counts in: who showed a token, else the address."""
    who = str(scope.get("state", {}).get("who", ""))
    return who if ":" in who else f"address:{(scope.get('client') or ('',))[0]}"
