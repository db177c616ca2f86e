"""Tables of a catalog that stay open: their logs are read once, and followed by what is committed here.

To read the log of a table, or what a commit adds to it, takes delta-rs the longer the more files the table has. So a
table is gone on with as long as nobody else commits to it, from one job to the next too, and what it has after a commit
of ours is known without a look at it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from deltalake import DeltaTable, Metadata
from deltalake.exceptions import TableNotFoundError
from deltalake.table import ProtocolVersions

from sphere.conf.errors import CatalogError, StorageMissing
from sphere.ingest.storage.base import Storage
from sphere.jobs.lookup import files
from sphere.jobs.parquet import NewFile


@dataclass(frozen=True, slots=True)
class Seen:
    """A table after commits of ours onto what `table` was when it was read: its version, and its files by their paths
    as the log has them, with their sizes in bytes. These commits change neither columns nor protocol."""

    table: DeltaTable
    number: int
    sizes: Mapping[str, int]

    def version(self) -> int:
        """The version of the table."""
        return self.number

    def metadata(self) -> Metadata:
        """Its id and properties."""
        return self.table.metadata()

    def protocol(self) -> ProtocolVersions:
        """What it asks of readers and writers."""
        return self.table.protocol()


At: TypeAlias = DeltaTable | Seen
"""A table in one version."""


@dataclass(slots=True)
class _Known:
    """An open table. All commits after its version up to `last` are ours; `stamp` is a checksum of the last one, and
    `seen` what the table has then, None where that was never asked."""

    table: DeltaTable
    last: int
    stamp: int
    seen: Seen | None = None


class OpenTables:
    """The tables below `root`, whose files `storage` has. Several threads may each work on tables of their own."""

    def __init__(self, root: str, storage: Storage) -> None:
        self._root = root
        self._storage = storage
        self._known: dict[str, _Known] = {}

    def url(self, name: str) -> str:
        """Where the table is."""
        return f"{self._root}/{name}"

    def look_again(self) -> set[str]:
        """Let go of tables whose last commit is another one than it was, and return the names of the others: who keeps
        tables for long may find that they were made anew, or come from a copy, and have as many commits as before."""
        for name, known in list(self._known.items()):
            if self._stamp(name, known.last) != known.stamp:
                del self._known[name]
        return set(self._known)

    def open(self, name: str) -> DeltaTable | None:
        """The table as of now, or None where nothing was ever written to it; raises CatalogError where it cannot be
        read.

        It becomes as of now where nobody but us committed since. Whoever holds it from before another's commit keeps
        that version, so that what is committed onto it is refused.
        """
        if name not in self._known and self._is_nowhere(name):
            return None
        try:
            return self._gone_on_with(name) or self._opened(name)
        except TableNotFoundError:
            return None
        except OSError as error:
            raise CatalogError(f"{self.url(name)} cannot be read: {' '.join(str(error).split())}") from None

    def latest(self, name: str) -> At | None:
        """What `open` gives, for who asks for no more than a version and its rows by key: it is not brought up to date
        for that."""
        known = self._known.get(name)
        if known is None or known.seen is None or known.seen.number != known.last or not self._is_last(known, name):
            return self.open(name)
        return known.table if known.table.version() == known.last else known.seen

    def files(self, name: str, at: At) -> Mapping[str, int]:
        """The table's files by their paths, with their sizes. To list them reads the statistics of all of them: it is
        done once, and what we commit is added."""
        if isinstance(at, Seen):
            return at.sizes
        known, version = self._known.get(name), at.version()
        if known is None or known.table is not at:
            return files(at)
        if known.seen is None or known.seen.number < version:
            known.seen = Seen(at, version, files(at))
        return known.seen.sizes if known.seen.number == version else files(at)

    def made(self, name: str, table: DeltaTable) -> None:
        """A table that was made by us."""
        self._known[name] = _Known(table, table.version(), self._stamp(name, table.version()))

    def committed(
        self,
        name: str,
        onto: At,
        version: int,
        added: Sequence[NewFile],
        removed: Mapping[str, int],
        *,
        said: bytes | None = None,
    ) -> None:
        """Remember what the table is after a commit of ours onto `onto`, which made this version and says `said`, where
        that is known."""
        known = self._known.get(name)
        table = onto.table if isinstance(onto, Seen) else onto
        if known is None or known.table is not table or known.last != version - 1:
            return
        known.last, known.stamp = version, self._stamp(name, version) if said is None else zlib.crc32(said)
        before, known.seen = known.seen, None
        if before is not None and before.number == version - 1:
            left = {path: size for path, size in before.sizes.items() if path not in removed}
            known.seen = Seen(table, version, left | {file.path: file.size for file in added})

    def _opened(self, name: str) -> DeltaTable:
        table = DeltaTable(self.url(name))
        self.made(name, table)
        return table

    def _is_nowhere(self, name: str) -> bool:
        """Whether nothing was ever written to a table for sure: a local disk tells at once."""
        parts = urlsplit(self.url(name))
        return parts.scheme == "file" and not Path(unquote(parts.path), "_delta_log").exists()

    def _gone_on_with(self, name: str) -> DeltaTable | None:
        """The table that was opened before, as of now; None where there is none, or another process committed."""
        known = self._known.pop(name, None)
        if known is None or not self._is_last(known, name):
            return None
        if known.table.version() < known.last:
            known.table.update_incremental()
        if known.table.version() != known.last:  # somebody committed while we looked
            return None
        self._known[name] = known
        return known.table

    def _is_last(self, known: _Known, name: str) -> bool:
        return not self._has(name, known.last + 1) and self._has(name, known.last)

    def _has(self, name: str, version: int) -> bool:
        return self._storage.exists(_commit(name, version))

    def _stamp(self, name: str, version: int) -> int:
        try:
            return zlib.crc32(self._storage.read(_commit(name, version)))
        except StorageMissing:
            return -1


def _commit(name: str, version: int) -> str:
    return f"{name}/_delta_log/{version:020}.json"
