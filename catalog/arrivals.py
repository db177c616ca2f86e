"""Headers of members that no table has yet: read once, kept as rows of `RECENT`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from typing import Any

import orjson
import pyarrow as pa

from sphere.catalog.schema import INSTANCE_FIELDS
from sphere.conf.errors import StorageError
from sphere.ingest.header import Header, HeaderReader
from sphere.ingest.header.columns import COLUMNS
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage.base import Readable

log = logging.getLogger(__name__)

PREFIX = 16 * 1024
"""Bytes of a member read at first; most headers are smaller."""

UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID")
RECENT = pa.schema(
    [
        *((name, pa.string()) for name in UIDS),
        *INSTANCE_FIELDS.items(),
        ("columns", pa.string()),  # the typed columns as a JSON object: hundreds of mostly empty ones cost too much
        ("dataset", pa.string()),
    ]
)
"""A recent arrival; `column_of` gives the columns of `instances` that are in `columns`."""


class HeadersOfMembers:
    """Turns journal records into rows of RECENT. Not for several threads at once."""

    def __init__(self, storage: Readable, max_header: int) -> None:
        self._storage = storage
        self._reader = HeaderReader(max_header=max_header)

    def read(self, records: Iterable[MemberRecord]) -> tuple[list[dict[str, Any]], list[MemberRecord]]:
        """(rows, records whose bytes cannot be read yet); the latter have a row of what the journal says of them.

        Members that extraction will quarantine have no row.
        """
        rows, unread = [], []
        for record, header, is_read in self.headers(records):
            if not is_read:
                unread.append(record)
            if header is not None:
                rows.append(_row(header, record))
        return rows, unread

    def headers(self, records: Iterable[MemberRecord]) -> Iterator[tuple[MemberRecord, Header | None, bool]]:
        """(record, header, whether it was read) of each member.

        None for what extraction will quarantine; what the journal says where the bytes cannot be read yet.
        """
        for record in records:
            try:
                yield record, self._header(record), True
            except StorageError as error:
                log.debug("a member of %s cannot be read yet: %s", record.bundle, error)
                yield record, _of_journal(record), False

    def _header(self, record: MemberRecord) -> Header | None:
        def fetch(start: int, count: int) -> bytes:
            wanted = max(0, min(count, record.length - start))
            data = self._storage.read(record.bundle, record.offset + start, wanted) if wanted else b""
            if len(data) < wanted:
                raise StorageError(f"{record.bundle} is not readable up to byte {record.offset + start + wanted} yet")
            return data

        found = self._reader.read(fetch(0, PREFIX), size=record.length, fetch=fetch)
        return found if isinstance(found, Header) else None


def _of_journal(record: MemberRecord) -> Header | None:
    """What is known before the bytes can be read (an open bundle on HDFS, for less than a second)."""
    values = {name: getattr(record, name) for name in UIDS if getattr(record, name)}
    if not all(name in values for name in UIDS[:3]):
        return None
    tags = ("00080018", "0020000D", "0020000E", "00080016")
    named = [(tag, values[name]) for tag, name in zip(tags, UIDS, strict=True) if name in values]
    dataset = {tag: {"vr": "UI", "Value": [uid]} for tag, uid in named}
    return Header(values, orjson.dumps(dataset), None, record.TransferSyntaxUID, record.dataset_offset, [])


def _row(header: Header, record: MemberRecord) -> dict[str, Any]:
    values = header.values
    return {
        **{name: values.get(name) for name in UIDS},
        "bundle": record.bundle,
        "offset": record.offset,
        "length": record.length,
        "dataset_offset": record.dataset_offset,
        "pixel_offset": header.pixel_offset,
        "transfer_syntax_uid": header.TransferSyntaxUID or None,
        "sha256": record.sha256,
        "received_at": record.received_at,
        "source_aet": record.source_aet,
        "origin": record.origin,
        "header_warnings": header.warnings,
        "collections": list(record.collections) or None,
        "columns": orjson.dumps(values).decode(),
        "dataset": header.dataset.decode(),
    }


def values_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of RECENT with the columns of `instances` that roll-ups are made of."""
    columns = orjson.loads(row["columns"])
    for name in _DATES & columns.keys():
        columns[name] = _dates_of(columns[name])
    return {**columns, **row}


def _dates_of(value: str | list[str | None] | None) -> date | list[date | None] | None:
    if isinstance(value, list):
        return [date.fromisoformat(one) if one else None for one in value]
    return date.fromisoformat(value) if value else None


_DATES = {column.keyword for column in COLUMNS if column.vr == "DA"}
