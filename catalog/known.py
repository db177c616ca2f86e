"""Which instances are stored already, and with which bytes: so that a copy is stored once, and a contradiction is seen.

What it knows is never wrong and not always whole: what it does not know is stored again, and extraction merges it. It
is asked for every instance that arrives, and so looks into a dictionary, and at what other processes of this host say
of the instance; it reads the tails of the journals once for each sender (an association), and the catalog's files once
for each study where the process has an index at hand: an index costs more than 100 MB of memory, which a receiver that
answers no query does without.
See docs/decisions/0012-policy.md.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from sphere.catalog.tail import JournalTail
from sphere.catalog.versions import order
from sphere.conf.errors import Refused, SphereError
from sphere.conf.logs import hashed
from sphere.conf.settings import OnConflict, Settings
from sphere.conf.uids import UID
from sphere.ingest.folders import BUNDLES
from sphere.ingest.members import NewMember, with_digest
from sphere.ingest.records import MemberRecord
from sphere.ingest.reservations import Reservation, Reservations
from sphere.ingest.spool import SpoolFirst, in_use, open_readable, spool_settings, spool_storage
from sphere.ingest.storage.base import Readable

log = logging.getLogger(__name__)

KEPT = 20_000  # instances remembered, some 250 bytes each; the first to come are the first forgotten
SENDERS = 1024  # associations and their studies remembered
CHUNK = 1 << 20  # bytes read at a time to see whether a copy is there
LINE = 700  # bytes of a line of a journal, about
TAIL = 10_000  # members taken from the journals at a time
PATIENCE_S = 0.5  # seconds that a sender to a spool waits for storage and catalog: they may be away for hours
READ_S = 20e6  # bytes of a copy that a storage reads in a second, or is not waited for
AWAY_S = 10.0  # seconds after a look that failed in which a sender to a spool waits for no other one
_UIDS = re.compile(" ".join([UID.pattern] * 3), re.ASCII)  # that make a row of `instances`
_PACKED = struct.Struct("<32sIQQI")  # sha256, number of the bundle, offset, length, dataset_offset

Meeting = Literal["new", "copy", "lost copy", "other", "refused copy"]
"""new: nothing is known of it; copy: the bytes of the first version; lost copy: those as well, and they cannot be read
where they were stored; other: bytes that are not known, or cannot be read and are not the first; refused copy: the
bytes of a version that is known and not the first."""

REFUSED: Final[tuple[Meeting, ...]] = ("other", "refused copy")  # with ingest.on_conflict = "reject"
DUPLICATE_INSTANCE = 0x0111  # duplicate SOP instance (PS3.7 C.5.7)


@dataclass(frozen=True, slots=True)
class KnownVersion:
    """Some bytes of an instance (as of `identity`): their digest (hexadecimal), and where they are."""

    SOPInstanceUID: str
    sha256: str
    bundle: str
    offset: int
    length: int
    dataset_offset: int


def identity(one: NewMember | MemberRecord) -> str:
    """What makes two members versions of one instance: the SOPInstanceUID of the data set. What extraction will put
    into quarantine, for a UID that is missing or none, is a version of nothing, and known by its digest alone ("": that
    is not known yet)."""
    uids = f"{one.SOPInstanceUID} {one.StudyInstanceUID} {one.SeriesInstanceUID}"
    return one.SOPInstanceUID if _UIDS.fullmatch(uids) else one.sha256


class Writer(Protocol):
    """What a bundle writer does for us."""

    def store(self, member: NewMember) -> MemberRecord:
        """Return when the member is durable; raises StorageError, then nothing of it remains."""


class Catalog(Protocol):
    """What the query service does for us."""

    def versions_of(self, study: str, *, seen: str, load: bool) -> tuple[str, list[KnownVersion]] | None:
        """See sphere.catalog.queries.Queries."""


class KnownInstances:
    """One per receiver process; shared by its threads."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._catalog = catalog
        self._thorough = settings.ingest.on_conflict == "reject"  # worth an index: a sender is to be told
        self._storage = open_readable(settings)
        self._state_dir = settings.archive.state_dir
        self._reservations = Reservations(self._state_dir)
        self._salt = secrets.token_bytes(16)  # nobody outside can make two UIDs meet
        self._versions: OrderedDict[bytes, bytes] = OrderedDict()
        self._bundles: list[str] = []
        self._numbers: dict[str, int] = {}
        self._adding = threading.Lock()
        self._looking = threading.Lock()
        self._looked_at = 0  # ns since 1970: what landed on this host until then is remembered
        self._tail = _Tail(self._storage, self._state_dir)
        self._beside: _Beside | None = None
        if in_use(settings):
            self._beside = _Beside()
            self._tail = _Tail(spool_storage(settings), spool_settings(settings).archive.state_dir)
            self._far = _Tail(self._storage, self._state_dir)
        self._looking_far = threading.Lock()
        self._senders: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._loaded: OrderedDict[str, str] = OrderedDict()  # by study, the index that it was loaded from

    def store(
        self, member: NewMember, store: Callable[[NewMember], MemberRecord], *, sender: str
    ) -> tuple[Meeting, MemberRecord | None]:
        """What an instance is, and its record where `store` was called with it: its bytes were not there.

        Of one SOPInstanceUID one instance at a time is stored on this host. Raises StorageError.
        """
        if member.digested is None or not identity(member):
            member = with_digest(member)
        uid = identity(member)
        study = member.StudyInstanceUID if uid == member.SOPInstanceUID else ""
        with self._reservations.hold(uid) as place:
            known = self._known(uid, study, sender, place)
            if known is not None:
                member = with_digest(member)
            meeting = "new" if known is None else self._compare(uid, member.sha256, known)
            if meeting in ("copy", "refused copy"):
                log.info("not stored again instance=%s: its bytes are", hashed(member.SOPInstanceUID))
                return meeting, None
            record = store(member)
            place.add(record)
            self.add(record)
            return meeting, record

    def meet(self, uid: str, study: str, sha256: str, *, sender: str, place: Reservation | None = None) -> Meeting:
        """What an instance is that arrives from `sender` (which stands for one association).

        A copy was read, and is there, byte for byte. `place` says what other processes stored of it.
        """
        known = self._known(uid, study, sender, place)
        return "new" if known is None else self._compare(uid, sha256, known)

    def _known(self, uid: str, study: str, sender: str, place: Reservation | None) -> bytes | None:
        """The versions that are known of an instance that arrives."""
        if (sender, study) not in self._senders:
            self._look(study, sender)
        if place is not None:
            self._see(uid, place)
        return self._versions.get(self._key(uid))

    def _compare(self, uid: str, sha256: str, known: bytes) -> Meeting:
        digest = bytes.fromhex(sha256)
        for number, (sha, bundle, *where) in enumerate(_PACKED.iter_unpack(known)):
            if sha == digest:
                if self._is_there(KnownVersion(uid, sha256, self._bundles[bundle], *where)):
                    return "refused copy" if number else "copy"
                return "other" if number else "lost copy"
        return "other"

    def add(self, record: MemberRecord) -> None:
        """An instance was stored; where it was before as well, it is here now."""
        self._add([record], moved=True)

    def _key(self, uid: str) -> bytes:
        return blake2b(uid.encode("utf-8", "backslashreplace"), digest_size=16, key=self._salt).digest()

    def _add(
        self, versions: Iterable[KnownVersion | MemberRecord], *, first: bool = False, moved: bool = False
    ) -> None:
        """Remember versions, in front of the others where `first`, in the place of the same bytes where `moved`."""
        with self._adding:
            for version in versions:
                uid = identity(version) if isinstance(version, MemberRecord) else version.SOPInstanceUID
                key, packed = self._key(uid), self._pack(version)
                known = self._versions.get(key)
                if known is None:
                    self._versions[key] = packed
                    continue
                at = next((at for at in range(0, len(known), _PACKED.size) if known[at : at + 32] == packed[:32]), -1)
                if at < 0:
                    self._versions[key] = packed + known if first else known + packed
                elif moved:
                    self._versions[key] = known[:at] + packed + known[at + _PACKED.size :]
            while len(self._versions) > KEPT:
                self._versions.popitem(last=False)

    def _pack(self, version: KnownVersion | MemberRecord) -> bytes:
        number = self._numbers.get(version.bundle)
        if number is None:
            number = self._numbers[version.bundle] = len(self._bundles)
            self._bundles.append(version.bundle)
        sha = bytes.fromhex(version.sha256)
        return _PACKED.pack(sha, number, version.offset, version.length, version.dataset_offset)

    def _look(self, study: str, sender: str) -> None:
        """See what landed elsewhere before this association, and what the catalog has of this study.

        Where a spool takes what arrives, nobody waits longer than PATIENCE_S for storage and catalog.
        """
        new = (sender, "") not in self._senders
        if self._beside is None:
            with self._looking:
                self._look_now(study, self._tail if new else None)
        else:
            if new:
                self._look_again()
            if not self._beside.ask(lambda: self._look_beside(study, self._far if new else None), PATIENCE_S):
                log.warning("copies are not recognised for now: storage or catalog takes its time")
        with self._looking:
            self._senders[sender, ""] = self._senders[sender, study] = None
            _forget(self._senders)

    def _look_now(self, study: str, tail: _Tail | None) -> bool:
        """Whether everything answered."""
        try:
            if tail is not None:
                self._catch_up(tail)
            found = self._catalog.versions_of(study, seen=self._loaded.get(study, ""), load=self._thorough)
            if found is not None:
                self._loaded[study], versions = found
                self._add(versions, first=True)
            _forget(self._loaded)
        except SphereError as error:
            log.warning("copies are not recognised for now: %s", error)
            return False
        return True

    def _look_beside(self, study: str, tail: _Tail | None) -> bool:
        with self._looking_far:
            return self._look_now(study, tail)

    def _see(self, uid: str, place: Reservation) -> None:
        """What processes of this host stored of an instance since this one looked."""
        if place.forgotten_at > self._looked_at:
            self._look_again()
        if versions := place.stored():
            self._add(
                KnownVersion(uid, one.sha256, one.bundle, one.offset, one.length, one.dataset_offset)
                for one in versions
            )

    def _look_again(self) -> None:
        """Read what the journals have of this host (with a spool, those of the spool)."""
        try:
            with self._looking:
                self._catch_up(self._tail)
        except SphereError as error:
            log.warning("copies are not recognised for now: %s", error)

    def _catch_up(self, tail: _Tail) -> None:
        now = time.time_ns()
        while records := tail.take():
            records.sort(key=order)  # of several journals
            self._add(records)
        if tail is self._tail:
            self._looked_at = now

    def _is_there(self, version: KnownVersion) -> bool:
        """Whether the bytes are where they should be; what cannot be read yet, or any more, is stored again."""
        if self._beside is None or self._spooled(version.bundle):
            return self._matches(version)
        return self._beside.ask(lambda: self._matches(version), PATIENCE_S + version.length / READ_S)

    def _spooled(self, bundle: str) -> bool:
        return isinstance(self._storage, SpoolFirst) and self._storage.spool.exists(bundle)

    def _matches(self, version: KnownVersion) -> bool:
        sha = hashlib.sha256()
        at, end = version.offset + version.dataset_offset, version.offset + version.length
        try:
            while at < end:
                data = self._storage.read(version.bundle, at, min(CHUNK, end - at))
                if not data:
                    return False
                sha.update(data)
                at += len(data)
        except SphereError as error:
            log.debug("a copy in %s cannot be read: %s", version.bundle, error)
            return False
        return sha.hexdigest() == version.sha256


