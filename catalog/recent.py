"""Recent arrivals: members that landed and that the catalog version of an index does not have, as tables beside it.

Each serving process holds its own, in memory. Studies that have an arrival are rolled up anew over the catalog's rows
and the arrivals, so that counts are right; the views `patients`, `studies` and `series` show the index with these in
place. A change is one transaction: a query sees all of it or nothing. See docs/decisions/0009-recent-arrivals.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import duckdb
import pyarrow as pa

from sphere.catalog.arrivals import RECENT, HeadersOfMembers
from sphere.catalog.rollup import duckdb_type, roll_up_sql, source_columns
from sphere.catalog.schema import BY_KEYWORD, TABLES
from sphere.catalog.tail import JournalTail
from sphere.catalog.versions import Place, Policy, Version, place, shown
from sphere.conf.errors import SphereError
from sphere.ingest.records import MemberRecord

log = logging.getLogger(__name__)

CATCH_UP_S = 2.0
"""Seconds that a query gives to taking up arrivals before it answers without the rest."""
CHUNK = 1000
"""Members taken up in one transaction."""
MAX_MEMBERS = 50_000
"""Members held at most; those beyond are found when they are extracted."""
RETRY_S = 0.2
"""Seconds between attempts to read members that their writer has not published yet."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_ROLLED = tuple(source_columns("series") | source_columns("studies"))
_BASE = tuple(dict.fromkeys((*_ROLLED, "SOPInstanceUID", "sha256")))
_TYPES = {name: duckdb_type(TABLES["instances"].schema.field(name).type) for name in _BASE}


@dataclass(frozen=True, slots=True)
class _Version:
    received_at: datetime
    bundle: str
    offset: int
    sha256: str


FindVersions = Callable[[Sequence[str]], dict[str, list[MemberRecord]]]
"""From SOP Instance UIDs to the versions of them that `conflicts` names."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where arrivals come from, and how they meet what is catalogued."""

    tail: JournalTail
    headers: HeadersOfMembers
    policy: Policy
    conflicting: FindVersions
    columns: frozenset[str]  # of the catalogued files of instances


def column_of(name: str) -> str:
    """The SQL expression of a column of `instances` over the rows of RECENT."""
    if name in RECENT.names:
        return f'"{name}"'
    arrow = BY_KEYWORD[name].arrow
    if pa.types.is_list(arrow):
        return f"""from_json("columns"->'$.{name}', '["{duckdb_type(arrow.value_type)}"]')"""
    return f"""CAST("columns"->>'$.{name}' AS {duckdb_type(arrow)})"""


