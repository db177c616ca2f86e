"""One entity as Python evaluates a query on it: rows of the catalog's tables that were never written.

The same columns by the same rules as `sphere.catalog.plan` finds them for SQL, in the form in which the index holds
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sphere.catalog.match import TRAILING_ONLY_VRS, Empty
from sphere.catalog.match_header import moment_holds
from sphere.catalog.plan import OFFSET, Columns, answered_keys
from sphere.catalog.predicate import IN_HEADERS, Compare, Moment, Node, Predicate
from sphere.catalog.query import ANSWERED, Key, Query
from sphere.catalog.schema import BY_KEYWORD, TABLES, level_of
from sphere.catalog.zones import DATE_OF, PAIRS, dated, moved

Row = Mapping[str, Any]
"""A row of one of the catalog's tables, by column."""

INSTANCE_COLUMNS = frozenset(TABLES["instances"].schema.names)


@dataclass(frozen=True)
class Question:
    """A query taken apart by the table that each part needs: `nodes` and `selected` by alias, `rest` and `header_keys`
    for headers, and `below` by alias what is asked of lower levels. Goes from process to process."""

    query: Query
    keys: tuple[Key, ...]
    nodes: Mapping[str, tuple[Node, ...]]
    selected: Mapping[str, tuple[Key, ...]]
    rest: tuple[Node, ...]
    header_keys: tuple[Key, ...]
    below: Mapping[str, tuple[Node, ...]]

    @property
    def needs_header(self) -> bool:
        """Whether what no column holds is asked for."""
        return bool(self.rest or self.header_keys)

    def uses(self, alias: str) -> bool:
        """Whether a table is needed to answer."""
        return bool(self.nodes.get(alias) or self.selected.get(alias))

    def holds(self, alias: str, row: Row) -> bool:
        """Whether everything that is asked of one table holds for a row of it."""
        return all(node_holds(node, row, self.query.timezone) for node in self.nodes.get(alias, ()))

    def holds_below(self, alias: str, row: Row) -> bool:
        """Whether everything that is asked of one table for the sake of a level above holds for a row of it."""
        return all(node_holds(node, row, self.query.timezone) for node in self.below.get(alias, ()))

    def values(self, alias: str, row: Row) -> dict[int, Any]:
        """The values of the keys that one table answers, by tag."""
        return {key.tag: value_of(row, key.keyword, self.query.timezone) for key in self.selected.get(alias, ())}


def take_apart(query: Query) -> Question:
    """Say where each part of a query is answered."""
    columns = Columns(query.level, INSTANCE_COLUMNS)
    nodes, rest = _by_alias(query.predicate(), columns)
    below, _ = _by_alias(query.below(), Columns(query.of_lowest().level, INSTANCE_COLUMNS))
    selected: dict[str, tuple[Key, ...]] = {}
    header_keys: list[Key] = []
    keys = answered_keys(query)
    for key in keys:
        alias = columns.alias(key.keyword)
        if alias is not None:
            selected[alias] = (*selected.get(alias, ()), key)
        elif level_of(key.keyword) in (None, query.level) and key.keyword not in ANSWERED and not key.is_creator:
            header_keys.append(key)
    return Question(query, keys, nodes, selected, rest, tuple(header_keys), below)


def _by_alias(predicate: Predicate, columns: Columns) -> tuple[dict[str, tuple[Node, ...]], tuple[Node, ...]]:
    """The nodes by the table that answers them, and those that none does."""
    nodes: dict[str, tuple[Node, ...]] = {}
    rest: list[Node] = []
    for node in predicate:
        alias = None
        if not isinstance(node, IN_HEADERS):
            alias = columns.alias(node.date_keyword if isinstance(node, Moment) else node.keyword)
        if alias is None:
            rest.append(node)
        else:
            nodes[alias] = (*nodes.get(alias, ()), node)
    return nodes, tuple(rest)


def value_of(row: Row, keyword: str, timezone: int | None) -> Any:
    """A column in column form, a date or time in the zone that is asked for."""
    value = trimmed(row.get(keyword), keyword)
    if timezone is None:
        return value
    day, time = DATE_OF.get(keyword, keyword), PAIRS.get(keyword, keyword)
    if day != time:
        pair = moved(row.get(day), trimmed(row.get(time), time), trimmed(row.get(OFFSET), OFFSET), timezone)
        return pair[keyword == time]
    if keyword in BY_KEYWORD and BY_KEYWORD[keyword].vr == "DT":
        return dated(value, trimmed(row.get(OFFSET), OFFSET), timezone)
    return value


def trimmed(value: Any, keyword: str) -> Any:
    """Text (or a list of it) without insignificant spaces, None where nothing is left: what the index holds."""
    column = BY_KEYWORD.get(keyword)
    if column is None or column.vr == "UI":
        return value
    ends_only = column.vr in TRAILING_ONLY_VRS
    if isinstance(value, list):
        return [_trim(one, ends_only) if isinstance(one, str) else one for one in value]
    return (_trim(value, ends_only) or None) if isinstance(value, str) else value


def _trim(text: str, ends_only: bool) -> str:
    return text.rstrip(" ") if ends_only else text.strip(" ")


def node_holds(node: Node, row: Row, timezone: int | None) -> bool:
    """Whether a node that columns answer holds for a row."""
    if isinstance(node, Moment):
        day, time = (value_of(row, name, timezone) for name in (node.date_keyword, node.time_keyword))
        return day is not None and time is not None and moment_holds(node, day, time)
    assert isinstance(node, Compare), node
    value = value_of(row, node.keyword, timezone)
    values = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
    if isinstance(node.test, Empty):
        return all(one == "" for one in values)
    return any(node.test.matches(one) for one in values)
