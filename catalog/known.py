"""Which instances are stored already, and with which bytes: so that a copy is stored once, and a contradiction is seen.

What it knows is never wrong and not always whole: what it does not know is stored again, and extraction merges it. It
is asked for every instance that arrives, and so looks into a dictionary; it reads the tails of the journals once for
each sender (an association), and the catalog's files once for each study where the process has an index at hand: an
index costs more than 100 MB of memory, which a receiver that answers no query does without.
See docs/decisions/0012-policy.md.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Protocol

from sphere.catalog.tail import JournalTail
from sphere.conf.errors import SphereError
from sphere.conf.settings import Settings
from sphere.ingest.folders import BUNDLES
from sphere.ingest.records import MemberRecord
from sphere.ingest.spool import in_use, open_readable

log = logging.getLogger(__name__)

KEPT = 20_000  # instances remembered, some 250 bytes each; the first to come are the first forgotten
SENDERS = 1024  # associations and their studies remembered
CHUNK = 1 << 20  # bytes read at a time to see whether a copy is there
LINE = 700  # bytes of a line of a journal, about
TAIL = 10_000  # members taken from the journals at a time
PATIENCE_S = 0.5  # seconds that a sender to a spool waits for storage and catalog: they may be away for hours
_PACKED = struct.Struct("<32sIQQI")  # sha256, number of the bundle, offset, length, dataset_offset

Meeting = Literal["new", "copy", "other", "refused copy"]
"""new: nothing is known of it; copy: the bytes of the first version; other: bytes that are not known; refused copy: the
bytes of a version that is known and not the first."""


@dataclass(frozen=True, slots=True)
class KnownVersion:
    """Some bytes of an instance: their digest (hexadecimal), and where they are."""

    SOPInstanceUID: str
    sha256: str
    bundle: str
    offset: int
    length: int
    dataset_offset: int


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
        self._hurried = in_use(settings) and not self._thorough
        self._state_dir = settings.archive.state_dir
        self._salt = secrets.token_bytes(16)  # nobody outside can make two UIDs meet
        self._versions: OrderedDict[bytes, bytes] = OrderedDict()
        self._bundles: list[str] = []
        self._numbers: dict[str, int] = {}
        self._adding = threading.Lock()
        self._looking = threading.Lock()
        self._tail: JournalTail | None = None
        self._senders: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._loaded: OrderedDict[str, str] = OrderedDict()  # by study, the index that it was loaded from

    def meet(self, uid: str, study: str, sha256: str, *, sender: str) -> Meeting:
        """What an instance is that arrives from `sender` (which stands for one association).

        A copy was read, and is there, byte for byte.
        """
        self._look(study, sender)
        known = self._versions.get(self._key(uid))
        if known is None:
            return "new"
        digest = bytes.fromhex(sha256)
        for number, (sha, bundle, *where) in enumerate(_PACKED.iter_unpack(known)):
            if sha == digest and self._is_there(KnownVersion(uid, sha256, self._bundles[bundle], *where)):
                return "refused copy" if number else "copy"
        return "other"

    def add(self, record: MemberRecord) -> None:
        """An instance was stored."""
        self._add([record])

    def _key(self, uid: str) -> bytes:
        return hashlib.blake2b(uid.encode(), digest_size=16, key=self._salt).digest()

    def _add(self, versions: Iterable[KnownVersion | MemberRecord], *, first: bool = False) -> None:
        """Remember versions, in front of the others where `first`."""
        with self._adding:
            for version in versions:
                key, packed = self._key(version.SOPInstanceUID), self._pack(version)
                known = self._versions.get(key, b"")
                if packed[:32] not in (known[at : at + 32] for at in range(0, len(known), _PACKED.size)):
                    self._versions[key] = packed + known if first else known + packed
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

        Where a spool takes what arrives, nobody waits longer than PATIENCE_S for it.
        """
        if (sender, study) in self._senders:
            return
        if not self._hurried:
            with self._looking:
                self._look_now(study, sender)
            return
        if self._looking.acquire(timeout=PATIENCE_S):
            looked = threading.Event()
            threading.Thread(target=self._look_beside, args=(study, sender, looked), daemon=True).start()
            if looked.wait(PATIENCE_S):
                return
        log.warning("copies are not recognised for now: storage or catalog takes its time")
        self._senders[sender, ""] = self._senders[sender, study] = None

    def _look_beside(self, study: str, sender: str, looked: threading.Event) -> None:
        try:
            self._look_now(study, sender)
        finally:
            self._looking.release()
            looked.set()

    def _look_now(self, study: str, sender: str) -> None:
        try:
            if (sender, "") not in self._senders:
                self._catch_up()
            found = self._catalog.versions_of(study, seen=self._loaded.get(study, ""), load=self._thorough)
            if found is not None:
                self._loaded[study], versions = found
                self._add(versions, first=True)
        except SphereError as error:
            log.warning("copies are not recognised for now: %s", error)
        self._senders[sender, ""] = self._senders[sender, study] = None
        _forget(self._senders)
        _forget(self._loaded)

    def _catch_up(self) -> None:
        if self._tail is None:
            self._tail = JournalTail(self._storage, self._state_dir, {}, self._older())
        while records := self._tail.take(TAIL):
            self._add(records)

    def _older(self) -> set[str]:
        """All bundles but the newest ones with about KEPT members."""
        journals = {entry.path: entry.size for entry in self._storage.walk(BUNDLES) if entry.path.endswith(".journal")}
        newest_first = sorted(journals, reverse=True)  # their names begin with their time
        sums = accumulate(journals[path] for path in newest_first)
        older = (path for path, size in zip(newest_first, sums, strict=True) if size > KEPT * LINE)
        return {path.removesuffix(".journal") + ".tar" for path in older}

    def _is_there(self, version: KnownVersion) -> bool:
        """Whether the bytes are where they should be; what cannot be read yet, or any more, is stored again."""
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


def _forget(remembered: OrderedDict[Any, Any]) -> None:
    while len(remembered) > SENDERS:
        remembered.popitem(last=False)