class OnceWriter:
    """Stores what arrives, unless its very bytes are stored already."""

    def __init__(self, writer: Writer, known: KnownInstances, on_conflict: OnConflict) -> None:
        self._writer, self._known, self._on_conflict = writer, known, on_conflict

    def store(self, member: NewMember, *, sender: str = "import") -> MemberRecord | None:
        """Its record when it is durable; None where it was stored before. Raises Refused for a version that is not to
        be (it is kept all the same, see docs/decisions/0012-policy.md), and StorageError.

        `sender` is what it came with, as an association.
        """
        meeting, record = self._known.store(member, self._writer.store, sender=sender)
        if self._on_conflict == "reject" and meeting in REFUSED:
            raise Refused("another version of this instance is stored", status=DUPLICATE_INSTANCE)
        return record


class _Tail:
    """What journals say beyond the newest bundles with about KEPT members, which the first look begins with. For one
    thread at a time."""

    def __init__(self, storage: Readable, state_dir: Path) -> None:
        self._storage, self._state_dir = storage, state_dir
        self._tail: JournalTail | None = None

    def take(self) -> list[MemberRecord]:
        """Further members, none where there are no more now; raises StorageError."""
        if self._tail is None:
            self._tail = JournalTail(self._storage, self._state_dir, {}, self._older())
        return self._tail.take(TAIL)

    def _older(self) -> set[str]:
        journals = {entry.path: entry.size for entry in self._storage.walk(BUNDLES) if entry.path.endswith(".journal")}
        newest_first = sorted(journals, reverse=True)  # their names begin with their time
        sums = accumulate(journals[path] for path in newest_first)
        older = (path for path, size in zip(newest_first, sums, strict=True) if size > KEPT * LINE)
        return {path.removesuffix(".journal") + ".tar" for path in older}


class _Beside:
    """Asks what may not answer for hours, in threads of its own, and waits for none while an earlier one is late."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._late = 0
        self._next = 0.0

    def ask(self, question: Callable[[], bool], wait_s: float) -> bool:
        """What it answers within `wait_s` seconds, else False."""
        if self._late or time.monotonic() < self._next:
            return False
        answers: list[bool] = []
        answered, waits = threading.Event(), True

        def answer() -> None:
            found = False
            try:
                found = question()
            finally:
                with self._lock:
                    answers.append(found)
                    answered.set()
                    if not waits:
                        self._late -= 1
                        self._next = self._next if found else time.monotonic() + AWAY_S

        try:
            threading.Thread(target=answer, daemon=True, name="beside").start()
        except RuntimeError:  # no room for one
            return False
        answered.wait(wait_s)
        with self._lock:
            if not answers:
                waits = False
                self._late += 1
            return answers == [True]


def _forget(remembered: OrderedDict[Any, Any]) -> None:
    while len(remembered) > SENDERS:
        remembered.popitem(last=False)
