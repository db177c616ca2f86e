"""Every member that landed, as a table: what queries without a catalog are answered from, next to the headers.

The journals are followed as recent arrivals follow them (see sphere.catalog.tail); of an instance that came more than
once, the version that extraction would show is marked, and what was deleted is left out. Held in DuckDB's memory up to
MEMORY_LIMIT, beyond it on this host's disk.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import duckdb
import pyarrow as pa

from sphere.catalog.arrow import empty
from sphere.catalog.grant import Grant
from sphere.catalog.scan import open_reader
from sphere.catalog.tail import JournalTail
from sphere.catalog.tombstones import open_tombstones
from sphere.catalog.versions import in_line, shown
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.ingest.records import MemberRecord
from sphere.ingest.spool import open_readable

MEMORY_LIMIT = "512MB"
CHUNK = 20_000
"""Members taken up in one transaction."""
PAGE = 2_000
"""Members fetched at once."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_TEXTS = (
    "bundle", "SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "TransferSyntaxUID", "sha256",
    "source_aet", "origin",
)  # fmt: skip
_NUMBERS = ("offset", "length", "dataset_offset")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        *((name, pa.int64()) for name in _NUMBERS),
        ("received_us", pa.int64()),
        ("collections", pa.list_(pa.string())),
    ]
)
_COLUMNS = ", ".join(f'"{name}"' for name in _SCHEMA.names)
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


