"""series, studies and patients, recomputed for what changed in `instances` since they were last written.

What changed comes from the change data feed, so that the roll-ups follow every writer of `instances`, and a killed run
is made good by the next one: each roll-up carries the version of `instances` that it was computed from in the very
commit that wrote it. `patients` goes first, as the patients of before are found through `studies`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import duckdb
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from sphere.catalog.rollup import MARK, roll_up_sql, source_columns
from sphere.catalog.schema import TABLES
from sphere.conf.settings import Settings
from sphere.jobs.tables import Tables, changed, read, reader

MEMORY_LIMIT = "1GB"
"""Memory that a roll-up takes before it goes on in temporary files."""

_KEYS = ("StudyInstanceUID",)


def refresh(tables: Tables, settings: Settings, *, on_step: Callable[[str], None]) -> None:
    """Bring the roll-ups to the present version of `instances`; calls `on_step` before each table's commit.

    Works in MEMORY_LIMIT, and beyond it in the archive's state folder. Raises JobFailed where another process writes.
    """
    if tables.open("instances") is None:
        return
    instances = tables.ensure("instances")  # of an older version, it lacks columns
    rolled = {name: tables.ensure(name) for name in ("patients", "studies", "series")}
    since = min(_seen(table) for table in rolled.values())
    if since >= instances.version():
        return
    touched = _touched(instances, (rolled["studies"], rolled["series"]), since)
    if not len(touched):
        return
    spill = settings.archive.state_dir / "rollup"
    with duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": str(spill)}) as db:
        rows = _roll_up(db, instances, rolled["studies"], touched)
        mark = (MARK, instances.version())
        for name, table in rolled.items():
            on_step(name)
            tables.merge(name, rows[name], gone=_gone(db, name, table), onto=table, mark=mark)


def _seen(table: DeltaTable) -> int:
    """The version of `instances` that a roll-up shows, -1 before the first."""
    mark = table.transaction_version(MARK)
    return -1 if mark is None else mark


def _touched(instances: DeltaTable, rolled: Iterable[DeltaTable], since: int) -> pa.Table:
    """Studies that changed after a version; every study where the change feed no longer reaches so far back."""
    try:
        return changed(instances, _KEYS, since=since)
    except DeltaError:
        pieces = [piece for table in (instances, *rolled) for piece in read(table, _KEYS)]
        return pa.concat_tables(pieces).group_by(_KEYS).aggregate([])


def _roll_up(
    db: duckdb.DuckDBPyConnection, instances: DeltaTable, studies: DeltaTable, touched: pa.Table
) -> dict[str, pa.Table]:
    """The new rows of every roll-up for the touched studies; they stay in `db` under their tables' names."""
    db.execute("SET TimeZone = 'UTC'")
    db.register("touched", touched)
    columns = source_columns("series") | source_columns("studies")
    _load(db, "rows", instances, tuple(columns), "SEMI JOIN touched USING (StudyInstanceUID)")
    _compute(db, "series", "rows")
    _compute(db, "studies", "rows")
    # Patients of touched studies, as they were and as they are, and all the other studies of these patients.
    _load(db, "before", studies, tuple(source_columns("patients") | {"patient_key": None}), "")
    db.execute(
        "CREATE TEMP TABLE affected AS SELECT patient_key FROM before SEMI JOIN touched USING (StudyInstanceUID) "
        "UNION SELECT patient_key FROM studies"
    )
    db.execute(
        "CREATE TEMP VIEW theirs AS SELECT * FROM studies UNION ALL BY NAME "
        "SELECT * FROM before ANTI JOIN touched USING (StudyInstanceUID) SEMI JOIN affected USING (patient_key)"
    )
    _compute(db, "patients", "theirs")
    return {name: db.sql(f"SELECT * FROM {name}").to_arrow_table() for name in ("patients", "studies", "series")}


def _load(db: duckdb.DuckDBPyConnection, name: str, table: DeltaTable, columns: tuple[str, ...], where: str) -> None:
    stream = reader(table, columns)
    db.register("stream", stream)
    db.execute(f"CREATE TEMP TABLE {name} AS SELECT * FROM stream {where}")
    db.unregister("stream")


def _compute(db: duckdb.DuckDBPyConnection, name: str, source: str) -> None:
    """Make the temporary table `name` from the rows of `source`, as the catalog's schema describes it."""
    db.execute(f"CREATE TEMP TABLE {name} AS {roll_up_sql(name, source)}")


def _gone(db: duckdb.DuckDBPyConnection, name: str, table: DeltaTable) -> list[dict[str, Any]]:
    """Keys of rows that are in the table, belong to what was touched, and have nothing left to show."""
    keys = TABLES[name].key
    scope = "affected USING (patient_key)" if name == "patients" else "touched USING (StudyInstanceUID)"
    _load(db, f"{name}_before", table, keys, f"SEMI JOIN {scope}")
    names = ", ".join(f'"{key}"' for key in keys)
    found = db.execute(f"SELECT {names} FROM {name}_before EXCEPT SELECT {names} FROM {name}").fetchall()
    return [dict(zip(keys, row, strict=True)) for row in found]
