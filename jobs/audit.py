"""The audit journal into table `audit`: every record once, none ever changed. Needs no Spark.

How far a file is loaded, the table itself says (`position`), and a commit is for the version that was read or not at
all; a small file beside the archive's state spares the look where nothing came.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import DeltaError

from sphere.catalog.audit import FOLDER, told
from sphere.catalog.lock import CatalogLock
from sphere.catalog.schema import TABLES
from sphere.conf.errors import JobFailed
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.ingest.header import dataset_json
from sphere.ingest.storage import Storage, open_storage
from sphere.jobs.parquet import ROW_GROUP, FileWriter
from sphere.jobs.tables import Tables

log = logging.getLogger(__name__)

AT_ONCE: Final = 64 << 20  # bytes of journals of one commit
JOINED: Final = 64  # files of the table, from which on small ones are joined
_TEXTS: Final = ("who", "role", "address", "method", "path", "query", "outcome")
_NUMBERS: Final = ("status", "entities", "failed", "bytes")


def run(settings: Settings) -> int:
    """Load what was recorded since; returns how many records. Raises LockHeld, JobFailed, StorageError."""
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    _bring_home(storage, settings.archive.state_dir / "audit.jsonl")
    tables, loaded = Tables(settings), 0
    while True:
        table = tables.open("audit")
        known = _Known(settings.archive.state_dir / "audit-loaded.json", str(table.metadata().id) if table else "")
        grown = _grown(storage, known)
        if not grown:
            return loaded
        with CatalogLock(settings, job="audit"):
            try:
                loaded += _load(tables, settings, storage, grown, known)
            except DeltaError as error:
                raise JobFailed(f"table audit cannot be read or written: {error}") from error


class _Known:
    """How far files were loaded into a table when we looked last: a cache, to be deleted at will."""

    def __init__(self, path: Path, table_id: str) -> None:
        self._path = path
        self.sizes: dict[str, int] = {}
        try:
            held = orjson.loads(path.read_bytes())
            self.sizes = held["sizes"] if held["table"] == table_id else {}
        except (OSError, ValueError, KeyError, TypeError):
            return

    def learn(self, table_id: str, sizes: dict[str, int]) -> None:
        """Write down how far files are loaded."""
        make_private(self._path.parent)
        new = self._path.with_suffix(".new")
        new.write_bytes(orjson.dumps({"table": table_id, "sizes": self.sizes | sizes}))
        new.replace(self._path)


def _bring_home(storage: Storage, fallback: Path) -> None:
    """Put the records that the storage refused once beside the others; the name makes it safe to be done twice.

    They are set aside first and brought at the next run: a writer may be in the middle of a line.
    """
    aside = fallback.with_name("audit-late.jsonl")
    if aside.exists():
        data = aside.read_bytes()
        storage.write(f"{FOLDER}/late/{hashlib.sha256(data).hexdigest()[:32]}.jsonl", data)
        aside.unlink()
    if fallback.exists():
        fallback.rename(aside)


def _grown(storage: Storage, known: _Known) -> dict[str, int]:
    """Files with more in them than is known to be loaded, and their sizes; together about AT_ONCE bytes."""
    found: dict[str, int] = {}
    size = 0
    for entry in storage.walk(FOLDER):
        left = entry.size - known.sizes.get(entry.path, 0)
        if left > 0 and size < AT_ONCE:
            found[entry.path] = entry.size
            size += left
    return found


def _load(tables: Tables, settings: Settings, storage: Storage, grown: dict[str, int], known: _Known) -> int:
    table = tables.ensure("audit")
    positions = _positions(table, list(grown))
    starts = {path: positions.get(path, 0) for path in grown}
    rows: list[dict[str, Any]] = []
    for path, size in grown.items():
        start = starts[path]
        for end, line in _lines(storage.read(path, start, min(size - start, AT_ONCE))):
            rows.append(_row(path, start + end, line))
            positions[path] = start + end
    if rows:
        writer = FileWriter(TABLES["audit"])
        data = pa.Table.from_pylist(rows, schema=TABLES["audit"].schema)
        for batch in data.combine_chunks().to_batches(max_chunksize=ROW_GROUP):
            writer.add(batch)
        catalog = open_storage(settings.catalog_root, user=settings.storage.user)
        tables.append("audit", [writer.finish(catalog, "audit")], onto=table)
        _join(tables)
    # a last line that is not whole is looked at again when its file grows
    reached = {
        path: size if size - starts[path] <= AT_ONCE else positions.get(path, size) for path, size in grown.items()
    }
    known.learn(str(table.metadata().id), reached)
    return len(rows)


def _positions(table: DeltaTable, paths: list[str]) -> dict[str, int]:
    """How far the table has each file."""
    listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    sql = f"SELECT file, max(position) AS position FROM rows WHERE file IN ({listed}) GROUP BY file"
    found = pa.table(QueryBuilder().register("rows", table).execute(sql))
    return {row["file"]: row["position"] for row in found.to_pylist()}


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(where it ends, line) of each whole line."""
    stream = io.BytesIO(data)
    for line in stream:
        if line.endswith(b"\n"):
            yield stream.tell(), line


def _row(path: str, position: int, line: bytes) -> dict[str, Any]:
    """One record; what cannot be read is one too."""
    try:
        record = orjson.loads(line)
        row: dict[str, Any] = {name: str(record.get(name, "")) for name in _TEXTS}
        row |= {name: int(record[name]) if name in record else None for name in _NUMBERS}
        row |= {"at": datetime.fromisoformat(record["at"]), "seconds": float(record.get("seconds", 0))}
        if "identifier" in record:
            row["query"] = _plain(record["identifier"], str(record.get("transfer_syntax", "")))
    except (ValueError, TypeError, KeyError, AttributeError):
        row = {"outcome": "unreadable", "query": told(line.decode("utf-8", "replace"))}
    return {"file": path, "position": position, **row}


def _plain(identifier: str, syntax: str) -> str:
    """A DICOM identifier, in hexadecimal, as DICOM JSON; as it is where that would not tell all of it."""
    try:
        return dataset_json(bytes.fromhex(identifier), syntax) or identifier
    except Exception:  # noqa: BLE001  whatever a peer sent, its request is recorded
        return identifier


def _join(tables: Tables) -> None:
    """Have few files: rows move, and stay what they are."""
    table = tables.ensure("audit")
    if len(table.file_uris()) >= JOINED:
        table.optimize.compact()
