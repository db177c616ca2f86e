"""What dead writers left behind: torn tails are cut, journals completed, bundles sealed. Killed anywhere and run again,
it goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sphere.conf.errors import BundleDamaged, StorageError, StorageMissing
from sphere.conf.settings import Settings
from sphere.ingest import tar
from sphere.ingest.folders import SealedFolders, bundle_of
from sphere.ingest.journal import (
    Landed,
    Sealed,
    bundle_id,
    journal_path,
    member_of,
    mirror_path,
    parse,
    remove_mirror,
    to_lines,
)
from sphere.ingest.lock import BundleLock, locked_bundles
from sphere.ingest.records import Member
from sphere.ingest.storage.base import Readable, Storage

CHUNK = 4 << 20  # bytes copied at a time
_WINDOW = 256 << 10  # bytes read at once while headers are scanned

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """One bundle: the members it now holds, bytes cut from its end, journal lines added, or why nothing was changed."""

    bundle: str
    members: int = 0
    cut: int = 0
    lines_added: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What `recover` did, one entry per bundle that it looked at."""

    bundles: tuple[Recovered, ...] = ()

    @property
    def failed(self) -> tuple[Recovered, ...]:
        """Those left as they were: damaged, or the storage refused."""
        return tuple(found for found in self.bundles if found.error)


def recover(storage: Storage, settings: Settings, *, now: Callable[[], float] = time.time) -> RecoveryReport:
    """Recover every bundle whose writer is dead.

    That is a bundle of this host whose lock nobody holds, or any unsealed one that was not written to for twice
    ``storage.seal_age_s`` and a minute (by `now`, in seconds since 1970). Bundles of living writers are left alone.
    """
    state_dir = settings.archive.state_dir
    idle_since = now() - 2 * settings.storage.seal_age_s - 60
    done: list[Recovered] = []
    for bundle in _candidates(storage, state_dir, idle_since):
        lock = BundleLock.take(state_dir, bundle)
        if lock is None:
            continue
        try:
            found = repair(storage, state_dir, bundle)
        except StorageError as error:
            _log.error("bundle %s cannot be recovered: %s", bundle_id(bundle), error)
            found = Recovered(bundle, error=str(error))
        lock.release(keep=bool(found.error))
        done.append(found)
    return RecoveryReport(tuple(done))


def _candidates(storage: Storage, state_dir: Path, idle_since: float) -> Iterator[str]:
    left_behind = locked_bundles(state_dir)
    folders = SealedFolders(storage, state_dir)
    entries = {entry.path: entry for entry in folders.entries()}
    landed = Landed(storage)
    sealed: set[str] = set()
    for path in sorted(entries):
        if not path.endswith(".tar"):
            continue
        if bundle_id(path) in left_behind:
            left_behind.discard(bundle_id(path))
            yield path
            continue
        journal = entries.get(journal_path(path))
        touched = max(entries[path].mtime, journal.mtime if journal else 0.0)
        if touched < idle_since and not folders.is_sealed(path):
            try:
                ended = landed.sealed(path, journal.size if journal else 0)
            except StorageError as error:  # of this one alone: others do not wait for it
                _log.error("bundle %s cannot be looked at: %s", bundle_id(path), error)
                continue
            if ended:
                sealed.add(path)
            else:
                yield path
    folders.remember(sealed)
    for name in left_behind:  # of a folder that was passed over, or locks whose bundle was never made, or was removed
        path = bundle_of(name)
        if storage.exists(path):
            yield path
            continue
        lock = BundleLock.take(state_dir, name)
        if lock is not None:
            lock.release()


