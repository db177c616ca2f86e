"""The journal: beside each bundle, one JSON line per durable member, and a last line when the bundle is sealed.

It saves its readers from scanning tars and can be rebuilt from the tar at any time, byte for byte. ``<bundle>.journal``
on the storage holds what is published. Where publishing takes a while (HDFS), the writing host also has the same lines
at once in ``<state_dir>/journal/``: the mirror is always the published journal or a continuation of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from sphere.conf.errors import BundleDamaged, StorageError, StorageMissing
from sphere.conf.private import make_private
from sphere.ingest.folders import BUNDLES, SealedFolders
from sphere.ingest.records import ERASED_LINE, Erased, Member, MemberRecord
from sphere.ingest.storage.base import Appender, Readable, Storage
from sphere.ingest.storage.paths import storage_error

_TAR, _JOURNAL = ".tar", ".journal"
_LAST_LINE = 256  # bytes that hold the sealing line whole


@dataclass(frozen=True, slots=True)
class Sealed:
    """The last line of a sealed bundle's journal: its members, and its size in bytes with the end-of-archive."""

    members: int
    size: int

    def to_json(self) -> bytes:
        return orjson.dumps({"sealed": True, "members": self.members, "size": self.size})


@dataclass(frozen=True, slots=True)
class BundleState:
    """What is published of a bundle: `records` once sealed, `journal_size` and `size` (of the tar) in bytes."""

    bundle: str
    records: int | None
    sealed: bool
    journal_size: int
    size: int


@dataclass(frozen=True, slots=True)
class Lines:
    """Complete lines of a journal: what each says of a member, the byte after the last of them, and the sealing line if
    any."""

    members: list[Member]
    next_byte: int
    sealed: Sealed | None

    @property
    def records(self) -> list[MemberRecord]:
        """The members whose bytes are there."""
        return [one for one in self.members if isinstance(one, MemberRecord)]


def journal_path(bundle: str) -> str:
    """Path of the journal of the bundle (a path ending in .tar)."""
    return bundle.removesuffix(_TAR) + _JOURNAL


def bundle_id(bundle: str) -> str:
    """Name of the bundle without folder and ending."""
    return bundle.rpartition("/")[2].removesuffix(_TAR)


def mirror_path(state_dir: Path, bundle: str) -> Path:
    """This host's copy of the journal."""
    return state_dir / "journal" / (bundle_id(bundle) + _JOURNAL)


def remove_mirror(mirror: Path) -> None:
    """Have none; raises StorageError."""
    with _local(mirror):
        mirror.unlink(missing_ok=True)


class Landed:
    """The read side: which bundles there are and what their journals say.

    `state_dir` (None on hosts that receive nothing) is where this host's own, not yet published lines are; with
    `folders`, folders are passed over in which every bundle is skipped.
    """

    def __init__(
        self, storage: Readable, state_dir: Path | None = None, *, folders: SealedFolders | None = None
    ) -> None:
        self._storage = storage
        self._state_dir = state_dir
        self._folders = folders

    def bundles(self, *, skip: Container[str] = ()) -> Iterator[BundleState]:
        """Every bundle, in the order in which they were begun, without looking into the (sealed) ones of `skip`."""
        journals: dict[str, int] = {}
        tars: dict[str, int] = {}
        for entry in self._storage.walk(BUNDLES) if self._folders is None else self._folders.entries(skip):
            if entry.path.endswith(_TAR):
                tars[entry.path] = entry.size
            elif entry.path.endswith(_JOURNAL):
                journals[entry.path.removesuffix(_JOURNAL) + _TAR] = entry.size
        if self._folders is not None:
            self._folders.remember(skip)
        for bundle in sorted(tars):
            if bundle not in skip:
                sealed = self.sealed(bundle, journals.get(bundle, 0))
                records = sealed.members if sealed else None
                yield BundleState(bundle, records, sealed is not None, journals.get(bundle, 0), tars[bundle])

    def records(
        self, bundle: str, *, from_byte: int = 0, unpublished: bool = False
    ) -> tuple[list[MemberRecord], int, bool]:
        """(records, next_byte, sealed) of the complete lines from `from_byte` on, which an earlier call gave; members
        whose bytes are gone are left out.

        `unpublished` adds what this host has written and other hosts cannot read yet. Raises BundleDamaged when the
        journal has no line beginning at `from_byte`, or a line that is no record.
        """
        lines = self.lines(bundle, from_byte=from_byte, unpublished=unpublished)
        return lines.records, lines.next_byte, lines.sealed is not None

    def lines(self, bundle: str, *, from_byte: int = 0, unpublished: bool = False) -> Lines:
        """What `records` gives, with the members whose bytes are gone."""
        return parse(self._read(bundle, max(0, from_byte - 1), unpublished), bundle, from_byte)

    def _read(self, bundle: str, from_byte: int, unpublished: bool) -> bytes:
        if unpublished and self._state_dir is not None:
            try:
                with mirror_path(self._state_dir, bundle).open("rb") as mirror:
                    mirror.seek(from_byte)
                    return mirror.read()
            except FileNotFoundError:  # sealed, or another host's: all that is known is on the storage
                pass
        try:
            return self._storage.read(journal_path(bundle), from_byte)
        except StorageMissing:
            return b""

    def sealed(self, bundle: str, journal_size: int) -> Sealed | None:
        """The last line of the published journal of `journal_size` bytes, if the bundle is sealed."""
        if not journal_size:
            return None
        tail = self._storage.read(journal_path(bundle), max(0, journal_size - _LAST_LINE))
        last = tail.removesuffix(b"\n").rpartition(b"\n")[2] if tail.endswith(b"\n") else b""
        return _sealed(last)


