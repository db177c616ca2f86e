"""Small files of `instances`, as short batches leave them, joined to longer ones in the commit of a later batch.

Every batch adds a file or two, and everything that lists the table pays for each of them. So files wait until there are
several of about one size: however many batches there are, at most twice as many bytes are written anew as they wrote.
Rows only move, and the commit says so (`dataChange` of the Delta protocol): the change data feed, and what follows it,
sees nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

import pyarrow as pa

from sphere.catalog.schema import TABLES
from sphere.ingest.storage.base import Storage
from sphere.jobs.lookup import open_parquet, shaped
from sphere.jobs.parquet import ROW_GROUP, FileWriter, NewFile

SIZES: Final = ((64 << 10, 16), (256 << 10, 8), (1 << 20, 8))
"""Files below so many bytes, and not below the limit before, are joined from so many on."""
FULL: Final = 4 << 20
"""Bytes of files that are joined at once, at most."""
ROWS: Final = 8 * ROW_GROUP
"""Rows that are joined at once, at most: they are in memory."""
_TABLE: Final = "instances"
_ORDER: Final = ("StudyInstanceUID", "SeriesInstanceUID", "bundle", "offset")  # that of rows of a batch


@dataclass(frozen=True, slots=True)
class Joined:
    """Files that have the rows of others, and these, by path with their sizes in bytes."""

    files: list[NewFile] = field(default_factory=list)
    removed: Mapping[str, int] = field(default_factory=dict)


NOTHING: Final = Joined()


def join(storage: Storage, sizes: Mapping[str, int]) -> Joined:
    """Join those of the files, by path with their sizes in bytes, whose turn it is; no other is opened.

    What is written is part of the table only when it is committed. Raises StorageError.
    """
    pieces: list[pa.Table] = []
    removed: dict[str, int] = {}
    schema, rows = TABLES[_TABLE].schema, 0
    for path in due(sizes):
        with open_parquet(storage, f"{_TABLE}/{unquote(path)}") as file:
            rows += file.metadata.num_rows
            if rows > ROWS:
                break
            there = set(file.schema_arrow.names)
            if not there <= set(schema.names):  # somebody else's column, which a file of ours would not have
                rows -= file.metadata.num_rows
                continue
            pieces.append(shaped(file.read(), pa.schema([one for one in schema if one.name in there])))
            removed[path] = sizes[path]
    if len(pieces) < 2:
        return NOTHING
    everything = pa.concat_tables(pieces, promote_options="default")
    writer = FileWriter(TABLES[_TABLE])
    for batch in everything.sort_by([(name, "ascending") for name in _ORDER]).combine_chunks().to_batches(ROW_GROUP):
        writer.add(batch)
    return Joined([writer.finish(storage, _TABLE)], removed)


def due(sizes: Mapping[str, int]) -> list[str]:
    """Paths of files of about one size, the smallest first, once there are enough of them."""
    least = 0
    for limit, enough in SIZES:
        some = sorted((size, path) for path, size in sizes.items() if least <= size < limit)
        if len(some) >= enough:
            total, found = 0, []
            for size, path in some:
                total += size
                if total > FULL:
                    break
                found.append(path)
            return found
        least = limit
    return []
