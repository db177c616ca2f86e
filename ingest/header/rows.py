"""Headers to Arrow: record batches of a given schema, of whose hundreds of columns most are null."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

import pyarrow as pa

from sphere.ingest.header.columns import COLUMNS
from sphere.ingest.header.reader import Header
from sphere.ingest.records import MemberRecord

_Source = Callable[[Header, MemberRecord], Any]

# Columns that are not attributes: where each comes from.
_FIXED: Final[dict[str, _Source]] = {
    "bundle": lambda header, record: record.bundle,
    "offset": lambda header, record: record.offset,
    "length": lambda header, record: record.length,
    "dataset_offset": lambda header, record: record.dataset_offset,
    "pixel_offset": lambda header, record: header.pixel_offset,
    "transfer_syntax_uid": lambda header, record: header.TransferSyntaxUID or None,
    "sha256": lambda header, record: record.sha256,
    "received_at": lambda header, record: record.received_at,
    "source_aet": lambda header, record: record.source_aet,
    "origin": lambda header, record: record.origin,
    "header_warnings": lambda header, record: header.warnings,
    "collections": lambda header, record: record.collections or None,
    "dataset": lambda header, record: header.dataset,
}

_KNOWN = {column.keyword for column in COLUMNS} | _FIXED.keys()


class RowBuilder:
    """Collects headers with their journal records and turns them into record batches of columns of `schema`.

    A column of the schema is filled by its name: an attribute's keyword from the header, a fixed column from the record
    or the header. Raises ValueError for a name that is neither. Attributes without a column are left to ``dataset``.
    Of hundreds of attributes most say nothing: where `always` is given, a batch has these, the fixed columns and those
    that say something.
    """

    def __init__(self, schema: pa.Schema, *, always: Collection[str] | None = None) -> None:
        self._names: list[str] = schema.names
        strange = [name for name in self._names if name not in _KNOWN]
        if strange:
            raise ValueError(f"no attribute and no fixed column: {', '.join(strange)}")
        self.schema = schema
        self._always = frozenset(self._names if always is None else {*always, *_FIXED})
        self._headers: list[Header] = []
        self._records: list[MemberRecord] = []
        self._nulls: dict[str, pa.Array] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        """Rows collected since the last batch."""
        return len(self._headers)

    def append(self, header: Header, record: MemberRecord) -> None:
        """Add one row; ``nbytes`` grows by the bytes of its dataset."""
        self._headers.append(header)
        self._records.append(record)
        self.nbytes += len(header.dataset)

    def batch(self) -> pa.RecordBatch:
        """All rows collected, which are then forgotten."""
        rows = [header.values for header in self._headers]
        touched = set[str]().union(*rows)
        schema = pa.schema([self.schema.field(name) for name in self._names if name in touched or name in self._always])
        arrays = [self._array(field, rows, touched) for field in schema]
        self._headers, self._records, self.nbytes = [], [], 0
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _array(self, field: pa.Field, rows: list[dict[str, Any]], touched: set[str]) -> pa.Array:
        name: str = field.name
        if name in touched:
            return pa.array([row.get(name) for row in rows], field.type)
        source = _FIXED.get(name)
        if source is not None:
            pairs = zip(self._headers, self._records, strict=True)
            return pa.array([source(header, record) for header, record in pairs], field.type)
        nulls = self._nulls.get(name)
        if nulls is None or len(nulls) != len(rows):
            nulls = self._nulls[name] = pa.nulls(len(rows), field.type)
        return nulls
