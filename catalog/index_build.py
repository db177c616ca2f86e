"""Making an index: from nothing, or what has changed since another one was made.

A *base* holds the rows of `patients`, `studies` and `series`, sorted by key and with the keys that peers ask for
indexed, and which file of `instances` holds which study and instance. A *refresh* is a small file of its own beside a
base: the files that came to `instances` or left it since, and the studies in them rolled up anew, as an overlay (see
sphere.catalog.overlay). It costs what changed, not what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import duckdb

from sphere.catalog import overlay
from sphere.catalog.arrow import empty
from sphere.catalog.grant import Grant
from sphere.catalog.index_files import FileMap
from sphere.catalog.index_note import Note, Snapshots
from sphere.catalog.match import TRAILING_ONLY_VRS, normal_name_sql
from sphere.catalog.reading import instances_sql
from sphere.catalog.rollup import optional_columns, roll_up_sql, source_columns
from sphere.catalog.rows import RowStore
from sphere.catalog.schema import BY_KEYWORD, TABLES
from sphere.catalog.tables import Snapshot

INDEXED = ("bundles", "patients", "studies", "series")
KEYS: Mapping[str, tuple[str, ...]] = {
    "patients": ("patient_key", "PatientID"),
    "studies": ("StudyInstanceUID", "PatientID", "AccessionNumber", "patient_key"),
    "series": ("StudyInstanceUID",),
    "study_files": ("StudyInstanceUID",),
}
"""Columns with an index of their own, as the order of rows does not help: DuckDB's zone maps compare the first eight
characters of a text, which UIDs have in common."""

NAME_SUFFIX = "$name"
"""Column `PatientName$name` holds the normalised form of `PatientName`."""
SHARE, LEAST = 0.03, 1000
"""A refresh covers at most this share of a base's studies (or so many): then a new base is made."""
REHEARSED = 300
"""Studies whose patients a rehearsal takes over: enough to touch most of the blocks that those of a batch are in."""

FILES_AT_ONCE = 200
"""Files of `instances` whose rows are in memory together while a base is built."""
_ALONE = ("series",)
_TOGETHER = ("study_files", "studies", "patients", "bundles")
"""Parts of a base, in the order in which they are begun; what takes most memory is by itself, as what does not fit into
it goes over the disk."""


class RebuildNeeded(Exception):
    """A refresh does not pay, or cannot be told from what the index before says."""


def build_base(db: duckdb.DuckDBPyConnection, snapshots: Snapshots, *, grant: Grant | None = None) -> None:
    """Fill an empty database from the tables; with a `grant`, which `db` has attached, roll up what is granted.

    The map of files and the tables are made at once: a table of one file keeps one core busy only. Raises duckdb.Error.
    """
    _create_map(db)
    if grant is not None:
        _roll_up_granted(db, snapshots["instances"], grant)
    for name in _ALONE:
        _base_part(db, name, snapshots, grant)
    with ThreadPoolExecutor(2, thread_name_prefix="index-base") as pool:
        for part in [pool.submit(_base_part, db, name, snapshots, grant) for name in _TOGETHER]:
            part.result()
    Note.of(snapshots, settled=grant is not None or _is_settled(snapshots), base="").write(db)


def _base_part(db: duckdb.DuckDBPyConnection, name: str, snapshots: Snapshots, grant: Grant | None) -> None:
    """One table of a base, where it is not rolled up already, with its indexes."""
    with db.cursor() as cursor:
        if name == "study_files":
            instances = snapshots["instances"]
            _add_files(cursor, list(enumerate(instances.files if instances else ())))
        elif grant is None or name == "bundles":
            _copy_table(cursor, name, snapshots[name])
        for number, column in enumerate(KEYS.get(name, ())):
            cursor.execute(f'CREATE INDEX {name}_{number} ON {name} ("{column}")')


