"""Whether a request comes from somebody of this host, who needs no token."""

from __future__ import annotations

import ipaddress
from typing import Final

from starlette.datastructures import Headers
from starlette.types import Scope

from sphere.conf.settings import Web
from sphere.scp.web.proxies import PASSED_ON

LOCAL_NAMES: Final = frozenset(("localhost", "127.0.0.1", "::1"))
PROXIED: Final = frozenset(("forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"))
PROXIED_BEGIN: Final = "x-forwarded"
"""Headers that only who passes a request on for others writes (RFC 7239, RFC 9110 7.6.3, and the customs before)."""


def is_local(scope: Scope, settings: Web) -> bool:
    """Whether somebody of this host asks, under a name of this host, and not for others.

    The name keeps out web pages of elsewhere whose name was made to lead here (DNS rebinding). What a reverse proxy on
    this host passes on is known by its headers where it writes any; one that writes none looks like a client of this
    host, which is why a proxy needs `auth` "all".
    """
    if settings.auth == "all" or not scope.get("client") or scope.get("state", {}).get(PASSED_ON):
        return False
    try:
        if not ipaddress.ip_address(scope["client"][0]).is_loopback:
            return False
    except ValueError:
        return False
    headers = Headers(scope=scope)
    if any(name in PROXIED or name.startswith(PROXIED_BEGIN) for name in headers):
        return False
    return name_of(headers.get("host", "")) in LOCAL_NAMES | {settings.host}


def name_of(host: str) -> str:
    """The name or address in a Host header, without the port and the brackets of IPv6, in lower case."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower()
