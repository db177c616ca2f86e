"""Rows put in by the key of a table: what becomes of a file that holds some of the keys.

Most rows of such a file stay, and so do most of its bytes' worth: new values are set in their rows' places, column by
column, in the order that the rows are in. Nothing is sorted, and columns in which the file says nothing are not read.
A file whose rows come as they are stays: where an instance is replaced, studies beside it are computed again, too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Positions = npt.NDArray[np.int64]


class Merge:
    """Rows that come into a table with the key columns `key`, and keys of rows that leave it.

    Files are given to it, by several threads at once if one likes; a row that came into one of them is not among the
    `rest`, for which no file had a row.
    """

    def __init__(self, rows: pa.Table, gone: pa.Table, key: Sequence[str]) -> None:
        self._rows = rows.combine_chunks()
        self._key = list(key)
        keys = pa.concat_tables([rows.select(self._key), gone.select(self._key)]).combine_chunks()
        self._numbered = keys.append_column("_number", pa.array(np.arange(len(keys))))
        self._placed = np.zeros(len(rows), bool)
        self._lock = threading.Lock()

    @property
    def keys(self) -> pa.Array:
        """What the first key column says in the rows that come and in the keys that leave."""
        return self._numbered[0].combine_chunks()

    def rest(self) -> pa.Table:
        """The rows that came into no file, with their keys and the columns in which some row says something."""
        says = [name for name in self._rows.column_names if self._rows[name].null_count < len(self._rows)]
        rows = self._rows.select(list(dict.fromkeys((*self._key, *says))))
        return rows.filter(pa.array(~self._placed)) if self._placed.any() else rows

    def others(self, keys: pa.Table) -> pa.BooleanArray:
        """Which rows of a file, of which these are the keys, have none of ours."""
        stays = np.ones(len(keys), bool)
        stays[self._found(keys)[0]] = False
        return pa.array(stays)

    def placed(self, before: pa.Table, kept_keys: Sequence[str]) -> tuple[pa.Table | None, bool]:
        """All that a file says (what `said` gives), with our rows in the places of those with the same key, without the
        keys that leave; None where this changes nothing. With it, whether no value came into one of the columns
        `kept_keys`."""
        at, numbers = self._found(before.select(self._key))
        if not len(at):
            return None, True
        ours = numbers < len(self._rows)
        first = np.zeros(len(at), bool)
        first[np.unique(numbers, return_index=True)[1]] = True
        ours &= first
        with self._lock:  # a key that two files have: one of them goes
            ours[ours] &= ~self._placed[numbers[ours]]
            self._placed[numbers[ours]] = True
        return self._set(before, at[ours], self._rows.take(pa.array(numbers[ours])), at[~ours], kept_keys)

    def _found(self, keys: pa.Table) -> tuple[Positions, Positions]:
        """Places of the rows that have one of our keys, ascending, and the number of each one's key."""
        first = self._key[0]
        if len(self._key) == 1:  # a row that comes stands before a key that leaves, so it is the one that is found
            number = pc.index_in(keys[first], value_set=self.keys, skip_nulls=True)
            there = pc.is_valid(number).to_numpy()
            return np.flatnonzero(there), number.drop_null().to_numpy().astype(np.int64)
        maybe = np.flatnonzero(pc.is_in(keys[first], value_set=self.keys).to_numpy())
        rows = keys.take(pa.array(maybe)).append_column("_at", pa.array(maybe))
        found = rows.join(self._numbered, keys=self._key, join_type="inner")
        at, numbers = (found[name].to_numpy().astype(np.int64) for name in ("_at", "_number"))
        order = np.lexsort((numbers, at))  # a row that comes before a key that leaves
        at, once = np.unique(at[order], return_index=True)
        return at, numbers[order][once]

    def _set(
        self, before: pa.Table, at: Positions, rows: pa.Table, leaving: Positions, kept_keys: Sequence[str]
    ) -> tuple[pa.Table | None, bool]:
        schema = rows.schema
        there = set(before.column_names)
        names = [name for name in schema.names if name in there or rows[name].null_count < len(rows)]
        mask = np.zeros(len(before), bool)
        mask[at] = True
        replaced = before.take(pa.array(at))
        columns, same, changed = [], True, len(leaving) > 0
        for name in names:
            type_, new = schema.field(name).type, rows[name]
            unchanged = name in there and _whole(replaced[name], type_).equals(_whole(new, type_))
            same = same and (unchanged or name not in kept_keys)
            changed = changed or not unchanged
            old = _whole(before[name], type_) if name in there else pa.nulls(len(before), type_)
            columns.append(old if unchanged else _replaced(old, mask, at, _whole(new, type_)))
        if not changed:
            return None, True
        table = pa.Table.from_arrays(columns, schema=pa.schema([schema.field(name) for name in names]))
        stays = np.ones(len(before), bool)
        stays[leaving] = False
        return (table.filter(pa.array(stays)) if len(leaving) else table), same


def _whole(column: pa.ChunkedArray, type_: pa.DataType) -> pa.Array:
    """A column in one piece and of this type, as it mostly is."""
    one = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return one if one.type == type_ else one.cast(type_)


def _replaced(old: pa.Array, mask: npt.NDArray[np.bool_], at: Positions, new: pa.Array) -> pa.Array:
    """The values of `old`, but those of `new`, in their order, where the mask is set, which is at the places `at`."""
    if not pa.types.is_nested(old.type):
        return pc.replace_with_mask(old, pa.array(mask), new)
    taken = np.arange(len(old))
    taken[at] = len(old) + np.arange(len(new))
    return pa.concat_arrays([old, new]).take(pa.array(taken))
