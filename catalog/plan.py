"""How a query is put to an index: which tables, which columns, which conditions, and what is left for headers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword

from sphere.catalog.index_build import KEYS, NAME_SUFFIX, trimmed_sql
from sphere.catalog.match import Exact
from sphere.catalog.predicate import ColumnSql, Compiled, Predicate, compile_sql
from sphere.catalog.query import ANSWERED, MODEL_LEVELS, Key, Query
from sphere.catalog.schema import BY_KEYWORD, COMPUTED, LEVELS, TABLES, UNIQUE_KEY, Level, level_of
from sphere.catalog.zones import DATE_OF, PAIRS, dated_sql, moved_sql
from sphere.conf.errors import QueryError

OFFSET = "TimezoneOffsetFromUTC"
_TABLE_OF: dict[str, str] = {"p": "patients", "t": "studies", "s": "series"}
_BASE: dict[Level, str] = {"PATIENT": "p", "STUDY": "t", "SERIES": "s", "IMAGE": "i"}
INSTANCES = "(instances)"
"""Stands in SQL for the relation that `Layer.instances` gives."""
KEYWORDS_INDEXED = frozenset(column for columns in KEYS.values() for column in columns)
ORDER: dict[Level, tuple[str, ...]] = {
    "PATIENT": ("p.patient_key",),
    "STUDY": ("t.StudyInstanceUID",),
    "SERIES": ("s.StudyInstanceUID", "s.SeriesInstanceUID"),
    "IMAGE": ("i.StudyInstanceUID", "i.SeriesInstanceUID", "i.SOPInstanceUID"),
}
"""What identifies one row of a level, and the order of answers."""


class Columns:
    """Finds the column of a keyword for queries at one level, and remembers which tables that takes.

    An attribute of a higher level is that of the roll-up, so that one entity gives one value at every level. Aliases:
    ``p`` patients, ``t`` studies, ``s`` series, ``i`` the files of instances.
    """

    def __init__(self, level: Level, instance_columns: frozenset[str], timezone: int | None = None) -> None:
        self._level = level
        self._timezone = timezone
        self._instance_columns = instance_columns
        self.used = {_BASE[level]}
        self.of_instances = dict.fromkeys(name.partition(".")[2] for name in ORDER["IMAGE"])

    def resolve(self, keyword: str) -> ColumnSql | None:
        """The column of a keyword; None where no column holds it at this level."""
        alias = self.alias(keyword)
        if alias is None:
            return None
        self.used.add(alias)
        column = self._column(alias, keyword)
        return column if self._timezone is None else self._adjusted(alias, keyword, column, self._timezone)

    def _column(self, alias: str, keyword: str) -> ColumnSql:
        if alias == "i":
            self.of_instances[keyword] = None
        return column_sql(alias, keyword)

    def _adjusted(self, alias: str, keyword: str, column: ColumnSql, asked: int) -> ColumnSql:
        """A date, time or date-time in the zone `asked`."""
        day, time = DATE_OF.get(keyword, keyword), PAIRS.get(keyword, keyword)
        if day != time:
            stored = self._column(alias, OFFSET).sql
            pair = moved_sql(self._column(alias, day).sql, self._column(alias, time).sql, stored, asked)
            return ColumnSql(pair[keyword == time])
        if keyword in BY_KEYWORD and BY_KEYWORD[keyword].vr == "DT":
            return ColumnSql(dated_sql(column.sql, self._column(alias, OFFSET).sql, asked))
        return column

    def alias(self, keyword: str) -> str | None:
        """The table that holds a keyword for this level; None where none does."""
        level = level_of(keyword)
        if level is None or LEVELS.index(level) > LEVELS.index(self._level):
            return None
        alias = self._alias(keyword, level)
        known = self._instance_columns if alias == "i" else TABLES[_TABLE_OF[alias]].schema.names
        return alias if keyword in known else None

    def _alias(self, keyword: str, level: Level) -> str:
        if self._level == "IMAGE" and keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
            return "i"
        if self._level == "SERIES" and keyword == "StudyInstanceUID":
            return "s"
        if level == "PATIENT" and self._level != "PATIENT" and keyword not in COMPUTED:
            return "t"
        return _BASE[level]

    def source(self) -> str:
        """The FROM clause; at IMAGE level with INSTANCES in place of the relation of instances."""
        base = _BASE[self._level]
        text = f"{INSTANCES} i" if base == "i" else f"{_TABLE_OF[base]} {base}"
        if "s" in self.used and base == "i":
            text += " JOIN series s ON s.StudyInstanceUID = i.StudyInstanceUID"
            text += " AND s.SeriesInstanceUID = i.SeriesInstanceUID"
        if self.used & {"t", "p"} and base in "si":
            text += f" JOIN studies t ON t.StudyInstanceUID = {base}.StudyInstanceUID"
        if "p" in self.used and base != "p":
            text += " JOIN patients p ON p.patient_key = t.patient_key"
        return text


@functools.cache
def column_sql(alias: str, keyword: str) -> ColumnSql:
    """The column of a keyword in one table; in the files of instances, text is trimmed as the index does."""
    sql = f'{alias}."{keyword}"'
    column = BY_KEYWORD.get(keyword)
    if column is None:  # computed
        return ColumnSql(sql, multiple=TABLES[_TABLE_OF[alias]].schema.field(keyword).type.num_fields > 0)
    if alias != "i":
        normal = f'{alias}."{keyword}{NAME_SUFFIX}"' if column.vr == "PN" and not column.multiple else None
        return ColumnSql(sql, column.multiple, normal)
    if "string" in str(column.arrow) and column.vr != "UI":
        sql = trimmed_sql(sql, column.vr, multiple=column.multiple)
    return ColumnSql(sql, column.multiple)


@dataclass(frozen=True)
class Below:
    """What a relational query asks of entities below its level, `lowest` being the lowest of theirs.

    `select` begins a statement that gives what identifies the entities which have such ones (PS3.4 C.4.1.3.2.1).
    """

    lowest: Level
    key: str
    select: str
    compiled: Compiled
    of_instances: tuple[str, ...]

    def condition(self, where: tuple[str, ...] = ()) -> str:
        """The SQL condition that an entity has them; at IMAGE level with INSTANCES in place of the relation."""
        return f"{self.key} IN ({self.select} WHERE {' AND '.join([*where, self.compiled.where])})"


@dataclass(frozen=True)
class Plan:
    """A query put to an index.

    `keys` are what every answer holds; the n-th value of a row is that of the n-th of `selected`. `rest` and
    `header_keys` need the headers (`dataset`) of instances. `of_instances` names the columns of `instances` in use.
    """

    query: Query
    keys: tuple[Key, ...]
    selected: tuple[Key, ...]
    header_keys: tuple[Key, ...]
    compiled: Compiled
    expressions: tuple[str, ...]
    source: str
    of_instances: tuple[str, ...]
    order: tuple[str, ...] = field(default=())
    below: Below | None = None

    @property
    def rest(self) -> Predicate:
        """What only headers can answer."""
        return self.compiled.rest

    @property
    def needs_header(self) -> bool:
        """Whether headers must be read to answer."""
        return bool(self.rest or self.header_keys)

    @property
    def has_no_join(self) -> bool:
        """Whether one table is asked, and what it says is answered as it stands."""
        return " " not in self.source.partition(" ")[2] and self.query.timezone is None and not self.rest

    @property
    def is_plain(self) -> bool:
        """Whether besides no header is needed."""
        return self.has_no_join and not self.header_keys

    def select(self, *, where: tuple[str, ...] = (), also: tuple[str, ...] = (), in_order: bool = False) -> str:
        """The SQL that gives rows: the columns of `order`, the dataset (at IMAGE level, if needed), `selected`.
        Conditions of `where` go before those of the plan, of `also` after them.

        Of a table whose rows are `in_order` already, the first ones come before the last is found; not so where an
        index of a key may be used.
        """
        header = ['i."dataset"'] if self.needs_header and self.query.level == "IMAGE" else []
        columns = ", ".join([*self.order, *header, *self.expressions])
        conditions = " AND ".join([*where, self.compiled.where, *also])
        text = f"SELECT {columns} FROM {self.source} WHERE {conditions}"
        return f"{text} ORDER BY {', '.join(self.order)}" if self.sorts(in_order=in_order) else text

    def sorts(self, *, in_order: bool) -> bool:
        """Whether `select` gives a statement that sorts."""
        as_stored = in_order and " " not in self.source.partition(" ")[2] and not self.by_key
        return not as_stored or self.below is not None or self.query.level == "IMAGE"

    @property
    def by_key(self) -> bool:
        """Whether a key with an index leaves few rows."""
        return any(isinstance(key.test, Exact) and key.keyword in KEYWORDS_INDEXED for key in self.query.keys)

    def count(self, *, where: tuple[str, ...] = (), also: tuple[str, ...] = ()) -> str:
        """The SQL that counts them."""
        return f"SELECT count(*) FROM {self.source} WHERE {' AND '.join([*where, self.compiled.where, *also])}"


def make_plan(query: Query, instance_columns: frozenset[str]) -> Plan:
    """Put a query to an index whose instance files have `instance_columns`."""
    columns = Columns(query.level, instance_columns, query.timezone)
    compiled = compile_sql(query.predicate(), columns.resolve)
    keys = answered_keys(query)
    selected: list[Key] = []
    expressions: list[str] = []
    header_keys: list[Key] = []
    for key in keys:
        column = columns.resolve(key.keyword)
        if column is not None:
            selected.append(key)
            expressions.append(column.sql)
        elif level_of(key.keyword) in (None, query.level) and key.keyword not in ANSWERED and not key.is_creator:
            header_keys.append(key)
    return Plan(
        query,
        keys,
        tuple(selected),
        tuple(header_keys),
        compiled,
        tuple(expressions),
        columns.source(),
        (*columns.of_instances, "dataset"),
        ORDER[query.level],
        _below(query, instance_columns),
    )


def _below(query: Query, instance_columns: frozenset[str]) -> Below | None:
    """What the query asks of lower levels; raises QueryError where the catalog has no column for it yet."""
    nodes = query.below()
    if not nodes:
        return None
    lowest = query.of_lowest().level
    columns = Columns(lowest, instance_columns, query.timezone)
    compiled = compile_sql(nodes, columns.resolve)
    if compiled.rest:
        missing = next(key for key in query.keys_below() if columns.resolve(key.keyword) is None)
        reason = f"{missing.name} below {query.level}: this catalog has no column of it"
        raise QueryError(reason, offending=(missing.tag,))
    key, found = _identity(query.level, lowest)
    if query.level == "PATIENT":
        columns.used.add("t")
    # Of instances there are many for one entity, and a semi-join would hold them all.
    select = f"SELECT {'DISTINCT ' if lowest == 'IMAGE' else ''}{found} FROM {columns.source()}"
    return Below(lowest, key, select, compiled, tuple(columns.of_instances))


def _identity(level: Level, lowest: Level) -> tuple[str, str]:
    """What identifies an entity of a level, in a row of its own and in one of an entity below."""
    if level == "PATIENT":
        return "p.patient_key", "t.patient_key"
    names = [name.partition(".")[2] for name in ORDER[level]]
    row, below = (", ".join(f"{alias}.{name}" for name in names) for alias in (_BASE[level], _BASE[lowest]))
    return (f"({row})", f"{below}") if len(names) > 1 else (row, below)


def studies_sql(query: Query, limit: int) -> tuple[str, list[Any]] | None:
    """SQL for the studies that may hold the instances that a query asks for at IMAGE level, or below its own; None
    where any may."""
    columns = Columns("SERIES", frozenset(), query.timezone)
    compiled = compile_sql(query.of_lowest().predicate(), columns.resolve)
    conditions, values = list(compiled.conditions), list(compiled.values)
    if query.level == "PATIENT":
        patients = Columns("PATIENT", frozenset(), query.timezone)
        theirs = compile_sql(query.predicate(), patients.resolve)
        if theirs.conditions:
            columns.used.add("t")
            conditions.append(f"t.patient_key IN (SELECT p.patient_key FROM {patients.source()} WHERE {theirs.where})")
            values += theirs.values
    if not conditions:
        return None
    where = " AND ".join(conditions)
    return f"SELECT DISTINCT s.StudyInstanceUID FROM {columns.source()} WHERE {where} LIMIT {limit}", values


def answered_keys(query: Query) -> tuple[Key, ...]:
    """The keys asked for, and the unique keys of the level and those above it in the model, in order of tags."""
    levels = MODEL_LEVELS[query.model]
    keys = {key.tag: key for key in query.keys}
    for level in levels[: levels.index(query.level) + 1]:
        tag = tag_for_keyword(UNIQUE_KEY[level]) or 0
        keys.setdefault(tag, Key(tag, UNIQUE_KEY[level], dictionary_VR(tag)))
    return tuple(keys[tag] for tag in sorted(keys))
