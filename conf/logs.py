"""Logging: one line an event on standard error, ids and statuses, never a data set, a name or what libraries say."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
import warnings
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

from sphere.conf.private import make_private

Level = Literal["debug", "info", "warning", "error"]
FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s[%(process)d] %(message)s"
KEPT = 1 << 18  # bytes


def configure(level: Level = "info") -> None:
    """Send the events of this process to standard error, UTC times; libraries from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("sphere").setLevel(level.upper())
    quiet(everything=not sys.warnoptions)


def quiet(*, everything: bool = False) -> None:
    """Let nothing out of this process that pydicom and pynetdicom warn of or log: they quote values.

    With `everything`, nothing that any library warns of: what they do with a value may be told in another's name.
    """
    if everything:
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", module=r"(pydicom|pynetdicom)(\.|$)")
    for name in ("pydicom", "pynetdicom"):
        logger = logging.getLogger(name)
        if logger.propagate:
            logger.addHandler(logging.NullHandler())  # else the handler of last resort has them
            logger.propagate = False


def keep(file: Path) -> None:
    """Keep the warnings and errors of this process in a file as well, up to twice KEPT bytes; a disk that refuses is
    told of by the events on standard error alone."""
    with suppress(OSError):
        make_private(file.parent)
        handler = RotatingFileHandler(file, maxBytes=KEPT, backupCount=1, encoding="utf-8", delay=True)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_Formatter())
        logging.getLogger().addHandler(handler)


class _Formatter(logging.Formatter):
    """Times in UTC; the text of a second is made once."""

    def __init__(self) -> None:
        super().__init__(FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
        self._second: tuple[int, str] = (-1, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second, text = self._second
        if second != int(record.created):
            second = int(record.created)
            text = time.strftime(datefmt or "", time.gmtime(second))
            self._second = second, text
        return text


def hashed(uid: str) -> str:
    """The first 12 hexadecimal digits of a UID's SHA-256: the same event can be followed, the UID is not told."""
    return hashlib.sha256(uid.encode()).hexdigest()[:12]
