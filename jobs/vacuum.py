"""Forgetting earlier versions of the tables: their files, and what the log says of these.

As `VACUUM` of Delta, with the log: its entries have the least and the greatest value of columns such as PatientName of
each file. It makes no commit. The earliest version that can still be asked is then the one of `older_than` ago.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from urllib.parse import unquote

import orjson
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from sphere.catalog.schema import TABLES
from sphere.conf.errors import CatalogError, SettingsError, SphereError, StorageMissing
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Entry, Storage
from sphere.jobs import rollup
from sphere.jobs.forward_queue import MARK
from sphere.jobs.tables import Tables

_LOG = "_delta_log"
_VERSION = re.compile(r"(\d{20})\.")


def vacuum(
    tables: Tables, settings: Settings, *, older_than: timedelta, dry_run: bool = False
) -> tuple[int, int, dict[str, str]]:
    """Remove what only versions need that were replaced `older_than` ago or before; the caller holds the lock.

    Returns (files of tables, their bytes, what went wrong by table). What is to be forwarded yet is kept. Raises
    SettingsError, with nothing removed, where ``[[snapshots]]`` would be.
    """
    storage = open_storage(settings.catalog_root, user=settings.storage.user)
    _keep_snapshots(tables, settings, older_than)
    if not dry_run:
        rollup.refresh(tables, settings, on_step=lambda _: None)  # they follow the log of `instances`
    count = size = 0
    failures: dict[str, str] = {}
    for name in TABLES:
        try:
            table = tables.open(name)
            if table is not None:
                going = _of_table(tables, storage, name, table, older_than, dry_run=dry_run)
                count, size = count + len(going), size + sum(entry.size for entry in going)
        except (SphereError, DeltaError, OSError) as error:
            failures[f"table {name}"] = str(error)
    return count, size, failures


def _keep_snapshots(tables: Tables, settings: Settings, older_than: timedelta) -> None:
    table = tables.open("bundles")
    times = {one["version"]: one["timestamp"] / 1000 for one in table.history()} if table else {}
    before = (datetime.now(timezone.utc) - older_than).timestamp()
    for one in settings.snapshots:
        as_of = one.as_of
        if isinstance(as_of, datetime):
            moment = (as_of if as_of.tzinfo else as_of.replace(tzinfo=timezone.utc)).timestamp()
        else:
            moment = times.get(as_of, 0.0)
        if moment < before:
            raise SettingsError(
                f"snapshots: {one.ae_title} answers as of {as_of}, which a vacuum would remove; "
                "take it out of the settings, or vacuum what was replaced longer ago"
            )


def _of_table(
    tables: Tables, storage: Storage, name: str, table: DeltaTable, older_than: timedelta, *, dry_run: bool
) -> list[Entry]:
    """Remove the files of a table that no version from the first one that is kept on has; returns them."""
    before = datetime.now(timezone.utc) - older_than
    first = _first_kept(tables, name, table, before)
    if first is None:
        return []
    entries = list(storage.walk(name))
    needed = _needed(tables, storage, name, first, table.version())
    data = {entry.path: entry for entry in entries if entry.path.endswith(".parquet") and f"/{_LOG}/" not in entry.path}
    if not _files(table, name) <= data.keys():
        raise CatalogError(f"table {name}: its log names files that are not below it; nothing of it was removed")
    going = [entry for path, entry in data.items() if path not in needed and entry.mtime <= before.timestamp()]
    if dry_run:
        return going
    _checkpoint(tables, storage, name, first)
    for entry in entries:
        found = _VERSION.match(entry.path.removeprefix(f"{name}/{_LOG}/"))
        if found and int(found[1]) < first:
            storage.delete(entry.path)
    for entry in going:
        storage.delete(entry.path)
    return going


def _first_kept(tables: Tables, name: str, table: DeltaTable, before: datetime) -> int | None:
    """The version that was the newest at `before`; None where the log does not reach back that far."""
    limit = int(before.timestamp() * 1000)
    first = max((one["version"] for one in table.history() if one["timestamp"] <= limit), default=None)
    forwards = tables.open("forwards") if name == "instances" else None
    mark = forwards.transaction_version(MARK) if forwards else None
    if first is not None and mark is not None:
        first = min(first, mark - 1)  # what came after it is still to be taken up
    return first if first is not None and first >= 0 else None


def _needed(tables: Tables, storage: Storage, name: str, first: int, last: int) -> set[str]:
    """Paths of the files of every version from `first` to `last`."""
    found = _files(DeltaTable(tables.url(name), version=first), name)
    for version in range(first + 1, last + 1):
        found |= {f"{name}/{unquote(path)}" for path in _added(storage.read(f"{name}/{_LOG}/{version:020}.json"))}
    return found


def _files(table: DeltaTable, name: str) -> set[str]:
    return {f"{name}/{unquote(path)}" for path in table.get_add_actions().column("path").to_pylist()}


def _added(commit: bytes) -> Iterator[str]:
    for line in commit.splitlines():
        action = orjson.loads(line)
        for kind in ("add", "cdc"):
            if kind in action:
                yield action[kind]["path"]


def _checkpoint(tables: Tables, storage: Storage, name: str, version: int) -> None:
    """Have a checkpoint of the version, so that nothing before it is needed to read it, and none pointed at that goes.

    What points at the checkpoint that is to be read first is written with each one, be it older than the one before.
    """
    path = f"{name}/{_LOG}/{version:020}.checkpoint.parquet"
    pointed = _pointed(storage, name)
    if not storage.exists(path) or pointed < version:
        DeltaTable(tables.url(name), version=version).create_checkpoint()
        if pointed > version:
            DeltaTable(tables.url(name)).create_checkpoint()
    if not storage.exists(path) or _pointed(storage, name) < version:
        raise CatalogError(f"table {name}: there is no checkpoint of version {version}; nothing of it was removed")


def _pointed(storage: Storage, name: str) -> int:
    """The version of the checkpoint that `_last_checkpoint` names, -1 where there is none."""
    try:
        return int(orjson.loads(storage.read(f"{name}/{_LOG}/_last_checkpoint"))["version"])
    except StorageMissing:
        return -1
