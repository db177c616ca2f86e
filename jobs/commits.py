"""Commits to the log of a Delta table: actions, written as the file of the next version, as a whole or not at all.

delta-rs takes 2 to 7 ms of CPU for each, most of it to read back what it wrote. What is said here is the least of the
protocol: files come and go, and which version of another table they show. Whatever asks for more of its writers, and
every commit that is due to be followed by a checkpoint, is left to delta-rs.
"""

from __future__ import annotations

import functools
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson
from deltalake import Schema

from sphere.catalog.schema import TABLES
from sphere.conf.errors import StorageError
from sphere.ingest.storage.base import Storage
from sphere.jobs.joining import NOTHING, Joined
from sphere.jobs.opened import At
from sphere.jobs.parquet import NewFile

CHECKPOINTS: Final = 100
"""Commits from one checkpoint to the next (delta.checkpointInterval, of which this is the default of delta-rs)."""
_READER, _WRITER = 1, 4  # versions of the protocol; the change data feed asks for this writer
_PLAIN = re.compile(r"[\w.\-/=]+", re.ASCII)  # paths that stand in the log as they are
_Action = dict[str, Any]


class Overtaken(Exception):
    """There is a commit of that version already."""


def is_plain(table: At, removed: Iterable[str]) -> bool:
    """Whether what is written here may be the commit after this version of a table."""
    protocol = table.protocol()
    due = (table.version() + 2) % CHECKPOINTS == 0 or "delta.checkpointInterval" in table.metadata().configuration
    known = protocol.min_reader_version <= _READER and protocol.min_writer_version <= _WRITER
    return known and not due and all(_PLAIN.fullmatch(path) for path in removed)


def commit(
    storage: Storage,
    name: str,
    version: int,
    added: Sequence[NewFile],
    removed: Mapping[str, int],
    *,
    joined: Joined = NOTHING,
    mark: tuple[str, int] | None = None,
    properties: Mapping[str, str | None] | None = None,
) -> bytes:
    """Make files part of the table `name`, and those at the paths `removed`, with their sizes, no longer; returns what
    the commit says.

    Of those that are `joined` rows only moved. `mark` is an application's name and version. Version 0 makes the table,
    with `properties`. Raises Overtaken where there is a commit of this version, StorageError.
    """
    now = int(time.time() * 1000)
    actions = [_info(now, version), *(_made(name, now, properties or {}) if not version else ())]
    for files, gone, change in ((added, removed, True), (joined.files, joined.removed, False)):
        actions += [_add(file, change) for file in files]
        actions += [_remove(path, size, now, change) for path, size in gone.items()]
    if mark:
        actions.append({"txn": {"appId": mark[0], "version": mark[1]}})
    said = b"".join(orjson.dumps(one) + b"\n" for one in actions)
    _publish(storage, f"{name}/_delta_log", version, said)
    return said


def _publish(storage: Storage, folder: str, version: int, data: bytes) -> None:
    path, written = f"{folder}/{version:020}.json", f"{folder}/_commit_{uuid.uuid4()}.json.tmp"
    storage.write(written, data)
    try:
        storage.rename(written, path)
    except StorageError:
        there = storage.exists(path)
        if there and storage.read(path) == data:  # its answer was lost, and it was asked again
            return
        storage.delete(written)
        if there:
            raise Overtaken from None
        raise


def _info(now: int, version: int) -> _Action:
    what = (
        ("WRITE", {"mode": "Append", "partitionBy": "[]"}) if version else ("CREATE TABLE", {"mode": "ErrorIfExists"})
    )
    info = {"timestamp": now, "operation": what[0], "operationParameters": what[1], "engineInfo": "sphere"}
    return {"commitInfo": info | {"txnId": str(uuid.uuid4())}}


def _made(name: str, now: int, properties: Mapping[str, str | None]) -> list[_Action]:
    needed = _WRITER if properties.get("delta.enableChangeDataFeed") == "true" else 2
    described: _Action = {
        "id": str(uuid.uuid4()),
        "name": None,
        "description": None,
        "format": {"provider": "parquet", "options": {}},
        "schemaString": _schema_string(name),
        "partitionColumns": [],
        "createdTime": now,
        "configuration": properties,
    }
    return [{"protocol": {"minReaderVersion": _READER, "minWriterVersion": needed}}, {"metaData": described}]


@functools.cache
def delta_schema(name: str) -> Schema:
    """A table's columns as delta-rs has them."""
    return Schema.from_arrow(TABLES[name].schema)


@functools.cache
def _schema_string(name: str) -> str:
    found: str = delta_schema(name).to_json()
    return found


def _add(file: NewFile, change: bool) -> _Action:
    return {
        "add": {
            "path": file.path,
            "partitionValues": {},
            "size": file.size,
            "modificationTime": file.modified_ms,
            "dataChange": change,
            "stats": file.stats,
        }
    }


def _remove(path: str, size: int, now: int, change: bool) -> _Action:
    return {
        "remove": {
            "path": path,
            "deletionTimestamp": now,
            "dataChange": change,
            "extendedFileMetadata": True,
            "partitionValues": {},
            "size": size,
        }
    }
