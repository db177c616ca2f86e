"""The query service: answers to a Query from the index and the Delta tables, for C-FIND, HTTP and Python alike."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from heapq import merge
from operator import itemgetter
from types import TracebackType
from typing import Any, TypeVar, cast

import duckdb
import orjson
import pyarrow as pa

from sphere.catalog.answer import Match, constants_of
from sphere.catalog.asof import AsOf
from sphere.catalog.cancel import Cancelled, never
from sphere.catalog.direct import Lookup, files_of, look_up, part_of
from sphere.catalog.grant import Grant
from sphere.catalog.headers import attributes_of, read_headers
from sphere.catalog.index import IndexCache, is_damage
from sphere.catalog.interrupt import interrupted
from sphere.catalog.kept_rows import PAGE, kept, streamed, turn
from sphere.catalog.known import KnownVersion
from sphere.catalog.layers import Index, Layer
from sphere.catalog.match import Exact
from sphere.catalog.match_header import Header, holds
from sphere.catalog.plan import INSTANCES, Plan, make_plan, studies_sql
from sphere.catalog.query import Query
from sphere.catalog.stored import StoredInstance
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings

__all__ = ["Match", "QueryService", "StoredInstance"]

STUDIES_LISTED = 1000
"""Studies up to which a question about instances names them, and opens only their files."""

_OF_DAMAGE = (LookupError, ValueError, TypeError, ArithmeticError, MemoryError, pa.ArrowException)
"""What numbers that were not written lead to, as a defect of ours may: which it was, their checksums tell."""

GRANTS = 8
"""Restricted services that are kept open: each has an index and recent arrivals of its own."""

Row = tuple[Any, ...]
T = TypeVar("T")


class QueryService:
    """Finds patients, studies, series and instances. One per process, shared by its threads.

    Every answer of one `find` comes from one version of the catalog. An archive that has no catalog yet has no matches.
    `apart` as of IndexCache.
    """

    def __init__(self, settings: Settings, grant: Grant | None = None, *, apart: bool = False) -> None:
        self._settings, self._apart = settings, apart
        self._indexes = IndexCache(settings, grant, apart=apart)
        self._ae_title = settings.archive.ae_title
        self._restricted: OrderedDict[Grant, QueryService] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> QueryService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index; iterators that are still open may be read to their end."""
        with self._lock:
            for one in self._restricted.values():
                one.close()
            self._restricted.clear()
        self._indexes.close()

    def restricted(self, grant: Grant) -> QueryService:
        """The service as if the archive held what is granted alone; those asked last are kept open."""
        with self._lock:
            found = self._restricted.pop(grant, None) or QueryService(self._settings, grant, apart=self._apart)
            self._restricted[grant] = found
            while len(self._restricted) > GRANTS:
                self._restricted.popitem(last=False)  # not closed: somebody may ask it just now
        return found

    def newest(self) -> AsOf:
        """As of sphere.catalog.queries.Queries."""
        return self._indexes.newest()

    def deletions(self) -> str:
        """As of sphere.catalog.queries.Queries."""
        return self._indexes.tombstones.state()

    def versions_of(self, study: str, *, seen: str, load: bool) -> tuple[str, list[KnownVersion]] | None:
        """What the catalog shows of a study (see sphere.catalog.queries.Queries)."""
        index = self._indexes.at_hand(load=load)
        if index is None or index.path.name == seen:
            return None
        columns = ", ".join(f'"{name}"' for name in KnownVersion.__dataclass_fields__)
        sql = f"SELECT {columns} FROM read_parquet(?, union_by_name = true) WHERE StudyInstanceUID = ?"
        try:
            with closing(index.connection.cursor()) as cursor:
                files = index.files.of_studies(cursor, [study])
                rows = cursor.execute(sql, [files, study]).fetchall() if files else []
        except duckdb.Error as error:
            raise CatalogError(f"the catalog cannot be read: {error}") from None
        return index.path.name, [KnownVersion(*row) for row in rows]

    def find(
        self, query: Query, *, as_of: AsOf | None = None, ae_title: str = "", cancelled: Cancelled = never
    ) -> Iterator[Match]:
        """The entities that match, in the order of their unique keys, a page at a time; to be retrieved from
        `ae_title`, by default that of the archive.

        With `as_of`, those of an earlier version of the catalog (see sphere.catalog.asof); else what arrived since the
        last extraction is among them.

        Closing the iterator cancels the query, and so does `cancelled`, asked for each page of candidates, and by
        another thread while this one waits for the database. Attributes
        that no column holds are read from the headers of the candidates that the other keys leave (see
        sphere.catalog.headers for the cost). Raises CatalogError.
        """
        title = ae_title or self._ae_title
        return self._retried(lambda index: self._find(query, index, title, cancelled), as_of)

    def count(self, query: Query, *, as_of: AsOf | None = None, cancelled: Cancelled = never) -> int:
        """How many entities match; of no meaning where it was `cancelled`, as of `find`. Raises CatalogError."""
        return next(self._retried(lambda index: self._count(query, index, cancelled), as_of), 0)

    def lookup_instances(
        self,
        *,
        study: Sequence[str] = (),
        series: Sequence[str] = (),
        sop: Sequence[str] = (),
        as_of: AsOf | None = None,
    ) -> Iterator[StoredInstance]:
        """Where the instances of some studies, series or with some SOPInstanceUIDs are, in the order of the bundles.

        Given several, all must hold; given none, every instance. Raises CatalogError.
        """
        wanted = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": sop}
        match = {keyword: list(uids) for keyword, uids in wanted.items() if uids}
        query = Query.build("IMAGE", match)
        return self._retried(lambda index: _stored(query, index), as_of)

    def lookup_headers(
        self, *, study: str, series: str = "", sop: str = "", as_of: AsOf | None = None
    ) -> Iterator[tuple[StoredInstance, str]]:
        """The instances of a study, a series or with a SOPInstanceUID, each with its header as DICOM JSON text.

        The header is `dataset` of table `instances`: places of bulk data are relative references. Raises CatalogError.
        """
        wanted = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": sop}
        query = Query.build("IMAGE", {keyword: uid for keyword, uid in wanted.items() if uid})
        return self._retried(lambda index: _with_headers(query, index), as_of)

    def _retried(self, ask: Callable[[Index], Iterator[T]], as_of: AsOf | None) -> Iterator[T]:
        """Answers of `ask`; where the index turns out damaged before the first, once more with a new one."""
        for last in (False, True):
            index = self._indexes.current() if as_of is None else self._indexes.at(as_of)
            begun = False
            try:
                index.catch_up()  # before anything is asked: some of `ask` read at once
                answers = ask(index)
                first = next(answers, None)
                if first is not None:
                    begun = True
                    yield first
                    yield from answers
                return
            except duckdb.OutOfMemoryException:
                raise CatalogError("the query takes more memory than there is for it now: ask for less") from None
            except duckdb.InterruptException:  # as was wished: see sphere.catalog.interrupt
                return
            except duckdb.Error as error:
                if not is_damage(error):
                    raise
                self._indexes.suspect(index)
                if begun:
                    raise
                if last:
                    raise CatalogError(f"the catalog cannot be read: {error}") from None
            except _OF_DAMAGE as error:
                if not self._indexes.suspect_rows(index):
                    raise
                if begun or last:
                    raise CatalogError(f"rows beside the index are damaged ({type(error).__name__})") from None

    def _find(self, query: Query, index: Index, ae_title: str, cancelled: Cancelled) -> Iterator[Match]:
        constants = constants_of(query, ae_title)
        if constants is None:
            return
        lookup = look_up(query, index.rows, index.instance_columns) if index.rows else None
        if lookup is not None:
            keys, found = lookup.keys, _looked_up(lookup, query, index, cancelled)
        else:
            plan = make_plan(query, index.instance_columns)
            keys, found = plan.keys, _rows(plan, index, cancelled)
        for _, columns, header, more in found:
            if constants:
                columns |= constants
            yield Match(query.level, keys, columns, header, ae_title, query.timezone, more)

    def _count(self, query: Query, index: Index, cancelled: Cancelled) -> Iterator[int]:
        plan = make_plan(query, index.instance_columns)
        if constants_of(query, self._ae_title) is None:
            yield 0
        elif plan.rest:
            yield sum(1 for _ in _rows(plan, index, cancelled))
        else:
            yield sum(index.ask(lambda layer: _count(plan, layer, cancelled)))