def parse(data: bytes, bundle: str, from_byte: int = 0) -> Lines:
    """The complete lines of `data`, the journal from the byte before `from_byte` on (from 0 on for 0)."""
    if from_byte:
        if data[:1] != b"\n":
            raise BundleDamaged(f"journal of {bundle}: no line begins at byte {from_byte}; rebuild it from the tar")
        data = data[1:]
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    sealed = _sealed(lines[-1]) if lines else None
    try:
        members = [member_of(line) for line in (lines[:-1] if sealed else lines)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleDamaged(
            f"journal of {bundle}: a line that is no record ({error}); rebuild it from the tar"
        ) from None
    return Lines(members, from_byte + end, sealed)


def member_of(line: bytes) -> Member:
    """What a line says of a member; raises ValueError, TypeError, KeyError or AttributeError where it says nothing."""
    return Erased.from_json(line) if line.startswith(ERASED_LINE) else MemberRecord.from_json(line)


def _sealed(line: bytes) -> Sealed | None:
    if not line.startswith(b'{"sealed":true'):
        return None
    try:
        fields = orjson.loads(line)
        members, size = fields["members"], fields["size"]
    except (ValueError, KeyError):
        return None
    sound = type(members) is type(size) is int and members >= 0 <= size
    return Sealed(members, size) if sound else None


def to_lines(records: Sequence[Member], sealed: Sealed | None = None) -> bytes:
    """The journal of these records, each line ended."""
    lines = [record.to_json() for record in records] + ([sealed.to_json()] if sealed else [])
    return b"".join(line + b"\n" for line in lines)


class JournalWriter:
    """The journal of the bundle being written. `add` is called by one thread at a time, `publish` by another one."""

    def __init__(self, storage: Storage, state_dir: Path, bundle: str) -> None:
        self._storage = storage
        self._path = journal_path(bundle)
        self._appender: Appender | None = None
        self._pending = b""  # lines of members that other hosts cannot read yet
        self._ready = b""  # lines of published members
        self._shown = 0  # bytes of lines given to `publish`
        self._exists = False  # though there is no appender: it was put there whole
        self._mirror: Path | None = None
        if not storage.visible_at_once:
            self._mirror = mirror_path(state_dir, bundle)
            with _local(self._mirror):
                make_private(self._mirror.parent)
                self._mirror_fd = os.open(self._mirror, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def add(self, lines: bytes) -> None:
        """Show durable members to this host (to everybody, where writes are visible at once); raises StorageError.

        `lines` are those of `to_lines`.
        """
        if self._mirror is None:
            self._write(lines)
            return
        self._pending += lines
        with _local(self._mirror):
            if os.write(self._mirror_fd, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def take(self) -> None:
        """Say that the members added so far are published: their lines are what `publish` shows."""
        self._ready += self._pending
        self._pending = b""

    def publish(self) -> None:
        """Show the lines of published members to everybody; raises StorageError."""
        if self._ready:
            lines, self._ready = self._ready, b""
            self._shown += len(lines)
            try:
                self._write(lines).publish()
            except StorageError:
                if self._mirror is None:
                    raise
                self._rewrite(self._mirror)

    def _rewrite(self, mirror: Path) -> None:
        """Put a file with all lines that are to be shown in the place of one that cannot be appended to."""
        if self._appender is not None:
            self._appender.abandon()
            self._appender = None
        with _local(mirror):
            lines = mirror.read_bytes()[: self._shown]
        self._storage.write(self._path, lines)
        self._exists = True

    def seal(self, sealed: Sealed) -> None:
        """Publish what is pending and the last line, and let go; raises StorageError."""
        self.take()
        self._write(self._ready + to_lines([], sealed)).close()
        self.discard()

    def abandon(self) -> None:
        """Let go as it is; the mirror stays for this host's readers until recovery has rebuilt the journal."""
        if self._appender is not None:
            self._appender.abandon()
        self._close_mirror()

    def discard(self) -> None:
        """Let go and remove the mirror, which says nothing more than the storage does."""
        self._close_mirror()
        if self._mirror is not None:
            remove_mirror(self._mirror)

    def _write(self, lines: bytes) -> Appender:
        if self._appender is None:
            self._appender = self._storage.append(self._path) if self._exists else self._storage.create(self._path)
        self._appender.write([lines])
        return self._appender

    def _close_mirror(self) -> None:
        if self._mirror is not None and self._mirror_fd >= 0:
            os.close(self._mirror_fd)
            self._mirror_fd = -1


@contextmanager
def _local(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error
