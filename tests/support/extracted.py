"""What extraction makes of the journals, plainly and without Spark: the reference for recent arrivals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sphere.catalog.schema import TABLES
from sphere.conf.settings import Settings
from sphere.ingest.header import Header, HeaderReader, RowBuilder
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.versions import place, settle
from tests.support.catalog import Row, write_catalog, write_table
from tests.support.headers import Source


def extract(settings: Settings, *, only: Callable[[MemberRecord], bool] = lambda record: True) -> None:
    """Catalogue what is published; with `only`, `instances` and the roll-ups of these members, `bundles` of none."""
    storage = open_storage(settings.storage.root)
    landed = Landed(storage)
    bundles: list[Row] = []
    versions: dict[str, list[MemberRecord]] = {}
    headers: dict[Any, Header] = {}
    reader = HeaderReader(max_header=1 << 26)
    for state in landed.bundles():
        records, end, sealed = landed.records(state.bundle)
        bundles.append({"bundle": state.bundle, "journal_bytes": end, "members": len(records), "sealed": sealed})
        for record in filter(only, records):
            data = storage.read(record.bundle, record.offset, record.length)
            found = reader.read(data, size=len(data), fetch=Source(data).fetch)
            if isinstance(found, Header):
                headers[place(record)] = found
                versions.setdefault(found.values["SOPInstanceUID"], []).append(record)
    rows = RowBuilder(TABLES["instances"].schema)
    conflicts: list[Any] = []
    for uid, known in versions.items():
        settled = settle(uid, known, settings.ingest.on_conflict)
        conflicts += settled.conflicts
        rows.append(headers[place(settled.winner)], settled.winner)
    write_table(settings, TABLES["conflicts"], conflicts)
    write_catalog(settings, rows.batch().to_pylist(), bundles=bundles)
