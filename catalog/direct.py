"""Queries that need no database: few rows of a base, found by a key of theirs, and matched one by one.

PatientID, AccessionNumber and StudyInstanceUID as single values or lists, the begin of a patient's name, and short
ranges of study dates give candidates (see sphere.catalog.rows); each is asked every key, by the same tests as headers
are. Whatever else a query asks for, or where there are many candidates, it is DuckDB's (see sphere.catalog.plan).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from sphere.catalog.cancel import Cancelled
from sphere.catalog.layers import Layer
from sphere.catalog.match import TRAILING_ONLY_VRS, DateRange, Empty, Exact, PersonName, Test
from sphere.catalog.match_header import column_value, moment_holds
from sphere.catalog.overlay import Touched
from sphere.catalog.plan import Columns, Plan, make_plan
from sphere.catalog.predicate import IN_HEADERS, Compare, Moment, Node, Predicate
from sphere.catalog.query import Key, Model, Query
from sphere.catalog.rows import KEYS, Rows, RowStore, kept
from sphere.catalog.schema import BY_KEYWORD, Level
from sphere.conf.memo import remembered

MOST = 4000
"""Candidates up to which they are looked at one by one; DuckDB is faster for more."""
PAGE = 256
_TABLES: Mapping[str, str] = {"p": "patients", "t": "studies", "s": "series"}
_AT: Mapping[Level, tuple[str, ...]] = {
    "PATIENT": ("patients",),
    "STUDY": ("studies",),
    "SERIES": ("studies", "series"),
}
"""Tables of which a row of a level has one row each here."""
_FIND_BY = tuple(sorted(KEYS, key=lambda key: key[1] != "StudyInstanceUID"))
"""The keys by which rows are found, the one that leaves fewest first."""
_OF_LEVEL: Mapping[Level, str] = {"PATIENT": "patients", "STUDY": "studies", "SERIES": "series", "IMAGE": "series"}
_ORDER: Mapping[Level, tuple[str, ...]] = {
    "PATIENT": ("patient_key",),
    "STUDY": ("StudyInstanceUID",),
    "SERIES": ("StudyInstanceUID", "SeriesInstanceUID"),
}

Direct = tuple[tuple[Any, ...], dict[int, Any], bool]
"""Of an entity that matches: what identifies it, the values of its columns by tag, and whether the next one, or the
end, is at hand."""
_Condition = tuple[tuple[str, ...], Compare | Moment]
"""The columns that a node looks at, as "table.column"."""


@dataclass(frozen=True)
class Lookup:
    """A query put to the rows of a base."""

    store: RowStore
    level: Level
    keys: tuple[Key, ...]
    selected: tuple[tuple[int, str], ...]
    conditions: tuple[_Condition, ...]
    candidates: Rows
    values: tuple[str, ...] | None
    below: tuple[_Condition, ...] = ()

    def concerns(self, touched: Touched) -> bool:
        """Whether the overlay may hold what is asked for, which it does only with one of the values."""
        return self.values is None or not touched.values.isdisjoint(self.values)

    def rows(self, dropped: frozenset[str], cancelled: Cancelled) -> Iterator[Direct]:
        """What matches and is not dropped, in the order of answers."""
        order = _ORDER[self.level]
        table = _OF_LEVEL[self.level]
        for start in range(0, len(self.candidates), PAGE):
            if cancelled():
                return
            rows = _matching(self.store, table, self.candidates[start : start + PAGE], self.conditions)
            rows = self._having(rows) if self.below else rows
            read = _Reader(self.store, table, rows)
            keys = list(zip(*(read.values(_at_home(f"{table}.{name}")) for name in order), strict=True))
            columns = [read.values(name) for _, name in self.selected]
            tags = [tag for tag, _ in self.selected]
            last = len(rows) - (start + PAGE < len(self.candidates))
            for number, (key, *values) in enumerate(zip(keys, *columns, strict=True), 1):
                if key[0] not in dropped:
                    yield key, dict(zip(tags, values, strict=True)), number <= last

    def _having(self, rows: Rows) -> Rows:
        """Those of some patients or studies that have a study, and a series in it, for which `below` holds."""
        studies = self.store.studies_of(rows) if self.level == "PATIENT" else rows  # found by their PatientID
        of_series = [one for one in self.below if _table_of(one) == "series"]
        found = _matching(self.store, "studies", studies, [one for one in self.below if one not in of_series])
        if of_series:
            series = _matching(self.store, "series", self.store.series_of(found), of_series)
            found = np.unique(self.store.study_of(series))
        if self.level == "STUDY":
            return found
        known = set(self.store.tables["studies"].values("patient_key", found))
        keys = self.store.tables["patients"].values("patient_key", rows)
        return rows[[key in known for key in keys]] if len(rows) else rows


def _matching(store: RowStore, table: str, rows: Rows, conditions: Sequence[_Condition]) -> Rows:
    """Those of some rows of a table for which every condition holds."""
    for names, node in conditions:
        if not len(rows):
            break
        read = _Reader(store, table, rows)
        values = zip(*(read.values(name) for name in names), strict=True)
        holding = [at for at, found in enumerate(values) if _holds(node, found)]
        rows = rows if len(holding) == len(rows) else rows[holding]
    return rows


def _table_of(condition: _Condition) -> str:
    return condition[0][0].partition(".")[0]


class _Reader:
    """Values of some rows of a table, and of the studies that they belong to."""

    def __init__(self, store: RowStore, table: str, rows: Rows) -> None:
        self._store, self._table, self._rows = store, table, rows

    def values(self, name: str) -> list[Any]:
        table, _, column = name.partition(".")
        rows = self._rows if table == self._table else self._store.study_of(self._rows)
        return self._store.tables[table].values(column, rows)


def _holds(node: Compare | Moment, found: Sequence[Any]) -> bool:
    """Whether a node holds for the values of its columns."""
    if isinstance(node, Moment):
        return None not in found and moment_holds(node, found[0], found[1])
    value = found[0]
    if isinstance(node.test, Empty):
        return value is None or (isinstance(value, list) and not any(one is not None and one != "" for one in value))
    if isinstance(value, list):
        return any(one is not None and node.test.matches(one) for one in value)
    return value is not None and node.test.matches(value)


def look_up(query: Query, store: RowStore, instance_columns: frozenset[str]) -> Lookup | None:
    """How a query is answered from the rows of a base; None where it is DuckDB's."""
    if query.level == "IMAGE" or query.timezone is not None or (query.level == "SERIES" and not store.has_series):
        return None
    asked = tuple((key.tag, key.keyword, key.vr, key.creator) for key in query.keys)
    if any(key.items for key in query.keys):
        return None
    shape = _shape(query.level, query.model, asked, instance_columns)
    if shape is None:
        return None
    conditions, below = _conditions(query), _conditions_below(query, store)
    if conditions is None or below is None:
        return None
    found = _candidates(query.level, conditions, store)
    if found is None:
        return None
    candidates, values = found
    return Lookup(store, query.level, shape[0], shape[1], tuple(conditions), candidates, values, tuple(below))


