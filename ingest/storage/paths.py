"""Which paths a storage takes, and how its failures are told."""

from __future__ import annotations

import errno

from sphere.conf.errors import StorageError, StorageFull, StorageMissing

TEMPORARY = ".sphere-tmp"  # ending of a file that `Storage.write` has not renamed yet; `walk` leaves it out

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def checked(path: str) -> str:
    """`path` itself when it is relative, below the root and plain; raises StorageError otherwise."""
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{path!r} is not a path below the storage root")
    return path


def checked_prefix(prefix: str) -> str:
    """Like `checked`, for a folder: "" is the root itself and one trailing "/" is dropped."""
    return checked(prefix.removesuffix("/")) if prefix else ""


def is_temporary(path: str) -> bool:
    """Whether the file is one that `Storage.write` was killed in."""
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(TEMPORARY)


def rewritten(path: str) -> str:
    """The one name under which a file is made anew: who goes on after another's end removes it first."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.rewrite{TEMPORARY}" if folder else f".{name}.rewrite{TEMPORARY}"


def storage_error(error: OSError, doing: str) -> StorageError:
    """The error of the tree for an error of the operating system; `doing` says what was tried, with the path."""
    message = f"{doing}: {error.strerror or error}"
    if error.errno in _FULL:
        return StorageFull(f"{message}; free some room, then send again")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return StorageMissing(message)
    return StorageError(message)