@dataclass(frozen=True, slots=True)
class _Scope:
    """Which instances a query reads: their relation, and the conditions and values that go before those of the plan
    (`where`), or after them (`also`)."""

    instances: str = ""
    where: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    also: tuple[str, ...] = ()
    further: tuple[Any, ...] = ()

    def ask(self, plan: Plan, sql: str) -> tuple[str, list[Any]]:
        """What DuckDB is to be asked for SQL of the plan, which has `where` in it."""
        return sql.replace(INSTANCES, self.instances), [*self.values, *plan.compiled.values, *self.further]


def _scope(plan: Plan, layer: Layer, cursor: duckdb.DuckDBPyConnection, names: Sequence[str]) -> _Scope | None:
    """At IMAGE level, the columns `names` in the files that hold what the other keys leave; above it what is asked of
    lower levels. None where nothing is."""
    if plan.query.level == "IMAGE":
        return _of_instances(plan.query, layer, cursor, names)
    below = plan.below
    if below is None:
        return _Scope()
    if below.lowest != "IMAGE":
        return _Scope(also=(below.condition(),), further=below.compiled.values)
    read = _of_instances(plan.query, layer, cursor, below.of_instances)
    if read is None:
        return None
    values = (*read.values, *below.compiled.values)
    return _Scope(read.instances, also=(below.condition(read.where),), further=values)


