"""Roll-ups as they grow: one row of `series` or `studies`, to which instances are added one by one, in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphere.catalog.schema import TABLES, Aggregate, RollUp, patient_key

Row = Mapping[str, Any]


class Fold:
    """What `sphere.catalog.schema` says of a group of rows, without keeping them."""

    def __init__(self, spec: RollUp) -> None:
        self._spec = spec
        self._first: dict[str, tuple[tuple[Any, ...], Any]] = {}
        self._sets: dict[str, set[Any]] = {}
        self._numbers: dict[str, Any] = {}

    def add(self, row: Row) -> None:
        """One more row of the group."""
        order = tuple(row[name] for name in self._spec.order)
        for name in self._spec.attributes:
            value = row.get(name)
            if value is not None:
                known = self._first.get(name)
                if known is None or order < known[0]:
                    self._first[name] = order, value
        for aggregate in self._spec.aggregates:
            self._aggregate(aggregate, row.get(aggregate.source) if aggregate.source else 1)

    def _aggregate(self, aggregate: Aggregate, value: Any) -> None:
        if value is None:
            return
        name = aggregate.column
        if aggregate.kind in ("count_distinct", "collect_set", "union"):
            self._sets.setdefault(name, set()).update(value if aggregate.kind == "union" else (value,))
        elif name not in self._numbers:
            self._numbers[name] = value
        elif aggregate.kind in ("count", "sum"):
            self._numbers[name] += value
        else:
            self._numbers[name] = (min if aggregate.kind == "min" else max)(self._numbers[name], value)

    def row(self, key: tuple[Any, ...]) -> dict[str, Any]:
        """The row of the roll-up whose key is `key`."""
        row = dict(zip(self._spec.keys, key, strict=True))
        row |= {name: value for name, (_, value) in self._first.items()}
        row |= self._numbers
        for aggregate in self._spec.aggregates:
            if aggregate.kind in ("collect_set", "union"):
                row[aggregate.column] = sorted(self._sets.get(aggregate.column, ())) or None
            elif aggregate.kind == "count_distinct":
                row[aggregate.column] = len(self._sets.get(aggregate.column, ()))
        return row


class FoldedStudy:
    """A study and its series."""

    def __init__(self, study_instance_uid: str) -> None:
        self._uid = study_instance_uid
        self._study: Fold | None = None
        self._series: dict[str, Fold] = {}

    def add(self, row: Row) -> None:
        """One more instance of the study."""
        self._study = self._study or _fold("studies")
        self._study.add(row)
        series = row["SeriesInstanceUID"]
        if series not in self._series:
            self._series[series] = _fold("series")
        self._series[series].add(row)

    def study(self) -> list[dict[str, Any]]:
        """The row of `studies`; none where no instance is left."""
        if self._study is None:
            return []
        row = self._study.row((self._uid,))
        return [{**row, "patient_key": patient_key(row.get("PatientID"), row.get("IssuerOfPatientID"), self._uid)}]

    def series(self) -> list[dict[str, Any]]:
        """The rows of `series`."""
        return [fold.row((self._uid, uid)) for uid, fold in self._series.items()]


def _fold(name: str) -> Fold:
    spec = TABLES[name].roll_up
    assert spec is not None
    return Fold(spec)
