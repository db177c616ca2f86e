"""Which files of a table may hold a key: hashes of the keys of every file, kept sorted on local disk.

A cache that follows from the table's files alone, which never change: what is kept of a file holds as long as the file
is part of the table, whoever wrote it. It is brought up to date by reading the key columns of files that it has not
seen, and made anew where it is missing, damaged or of another table. A key that is in the table is always found; a file
may be named that does not hold it (two keys with one hash), so what is found there has to be compared.

Hashes are in runs, each sorted; a run is joined with the one before it when that is no more than twice as long: a
table of n keys has about log2(n) runs, and looking up a key takes a binary search in each.
"""

from __future__ import annotations

import logging
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sphere.conf.private import make_private

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

KEY_BYTES = 64
"""Bytes of a key that its hash looks at, besides its length: a UID whole (PS3.5 9.1)."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_VERSION = 1  # of the files' form
_MANY = 1 << 20  # hashes from which on a place is guessed: fewer are in a processor's cache
_GUESSES = 4
_NEAR = 8  # places around the last guess that are compared: of 27 million hashes, 99 of 100 guesses were 7 away at most
_log = logging.getLogger(__name__)
_checked: set[Path] = set()  # runs whose checksum this process has compared; their names are never used again


@dataclass(slots=True)
class _Run:
    """Sorted hashes, and beside each the number of a file that has the key."""

    hashes: Hashes
    numbers: Numbers
    name: str = ""
    crc: int = 0

    def find(self, wanted: Hashes) -> Numbers:
        """The numbers of the files that have one of the hashes."""
        first = _places(self.hashes, wanted)
        there = first < len(self.hashes)
        there[there] = self.hashes[first[there]] == wanted[there]  # few: the second search is for what is there
        first, wanted = first[there], wanted[there]
        counts = np.searchsorted(self.hashes, wanted, "right") - first
        before = np.cumsum(counts) - counts
        at = np.repeat(first - before, counts) + np.arange(counts.sum())
        found: Numbers = np.unique(self.numbers[at])
        return found


@dataclass(slots=True)
class _State:
    """What is kept of a table: its files by path, each with a number, and the runs."""

    table: str
    files: dict[str, int] = field(default_factory=dict)
    runs: list[_Run] = field(default_factory=list)


class KeyFiles:
    """The cache for one table, in `folder`; one process at a time brings it up to date."""

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._folder = folder
        self._columns = tuple(columns)
        self._state: _State | None = None
        self._list: tuple[int, int, int] | None = None  # which file the list was when it was read or written

    def look_again(self) -> None:
        """Another process may have brought it up to date since: it is read again if so."""
        if self._state is not None and self._list != self._listed():
            self._state = None

    def _listed(self) -> tuple[int, int, int] | None:
        try:
            found = (self._folder / "files.json").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def holding(
        self, table: str, files: Iterable[str], column: str, values: pa.Array, *, load: Callable[[str], pa.Table]
    ) -> list[str]:
        """Those of `files`, all that the table with the id `table` now has, that may hold one of `values` in `column`.

        ``load(path)`` gives the key columns of a file that is new to the cache.
        """
        files = list(files)
        if not files or not len(values):
            return []
        state = self._refreshed(table, files, load)
        wanted = np.sort(_hashes(values, self._columns.index(column)))
        numbers = set(np.concatenate([run.find(wanted) for run in state.runs]).tolist()) if state.runs else set()
        return [path for path in files if state.files[path] in numbers]

    def renamed(self, paths: Mapping[str, str]) -> None:
        """Files that were written anew, by their paths of before: they have the same keys, or fewer of them."""
        state = self._state
        if state is None:
            return
        known = {old: new for old, new in paths.items() if old in state.files}
        for old, new in known.items():
            state.files[new] = state.files.pop(old)
        if known:
            self._write(state)

    def _refreshed(self, table: str, files: Sequence[str], load: Callable[[str], pa.Table]) -> _State:
        state = self._state or self._read()
        if state is None or state.table != table:
            state = _State(table)
        self._state = state
        new = [path for path in files if path not in state.files]
        if new:
            first = max(state.files.values(), default=-1) + 1
            numbers = {path: first + at for at, path in enumerate(new)}
            state.runs.append(_joined([self._run(load(path), number) for path, number in numbers.items()]))
            state.files |= numbers
            self._tidy(state, files)
            self._write(state)
        return state

    def _run(self, keys: pa.Table, number: int) -> _Run:
        columns = (_hashes(keys[column], at) for at, column in enumerate(self._columns))
        hashes = np.unique(np.concatenate(list(columns)))
        return _Run(hashes, np.full(len(hashes), number, np.uint32))

    def _tidy(self, state: _State, files: Sequence[str]) -> None:
        """Join runs of like length; forget what was of files that the table no longer has, once these are many."""
        if len(state.files) > 2 * len(files) + 16:
            state.files = {path: state.files[path] for path in files}
            state.runs = [_joined(state.runs, keep=np.array(sorted(state.files.values()), np.uint32))]
        while len(state.runs) > 1 and len(state.runs[-2].hashes) <= 2 * len(state.runs[-1].hashes):
            state.runs[-2:] = [_joined(state.runs[-2:])]

    def _read(self) -> _State | None:
        """What is on disk, or None where it cannot be used."""
        self._list = self._listed()
        try:
            body = (self._folder / "files.json").read_bytes()
            crc, _, text = body.partition(b"\n")
            if int(crc) != zlib.crc32(text):
                raise ValueError("the list has another checksum")
            found = orjson.loads(text)
            if (found["version"], tuple(found["columns"])) != (_VERSION, self._columns):
                return None
            return _State(found["table"], found["files"], [self._open(run) for run in found["runs"]])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("what %s kept is damaged and made anew: %s", self._folder.name, error)
            return None

    def _open(self, run: Mapping[str, Any]) -> _Run:
        path, count = self._folder / run["name"], run["count"]
        data = np.memmap(path, np.uint8, "r") if count else np.empty(0, np.uint8)
        if len(data) != 12 * count or (path not in _checked and zlib.crc32(data.data) != run["crc"]):
            raise ValueError(f"{run['name']} has another checksum")
        _checked.add(path)
        return _Run(data[: 8 * count].view(np.uint64), data[8 * count :].view(np.uint32), run["name"], run["crc"])

    def _write(self, state: _State) -> None:
        """Runs first, under new names, then the list of them; what a crash leaves behind is found by checksums."""
        make_private(self._folder)
        for run in state.runs:
            if not run.name:
                data = run.hashes.tobytes() + run.numbers.tobytes()
                run.name, run.crc = f"{uuid.uuid4()}.run", zlib.crc32(data)
                (self._folder / run.name).write_bytes(data)
                _checked.add(self._folder / run.name)
        runs = [{"name": run.name, "count": len(run.hashes), "crc": run.crc} for run in state.runs]
        kept = {"version": _VERSION, "columns": self._columns, "table": state.table, "files": state.files, "runs": runs}
        text = orjson.dumps(kept)
        fresh = self._folder / "files.json.new"
        fresh.write_bytes(b"%d\n%b" % (zlib.crc32(text), text))
        fresh.replace(self._folder / "files.json")
        self._list = self._listed()
        names = {run.name for run in state.runs}
        for path in self._folder.glob("*.run"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def _places(hashes: Hashes, wanted: Hashes) -> Places:
    """Where each of `wanted` would be put among the sorted `hashes`, as np.searchsorted says, which for each looks at
    25 places of 25 million, far from each other in memory.

    Hashes are spread evenly, so the place follows from the value, give or take a few, which are compared. What is not
    among these is searched for.
    """
    count = len(hashes)
    if count < _MANY:
        return np.searchsorted(hashes, wanted, "left")
    density = count / 2.0**64
    near = np.zeros(len(wanted), np.int64)
    away = wanted * density
    for _ in range(_GUESSES):
        near = np.clip(near + away.astype(np.int64), 0, count - 1)
        away = (wanted.astype(np.float64) - hashes[near].astype(np.float64)) * density
    low, high = np.maximum(near - _NEAR, 0), np.minimum(near + _NEAR, count)
    inside = ((low == 0) | (hashes[low - 1] < wanted)) & ((high == count) | (hashes[high - 1] >= wanted))
    for _ in range((2 * _NEAR).bit_length()):
        middle = (low + high) // 2
        before = (low < high) & (hashes[np.minimum(middle, count - 1)] < wanted)
        low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
    low[~inside] = np.searchsorted(hashes, wanted[~inside], "left")
    return low


def _joined(runs: Sequence[_Run], keep: Numbers | None = None) -> _Run:
    """One run of several, only with the numbers of `keep` where that is given."""
    hashes = np.concatenate([run.hashes for run in runs])
    numbers = np.concatenate([run.numbers for run in runs])
    if keep is not None:
        stays = np.isin(numbers, keep)
        hashes, numbers = hashes[stays], numbers[stays]
    order = np.argsort(hashes, kind="stable")
    return _Run(hashes[order], numbers[order])


def _hashes(values: pa.Array | pa.ChunkedArray, salt: int) -> Hashes:
    """A hash of each value that is not null, another one for each `salt`."""
    chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
    return np.concatenate([np.empty(0, np.uint64), *(_hash(chunk, salt) for chunk in chunks)])


def _hash(values: pa.Array, salt: int) -> Hashes:
    values = values.drop_null().cast(pa.binary())
    lengths = pc.binary_length(values).to_numpy(zero_copy_only=False).astype(np.uint64)
    words = _words(pc.binary_slice(values, 0, KEY_BYTES), np.minimum(lengths, KEY_BYTES))
    result: Hashes = lengths * _FACTOR + np.uint64(salt)
    for column in words.T:
        result = (result ^ column) * _FACTOR
        result ^= result >> _SHIFT
    return result


def _words(values: pa.Array, lengths: Hashes) -> npt.NDArray[np.uint64]:
    """The bytes of each value, at most KEY_BYTES, as numbers, zeros behind them."""
    matrix = np.zeros((len(values), KEY_BYTES), np.uint8)
    offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
    if len(values) and offsets[-1] > offsets[0]:
        data = np.frombuffer(values.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        matrix[np.arange(KEY_BYTES) < lengths[:, None]] = data
    words: npt.NDArray[np.uint64] = matrix.view("<u8")
    return words
