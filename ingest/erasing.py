"""Taking the bytes of members out of a sealed bundle: no other member moves, and none is lost.

The bundle is written anew beside the old one, with zeros where the erased members were (holes, where the storage can
leave them out), read back, compared, and put in its place; a bundle of which nothing is left is removed. Then the
journal is made anew from the tar. Killed anywhere and done again, it goes on where it was. See
docs/decisions/0032-compaction.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from sphere.conf.errors import BundleDamaged, StorageError, StorageMissing
from sphere.ingest import tar
from sphere.ingest.journal import Lines, journal_path, parse
from sphere.ingest.records import Erased, Member
from sphere.ingest.recovery import Window, rebuild_journal
from sphere.ingest.storage.base import Piece, Storage

CHUNK = 8 << 20
"""Bytes of a bundle held in memory at a time."""

OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was done to a bundle: members whose bytes went now, how many bytes these were, how many the storage has more
    room for, and whether the whole bundle went."""

    members: int = 0
    size: int = 0
    freed: int = 0
    removed: bool = False


def erase(storage: Storage, bundle: str, offsets: Collection[int], *, on_step: OnStep = lambda _: None) -> Erasure:
    """Have nothing left of the members at `offsets` of a sealed bundle; `on_step` is called before each step.

    Whose bytes are gone already is passed over, and so is a bundle that is. Raises BundleDamaged, with nothing changed,
    where the bundle is not what its journal says, and StorageError.
    """
    if not storage.exists(bundle):
        _finish_removal(storage, bundle, offsets, on_step)
        return Erasure()
    size = storage.size(bundle)
    members = _members(storage, bundle, size)
    there = {member.offset: member for member in members}
    if unknown := set(offsets) - there.keys():
        raise BundleDamaged(f"bundle {bundle}: no member begins at byte {min(unknown)}")
    dead = {offset: there[offset] for offset in offsets if not there[offset].erased}
    gone = sum(member.length for member in dead.values())
    if all(member.erased or member.offset in dead for member in members):
        _remove(storage, bundle, on_step)
        return Erasure(len(dead), gone, size, removed=True)
    freed = 0
    if dead:
        on_step("copy")
        layout = Layout(storage, bundle, members, frozenset(dead), size)
        freed = storage.rewrite(bundle, layout.pieces, check=lambda path: layout.check(path, on_step))
    on_step("journal")
    rebuild_journal(storage, bundle)
    return Erasure(len(dead), gone, freed)


def _members(storage: Storage, bundle: str, size: int) -> list[tar.TarMember]:
    """The members of a bundle that is sealed, whole, and what its journal says; of one that was written anew before its
    journal was, the journal may say more."""
    found = tar.scan(Window(storage, bundle), size)
    if not found.sealed:
        raise BundleDamaged(f"bundle {bundle}: {found.damage or 'no end-of-archive'}")
    said = _said(storage, bundle)
    if said.sealed is None or (said.sealed.members, said.sealed.size) != (len(found.members), size):
        raise BundleDamaged(f"bundle {bundle}: its journal ends with {said.sealed}")
    for member, line in zip(found.members, said.members, strict=False):
        if not _agree(member.record(bundle), line):
            raise BundleDamaged(f"bundle {bundle}: the journal has another member than the one at byte {member.offset}")
    return found.members


def _said(storage: Storage, bundle: str) -> Lines:
    try:
        return parse(storage.read(journal_path(bundle)), bundle)
    except StorageMissing:
        raise BundleDamaged(f"bundle {bundle}: it has no journal; recovery writes one") from None


def _agree(member: Member, line: Member) -> bool:
    if isinstance(member, Erased):
        return (member.offset, member.length, member.line) == (line.offset, line.length, len(line.to_json()))
    return member == line


def _finish_removal(storage: Storage, bundle: str, offsets: Collection[int], on_step: OnStep) -> None:
    """Remove the journal of a bundle that was removed; raises BundleDamaged where it was lost, with others in it."""
    try:
        records = parse(storage.read(journal_path(bundle)), bundle).records
    except StorageMissing:
        return
    if any(record.offset not in offsets for record in records):
        raise BundleDamaged(f"bundle {bundle}: it is gone, and its journal names members that were not to go")
    on_step("remove journal")
    storage.delete(journal_path(bundle))


def _remove(storage: Storage, bundle: str, on_step: OnStep) -> None:
    """The tar first: without a journal it would be made again from it."""
    on_step("remove")
    storage.delete(bundle)
    on_step("remove journal")
    storage.delete(journal_path(bundle))


@dataclass(frozen=True, slots=True)
class Layout:
    """A sealed bundle as it will be: `dead` are the offsets of members that are to go, `size` its bytes."""

    storage: Storage
    bundle: str
    members: list[tar.TarMember]
    dead: frozenset[int]
    size: int

    def pieces(self) -> Iterator[Piece]:
        """Its bytes in order, those of other members as they are."""
        for start, end, member in self._parts():
            if member is None:
                for at in range(start, end, CHUNK):
                    yield self._read(self.bundle, at, min(CHUNK, end - at))
            else:
                yield tar.erased_header(self._read(self.bundle, start, member.offset - start))
                yield end - member.offset

    def check(self, path: str, on_step: OnStep) -> None:
        """Compare the file that was written with the bundle, and each member with its digest; raises BundleDamaged and
        StorageError."""
        on_step("check")
        if self.storage.size(path) != self.size:
            raise StorageError(f"{path} has another size than was written")
        for start, end, member in self._parts():
            if member is None:
                for at in range(start, end, CHUNK):
                    length = min(CHUNK, end - at)
                    if self._read(self.bundle, at, length) != self._read(path, at, length):
                        raise StorageError(f"{path} has other bytes than were written, at byte {at} or after")
        window = Window(self.storage, path)
        found = tar.scan(window, self.size)
        if not found.sealed or [one.offset for one in found.members] != [one.offset for one in self.members]:
            raise StorageError(f"{path} is no bundle of the same members: {found.damage}")
        for new, old in zip(found.members, self.members, strict=True):
            self._check_member(path, new, old)
        on_step("rename")

    def _check_member(self, path: str, new: tar.TarMember, old: tar.TarMember) -> None:
        if old.erased or old.offset in self.dead:
            if not new.erased or (new.length, new.end) != (old.length, old.end):
                raise StorageError(f"{path}: the member at byte {new.offset} was to be erased")
        elif new != old:
            raise StorageError(f"{path}: the member at byte {new.offset} has other headers")
        elif tar.digest(lambda at, length: self._read(path, at, length), new, chunk=CHUNK) != new.fields.get("sha256"):
            raise BundleDamaged(
                f"bundle {self.bundle}: the member at byte {new.offset} has other bytes than its sha256 says"
            )

    def _parts(self) -> Iterator[tuple[int, int, tar.TarMember | None]]:
        """Ranges of the file: what stays, and each member that goes. What went before has zeros, which are left out
        again."""
        at = 0
        for member in self.members:
            if member.offset in self.dead or member.erased:
                if at < member.start:
                    yield at, member.start, None
                yield member.start, member.end, member
                at = member.end
        yield at, self.size, None

    def _read(self, path: str, offset: int, length: int) -> bytes:
        data = self.storage.read(path, offset, length)
        if len(data) != length:
            raise StorageError(f"{path} ends at byte {offset + len(data)}")
        return data
