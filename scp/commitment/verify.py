"""Whether instances are kept: their bytes are read back and compared with the digest of their arrival."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from sphere.conf.errors import StorageError, StorageMissing
from sphere.conf.logs import hashed
from sphere.conf.uids import UID
from sphere.ingest.storage.base import Readable
from sphere.scp.commitment.transactions import Reference
from sphere.scp.retrieve.outbound import range_of
from sphere.scp.retrieve.read_ahead import ReadAhead

if TYPE_CHECKING:
    from sphere.catalog.stored import StoredInstance

log = logging.getLogger(__name__)

COMMITTED = 0
PROCESSING_FAILURE = 0x0110  # Failure Reasons (PS3.3 C.14.1.1)
NO_SUCH_INSTANCE = 0x0112
CLASS_CONFLICT = 0x0119
BATCH = 500  # instances looked up at once


class Catalog(Protocol):
    """What the query service does for us; recent arrivals are among its answers."""

    def lookup_instances(self, *, sop: Sequence[str]) -> Iterator[StoredInstance]:
        """Where instances are."""


class Verifier:
    """Checks references. One per process, shared by its threads."""

    def __init__(self, catalog: Catalog, storage: Readable) -> None:
        self._catalog = catalog
        self._storage = storage

    def check(self, references: Sequence[Reference]) -> Iterator[tuple[Reference, int]]:
        """Each reference and COMMITTED or why it is not, in some order.

        An instance of which the bundle has other bytes, or too few, is PROCESSING_FAILURE. Raises StorageError where
        the storage does not answer, and CatalogError: then nothing is known.
        """
        rest = iter(references)
        while batch := list(islice(rest, BATCH)):
            uids = [one.SOPInstanceUID for one in batch if UID.fullmatch(one.SOPInstanceUID)]
            found = {one.SOPInstanceUID: one for one in self._catalog.lookup_instances(sop=uids)} if uids else {}
            readable: list[tuple[StoredInstance, Reference]] = []
            for reference in batch:
                stored = found.get(reference.SOPInstanceUID)
                if stored is None:
                    yield reference, NO_SUCH_INSTANCE
                elif stored.SOPClassUID != reference.SOPClassUID:
                    yield reference, CLASS_CONFLICT
                else:
                    readable.append((stored, reference))
            yield from self._read(sorted(readable, key=lambda one: (one[0].bundle, one[0].offset)))

    def _read(self, instances: Sequence[tuple[StoredInstance, Reference]]) -> Iterator[tuple[Reference, int]]:
        with ReadAhead(self._storage, [range_of(stored) for stored, _ in instances]) as ahead:
            for stored, reference in instances:
                if self._is_whole(stored, ahead.next()):
                    yield reference, COMMITTED
                    continue
                log.error(
                    "stored bytes are damaged instance=%s bundle=%s", hashed(stored.SOPInstanceUID), stored.bundle
                )
                yield reference, PROCESSING_FAILURE

    def _is_whole(self, stored: StoredInstance, parts: Iterator[memoryview]) -> bool:
        digest = hashlib.sha256()
        try:
            for part in parts:
                digest.update(part)
        except StorageError:
            if self._is_cut(stored):
                return False
            raise
        return digest.hexdigest() == stored.sha256

    def _is_cut(self, stored: StoredInstance) -> bool:
        """Whether the bundle is gone or too short, rather than the storage away for a while."""
        try:
            return self._storage.size(stored.bundle) < stored.offset + stored.length
        except StorageMissing:
            return True