def repair(storage: Storage, state_dir: Path, bundle: str, *, keep: int | None = None) -> Recovered:
    """Cut, complete and seal one bundle that nobody writes to; the caller holds its lock.

    `keep`, where the caller knows it, is the end in bytes of the last member whose bytes were synced. An empty bundle
    is removed. A member that no journal promises and whose bytes did not reach the disk, though those of later ones
    did, is kept in ``damaged/<bundle>-<offset>.dcm`` below the root, and its place is that of an erased one. Raises
    BundleDamaged, with nothing changed, when the bundle lacks what its journal or `keep` promises, and StorageError.
    """
    if keep == 0:  # nothing in it was ever promised: no lease has to be recovered for that
        _remove(storage, bundle)
        remove_mirror(mirror_path(state_dir, bundle))
        return Recovered(bundle)
    size = storage.recover(bundle)
    found = tar.scan(Window(storage, bundle), size)
    known = _known(storage, state_dir, bundle)
    members = [member for member in found.members if keep is None or member.end <= keep]
    members, torn = _without_bad_tail(storage, bundle, members, known)
    if keep is not None and (torn or not members or members[-1].end != keep):
        raise BundleDamaged(f"bundle {bundle}: its first {keep} bytes are not as they were synced; {found.damage}")
    records = _records(bundle, members)
    missing = known - {_place(record) for record in records}
    if missing:
        raise BundleDamaged(f"bundle {bundle}: {len(missing)} members of its journal are not in it; {found.damage}")
    mirror = mirror_path(state_dir, bundle)
    if not members:
        _remove(storage, bundle)
        remove_mirror(mirror)
        return Recovered(bundle, cut=size)
    good = members[-1].end
    for member in torn:
        _keep_aside(storage, bundle, member)
    if not (found.sealed and good == found.good):
        _end_at(storage, bundle, good, size)
    if torn:
        records = _records(bundle, _without_bytes(storage, bundle, members, torn))
    written = _write_journal(storage, bundle, to_lines(records, Sealed(len(records), good + len(tar.END))))
    remove_mirror(mirror)
    cut = 0 if found.sealed and good == found.good else size - good
    return Recovered(bundle, len(records), cut, written)


def rebuild_journal(storage: Storage, bundle: str) -> int:
    """Write the journal anew from the tar alone, for a bundle that nobody writes to; returns the lines that changed.

    Raises BundleDamaged when the tar has a torn tail (`repair` cuts it).
    """
    found = tar.scan(Window(storage, bundle), storage.size(bundle))
    if found.damage:
        raise BundleDamaged(f"bundle {bundle}: {found.damage}")
    records = _records(bundle, found.members)
    sealed = Sealed(len(records), found.good + len(tar.END)) if found.sealed else None
    return _write_journal(storage, bundle, to_lines(records, sealed))


@dataclass(frozen=True, slots=True)
class Verification:
    """A bundle read whole: its members, its size in bytes, and everything that is not as promised; `damaged`: where the
    members begin that have other bytes, each of which is one of the problems."""

    bundle: str
    members: int
    size: int
    problems: tuple[str, ...]
    damaged: tuple[int, ...] = ()


def verify(storage: Readable, bundle: str) -> Verification:
    """Read a sealed bundle whole: every digest, the end-of-archive, and that the journal says the same."""
    size = storage.size(bundle)
    window = Window(storage, bundle)
    found = tar.scan(window, size)
    problems = [found.damage] if found.damage else [] if found.sealed else ["no end-of-archive"]
    damaged = []
    for member in found.members:
        if not member.erased and tar.digest(window, member) != member.fields.get("sha256"):
            problems.append(f"member at byte {member.offset}: sha256 differs")
            damaged.append(member.offset)
    try:
        records = _records(bundle, found.members)
        lines = parse(storage.read(journal_path(bundle)), bundle)
        if lines.members != records:
            problems.append(f"journal has {len(lines.members)} records that are not the tar's {len(records)}")
        if lines.sealed != Sealed(len(records), size):
            problems.append(f"journal ends with {lines.sealed}")
    except StorageError as error:
        problems.append(str(error))
    return Verification(bundle, len(found.members), size, tuple(problems), tuple(damaged))


class Window:
    """Reads a file by pieces, small neighbouring ones from one read of the storage."""

    def __init__(self, storage: Readable, path: str) -> None:
        self._storage = storage
        self._path = path
        self._start = 0
        self._data = b""

    def __call__(self, offset: int, length: int) -> bytes:
        """Bytes ``[offset, offset + length)``, fewer at the end of the file."""
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            self._data = self._storage.read(self._path, offset, max(length, _WINDOW))
            self._start, at = offset, 0
        return self._data[at : at + length]


