"""What a query asks of one entity: a conjunction of nodes, which SQL and a DICOM JSON header are both asked with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from sphere.catalog.as_stored import AsStored
from sphere.catalog.fuzzy import FuzzyName
from sphere.catalog.match import TIME_RE, Empty, PersonName, Sql, Test, normal_name_sql


@dataclass(frozen=True, slots=True)
class Compare:
    """One of an attribute's values passes a test. A multi-valued attribute matches by any value (PS3.4 C.2.2.3).

    A private attribute with a `creator` is looked for in the block that this creator reserved in each data set (PS3.5
    7.8.1).
    """

    tag: int
    keyword: str
    vr: str
    test: Test
    creator: str = ""


@dataclass(frozen=True, slots=True)
class AnyItem:
    """Sequence matching (PS3.4 C.2.2.2.6): one and the same item of a sequence passes every node."""

    tag: int
    keyword: str
    nodes: tuple[Node, ...]
    creator: str = ""


@dataclass(frozen=True, slots=True)
class Moment:
    """Combined date and time matching (PS3.4 C.2.2.2.5.4): a DA and a TM taken as one date-time, in a range.

    `low` and `high` are "YYYYMMDD" followed by a time in the form of TimeRange; None leaves an end open.
    """

    date_tag: int
    date_keyword: str
    time_tag: int
    time_keyword: str
    low: str | None
    high: str | None


@dataclass(frozen=True, slots=True)
class CompareStored:
    """An attribute that PS3.6 does not know passes what is asked of it, by the VR that a data set has it with."""

    tag: int
    asks: AsStored
    creator: str = ""


Node = Compare | AnyItem | Moment | CompareStored
IN_HEADERS: Final = (AnyItem, CompareStored)
"""Nodes that no column answers."""
Predicate = tuple[Node, ...]
"""Nodes that must all hold; no node means every entity."""


@dataclass(frozen=True, slots=True)
class ColumnSql:
    """Where a query finds an attribute: an SQL expression, whether it is a list, and its normalised form for a PN."""

    sql: str
    multiple: bool = False
    normal_name: str | None = None


Resolve = Callable[[str], ColumnSql | None]
"""From a keyword to its column; None where no column holds the attribute."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """SQL conditions, the values of their ``?`` in order, and the nodes that no column can answer."""

    conditions: tuple[str, ...]
    values: tuple[Any, ...]
    rest: Predicate

    @property
    def where(self) -> str:
        """The conditions as one SQL expression."""
        return " AND ".join(self.conditions) or "true"


def compile_sql(nodes: Iterable[Node], resolve: Resolve) -> Compiled:
    """Everything that columns can answer as SQL; the rest is for `sphere.catalog.match_header.holds`."""
    conditions: list[str] = []
    values: list[Any] = []
    rest: list[Node] = []
    for node in nodes:
        answer = _node_sql(node, resolve)
        if answer is None:
            rest.append(node)
        else:
            conditions.append(answer[0])
            values += answer[1]
    return Compiled(tuple(conditions), tuple(values), tuple(rest))


def _node_sql(node: Node, resolve: Resolve) -> Sql | None:
    if isinstance(node, Compare):
        column = resolve(node.keyword)
        return _compare_sql(node.test, column) if column else None
    if isinstance(node, Moment):
        date, time = resolve(node.date_keyword), resolve(node.time_keyword)
        return _moment_sql(node, date.sql, time.sql) if date and time else None
    return None


def _compare_sql(test: Test, column: ColumnSql) -> Sql:
    if isinstance(test, Empty) and column.multiple:
        filled = f"list_filter({column.sql}, lambda v: v IS NOT NULL AND CAST(v AS VARCHAR) <> '')"
        return f"(coalesce(len({filled}), 0) = 0)", []
    if isinstance(test, Empty):
        return test.sql(column.sql)
    name = isinstance(test, (PersonName, FuzzyName))
    if not column.multiple:
        return test.sql(column.normal_name or normal_name_sql(column.sql) if name else column.sql)
    condition, values = test.sql(normal_name_sql("v") if name else "v")
    return f"len(list_filter({column.sql}, lambda v: {condition})) > 0", values


def _moment_sql(node: Moment, date: str, time: str) -> Sql:
    text = f"replace({time}, ':', '')"
    moment = f"(strftime({date}, '%Y%m%d') || {text})"
    bounds = [(f"{moment} >= ?", node.low), (f"{moment} <= ?", node.high)]
    kept = [(condition, value) for condition, value in bounds if value is not None]
    conditions = [f"regexp_full_match({text}, '{TIME_RE}')", *(condition for condition, _ in kept)]
    return f"({' AND '.join(conditions)})", [value for _, value in kept]
