"""The `annotations` table, made to follow the event journals: what changed since is merged by key, under the lock."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from sphere.catalog.annotations import Annotations, State, Version
from sphere.conf.settings import Settings
from sphere.jobs.tables import Tables

TABLE = "annotations"


def follow(tables: Tables, settings: Settings) -> int:
    """Merge every version of the annotations that changed since this host did so; returns how many.

    Doing it again changes nothing. Raises JobFailed where another process writes, StorageError.
    """
    annotations = Annotations(settings)
    try:
        if annotations.is_unused():
            return 0
        table = tables.current(TABLE)
        changed, seq = annotations.after(annotations.told(str(table.metadata().id)) if table else 0)
        if changed:
            table = table or tables.ensure(TABLE)
            tables.merge(TABLE, [_row(version, state) for version, state in changed], onto=table)
            annotations.tell(str(table.metadata().id), seq)
        return len(changed)
    finally:
        annotations.close()


def waiting(settings: Settings) -> bool:
    """Whether there is something that this host has not merged."""
    table = Tables(settings).open(TABLE)
    annotations = Annotations(settings)
    try:
        return bool(annotations.after(annotations.told(str(table.metadata().id)) if table else 0)[0])
    finally:
        annotations.close()


def _row(version: Version, state: State) -> dict[str, Any]:
    row = asdict(version)
    del row["action"]
    return {**row, "state": state, "at": datetime.fromisoformat(version.at)}