class Recent:
    """The arrivals beside one index, which `connection` has attached as `base`. Thread-safe.

    `selected` gives the expression by which the index holds a column of a roll-up.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, sources: Sources, selected: Callable[[str], str]) -> None:
        self._db = connection.cursor()
        self._sources = sources
        self._selected = selected
        self._lock = threading.Lock()
        self._unread: list[MemberRecord] = []
        self._retry_at = 0.0
        self._full = False
        self.members = 0
        """Members taken up so far; while none is, the views show nothing that the index does not."""
        self._db.execute("SET TimeZone = 'UTC'")
        _create(self._db)

    def catch_up(self) -> None:
        """Take up what arrived, for at most about CATCH_UP_S. Without the storage, what is known stays."""
        if not self._lock.acquire(timeout=CATCH_UP_S):
            return
        try:
            end = time.monotonic() + CATCH_UP_S
            while self._step() and time.monotonic() < end:
                continue
        except SphereError as error:
            log.warning("recent arrivals cannot be seen for now: %s", error)
        finally:
            self._lock.release()

    def _step(self) -> bool:
        if self.members >= MAX_MEMBERS:
            if not self._full:
                log.warning("more than %d members wait for extraction: further ones are found after it", MAX_MEMBERS)
            self._full = True
            return False
        again: list[MemberRecord] = []
        if self._unread and time.monotonic() >= self._retry_at:
            again = self._unread
        new = self._sources.tail.take(CHUNK)
        if not new and not again:
            return False
        try:
            rows, unread = self._sources.headers.read([*again, *new])
            self._take_up(rows, again)
        except BaseException:
            self._sources.tail.give_back(new)
            raise
        if again or unread:
            self._unread = unread if again else [*self._unread, *unread]
            self._retry_at = time.monotonic() + RETRY_S
        self.members += len(new)
        return bool(new)

    def _take_up(self, rows: Sequence[dict[str, Any]], again: Sequence[MemberRecord]) -> None:
        db = self._db
        db.execute("BEGIN")
        try:
            for record in again:
                db.execute('DELETE FROM recent.arrivals WHERE bundle = ? AND "offset" = ?', list(place(record)))
            uids = sorted({row["SOPInstanceUID"] for row in rows})
            studies = {row["StudyInstanceUID"] for row in rows} | {record.StudyInstanceUID for record in again}
            studies |= self._load_base(uids, studies)
            self._insert(rows)
            studies |= self._settle(uids)
            _roll_up(db, sorted(studies - {""}), self._selected)
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def _insert(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self._db.register("incoming", pa.Table.from_pylist(list(rows), schema=RECENT))
            self._db.execute("INSERT INTO recent.arrivals SELECT *, true FROM incoming")
            self._db.unregister("incoming")

    def _load_base(self, uids: list[str], studies: Iterable[str]) -> set[str]:
        """Bring in what the catalog has of the studies, and of the studies in which it has the instances `uids`.

        Returns the latter.
        """
        db = self._db
        files = db.execute(FILES_OF_INSTANCES, [uids]).fetchall()
        others: set[str] = set()
        if files:
            sql = "SELECT DISTINCT StudyInstanceUID FROM read_parquet(?, union_by_name = true) WHERE SOPInstanceUID IN "
            others = {
                row[0] for row in db.execute(f"{sql}(SELECT unnest(?))", [[f[0] for f in files], uids]).fetchall()
            }
        sql = "SELECT unnest(?::VARCHAR[]) EXCEPT SELECT StudyInstanceUID FROM recent.touched"
        new = [row[0] for row in db.execute(sql, [sorted({*studies, *others} - {""})]).fetchall()]
        db.execute("INSERT INTO recent.touched SELECT unnest(?::VARCHAR[])", [new])
        files = db.execute(FILES_OF_STUDIES, [new]).fetchall()
        if files:
            known = self._sources.columns
            columns = ", ".join(f'"{c}"' if c in known else f'CAST(NULL AS {_TYPES[c]}) AS "{c}"' for c in _BASE)
            db.execute(
                f"INSERT INTO recent.catalogued SELECT {columns} FROM read_parquet(?, union_by_name = true) "
                "WHERE StudyInstanceUID IN (SELECT unnest(?))",
                [[row[0] for row in files], new],
            )
        return others

    def _settle(self, uids: list[str]) -> set[str]:
        """Say which version of each instance is shown; returns the studies of all versions."""
        found = self._db.execute(
            'SELECT SOPInstanceUID, epoch_us(received_at), bundle, "offset", sha256, StudyInstanceUID, true '
            "FROM recent.arrivals WHERE SOPInstanceUID IN (SELECT unnest(?)) UNION ALL "
            'SELECT SOPInstanceUID, epoch_us(received_at), bundle, "offset", sha256, StudyInstanceUID, false '
            "FROM recent.catalogued WHERE SOPInstanceUID IN (SELECT unnest(?))",
            [uids, uids],
        ).fetchall()
        base: dict[str, _Version] = {}
        versions: dict[str, list[Version]] = {}
        for uid, micros, bundle, offset, sha256, _, arrived in found:
            version = _Version(_EPOCH + timedelta(microseconds=micros), bundle, offset, sha256)
            versions.setdefault(uid, []).append(version)
            if not arrived:
                base[uid] = version
        contested = [uid for uid in base if len({version.sha256 for version in versions[uid]}) > 1]
        for uid, more in (self._sources.conflicting(contested) if contested else {}).items():
            versions[uid] += more
        self._show({uid: place(shown(known, self._sources.policy)) for uid, known in versions.items()}, base, versions)
        return {row[5] for row in found}

    def _show(self, winners: dict[str, Place], base: dict[str, _Version], versions: dict[str, list[Version]]) -> None:
        several = [uid for uid in winners if len(versions[uid]) > 1]
        hidden = [uid for uid in base if winners[uid] != place(base[uid])]
        arrived = [winners[uid] for uid in several if uid not in base or uid in hidden]
        if several:
            self._db.execute(
                "UPDATE recent.arrivals SET shown = (bundle || '/' || \"offset\") IN (SELECT unnest(?::VARCHAR[])) "
                "WHERE SOPInstanceUID IN (SELECT unnest(?))",
                [[f"{bundle}/{offset}" for bundle, offset in arrived], several],
            )
            self._db.execute("DELETE FROM recent.hidden WHERE SOPInstanceUID IN (SELECT unnest(?))", [several])
            self._db.execute("INSERT INTO recent.hidden SELECT unnest(?::VARCHAR[])", [hidden])


FILES_OF_STUDIES = (
    "SELECT DISTINCT file FROM base.study_files WHERE StudyInstanceUID IN (SELECT unnest(?::VARCHAR[])) ORDER BY file"
)
FILES_OF_INSTANCES = (
    "SELECT DISTINCT f.file FROM base.sop_files s JOIN base.files f USING (id) "
    "WHERE s.hash IN (SELECT hash(u) FROM (SELECT unnest(?::VARCHAR[]) AS u)) ORDER BY f.file"
)


def _create(db: duckdb.DuckDBPyConnection) -> None:
    db.execute("CREATE SCHEMA recent")
    db.register("arrivals_", RECENT.empty_table())
    db.execute("CREATE TABLE recent.arrivals AS SELECT *, true AS shown FROM arrivals_")
    db.unregister("arrivals_")
    columns = ", ".join(f'"{name}" {type_}' for name, type_ in _TYPES.items())
    db.execute(f"CREATE TABLE recent.catalogued ({columns})")
    for name in ("touched", "affected"):
        db.execute(f"CREATE TABLE recent.{name} (StudyInstanceUID VARCHAR)")
    db.execute("CREATE TABLE recent.hidden (SOPInstanceUID VARCHAR)")
    for name in ("touched_patients", "affected_patients"):
        db.execute(f"CREATE TABLE recent.{name} (patient_key VARCHAR)")
    for name, touched, key in (
        ("patients", "touched_patients", "patient_key"),
        ("studies", "touched", "StudyInstanceUID"),
        ("series", "touched", "StudyInstanceUID"),
    ):
        db.execute(f"CREATE TABLE recent.new_{name} AS SELECT * FROM base.{name} LIMIT 0")
        db.execute(
            f"CREATE VIEW recent.{name} AS SELECT * FROM base.{name} ANTI JOIN recent.{touched} USING ({key}) "
            f"UNION ALL SELECT * FROM recent.new_{name}"
        )


def _rows_of_affected() -> str:
    """What is shown of the affected studies: columns that the roll-ups need."""
    catalogued = ", ".join(f'"{name}"' for name in _ROLLED)
    arrived = ", ".join(f'{column_of(name)} AS "{name}"' for name in _ROLLED)
    return (
        f"(SELECT {catalogued} FROM recent.catalogued SEMI JOIN recent.affected USING (StudyInstanceUID) "
        "ANTI JOIN recent.hidden USING (SOPInstanceUID) UNION ALL "
        f"SELECT {arrived} FROM recent.arrivals SEMI JOIN recent.affected USING (StudyInstanceUID) WHERE shown)"
    )


_KEYS_OF_AFFECTED = (
    "INSERT INTO recent.affected_patients SELECT patient_key FROM {} SEMI JOIN recent.affected USING (StudyInstanceUID)"
)


def _roll_up(db: duckdb.DuckDBPyConnection, studies: list[str], selected: Callable[[str], str]) -> None:
    """Compute the studies, their series, and the patients that these are or were of."""
    db.execute("DELETE FROM recent.affected")
    db.execute("DELETE FROM recent.affected_patients")
    db.execute("INSERT INTO recent.affected SELECT unnest(?::VARCHAR[])", [studies])
    for source in ("base.studies", "recent.new_studies"):
        db.execute(_KEYS_OF_AFFECTED.format(source))
    for name in ("series", "studies"):
        db.execute(
            f"DELETE FROM recent.new_{name} WHERE StudyInstanceUID IN (SELECT StudyInstanceUID FROM recent.affected)"
        )
        _insert_rolled(db, name, _rows_of_affected(), selected)
    db.execute(_KEYS_OF_AFFECTED.format("recent.new_studies"))
    of_affected = "patient_key IN (SELECT patient_key FROM recent.affected_patients)"
    db.execute(f"DELETE FROM recent.new_patients WHERE {of_affected}")
    _insert_rolled(db, "patients", f"(SELECT * FROM recent.studies WHERE {of_affected})", selected)
    db.execute("INSERT INTO recent.touched_patients SELECT DISTINCT patient_key FROM recent.affected_patients")


def _insert_rolled(db: duckdb.DuckDBPyConnection, name: str, source: str, selected: Callable[[str], str]) -> None:
    columns = ", ".join(selected(column) for column in TABLES[name].schema.names)
    db.execute(f"INSERT INTO recent.new_{name} BY NAME SELECT {columns} FROM ({roll_up_sql(name, source)})")