def build_refresh(
    db: duckdb.DuckDBPyConnection,
    snapshots: Snapshots,
    *,
    since: str | None,
    base: str,
    rows: RowStore | None = None,
    grant: Grant | None = None,
) -> None:
    """Fill an empty database with what makes the attached `base` one of `snapshots`, going on from the refresh that is
    attached as `since`, if any, in one transaction. `base` is written down as its file's name, `rows` are its rows.

    Raises RebuildNeeded and duckdb.Error.
    """
    db.begin()
    sources = ("base", since) if since else ("base",)
    before = FileMap.read(db, sources)
    instances = snapshots["instances"]
    now = set(instances.files) if instances else set()
    known = set(before.names.values())
    gone = [number for number, file in before.names.items() if file not in now]
    free = 1 + max(
        (row[0] or 0 for source in sources for row in db.execute(f"SELECT max(id) FROM {source}.files").fetchall()),
        default=0,
    )
    added = list(enumerate(sorted(now - known), free))
    _check(db, sources[-1], snapshots, moved=bool(gone or added))
    _create_map(db)
    overlay.create(db, "base")
    touched = overlay.Touched()
    if since:
        touched = overlay.copy(db, f"{since}.{overlay.SCHEMA}")
        for name in ("files", "gone_files", "study_files", "sop_files"):
            db.execute(f"INSERT INTO {name} SELECT * FROM {since}.{name}")
    _add_files(db, added)
    affected = _studies_since(db, added) | _studies_in(db, sources, gone)
    _remove_files(db, gone)
    if grant is not None:
        affected &= _granted_studies(db, [name for _, name in added], grant)
    (studies,) = db.execute("SELECT count(*) FROM base.studies").fetchall()[0]
    if len(affected | touched.studies) > max(LEAST, SHARE * studies):
        raise RebuildNeeded(f"{len(affected)} of {studies} studies changed")
    if affected:
        files = FileMap.read(db, ("base", "main"))
        _replace(db, files, touched, sorted(affected), instances, rows, grant)
    _copy_table(db, "bundles", snapshots["bundles"], in_transaction=True)
    Note.of(snapshots, settled=True, base=base).write(db)
    db.commit()


