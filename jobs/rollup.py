"""series, studies and patients, recomputed for what changed in `instances` since they were last written.

What changed comes from the change data feed, so that the roll-ups follow every writer of `instances`, and a killed run
is made good by the next one: each roll-up carries the version of `instances` that it was computed from in the very
commit that wrote it. Studies that are wholly of the rows which extraction has just added come rolled up by its tasks,
and nothing is read for them. `patients` goes first, as the patients of before are found through `studies`; `studies`
and `series` go together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from sphere.jobs import contradictions
from sphere.jobs.opened import At
from sphere.jobs.rolling import COLUMNS, Rolled, compute, grow, join
from sphere.jobs.tables import Prepared, Tables, changed, read

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
    instances = tables.latest("instances")
    if instances is None:
        return
    rolled = {name: tables.current(name) for name in ("patients", "studies", "series")}
    if min(map(_seen, rolled.values())) >= instances.version():
        return
    touched, new = _touched(tables, instances, rolled, added)
    if not touched and not (new and len(new.studies)):
        for name in rolled:
            tables.ensure(name)  # empty, where everything was rejected: SQL knows it
        return
    news = _roll_up(tables, settings, instances, rolled, touched, new)

    def prepared(name: str) -> Prepared | None:
        gone = _gone(news.had[name], news.rows[name])
        return tables.prepare(name, news.rows[name], gone=gone, onto=rolled[name])

    with ThreadPoolExecutor(1) as beside:
        patients = beside.submit(prepared, "patients")  # most of the work, where they come from everywhere
        on_step("contradictions")
        contradictions.record(
            tables, instances, heard=news.said, studies=news.of_patients, series=news.same_series, before=news.had
        )
        others = {name: prepared(name) for name in ("studies", "series")}
        ready = {"patients": patients.result(), **others}

    def put(name: str) -> None:
        tables.put(ready[name], mark=(MARK, instances.version()))

    on_step("patients")
    put("patients")
    with ThreadPoolExecutor(1) as beside:  # neither needs the other: they are recomputed where one is behind
        on_step("studies")
        studies = beside.submit(put, "studies")
        on_step("series")
        put("series")
        studies.result()


def foresee(tables: Tables, rolled: Sequence[Rolled]) -> None:
    """Begin to read what `refresh` is going to need of the patients of studies that tasks rolled up."""
    tables.foresee("patients", {key for piece in rolled for key in piece.studies["patient_key"].to_pylist()})


def _seen(table: DeltaTable | None) -> int:
    """The version of `instances` that a roll-up shows, -1 before the first."""
    mark = table.transaction_version(MARK) if table else None
    return -1 if mark is None else mark


def _touched(
    tables: Tables, instances: At, rolled: Mapping[str, DeltaTable | None], added: Added | None
) -> tuple[set[str], Rolled | None]:
    """Studies to be rolled up from the table, and the others that changed, rolled up already."""
    if added is None or not added.rolled or not _show(tables, rolled.values(), added.onto):
        return set(_changed_studies(tables, rolled, min(map(_seen, rolled.values())))), None
    new, touched = join(added.rolled)
    uids = new.studies[_STUDY].to_pylist()
    # The studies show every row of the version before: a study that they do not have had none.
    touched |= set(tables.find("studies", (_STUDY,), key=_STUDY, values=uids, at=rolled["studies"])[_STUDY].to_pylist())
    if instances.version() > added.onto + 1:
        touched |= set(_changed_studies(tables, rolled, added.onto + 1))
    kept = {name: _without(getattr(new, name), touched) for name in ("series", "studies", "said")}
    return touched, Rolled(**kept, rows=new.rows)


def _show(tables: Tables, rolled: Iterable[DeltaTable | None], version: int) -> bool:
    """Whether the roll-ups show what `instances` had in a version."""
    seen = set(map(_seen, rolled))
    if seen == {version}:
        return True
    try:  # commits in between that changed no row: the table was made, columns were added
        return len(seen) == 1 and not len(changed(_instances(tables), (_STUDY,), since=min(seen), until=version))
    except DeltaError:
        return False


def _instances(tables: Tables) -> DeltaTable:
    """The table itself, whose log is asked."""
    return tables.ensure("instances")


def _changed_studies(tables: Tables, rolled: Mapping[str, DeltaTable | None], since: int) -> list[str]:
    """Studies that changed after a version; every study where the change feed no longer reaches so far back."""
    instances = _instances(tables)
    try:
        found = changed(instances, (_STUDY,), since=since)
    except DeltaError:
        sources = (instances, rolled["studies"], rolled["series"])
        found = pa.concat_tables([piece for table in sources for piece in read(table, (_STUDY,))])
    uids: list[str] = found[_STUDY].unique().to_pylist()
    return uids


@dataclass(frozen=True, slots=True)
class _News:
    """By table, the rows for the touched and the new studies, and the keys of what these had before.

    `said` is what these studies say, `of_patients` all the studies of their patients (of those who only have more of
    the same, these studies alone), `same_series` their series and the series of other studies that have the same UID.
    """

    rows: Mapping[str, pa.Table]
    had: Mapping[str, pa.Table]
    said: pa.Table
    of_patients: pa.Table
    same_series: pa.Table


def _roll_up(
    tables: Tables,
    settings: Settings,
    instances: At,
    rolled: Mapping[str, DeltaTable | None],
    touched: set[str],
    new: Rolled | None,
) -> _News:
    parts = [new] if new else []
    if touched:
        parts.append(
            _roll_up_again(tables.pieces("instances", COLUMNS, key=_STUDY, values=touched, at=instances), settings)
        )
    series, studies, heard = (
        pa.concat_tables([getattr(part, name) for part in parts]) for name in ("series", "studies", "said")
    )
    before = tables.find("studies", _OF_PATIENTS, key=_STUDY, values=touched, at=rolled["studies"])
    affected = {*before["patient_key"].to_pylist(), *studies["patient_key"].to_pylist()}
    grown = _grown(tables, rolled["patients"], studies, heard, changed=touched, before=before) if new else None
    if grown is not None:
        affected.difference_update(grown["patient_key"].to_pylist())
    theirs = tables.find("studies", _OF_PATIENTS, key="patient_key", values=affected, at=rolled["studies"])
    theirs = pa.concat_tables([studies.select(_OF_PATIENTS), _without(theirs, touched)])
    patients = compute("patients", theirs)
    if grown is not None:
        others = pc.invert(pc.is_in(patients["patient_key"], value_set=grown["patient_key"].combine_chunks()))
        patients = pa.concat_tables([patients.filter(others), grown])
    keys = TABLES["series"].key
    had = tables.find("series", keys, key=_STUDY, values=touched, at=rolled["series"])
    uids = {uid for rows in (series, had) for uid in rows["SeriesInstanceUID"].to_pylist()}
    elsewhere = tables.find("series", keys, key="SeriesInstanceUID", values=uids, at=rolled["series"])
    return _News(
        rows={"patients": patients, "studies": studies, "series": series},
        had={"patients": before.select(["patient_key"]), "studies": before.select([_STUDY]), "series": had},
        said=heard,
        of_patients=theirs,
        same_series=pa.concat_tables([series.select(keys), _without(elsewhere, touched)]),
    )


def _grown(
    tables: Tables,
    patients: DeltaTable | None,
    studies: pa.Table,
    heard: pa.Table,
    *,
    changed: Collection[str],
    before: pa.Table,
) -> pa.Table:
    """Rows of `patients` that follow from their rows of before and from the new ones among `studies`, without a look at
    what else these patients have.

    That is so where all of a patient's studies in hand are new and came after all that it had, and nobody ever said two
    things of it. `changed` are the studies that are not new; `before` is what they were, `heard` what all of them say.
    """
    fresh = _without(studies, changed)
    moved = {*before["patient_key"].to_pylist(), *_only(studies, changed)["patient_key"].to_pylist()}
    keys = set(fresh["patient_key"].to_pylist()) - moved
    had = tables.find_to_merge("patients", keys, at=patients)
    if not len(had):
        return had
    more = compute("patients", _of(fresh, had["patient_key"].to_pylist()).select(_OF_PATIENTS))
    came = had.select(["patient_key", "last_received_at"]).join(
        more.select(["patient_key", "first_received_at"]), keys="patient_key", join_type="inner"
    )
    later = came.filter(pc.less(came["last_received_at"], came["first_received_at"]))["patient_key"].to_pylist()
    doubted = contradictions.doubted(tables, heard, studies, had)
    sure = [key for key in later if key not in doubted]
    return grow("patients", _of(had, sure), _of(more, sure))


def _roll_up_again(pieces: Iterator[pa.Table], settings: Settings) -> Rolled:
    """Rows of `instances` rolled up, of which there may be more than memory holds."""
    schema = pa.schema([TABLES["instances"].schema.field(column) for column in COLUMNS])
    batches = (batch for piece in pieces for batch in piece.to_batches())
    spill = settings.archive.state_dir / "rollup"
    with duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": str(spill)}) as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("stream", pa.RecordBatchReader.from_batches(schema, batches))
        db.execute("CREATE TEMP TABLE source AS SELECT * FROM stream")
        found = {}
        for name in ("series", "studies"):
            wanted = TABLES[name].schema
            found[name] = db.sql(roll_up_sql(name, "source")).to_arrow_table().select(wanted.names).cast(wanted)
        names = ", ".join(f'"{column}"' for column in contradictions.SAID)
        heard = db.sql(f"SELECT DISTINCT {names} FROM source").to_arrow_table()
    return Rolled(**found, rows=schema.empty_table(), said=contradictions.said(heard))


def _without(rows: pa.Table, studies: Collection[str]) -> pa.Table:
    """The rows of other studies."""
    if not studies:
        return rows
    return rows.filter(pc.invert(pc.is_in(rows[_STUDY], pa.array(studies, pa.string()))))


def _only(rows: pa.Table, studies: Collection[str]) -> pa.Table:
    """The rows of these studies."""
    return rows.filter(pc.is_in(rows[_STUDY], pa.array(studies, pa.string())))


def _of(rows: pa.Table, patients: Collection[str]) -> pa.Table:
    """The rows of these patients."""
    return rows.filter(pc.is_in(rows["patient_key"], pa.array(patients, pa.string())))


def _gone(before: pa.Table, now: pa.Table) -> list[dict[str, Any]]:
    """The keys of rows that are no more."""
    keys = before.column_names
    there = set(zip(*(now[key].to_pylist() for key in keys), strict=True))
    rows = set(zip(*(before[key].to_pylist() for key in keys), strict=True))
    return [dict(zip(keys, row, strict=True)) for row in rows - there]