def studies_of(query: Query, store: RowStore) -> Rows | None:
    """The studies that may hold what a query asks for, where a key of theirs tells; None where it does not."""
    if query.timezone is not None:  # which moves dates
        return None
    conditions = _conditions(query, partly=True)
    found = _candidates("STUDY", conditions or [], store)
    return found[0] if found else None


def files_of(query: Query, layer: Layer, most: int) -> tuple[list[str], list[str]] | None:
    """The files to look into for instances, and the studies to look for, where the rows of a base tell both."""
    store = layer.index.rows if layer.name == "base" else None
    rows = studies_of(query, store) if store else None
    if store is None or rows is None or len(rows) > most:
        return None
    uids, dropped = store.tables["studies"].values("StudyInstanceUID", rows), layer.dropped("STUDY")
    left = [at for at, uid in enumerate(uids) if uid not in dropped]
    return layer.index.files.named(store.files_of(rows[left])), [uids[at] for at in left]


def part_of(query: Query, layer: Layer, names: Sequence[str]) -> list[tuple[Any, ...]] | None:
    """The columns `names` of the instances that a query at IMAGE level asks for; None where that is DuckDB's.

    That is where the studies are not known, are many, or are in files that are not of a local disk.
    """
    if query.level != "IMAGE" or not layer.reads_files_whole:
        return None
    known = files_of(query, layer, FEW_STUDIES)
    if known is None or not all(path.startswith("/") for path in known[0]):
        return None
    nodes = [node for node in query.predicate() if isinstance(node, Compare)]
    narrowed = {
        node.keyword: node.test.texts for node in nodes if node.keyword in _NARROW and isinstance(node.test, Exact)
    }
    left = [node for node in query.predicate() if not (isinstance(node, Compare) and node.keyword in narrowed)]
    asked = [name for node in left for name in _keywords(node)]
    if not all(name in BY_KEYWORD for name in asked) or any(isinstance(node, IN_HEADERS) for node in left):
        return None
    every = [*names, *asked]
    try:
        rows = layer.index.instances.rows(*known, narrowed, every)
    except (OSError, pa.ArrowException):
        return None  # DuckDB says what is wrong
    tidied = _tidied(rows, every)
    return [row[: len(names)] for row in tidied if _all_hold(left, row[len(names) :])]


_NARROW = ("SeriesInstanceUID", "SOPInstanceUID")
FEW_STUDIES = 16


def _keywords(node: Node) -> tuple[str, ...]:
    if isinstance(node, IN_HEADERS):
        return ()
    return (node.keyword,) if isinstance(node, Compare) else (node.date_keyword, node.time_keyword)


def _all_hold(nodes: Sequence[Node], values: Sequence[Any]) -> bool:
    at = 0
    for node in nodes:
        width = len(_keywords(node))
        if isinstance(node, IN_HEADERS) or not _holds(node, values[at : at + width]):
            return False
        at += width
    return True