def rehearse(db: duckdb.DuckDBPyConnection, instances: Snapshot | None, rows: RowStore | None) -> None:
    """Do in an empty database what a refresh does: with one study of the attached `base` as if it had changed, and with
    patients from all over it, whose rows are taken over. What the first refresh would load is loaded then.

    Raises duckdb.Error.
    """
    some = [row[0] for row in db.execute("SELECT StudyInstanceUID FROM base.studies LIMIT 1").fetchall()]
    if some:
        _create_map(db)
        overlay.create(db, "base")
        _replace(db, FileMap.read(db, ("base",)), overlay.Touched(), some, instances, rows, None)
        (studies,) = db.execute("SELECT count(*) FROM base.studies").fetchall()[0]
        spread = "SELECT DISTINCT patient_key FROM base.studies WHERE rowid % ? = 0"
        found = db.execute(spread, [studies // REHEARSED + 1]).fetchall()
        overlay.adopt(db, sorted(row[0] for row in found), rows)


def _replace(
    db: duckdb.DuckDBPyConnection,
    files: FileMap,
    touched: overlay.Touched,
    affected: list[str],
    instances: Snapshot | None,
    rows: RowStore | None,
    grant: Grant | None,
) -> None:
    """Roll the studies up from the files that hold them now, as extraction does, or what is granted of them.

    Of the columns that could be null, those that no file has are left out: most of them, and half of the time.
    """
    columns = source_columns("series") | source_columns("studies")
    optional = optional_columns("series", "studies")
    condition, values = overlay.among("StudyInstanceUID", affected)
    holding = files.of_studies(db, affected, rows)
    if holding and instances is not None:
        there = _columns_of(db, holding)
        columns = {name: None for name in columns if name in there or name not in optional}
        source, bound = instances_sql(columns, grant), [holding]
    else:
        db.register("no_rows", empty(TABLES["instances"].schema))
        source, bound = "no_rows", []
    listed = ", ".join(f'"{name}"' for name in columns)
    db.execute("SET TimeZone = 'UTC'")
    db.execute(f"CREATE TEMP TABLE changed_rows AS SELECT {listed} FROM {source} WHERE {condition}", [*bound, *values])
    absent = optional.difference(columns)
    series = db.sql(roll_up_sql("series", "changed_rows", absent=absent)).to_arrow_table()
    studies = db.sql(roll_up_sql("studies", "changed_rows", absent=absent)).to_arrow_table()
    overlay.replace(db, touched, affected, series=series, studies=studies, selected=selected, rows=rows)


def _granted_studies(db: duckdb.DuckDBPyConnection, added: Sequence[str], grant: Grant) -> set[str]:
    """The studies of which something was granted, or is in the files `added`."""
    known = "SELECT StudyInstanceUID FROM base.studies UNION SELECT StudyInstanceUID FROM {}.studies"
    studies = {row[0] for row in db.execute(known.format(overlay.SCHEMA)).fetchall()}
    if added:
        sql = f"SELECT DISTINCT StudyInstanceUID FROM {instances_sql((), grant)}"
        studies |= {row[0] for row in db.execute(sql, [list(added)]).fetchall()}
    return studies


def _roll_up_granted(db: duckdb.DuckDBPyConnection, instances: Snapshot | None, grant: Grant) -> None:
    """Make the roll-ups of the granted instances, as extraction makes those of all; columns that no file has are left
    out, as by `_replace`."""
    files = instances.files if instances else ()
    pieces = [list(files[start : start + FILES_AT_ONCE]) for start in range(0, len(files), FILES_AT_ONCE)]
    there = {name for some in pieces for name in _columns_of(db, some)}
    optional = optional_columns("series", "studies")
    columns = [
        name for name in source_columns("series") | source_columns("studies") if name in there or name not in optional
    ]
    absent = optional.difference(columns)
    db.register("no_rows", empty(TABLES["instances"].schema))
    listed = ", ".join(f'"{name}"' for name in columns)
    db.execute("SET TimeZone = 'UTC'")
    db.execute(f"CREATE TEMP TABLE granted_rows AS SELECT {listed} FROM no_rows")
    db.unregister("no_rows")
    for some in pieces:
        db.execute(f"INSERT INTO granted_rows SELECT {listed} FROM {instances_sql(columns, grant)}", [some])
    for name, source in (("series", "granted_rows"), ("studies", "granted_rows"), ("patients", "studies_rolled")):
        rolled = roll_up_sql(name, source, absent=absent & optional_columns(name))
        db.execute(f"CREATE TEMP TABLE {name}_rolled AS {rolled}")
        kept = ", ".join(selected(column) for column in TABLES[name].schema.names)
        order = ", ".join(f'"{key}"' for key in TABLES[name].key)
        db.execute(f"CREATE TABLE {name} AS SELECT {kept} FROM {name}_rolled ORDER BY {order}")
    for name in ("granted_rows", "series_rolled", "studies_rolled", "patients_rolled"):
        db.execute(f"DROP TABLE {name}")


def _columns_of(db: duckdb.DuckDBPyConnection, files: Sequence[str]) -> set[str]:
    """What some Parquet files have, be it one of them."""
    found = db.execute("SELECT DISTINCT name FROM parquet_schema(?)", [list(files)]).fetchall()
    return {row[0] for row in found}


def _copy_table(
    db: duckdb.DuckDBPyConnection, name: str, snapshot: Snapshot | None, *, in_transaction: bool = False
) -> None:
    """The rows of a roll-up or of `bundles`, sorted by key; columns that say nothing come last.

    DuckDB carries every column through a sort, those without a value too, and writes many of them with one thread only:
    added afterwards, they cost a twentieth.
    """
    table = TABLES[name]
    db.register("empty", empty(table.schema))
    if snapshot is None or not snapshot.files:
        source, values = "empty", []
        filled = list(table.schema.names)
    else:
        source, values = "read_parquet(?, union_by_name = true)", [list(snapshot.files)]
        said = _with_values(db, snapshot.files) | set(table.key)
        filled = [column for column in table.schema.names if column in snapshot.columns and column in said]
    listed = ", ".join(map(selected, filled))
    order = ", ".join(f'"{key}"' for key in table.key)
    db.execute(f"CREATE TABLE {name} AS SELECT {listed} FROM {source} ORDER BY {order}", values)
    others = [column for column in table.schema.names if column not in filled]
    if others and not in_transaction:
        db.begin()  # else each column is a commit, and waits for the disk
    for column, kind in (kept for one in others for kept in _kinds(db, name)[one]):
        db.execute(f'ALTER TABLE {name} ADD COLUMN "{column}" {kind}')
    if others and not in_transaction:
        db.commit()
    db.unregister("empty")


_KINDS: dict[str, dict[str, list[tuple[str, str]]]] = {}


def _kinds(db: duckdb.DuckDBPyConnection, name: str) -> dict[str, list[tuple[str, str]]]:
    """The columns of an index, with their types, that each column of a table becomes. Planned once: it takes some
    milliseconds."""
    if name not in _KINDS:
        names = TABLES[name].schema.names
        listed = ", ".join(map(selected, names))
        found: dict[str, list[tuple[str, str]]] = {}
        for column, kind, *_ in db.execute(f"DESCRIBE SELECT {listed} FROM empty").fetchall():
            found.setdefault(column.removesuffix(NAME_SUFFIX), []).append((column, kind))
        _KINDS[name] = found
    return _KINDS[name]


def _with_values(db: duckdb.DuckDBPyConnection, files: Sequence[str]) -> set[str]:
    """The columns of Parquet files that have a value somewhere, or may have: of a list that is empty, as of one that is
    null, statistics say that it has none."""
    sql = (
        "SELECT DISTINCT split_part(path_in_schema, ',', 1) FROM parquet_metadata(?) "
        "WHERE stats_null_count IS NULL OR stats_null_count < num_values OR contains(path_in_schema, ',')"
    )
    return {row[0] for row in db.execute(sql, [list(files)]).fetchall()}


def selected(name: str) -> str:
    """A column for the index: text without insignificant spaces, empty text as null, names normalised beside."""
    column = BY_KEYWORD.get(name)
    if column is None or str(column.arrow) not in ("string", "list<item: string>") or column.vr == "UI":
        return f'"{name}"'
    trimmed = trimmed_sql(f'"{name}"', column.vr, multiple=column.multiple)
    if column.vr != "PN" or column.multiple:
        return f'{trimmed} AS "{name}"'
    return f'{trimmed} AS "{name}", {normal_name_sql(trimmed)} AS "{name}{NAME_SUFFIX}"'


def trimmed_sql(x: str, vr: str, *, multiple: bool) -> str:
    """Text (or a list of it) in column form: without insignificant spaces, null where nothing is left."""
    trim = "rtrim" if vr in TRAILING_ONLY_VRS else "trim"
    if multiple:
        return f"list_transform({x}, lambda v: {trim}(v))"
    return f"nullif({trim}({x}), '')"


def _create_map(db: duckdb.DuckDBPyConnection) -> None:
    db.execute("CREATE TABLE files (id INTEGER, file VARCHAR)")
    db.execute("CREATE TABLE gone_files (id INTEGER)")
    db.execute("CREATE TABLE study_files (StudyInstanceUID VARCHAR, id INTEGER)")
    db.execute("CREATE TABLE sop_files (hash UBIGINT, id INTEGER)")


def _add_files(db: duckdb.DuckDBPyConnection, files: Sequence[tuple[int, str]]) -> None:
    """Say what is in some files of `instances`, by number and name."""
    db.execute("CREATE TEMP TABLE studies_of (StudyInstanceUID VARCHAR, id INTEGER)")
    db.execute("CREATE TEMP TABLE sops_of (hash UBIGINT, id INTEGER)")
    for start in range(0, len(files), FILES_AT_ONCE):
        some = files[start : start + FILES_AT_ONCE]
        names = [name for _, name in some]
        db.execute("INSERT INTO files SELECT unnest(?::INTEGER[]), unnest(?::VARCHAR[])", [[n for n, _ in some], names])
        db.execute(
            "CREATE TEMP TABLE added_rows AS SELECT i.StudyInstanceUID, hash(i.SOPInstanceUID) AS hash, f.id "
            "FROM read_parquet(?, filename = true) i JOIN files f ON f.file = i.filename",
            [names],
        )
        db.execute("INSERT INTO studies_of SELECT DISTINCT StudyInstanceUID, id FROM added_rows")
        db.execute("INSERT INTO sops_of SELECT hash, id FROM added_rows")
        db.execute("DROP TABLE added_rows")
    db.execute("INSERT INTO study_files SELECT * FROM studies_of ORDER BY ALL")
    db.execute("INSERT INTO sop_files SELECT * FROM sops_of ORDER BY hash")


def _studies_since(db: duckdb.DuckDBPyConnection, files: Sequence[tuple[int, str]]) -> set[str]:
    if not files:
        return set()
    found = db.execute("SELECT StudyInstanceUID FROM study_files WHERE id >= ?", [files[0][0]]).fetchall()
    return {row[0] for row in found}


def _studies_in(db: duckdb.DuckDBPyConnection, sources: Sequence[str], gone: Sequence[int]) -> set[str]:
    if not gone:
        return set()
    sql = "SELECT DISTINCT StudyInstanceUID FROM {}.study_files WHERE id IN (SELECT unnest(?::INTEGER[]))"
    return {row[0] for source in sources for row in db.execute(sql.format(source), [list(gone)]).fetchall()}


def _remove_files(db: duckdb.DuckDBPyConnection, gone: Sequence[int]) -> None:
    if gone:
        db.execute("INSERT INTO gone_files SELECT unnest(?::INTEGER[])", [list(gone)])
        for name in ("files", "study_files", "sop_files"):
            db.execute(f"DELETE FROM {name} WHERE id IN (SELECT id FROM gone_files)")


def _is_settled(snapshots: Snapshots) -> bool:
    """Whether the roll-ups are those of the instances; where none says, they are taken to be."""
    instances = snapshots["instances"]
    marks = {s.mark for name, s in snapshots.items() if s and name in overlay.ROLLED and s.mark is not None}
    return instances is None or marks <= {instances.version}


def _check(db: duckdb.DuckDBPyConnection, source: str, snapshots: Snapshots, *, moved: bool) -> None:
    """Raises RebuildNeeded where the change of `instances` does not tell all:

    where a roll-up was not (yet) that of the instances, where a table is another one, or where roll-ups
    changed by themselves.
    """
    note = Note.read(db, source)
    if not note.settled:
        raise RebuildNeeded("the tables were being written when the index was made")
    for name, snapshot in snapshots.items():
        before = note.tables[name]
        if before and (snapshot is None or snapshot.table_id != before.table_id):
            raise RebuildNeeded(f"table {name} is another one")
        if name in overlay.ROLLED and not moved and snapshot and (not before or before.version != snapshot.version):
            instances = note.tables["instances"]
            if snapshot.mark is None or instances is None or snapshot.mark != instances.version:
                raise RebuildNeeded(f"table {name} changed by itself")
