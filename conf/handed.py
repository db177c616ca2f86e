"""What a process of ours is handed by the one that starts it with `python -m`: settings, and how much to log."""

from __future__ import annotations

import logging
import pickle
from typing import IO

from sphere.conf import logs
from sphere.conf.footprint import keep_small
from sphere.conf.settings import Settings


def handed(settings: Settings) -> bytes:
    """What `take_over` reads, of this process."""
    return pickle.dumps((logging.getLogger("sphere").getEffectiveLevel(), settings))


def take_over(stream: IO[bytes]) -> Settings:
    """The settings. This process logs as the other one does and stays small: to be called before anything else is
    imported, as a quarter of a start is what pydicom would load and nobody here uses."""
    level, settings = pickle.load(stream)
    logs.configure("info")
    logging.getLogger("sphere").setLevel(level)
    keep_small(settings)
    taken: Settings = settings
    return taken