def _tidied(rows: list[tuple[Any, ...]], names: Sequence[str]) -> list[tuple[Any, ...]]:
    """Text as the index has it (see sphere.catalog.plan.column_sql): without insignificant spaces, or none."""
    texts = [at for at, name in enumerate(names) if name in BY_KEYWORD and "string" in str(BY_KEYWORD[name].arrow)]
    trims = [(at, BY_KEYWORD[names[at]].vr) for at in texts if BY_KEYWORD[names[at]].vr != "UI"]
    if not trims:
        return rows
    tidied = [list(row) for row in rows]
    for row in tidied:
        for at, vr in trims:
            row[at] = _trimmed(row[at], vr)
    return [tuple(row) for row in tidied]


def _trimmed(value: Any, vr: str) -> Any:
    if isinstance(value, list):
        return [
            None if one is None else one.rstrip(" ") if vr in TRAILING_ONLY_VRS else one.strip(" ") for one in value
        ]
    return column_value(value, "LT" if vr in TRAILING_ONLY_VRS else "LO")


@remembered(256)
def _shape(
    level: Level, model: Model, asked: tuple[tuple[int, str, str, str], ...], instance_columns: frozenset[str]
) -> tuple[tuple[Key, ...], tuple[tuple[int, str], ...]] | None:
    """What every answer to the keys `asked` holds, and the columns that give it; None where headers have to, or a
    column is not kept."""
    keys = tuple(Key(tag, keyword, vr, creator=creator) for tag, keyword, vr, creator in asked)
    plan: Plan = make_plan(Query(level, model, keys), instance_columns)
    if plan.needs_header:
        return None
    columns = Columns(level, instance_columns)
    named = [(key.tag, _home(columns, key.keyword)) for key in plan.selected]
    return (plan.keys, tuple(named)) if all(_is_kept(level, name) for _, name in named) else None


def _home(columns: Columns, keyword: str) -> str:
    return _at_home(f"{_TABLES.get(columns.alias(keyword) or '', '')}.{keyword}")


def _at_home(name: str) -> str:
    """Where a column is kept: that of the key is not in `series`."""
    return "studies.StudyInstanceUID" if name.endswith(".StudyInstanceUID") else name


def _is_kept(level: Level, name: str) -> bool:
    table, _, column = name.partition(".")
    return table in _AT[level] and column in kept(table)


@functools.lru_cache(4096)
def _kept_at(level: Level, keyword: str) -> str | None:
    """The column of a keyword, where it is kept for queries at a level."""
    name = _home(Columns(level, frozenset()), keyword)
    return name if _is_kept(level, name) else None


def _conditions(query: Query, *, partly: bool = False) -> list[_Condition] | None:
    """What the query asks, with the columns that answer it; None where one is not kept, unless `partly` will do."""
    return _kept_conditions("SERIES" if query.level == "IMAGE" else query.level, query.predicate(), partly=partly)


def _conditions_below(query: Query, store: RowStore) -> list[_Condition] | None:
    """What the query asks of studies below patients, and series below studies; None where that is DuckDB's."""
    nodes = query.below()
    return _kept_conditions("SERIES", nodes) if store.has_series or not nodes else None


def _kept_conditions(level: Level, nodes: Predicate, *, partly: bool = False) -> list[_Condition] | None:
    conditions: list[_Condition] = []
    for node in nodes:
        names = tuple([_kept_at(level, word) for word in _keywords(node)])
        if not isinstance(node, IN_HEADERS) and None not in names:
            conditions.append((cast("tuple[str, ...]", names), node))
        elif not partly:
            return None
    return conditions


def _candidates(
    level: Level, conditions: Sequence[_Condition], store: RowStore
) -> tuple[Rows, tuple[str, ...] | None] | None:
    """Rows among which all matches are, and the values one of which every match has, where that is known."""
    tests = {names[0]: node.test for names, node in conditions if isinstance(node, Compare)}
    found = _by_key(level, tests, store) or _by_range(level, tests, store)
    if found is None:
        return None
    rows, values = found
    if level == "SERIES":
        rows = store.series_of(rows)
    return (rows, values) if len(rows) <= MOST else None


def _by_key(level: Level, tests: Mapping[str, Test], store: RowStore) -> tuple[Rows, tuple[str, ...]] | None:
    for table, column in _FIND_BY:
        test = tests.get(f"{table}.{column}")
        if (table == "patients") == (level == "PATIENT") and isinstance(test, Exact):
            return store.by_key(table, column, test.texts), test.texts
    return None


def _by_range(level: Level, tests: Mapping[str, Test], store: RowStore) -> tuple[Rows, None] | None:
    if level == "PATIENT":
        return None
    rows: Rows | None = None
    name, days = tests.get("studies.PatientName"), tests.get("studies.StudyDate")
    if isinstance(name, PersonName) and len(name.groups) == 1 and (begin := _begin(name.groups[0])):
        rows = store.by_name(begin, MOST)
    if rows is None and isinstance(days, DateRange):
        rows = store.by_days(days.low, days.high, MOST)
    return None if rows is None else (rows, None)


def _begin(group: str) -> str:
    """How every name begins that matches a group of a key (`DOE^*` finds `DOE` as well)."""
    while group.endswith("^*"):
        group = group[:-2]
    return re.split(r"[*?]", group, maxsplit=1)[0]
