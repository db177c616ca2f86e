"""Arrow arrays and tables of what there is, without pandas.

`pa.array`, `pa.table` of lists and `Schema.empty_table` ask first whether what they are given is of pandas, which loads
it where it is installed: 0.2 s and 40 MB of a process that makes no data frames.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def empty(schema: pa.Schema) -> pa.Table:
    """A table without rows."""
    return pa.Table.from_batches([], schema)


def integers(values: npt.NDArray[np.int64]) -> pa.Int64Array:
    """The values, in the memory where they are if that is one piece."""
    return pa.Int64Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def strings(values: Sequence[str | None]) -> pa.StringArray:
    """The values, of up to 2 GiB together; raises OverflowError above that."""
    encoded = [b"" if value is None else value.encode() for value in values]
    ends = array("i", accumulate(map(len, encoded), initial=0))
    there = np.packbits([value is not None for value in values], bitorder="little") if None in values else None
    texts = pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))
    return pa.StringArray.from_buffers(len(encoded), *texts, None if there is None else pa.py_buffer(there))


def numbers(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """The integers of a column, in the memory where they are if that is one piece; none of them may be null."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    pieces = [np.from_dlpack(one) for one in chunks if len(one)]
    return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])
