"""Whom a reverse proxy of web.trusted_proxies asks for: the address that is recorded, and the scheme of links."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

SCHEMES: Final = ("http", "https")
PASSED_ON: Final = "proxied"
"""In `state` of a request that a trusted proxy sent: it is of nobody of this host (see sphere.scp.web.local)."""


class Trusted:
    """The addresses of the proxies that are believed."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(one, strict=False) for one in networks]

    def __contains__(self, text: object) -> bool:
        address = _address(str(text))
        return address is not None and any(address in network for network in self._networks)

    def __bool__(self) -> bool:
        return bool(self._networks)


class Proxied:
    """ASGI middleware: what a trusted proxy asks for has the address and scheme of its client.

    Of several proxies each adds the address that asked it, the last one at the end: the first from there that is no
    trusted proxy is the client, and what stands before it is only what that said. A request with both Forwarded (RFC
    7239) and X-Forwarded-For stays the proxy's own, as one of them is passed on as it came from outside.
    """

    def __init__(self, app: ASGIApp, trusted: Trusted) -> None:
        self._app, self._trusted = app, trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = (scope.get("client") or ("",))[0]
        if scope["type"] == "http" and self._trusted and peer in self._trusted:
            scope.setdefault("state", {})[PASSED_ON] = True
            headers = Headers(scope=scope)
            hops, schemes = list(_hops(headers)), list(_schemes(headers))
            if schemes and schemes[-1] in SCHEMES:
                scope["scheme"] = schemes[-1]
            scope["client"] = (self._client(peer, hops), 0)
        await self._app(scope, receive, send)

    def _client(self, peer: str, hops: list[str]) -> str:
        for hop in reversed(hops):
            address = _address(hop)
            if address is None:  # unknown, or a name that stands for one
                break
            peer = str(address)
            if peer not in self._trusted:
                break
        return peer


def _hops(headers: Headers) -> Iterator[str]:
    """The addresses that were added, the last one at the end; none where two headers name some."""
    forwarded, customary = headers.getlist("forwarded"), headers.getlist("x-forwarded-for")
    if forwarded and customary:
        return
    for line in customary:
        yield from line.split(",")
    for pairs in _elements(forwarded):
        yield pairs.get("for", "")


def _schemes(headers: Headers) -> Iterator[str]:
    forwarded, customary = headers.getlist("forwarded"), headers.getlist("x-forwarded-proto")
    if forwarded and customary:
        return
    for line in customary:
        yield from (one.strip().lower() for one in line.split(","))
    for pairs in _elements(forwarded):
        yield pairs.get("proto", "").lower()


def _elements(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The pairs of each element; no value that is of use here has a comma or a semicolon in it."""
    for element in (one for line in lines for one in line.split(",")):
        pairs = (pair.partition("=") for pair in element.split(";"))
        yield {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}


def _address(text: str) -> Address | None:
    """An IP address, perhaps with a port, that of IPv6 in brackets then; an IPv4 address in IPv6 as itself."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
