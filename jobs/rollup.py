"""series, studies and patients, recomputed for what changed in `instances` since they were last written.

What changed comes from the change data feed, so that the roll-ups follow every writer of `instances`, and a killed run
is made good by the next one: each roll-up carries the version of `instances` that it was computed from in the very
commit that wrote it. Studies that are wholly of the rows which extraction has just added come rolled up by its tasks,
and nothing is read for them. `patients` goes first, as the patients of before are found through `studies`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from sphere.catalog.rollup import MARK, roll_up_sql, source_columns
from sphere.catalog.schema import TABLES
from sphere.conf.settings import Settings
from sphere.jobs.rolling import COLUMNS, Rolled, compute, join
from sphere.jobs.tables import Tables, changed, read

MEMORY_LIMIT = "1GB"
"""Memory that a roll-up takes before it goes on in temporary files."""

_STUDY = "StudyInstanceUID"
_OF_PATIENTS = tuple(source_columns("patients") | {"patient_key": None})


@dataclass(frozen=True, slots=True)
class Added:
    """Rows that were added to `instances` by the commit after the version `onto`, all of them, as tasks rolled them
    up."""

    onto: int
    rolled: Sequence[Rolled]


def refresh(tables: Tables, settings: Settings, *, on_step: Callable[[str], None], added: Added | None = None) -> None:
    """Bring the roll-ups to the present version of `instances`; calls `on_step` before each table's commit.

    Works in MEMORY_LIMIT, and beyond it in the archive's state folder. Raises JobFailed where another process writes.
    """
    instances = tables.current("instances")
    if instances is None:
        return
    rolled = {name: tables.ensure(name) for name in ("patients", "studies", "series")}
    if min(map(_seen, rolled.values())) >= instances.version():
        return
    touched, new = _touched(tables, instances, rolled, added)
    if not touched and not (new and len(new.studies)):
        return
    rows, gone = _roll_up(tables, settings, instances, rolled, touched, new)
    mark = (MARK, instances.version())
    for name, table in rolled.items():
        on_step(name)
        tables.merge(name, rows[name], gone=gone[name], onto=table, mark=mark)


def _seen(table: DeltaTable) -> int:
    """The version of `instances` that a roll-up shows, -1 before the first."""
    mark = table.transaction_version(MARK)
    return -1 if mark is None else mark


def _touched(
    tables: Tables, instances: DeltaTable, rolled: Mapping[str, DeltaTable], added: Added | None
) -> tuple[set[str], Rolled | None]:
    """Studies to be rolled up from the table, and the others that changed, rolled up already."""
    if added is None or not added.rolled or not _show(instances, rolled.values(), added.onto):
        return set(_changed_studies(instances, rolled, min(map(_seen, rolled.values())))), None
    new, touched = join(added.rolled)
    uids = new.studies[_STUDY].to_pylist()
    # The studies show every row of the version before: a study that they do not have had none.
    touched |= set(tables.find("studies", (_STUDY,), key=_STUDY, values=uids, at=rolled["studies"])[_STUDY].to_pylist())
    if instances.version() > added.onto + 1:
        touched |= set(_changed_studies(instances, rolled, added.onto + 1))
    return touched, Rolled(_without(new.series, touched), _without(new.studies, touched), new.rows)


def _show(instances: DeltaTable, rolled: Iterable[DeltaTable], version: int) -> bool:
    """Whether the roll-ups show what `instances` had in a version."""
    seen = set(map(_seen, rolled))
    if seen == {version}:
        return True
    try:  # commits in between that changed no row: the table was made, columns were added
        return len(seen) == 1 and not len(changed(instances, (_STUDY,), since=min(seen), until=version))
    except DeltaError:
        return False


def _changed_studies(instances: DeltaTable, rolled: Mapping[str, DeltaTable], since: int) -> list[str]:
    """Studies that changed after a version; every study where the change feed no longer reaches so far back."""
    try:
        found = changed(instances, (_STUDY,), since=since)
    except DeltaError:
        sources = (instances, rolled["studies"], rolled["series"])
        found = pa.concat_tables([piece for table in sources for piece in read(table, (_STUDY,))])
    uids: list[str] = found[_STUDY].unique().to_pylist()
    return uids


def _roll_up(
    tables: Tables,
    settings: Settings,
    instances: DeltaTable,
    rolled: Mapping[str, DeltaTable],
    touched: set[str],
    new: Rolled | None,
) -> tuple[dict[str, pa.Table], dict[str, list[dict[str, Any]]]]:
    """By table, the new rows for the touched and the new studies, and the keys of those that have nothing left."""
    series, studies = ([getattr(new, name)] if new else [] for name in ("series", "studies"))
    if touched:
        source = tables.pieces("instances", COLUMNS, key=_STUDY, values=touched, at=instances)
        for pieces, rows in zip((series, studies), _roll_up_again(source, settings), strict=True):
            pieces.append(rows)
    found = {"studies": pa.concat_tables(studies), "series": pa.concat_tables(series)}
    # Patients of touched studies, as they were and as they are, and all the other studies of these patients.
    before = tables.find("studies", _OF_PATIENTS, key=_STUDY, values=touched, at=rolled["studies"])
    affected = {*before["patient_key"].to_pylist(), *found["studies"]["patient_key"].to_pylist()}
    theirs = tables.find("studies", _OF_PATIENTS, key="patient_key", values=affected, at=rolled["studies"])
    theirs = pa.concat_tables([found["studies"].select(_OF_PATIENTS), _without(theirs, touched)])
    found["patients"] = compute("patients", theirs)
    had = {
        "patients": before.select(["patient_key"]),
        "studies": before.select([_STUDY]),
        "series": tables.find("series", TABLES["series"].key, key=_STUDY, values=touched, at=rolled["series"]),
    }
    return found, {name: _gone(had[name], found[name]) for name in found}


def _roll_up_again(pieces: Iterator[pa.Table], settings: Settings) -> Iterator[pa.Table]:
    """Rows of `series` and of `studies` from those of `instances`, of which there may be more than memory holds."""
    schema = pa.schema([TABLES["instances"].schema.field(column) for column in COLUMNS])
    batches = (batch for piece in pieces for batch in piece.to_batches())
    spill = settings.archive.state_dir / "rollup"
    with duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": str(spill)}) as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("stream", pa.RecordBatchReader.from_batches(schema, batches))
        db.execute("CREATE TEMP TABLE source AS SELECT * FROM stream")
        for name in ("series", "studies"):
            wanted = TABLES[name].schema
            yield db.sql(roll_up_sql(name, "source")).to_arrow_table().select(wanted.names).cast(wanted)


def _without(rows: pa.Table, studies: Collection[str]) -> pa.Table:
    """The rows of other studies."""
    return rows.filter(pc.invert(pc.is_in(rows[_STUDY], pa.array(studies, pa.string()))))


def _gone(before: pa.Table, now: pa.Table) -> list[dict[str, Any]]:
    """The keys of rows that are no more."""
    keys = before.column_names
    there = set(zip(*(now[key].to_pylist() for key in keys), strict=True))
    rows = set(zip(*(before[key].to_pylist() for key in keys), strict=True))
    return [dict(zip(keys, row, strict=True)) for row in rows - there]
