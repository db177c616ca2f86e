"""Logging: one line an event on standard error, with ids and statuses, never a data set or a name."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s[%(process)d] %(message)s"


def configure(level: Level = "info") -> None:
    """Send the events of this process to standard error, UTC times; libraries from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("sphere").setLevel(level.upper())


def hashed(uid: str) -> str:
    """The first 12 hexadecimal digits of a UID's SHA-256: the same event can be followed, the UID is not told."""
    return hashlib.sha256(uid.encode()).hexdigest()[:12]
