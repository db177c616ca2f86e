"""A process that stays small and quick: what libraries load beside what they need, how the allocators keep what was
freed, and what the garbage collector looks at.

Half of what a receiver that answers queries took was memory of this kind (docs/decisions/0008-retrieve.md).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

from sphere.conf.settings import Settings

OPTIONAL: Final = (
    "gdcm", "pylibjpeg", "libjpeg", "openjpeg", "rle", "jpeg_ls", "PIL", "pandas", "pyarrow._s3fs",
)  # fmt: skip
"""Modules that pydicom and pyarrow load where they are installed, and do without: a receiver decodes no pixels
(that is done by processes of their own) and makes no data frames."""
HTTP: Final = "requests"  # pydicom's, to download its test files; ours for WebHDFS
ARENAS: Final = 2  # of glibc's malloc, which makes eight for each core
M_ARENA_MAX: Final = -8  # mallopt(3)


class _Refused:
    """An import finder before all others that does not find some modules."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None, so that others are asked; raises ModuleNotFoundError for what is refused."""
        if name in self._names:
            raise ModuleNotFoundError(f"{name} is not loaded in this process", name=name)
        return None


def keep_small(settings: Settings) -> None:
    """Make this process one of a small footprint, for its whole life; to be called before anything else is imported."""
    refused = OPTIONAL if settings.storage.root.startswith("webhdfs:") else (*OPTIONAL, HTTP)
    sys.meta_path.insert(0, _Refused(refused))
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # its own pool keeps what was freed
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc); a few milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def settle() -> None:
    """Have the garbage collector leave alone, from now on, all that this process has: for who serves, once what stays
    is loaded. Every thread waits for a collection, of 29 to 60 ms where the objects of the libraries are in it."""
    gc.collect()  # what is garbage now would stay
    gc.freeze()


def unsettle() -> None:
    """Undo `settle`, so that the end of the process finds all that it has to take down."""
    gc.unfreeze()
