"""Folders and files that hold patients: for their owner and its group, and no other account of this host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

FOLDER: Final = 0o750
MASK: Final = 0o027  # what a file or folder that anything of this process makes may not have


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, closed to other accounts of this host; raises OSError."""
    try:
        folder.mkdir(FOLDER)
    except FileNotFoundError:
        if folder.parent == folder:
            raise
        make_private(folder.parent)
        folder.mkdir(FOLDER, exist_ok=True)
    except OSError:  # on some systems it says that it cannot be made, though it is there
        if not folder.is_dir():
            raise


def keep_private() -> None:
    """From now on this process, and those that it starts, make nothing that other accounts of this host can read.

    For libraries that make files themselves: indexes of DuckDB, logs of Delta tables.
    """
    os.umask(os.umask(MASK) | MASK)


def is_open(folder: Path) -> bool:
    """Whether other accounts of this host may look into a folder that is there: it and all above it let them."""
    try:
        modes = [one.stat().st_mode for one in (folder, *folder.resolve().parents)]
    except OSError:
        return False
    return bool(modes[0] & 0o005) and all(mode & 0o001 for mode in modes[1:])