class Members:
    """The members of an archive. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        spill = settings.archive.state_dir / "scan"
        config: dict[str, Any] = {"memory_limit": MEMORY_LIMIT, "threads": 2, "temp_directory": str(spill)}
        self._db = duckdb.connect(config={**config, "autoinstall_known_extensions": False})
        self._db.register("empty", empty(_SCHEMA))
        self._db.execute("CREATE TABLE members AS SELECT *, true AS shown FROM empty")
        self._db.execute("CREATE TABLE deleted (SOPInstanceUID VARCHAR)")
        self._tail = JournalTail(open_readable(settings), settings.archive.state_dir, {})
        self.tombstones, self._deletions = open_tombstones(settings), ""
        self._reader = open_reader(settings)
        self._policy = settings.ingest.on_conflict
        self._lock = threading.Lock()
        self._restricted: dict[Grant, Members] = {}
        self._wanted = "shown AND SOPInstanceUID NOT IN (SELECT SOPInstanceUID FROM deleted)"

    def restricted(self, grant: Grant) -> Members:
        """Those that are granted; raises CatalogError where journals do not say so."""
        if grant.patients:
            raise CatalogError(
                'catalog.mode = "files" cannot show the studies of some patients alone: journals lack them'
            )
        with self._lock:
            if grant not in self._restricted:
                grant.attach(self._db)
                part = copy.copy(self)
                part._wanted = f"{self._wanted} AND {grant.condition(_quoted)}"
                self._restricted[grant] = part
            return self._restricted[grant]

    def close(self) -> None:
        """Let go of the table."""
        self._db.close()
        self.tombstones.close()

    def catch_up(self) -> None:
        """Take up what was deleted and what landed since; raises StorageError."""
        with self._lock:
            self._bury()
            while records := self._tail.take(CHUNK):
                try:
                    self._take_up(records)
                except BaseException:
                    self._tail.give_back(records)
                    raise

    def _bury(self) -> None:
        while True:
            changes, cursor = self.tombstones.changes(self._deletions)
            if not changes:
                return
            gone, back = ([one.SOPInstanceUID for one in changes if one.deleted is which] for which in (True, False))
            self._db.execute("INSERT INTO deleted SELECT unnest(?::VARCHAR[]) EXCEPT SELECT * FROM deleted", [gone])
            self._db.execute("DELETE FROM deleted WHERE SOPInstanceUID IN (SELECT unnest(?::VARCHAR[]))", [back])
            self._deletions = cursor

    def count(self, study: Sequence[str] | None) -> int:
        """How many members there are to look at (of some studies)."""
        where, values = _among({"StudyInstanceUID": study} if study is not None else {})
        with self._cursor() as cursor:
            [(count,)] = cursor.execute(f"SELECT count(*) FROM members WHERE {self._wanted}{where}", values).fetchall()
        return int(count)

    def studies_of(self, wanted: dict[str, Sequence[str]]) -> list[str] | None:
        """The studies that hold any instance with these UIDs; None where none are named."""
        if not wanted:
            return None
        where, values = _among(wanted)
        with self._cursor() as cursor:
            rows = cursor.execute(
                f"SELECT DISTINCT StudyInstanceUID FROM members WHERE {self._wanted}{where}", values
            ).fetchall()
        return [row[0] for row in rows]

    def by_study(self, studies: Sequence[str] | None) -> Iterator[MemberRecord]:
        """The members to look at, study by study in the order of UIDs, a page at a time."""
        where, values = _among({"StudyInstanceUID": studies} if studies is not None else {})
        yield from self._records(f'{where} ORDER BY StudyInstanceUID, bundle, "offset"', values)

    def by_place(self, wanted: dict[str, Sequence[str]]) -> Iterator[MemberRecord]:
        """The members with these UIDs, in the order of the bundles."""
        where, values = _among(wanted)
        yield from self._records(f'{where} ORDER BY bundle, "offset"', values)

    def _records(self, rest: str, values: list[Any]) -> Iterator[MemberRecord]:
        with self._cursor() as cursor:
            cursor.execute(f"SELECT {_COLUMNS} FROM members WHERE {self._wanted}{rest}", values)
            while rows := cursor.fetchmany(PAGE):
                yield from map(_record, rows)

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        return self._db.cursor()

    def _take_up(self, records: list[MemberRecord]) -> None:
        known = [one for record in records for one in self._with_uids(record)]
        self._db.execute("BEGIN")
        try:
            self._db.register("incoming", pa.Table.from_pylist([_row(one) for one in known], schema=_SCHEMA))
            self._db.execute("INSERT INTO members SELECT *, true FROM incoming")
            again = self._db.execute(
                "SELECT SOPInstanceUID FROM members WHERE SOPInstanceUID IN (SELECT SOPInstanceUID FROM incoming) "
                "GROUP BY ALL HAVING count(*) > 1"
            ).fetchall()
            self._settle([row[0] for row in again])
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        finally:
            self._db.unregister("incoming")

    def _with_uids(self, record: MemberRecord) -> list[MemberRecord]:
        """The record; where the journal lacks UIDs, with those of the header; nothing where that has none."""
        if record.StudyInstanceUID and record.SeriesInstanceUID and record.SOPInstanceUID:
            return [record]
        [(_, header, _)] = self._reader.headers([record])
        return [] if header is None else [replace(record, **{name: header.values[name] for name in UIDS})]

    def _settle(self, uids: list[str]) -> None:
        """Mark the version that is shown of instances that came more than once."""
        if not uids:
            return
        versions: dict[str, list[MemberRecord]] = {}
        where, values = _among({"SOPInstanceUID": uids}, before="WHERE")
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM members {where}", values).fetchall():
            record = _record(row)
            versions.setdefault(record.SOPInstanceUID, []).append(record)
        winners = [self._winner(known) for known in versions.values()]
        self._db.execute(f"UPDATE members SET shown = false {where}", values)
        places = pa.table({"bundle": [one.bundle for one in winners], "offset": [one.offset for one in winners]})
        self._db.register("winners", places)
        self._db.execute(
            "UPDATE members SET shown = true FROM winners w "
            'WHERE members.bundle = w.bundle AND members."offset" = w."offset"'
        )
        self._db.unregister("winners")

    def _winner(self, known: list[MemberRecord]) -> MemberRecord:
        """Of versions with different bytes, those that extraction would quarantine do not count."""
        line = in_line(known)
        if len(line) > 1:
            line = [one for one, header, _ in self._reader.headers(line) if header is not None] or line
        return shown(line, self._policy)


def _among(wanted: dict[str, Sequence[str]], *, before: str = " AND") -> tuple[str, list[Any]]:
    """A condition that UIDs are among those wanted, and its values."""
    conditions = [f'"{name}" IN (SELECT unnest(?::VARCHAR[]))' for name in wanted]
    return (f"{before} {' AND '.join(conditions)}" if conditions else ""), [list(uids) for uids in wanted.values()]


def _quoted(name: str) -> str:
    return f'"{name}"'


def _row(record: MemberRecord) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in (*_TEXTS, *_NUMBERS)}
    received_us = (record.received_at - _EPOCH) // timedelta(microseconds=1)
    return {**row, "received_us": received_us, "collections": list(record.collections)}


def _record(row: Sequence[Any]) -> MemberRecord:
    fields = dict(zip(_SCHEMA.names, row, strict=True))
    received_at = _EPOCH + timedelta(microseconds=fields.pop("received_us"))
    collections = tuple(fields.pop("collections"))
    return MemberRecord(**fields, received_at=received_at, collections=collections)
