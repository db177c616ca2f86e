"""Ports for servers of tests."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_chance = random.SystemRandom()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, below those that the kernel gives to outgoing connections.

    One of those could be taken by a connection while its server is being started again.
    """
    first = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    while True:
        with socket.socket() as probe:
            port = _chance.randrange(min(first, 32_768) // 2, first)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
