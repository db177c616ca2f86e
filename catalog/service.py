"""The query service: answers to a Query from the index and the Delta tables, for C-FIND, HTTP and Python alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import duckdb
import orjson

from sphere.catalog.answer import Match
from sphere.catalog.headers import read_headers, tags_of
from sphere.catalog.index import Index, IndexCache, is_damage
from sphere.catalog.match_header import Header, holds
from sphere.catalog.plan import Plan, make_plan, studies_sql
from sphere.catalog.query import ANSWERED, Query
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings

__all__ = ["Match", "QueryService", "StoredInstance"]

PAGE = 256
"""Answers fetched at once: what a slow reader costs."""
STUDIES_LISTED = 1000
"""Studies up to which a question about instances names them, and opens only their files."""

Row = tuple[Any, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """Where the bytes of an instance are: a DICOM Part 10 file in bytes [offset, offset + length) of its bundle."""

    StudyInstanceUID: str
    SeriesInstanceUID: str
    SOPInstanceUID: str
    SOPClassUID: str
    transfer_syntax_uid: str
    bundle: str
    offset: int
    length: int
    dataset_offset: int
    pixel_offset: int | None
    sha256: str


class QueryService:
    """Finds patients, studies, series and instances. One per process, shared by its threads.

    Every answer of one `find` comes from one version of the catalog. An archive that has no catalog yet has no matches.
    """

    def __init__(self, settings: Settings) -> None:
        self._indexes = IndexCache(settings)
        self._ae_title = settings.archive.ae_title

    def __enter__(self) -> QueryService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index; iterators that are still open may be read to their end."""
        self._indexes.close()

    def find(self, query: Query) -> Iterator[Match]:
        """The entities that match, in the order of their unique keys, a page at a time.

        Closing the iterator cancels the query. Attributes that no column holds are read from the headers of the
        candidates that the other keys leave (see sphere.catalog.headers for the cost). Raises CatalogError.
        """
        return self._retried(lambda index: self._find(query, index))

    def count(self, query: Query) -> int:
        """How many entities match. Raises CatalogError."""
        return next(self._retried(lambda index: self._count(query, index)))

    def lookup_instances(
        self,
        *,
        study: Sequence[str] = (),
        series: Sequence[str] = (),
        sop: Sequence[str] = (),
    ) -> Iterator[StoredInstance]:
        """Where the instances of some studies, series or with some SOPInstanceUIDs are, in the order of the bundles.

        Given several, all must hold; given none, every instance. Raises CatalogError.
        """
        wanted = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": sop}
        match = {keyword: list(uids) for keyword, uids in wanted.items() if uids}
        query = Query.build("IMAGE", match)
        return self._retried(lambda index: _stored(query, index))

    def _retried(self, ask: Callable[[Index], Iterator[T]]) -> Iterator[T]:
        """Answers of `ask`; where the index turns out damaged before the first, once more with a new one."""
        for last in (False, True):
            index = self._indexes.current()
            answers = ask(index)
            try:
                first = next(answers, None)
            except duckdb.Error as error:
                if not is_damage(error):
                    raise
                self._indexes.suspect(index)
                if last:
                    raise CatalogError(f"the catalog cannot be read: {error}") from None
                continue
            if first is not None:
                yield first
                yield from answers
            return

    def _find(self, query: Query, index: Index) -> Iterator[Match]:
        constants = self._constants(query)
        if constants is None:
            return
        plan = make_plan(query, index.instance_columns)
        for columns, header in _rows(plan, index):
            yield Match(query.level, plan.keys, {**constants, **columns}, header, self._ae_title)

    def _count(self, query: Query, index: Index) -> Iterator[int]:
        plan = make_plan(query, index.instance_columns)
        if self._constants(query) is None:
            yield 0
        elif plan.rest:
            yield sum(1 for _ in _rows(plan, index))
        else:
            with index.cursor() as cursor:
                scope = _scope(query, index, cursor)
                values = [*scope.values, *plan.compiled.values]
                row = cursor.execute(plan.count(where=scope.where), values).fetchone() if scope.any else None
            yield row[0] if row else 0

    def _constants(self, query: Query) -> Mapping[int, str] | None:
        """Values that every entity has; None where a key asks for others."""
        known = {"RetrieveAETitle": self._ae_title, "InstanceAvailability": "ONLINE"}
        asked = [key for key in query.keys if key.keyword in ANSWERED]
        if any(key.test is not None and not key.test.matches(known[key.keyword]) for key in asked):
            return None
        return {key.tag: known[key.keyword] for key in asked}


@dataclass(frozen=True, slots=True)
class _Scope:
    """Which files a query reads: the conditions and values that go before those of the plan."""

    any: bool = True
    where: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()


def _scope(query: Query, index: Index, cursor: duckdb.DuckDBPyConnection) -> _Scope:
    """At IMAGE level, the files that hold the studies that the other keys leave."""
    if query.level != "IMAGE":
        return _Scope()
    asked = studies_sql(query, STUDIES_LISTED + 1)
    if asked is None:
        files = index.instance_files(None)
        return _Scope(bool(files), values=(files,))
    studies = [row[0] for row in cursor.execute(*asked).fetchall()]
    if len(studies) > STUDIES_LISTED:
        return _Scope(values=(index.instance_files(None),))
    files = index.instance_files(studies)
    where = f"i.StudyInstanceUID IN ({', '.join('?' * len(studies))})"
    return _Scope(bool(files), (where,), (files, *studies))


def _rows(plan: Plan, index: Index) -> Iterator[tuple[Mapping[int, Any], Header]]:
    """(values of columns by tag, header) of every entity that matches, columns and headers considered."""
    with index.cursor() as cursor:
        scope = _scope(plan.query, index, cursor)
        if not scope.any:
            return
        cursor.execute(plan.select(where=scope.where), [*scope.values, *plan.compiled.values])
        while rows := cursor.fetchmany(PAGE):
            for row, header in zip(rows, _headers(plan, index, rows), strict=True):
                if holds(plan.rest, header):
                    values = row[len(row) - len(plan.selected) :]
                    yield {key.tag: value for key, value in zip(plan.selected, values, strict=True)}, header


def _headers(plan: Plan, index: Index, rows: Sequence[Row]) -> Iterator[Header]:
    """The header of each row of a page, as far as the plan needs it."""
    width = len(plan.order)
    if not plan.needs_header:
        return iter([{}] * len(rows))
    if plan.query.level == "IMAGE":
        return (orjson.loads(row[width] or b"{}") for row in rows)
    tags = tags_of(plan.rest) | {key.tag for key in plan.header_keys}
    with index.cursor() as cursor:
        headers = read_headers(index, cursor, plan.query.level, [row[:width] for row in rows], tags)
    return (headers.get(row[:width], {}) for row in rows)


_STORED = ", ".join(f'i."{name}"' for name in StoredInstance.__dataclass_fields__)


def _stored(query: Query, index: Index) -> Iterator[StoredInstance]:
    plan = make_plan(query, index.instance_columns)
    with index.cursor() as cursor:
        scope = _scope(query, index, cursor)
        if not scope.any:
            return
        where = " AND ".join([*scope.where, plan.compiled.where])
        sql = f'SELECT {_STORED} FROM {plan.source} WHERE {where} ORDER BY i.bundle, i."offset"'
        cursor.execute(sql, [*scope.values, *plan.compiled.values])
        while rows := cursor.fetchmany(PAGE):
            yield from (StoredInstance(*row) for row in rows)
