"""Peers: who is meant by a name on the command line, and who may call us."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable

from sphere.conf.errors import SettingsError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings

RESOLVED_S = 60.0  # seconds that an answer of the name service is kept
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
_WRITTEN_OUT = re.compile(r"(?P<ae_title>[^@\\]{1,16})@(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]@]+):(?P<port>\d{1,5})")


def resolve(text: str, settings: Settings) -> Peer:
    """The peer called `text`: its name in the settings, or AET@HOST:PORT ([HOST] for IPv6).

    Raises SettingsError when `text` is neither; the message lists the known names.
    """
    for peer in settings.peers:
        if peer.name == text:
            return peer
    if match := _WRITTEN_OUT.fullmatch(text):
        host, port = match["host"].strip("[]"), int(match["port"])
        if 0 < port <= 65535 and match["ae_title"].strip():
            return Peer(
                name=f"{host}-{port}".replace(":", "_"), ae_title=match["ae_title"].strip(), host=host, port=port
            )
    known = ", ".join(peer.name for peer in settings.peers) or "none"
    raise SettingsError(f"peer {text!r} is neither a name in the settings ({known}) nor AET@HOST:PORT")


def describe(peer: Peer) -> str:
    """How messages call a peer."""
    return f"peer {peer.ae_title} at {peer.host}:{peer.port}"


def addresses(host: str) -> frozenset[str] | None:
    """Every address of `host`, IPv4 or IPv6, as text; none where there is no such name, None where nobody says."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return frozenset() if error.errno in _NO_SUCH_NAME else None
    return frozenset(plain_address(str(item[4][0])) for item in found)


def plain_address(address: str) -> str:
    """An IP address in its shortest form, an IPv4 one that came over an IPv6 socket as IPv4, without zone."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


class CallingPolicy:
    """Who may associate: a known peer by AE title and address, or anybody from loopback."""

    def __init__(
        self,
        peers: tuple[Peer, ...],
        *,
        lookup: Callable[[str], frozenset[str] | None] = addresses,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = peers
        self._lookup = lookup
        self._clock = clock
        self._kept: dict[str, tuple[float, frozenset[str]]] = {}

    def admits(self, ae_title: str, address: str) -> bool:
        """Whether the calling AE title may associate from `address` (PS3.8 9.3.4: else reason 3)."""
        return _is_loopback(plain_address(address)) or self.peer(ae_title, address) is not None

    def peer(self, ae_title: str, address: str) -> Peer | None:
        """The peer that calls by this AE title from this address; None for a stranger."""
        plain = plain_address(address)
        for peer in self._peers:
            if peer.ae_title == ae_title.strip() and plain in self._addresses(peer.host):
                return peer
        return None

    def _addresses(self, host: str) -> frozenset[str]:
        now = self._clock()
        kept = self._kept.get(host)
        if kept is None or now - kept[0] > RESOLVED_S:
            found = self._lookup(host)
            if found is None:  # the name service is away: a peer is not to become a stranger for that
                found = kept[1] if kept is not None else frozenset()
            kept = self._kept[host] = (now, found)
        return kept[1]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
