"""What every peer of the settings answers to C-ECHO."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sphere.conf.errors import SphereError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp.client.query import echo

AT_ONCE = 16  # peers asked at the same time


@dataclass(frozen=True, slots=True)
class Echo:
    """A peer, and its answer: milliseconds, or an error."""

    peer: Peer
    ms: float | None
    error: str = ""


def echo_all(settings: Settings, *, timeout_s: float) -> list[Echo]:
    """Ask all peers at the same time; each has `timeout_s` seconds to connect, and to answer."""
    limits = {"artim_s": timeout_s, "dimse_timeout_s": timeout_s}
    hurried = settings.model_copy(update={"dimse": settings.dimse.model_copy(update=limits)})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda peer: _ask(peer, hurried), settings.peers))


def _ask(peer: Peer, settings: Settings) -> Echo:
    try:
        return Echo(peer, round(1000 * echo(peer, settings=settings), 1))
    except SphereError as error:
        return Echo(peer, None, str(error))