def _of_instances(query: Query, layer: Layer, cursor: duckdb.DuckDBPyConnection, names: Sequence[str]) -> _Scope | None:
    """The instances that a query looks at."""
    files, studies = _files(query, layer, cursor)
    if studies == []:
        return None
    instances = layer.instances(files, names)
    if instances is None:
        return None
    if studies is None and layer.name == "overlay":
        return _Scope(instances[0], ("i.StudyInstanceUID IN (SELECT StudyInstanceUID FROM touched)",), (*instances[1],))
    where = (f"i.StudyInstanceUID IN ({', '.join('?' * len(studies))})",) if studies else ()
    return _Scope(instances[0], where, (*instances[1], *(studies or ())))


def _files(query: Query, layer: Layer, cursor: duckdb.DuckDBPyConnection) -> tuple[list[str], list[str] | None]:
    """The files to look into, and the studies of the layer to look for where they are few."""
    lowest = query.of_lowest()
    if (known := files_of(lowest, layer, STUDIES_LISTED)) is not None:
        return known
    asked = studies_sql(query, STUDIES_LISTED + 1)
    if asked:
        found = [row[0] for row in cursor.execute(*asked).fetchall()]
        if len(found) <= STUDIES_LISTED:
            dropped = layer.dropped(lowest.level)
            studies = [uid for uid in found if uid not in dropped]
            return layer.instance_files(studies), studies
    uids = next((key.test for key in lowest.keys if key.keyword == "SOPInstanceUID"), None)
    return (layer.files_of_instances(uids.texts) if isinstance(uids, Exact) else layer.instance_files(None)), None


Found = tuple[Row, dict[int, Any], Header, bool]
"""Of an entity that matches: what identifies it, the values of its columns by tag, its header, and whether the next one
or the end is at hand."""


def _looked_up(lookup: Lookup, query: Query, index: Index, cancelled: Cancelled) -> Iterator[Found]:
    """What a lookup in the base gives, and what the overlay has in place of it or beside."""

    def put(layer: Layer) -> Iterator[Found]:
        if layer.name == "base":
            rows = lookup.rows(layer.dropped(query.level), cancelled)
            return ((key, columns, {}, more) for key, columns, more in rows)
        if not lookup.concerns(layer.touched):
            return iter(())
        return _begun(_matches(make_plan(query, index.instance_columns), layer, cancelled))

    found = index.ask(put)
    return found[0] if len(found) == 1 else merge(*found, key=itemgetter(0))


def _rows(plan: Plan, index: Index, cancelled: Cancelled = never) -> Iterator[Found]:
    """Every entity that matches, columns and headers considered, in their order."""
    found = index.ask(lambda layer: _begun(_matches(plan, layer, cancelled)))
    return found[0] if len(found) == 1 else merge(*found, key=itemgetter(0))


def _begun(rows: Iterator[T | None]) -> Iterator[T]:
    """An iterator that gives None when it has begun to read, made to begin."""
    next(rows)
    return cast("Iterator[T]", rows)