def _place(record: Member) -> tuple[int, int]:
    return record.offset, record.length


def _known(storage: Storage, state_dir: Path, bundle: str) -> set[tuple[int, int]]:
    """(offset, length) of the members that the journal or this host's mirror promises; a torn line ends either."""
    journal = journal_path(bundle)
    data = []
    try:
        storage.recover(journal)
        data.append(storage.read(journal))
    except StorageMissing:  # not published before its writer died
        pass
    mirror = mirror_path(state_dir, bundle)
    if mirror.exists():
        data.append(mirror.read_bytes())
    known: set[tuple[int, int]] = set()
    for text in data:
        for line in text.split(b"\n"):
            try:
                known.add(_place(member_of(line)))
            except (ValueError, TypeError, KeyError, AttributeError):
                break
    return known


def _without_bad_tail(
    storage: Storage, bundle: str, members: list[tar.TarMember], known: set[tuple[int, int]]
) -> tuple[list[tar.TarMember], list[tar.TarMember]]:
    """`members` less those at the end that no journal promises and whose bytes did not reach the disk; and such as are
    among the others: a disk that loses its power has written a group in any order."""
    window = Window(storage, bundle)
    bad = {
        member.offset
        for member in members
        if not (member.erased or (member.offset, member.length) in known)
        and tar.digest(window, member) != member.fields.get("sha256")
    }
    kept = list(members)
    while kept and kept[-1].offset in bad:
        kept.pop()
    return kept, [member for member in kept if member.offset in bad]


def _keep_aside(storage: Storage, bundle: str, member: tar.TarMember) -> None:
    """Copy a member's bytes as they are: it cannot be told whether it was ever promised."""
    path = f"damaged/{bundle_id(bundle)}-{member.offset}.dcm"
    storage.delete(path)  # of a process that was killed here
    appender = storage.create(path)
    try:
        for at in range(member.offset, member.offset + member.length, CHUNK):
            appender.write([storage.read(bundle, at, min(CHUNK, member.offset + member.length - at))])
        appender.close()
    finally:
        appender.abandon()
    _log.error("bundle %s: the member at byte %d has other bytes than its sha256 says: they are kept in %s, the others "
               "go on; send it again", bundle_id(bundle), member.offset, path)  # fmt: skip


def _without_bytes(
    storage: Storage, bundle: str, members: list[tar.TarMember], torn: list[tar.TarMember]
) -> list[tar.TarMember]:
    """The members of a bundle that ends after them, which is written anew without the bytes of some."""
    from sphere.ingest.erasing import Layout  # which rebuilds journals

    size = members[-1].end + len(tar.END)
    layout = Layout(storage, bundle, members, frozenset(member.offset for member in torn), size)
    storage.rewrite(bundle, layout.pieces, check=lambda path: layout.check(path, lambda _: None))
    return tar.scan(Window(storage, bundle), size).members


def _records(bundle: str, members: list[tar.TarMember]) -> list[Member]:
    try:
        return [member.record(bundle) for member in members]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleDamaged(f"bundle {bundle}: an extended header gives no record ({error})") from None


def _end_at(storage: Storage, bundle: str, good: int, size: int) -> None:
    """Make the tar end after byte `good` with an end-of-archive."""
    if size != good:
        storage.truncate(bundle, good)
    appender = storage.append(bundle)
    try:
        if appender.tell() != good:
            raise StorageError(f"bundle {bundle} grew while it was recovered: somebody writes to it")
        appender.write([tar.END])
        appender.close()
    finally:
        appender.abandon()


def _write_journal(storage: Storage, bundle: str, lines: bytes) -> int:
    """Make the journal these lines, atomically; returns how many it did not have at their place."""
    try:
        before = storage.read(journal_path(bundle))
    except StorageMissing:
        before = b""
    if before == lines:
        return 0
    storage.write(journal_path(bundle), lines)
    old, new = before.split(b"\n"), lines.split(b"\n")[:-1]
    return sum(1 for at, line in enumerate(new) if at >= len(old) - 1 or old[at] != line)


def _remove(storage: Storage, bundle: str) -> None:
    storage.delete(journal_path(bundle))
    storage.delete(bundle)
