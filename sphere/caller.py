"""Who calls the command line or the Python API."""

from __future__ import annotations

import getpass
import os


def who_calls() -> str:
    """As records and annotations name a user of this host."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a user without a name
        return f"cli:{os.getuid()}"
