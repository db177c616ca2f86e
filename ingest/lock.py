"""Which bundles a living process of this host writes: a flock on a file of the bundle's name."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from sphere.conf.private import make_private
from sphere.ingest.journal import bundle_id
from sphere.ingest.storage.paths import storage_error

_LOCK = ".lock"
log = logging.getLogger(__name__)


class BundleLock:
    """Held while a bundle is written or recovered; the kernel lets go of it when the process dies.

    The file stays behind a dead writer and so names the bundle that has to be recovered: `release` removes it.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def take(cls, state_dir: Path, bundle: str) -> BundleLock | None:
        """The lock, or None where another process (or another writer of this one) holds it; raises StorageError."""
        path = state_dir / "locks" / (bundle_id(bundle) + _LOCK)
        try:
            make_private(path.parent)
            while True:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    return None
                if _same_file(fd, path):
                    return cls(path, fd)
                os.close(fd)  # its holder removed it in the meantime
        except OSError as error:
            raise storage_error(error, f"locking {path}") from error

    def release(self, *, keep: bool = False) -> None:
        """Let go; with `keep` the file stays and says that the bundle still has to be recovered. One that cannot be
        removed says so as well: recovery finds nothing to be done."""
        try:
            if not keep:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("lock %s stays: %s", self._path, error.strerror)
        finally:
            os.close(self._fd)


def locked_bundles(state_dir: Path) -> set[str]:
    """Ids of the bundles that have a lock file, held or left behind."""
    folder = state_dir / "locks"
    return {path.name.removesuffix(_LOCK) for path in folder.glob("*" + _LOCK)}


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