def _matches(plan: Plan, layer: Layer, cancelled: Cancelled) -> Iterator[Found | None]:
    names = [name.partition(".")[2] for name in plan.order]
    part = part_of(plan.query, layer, [*names, *(key.keyword for key in plan.selected)]) if plan.is_plain else None
    if part is not None:
        yield None
        tags, width = [key.tag for key in plan.selected], len(names)
        for row in sorted(part, key=itemgetter(slice(width))):
            yield row[:width], dict(zip(tags, row[width:], strict=True)), {}, True
        return
    with layer.cursor() as cursor, ExitStack() as stack:
        busy = interrupted(cursor, cancelled)
        with busy:
            scope = _scope(plan, layer, cursor, plan.of_instances)
        if scope is None:
            yield None
            return
        in_order = layer.name == "base"
        over: Callable[[], object] = never
        sorts = plan.sorts(in_order=in_order)
        if sorts and in_order and not scope.where and not plan.by_key:
            over = stack.enter_context(turn(cancelled))
        with busy:
            sql = plan.select(where=scope.where, also=scope.also, in_order=in_order)
            cursor.execute(*scope.ask(plan, sql))
        yield None
        dropped, width = layer.dropped(plan.query.level), len(plan.order)
        pages = kept(cursor, layer.folder, cancelled, over, busy) if sorts else streamed(cursor, cancelled, busy)
        for rows in pages:
            full = len(rows) == PAGE
            if dropped:
                rows = [row for row in rows if row[0] not in dropped]
            last = 0 if plan.rest else len(rows) - full  # up to which the next one, or the end, is at hand
            for number, (row, header) in enumerate(zip(rows, _headers(plan, layer, rows), strict=True), 1):
                if holds(plan.rest, header):
                    values = row[len(row) - len(plan.selected) :]
                    columns = {key.tag: value for key, value in zip(plan.selected, values, strict=True)}
                    yield row[:width], columns, header, number <= last


def _count(plan: Plan, layer: Layer, cancelled: Cancelled) -> int:
    """How many rows of a layer match, where no header need be read."""
    with layer.cursor() as cursor, interrupted(cursor, cancelled):
        scope = _scope(plan, layer, cursor, plan.of_instances)
        if scope is None:
            return 0
        dropped = sorted(layer.dropped(plan.query.level))
        if dropped:
            left = (f"{plan.order[0]} NOT IN (SELECT unnest(?::VARCHAR[]))",)
            scope = replace(scope, where=(*scope.where, *left), values=(*scope.values, dropped))
        (row,) = cursor.execute(*scope.ask(plan, plan.count(where=scope.where, also=scope.also))).fetchall()
        return int(row[0])


def _headers(plan: Plan, layer: Layer, rows: Sequence[Row]) -> Iterator[Header]:
    """The header of each row of a page, as far as the plan needs it."""
    width = len(plan.order)
    if not plan.needs_header or not rows:
        return iter([{}] * len(rows))
    if plan.query.level == "IMAGE":
        return (orjson.loads(row[width] or b"{}") for row in rows)
    wanted = attributes_of(plan.rest) | {(key.tag, key.creator) for key in plan.header_keys}
    with layer.cursor() as cursor:
        headers = read_headers(layer, cursor, plan.query.level, [row[:width] for row in rows], wanted)
    return (headers.get(row[:width], {}) for row in rows)


_STORED = ", ".join(f'i."{name}"' for name in StoredInstance.__dataclass_fields__)


def _stored(query: Query, index: Index) -> Iterator[StoredInstance]:
    return (StoredInstance(*row) for row in _stored_rows(query, index))


def _with_headers(query: Query, index: Index) -> Iterator[tuple[StoredInstance, str]]:
    return ((StoredInstance(*row[:-1]), row[-1] or "{}") for row in _stored_rows(query, index, "dataset"))


def _stored_rows(query: Query, index: Index, *more: str) -> Iterator[Row]:
    """The columns of StoredInstance and `more`, in the order of the bundles."""
    plan = make_plan(query, index.instance_columns)
    found = index.ask(lambda layer: _begun(_places(plan, layer, more)))
    return found[0] if len(found) == 1 else merge(*found, key=itemgetter(*_PLACE))


_PLACE = [list(StoredInstance.__dataclass_fields__).index(name) for name in ("bundle", "offset")]


def _places(plan: Plan, layer: Layer, more: tuple[str, ...]) -> Iterator[Row | None]:
    wanted = [*StoredInstance.__dataclass_fields__, *more]
    part = part_of(plan.query, layer, wanted) if plan.has_no_join else None
    if part is not None:
        yield None
        yield from sorted(part, key=itemgetter(*_PLACE))
        return
    with layer.cursor() as cursor:
        names = dict.fromkeys((*plan.of_instances, *StoredInstance.__dataclass_fields__, *more))
        scope = _scope(plan, layer, cursor, tuple(names))
        if scope is None:
            yield None
            return
        where = " AND ".join([*scope.where, plan.compiled.where])
        columns = ", ".join([_STORED, *(f'i."{name}"' for name in more)])
        sql = f'SELECT {columns} FROM {plan.source} WHERE {where} ORDER BY i.bundle, i."offset"'
        cursor.execute(*scope.ask(plan, sql))
        yield None
        dropped = layer.dropped("IMAGE")
        for rows in kept(cursor, layer.folder):
            yield from (row for row in rows if row[0] not in dropped)
