"""What an interrupted `sphere store` has sent: a file of lines, so that the next call goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from sphere.catalog.service import StoredInstance
from sphere.conf.errors import StorageError
from sphere.conf.peers import Peer
from sphere.conf.private import make_private

FOLDER = "sending"


class SentJournal:
    """One line for each file or instance that the peer has; removed by `done`.

    It belongs to a peer and what was asked to be sent to it. Each line is given to the kernel before the next is sent:
    it outlives the process. A file that was changed since is another one.
    """

    def __init__(self, folder: Path, peer: Peer, asked: Iterable[str]) -> None:
        """Raises StorageError when there is such a file and it cannot be read."""
        wanted = "\n".join([f"{peer.ae_title}@{peer.host}:{peer.port}", *sorted(asked)])
        self._path = folder / FOLDER / f"{hashlib.sha256(wanted.encode('utf-8', 'replace')).hexdigest()[:20]}.sent"
        self._file: TextIO | None = None
        try:
            self._sent = set(self._path.read_text(encoding="utf-8").split("\n"))
        except FileNotFoundError:
            self._sent = set()
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{self._path} cannot be read: {error}; remove it to send everything again") from None

    def __enter__(self) -> SentJournal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, key: str) -> bool:
        """Whether an earlier call sent it."""
        return key in self._sent

    def add(self, key: str) -> None:
        """It was sent. Raises StorageError."""
        try:
            if self._file is None:
                make_private(self._path.parent)
                self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._file.write(f"{key}\n")
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror}") from None

    def forget(self) -> None:
        """Begin anew: the next call, too, sends everything."""
        self._sent = set()
        self._path.unlink(missing_ok=True)

    def done(self) -> None:
        """Everything was sent."""
        self.forget()
        with contextlib.suppress(OSError):  # other calls have theirs in it, or it never was
            self._path.parent.rmdir()


def file_key(path: Path) -> str:
    """What tells a file, in its present state, from others."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    named = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{named[:32]} {stat.st_size} {stat.st_mtime_ns}"


def instance_key(instance: StoredInstance) -> str:
    """What tells a version of an instance from others."""
    return f"{instance.SOPInstanceUID} {instance.sha256}"
