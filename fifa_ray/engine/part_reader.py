"""Tables read inside a task: a batch at a time on its one core, memory given back when freed.

What a task holds at once is then a few batches, whatever the size of a part or a row group.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import DTypeLike

from fifa_ray.run_dir import RunDir

BATCH_ROWS = 1 << 16


@contextlib.contextmanager
def frugal_memory() -> Iterator[None]:
    """Arrow takes its memory from malloc in this block, and gives back what it keeps at its end.

    Its default allocator keeps freed pages for the next use: several times what is in use. Some of
    Arrow's own parts take from it all the same.
    """
    default = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(default)
        default.release_unused()


def part_task(work: Callable[..., Any]) -> Any:
    """`work` as a Ray task of one core, in frugal memory."""

    @functools.wraps(work)
    def frugal(*arguments: Any) -> Any:
        with frugal_memory():
            return work(*arguments)

    return ray.remote(num_cpus=1)(frugal)


def open_part(run: RunDir, *parts: str) -> pq.ParquetFile:
    """One part of a table: its footer is read now, rows when asked for."""
    return pq.ParquetFile(run.filesystem.open_input_file(run.path(*parts)))


def batches(
    file: pq.ParquetFile,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows of a part in their order."""
    return file.iter_batches(BATCH_ROWS, row_groups, columns, use_threads=False)


def read_columns(
    run: RunDir, *parts: str, columns: Mapping[str, DTypeLike]
) -> dict[str, np.ndarray]:
    """Whole columns, as these types, of one part or of all of a table; null is NaN, or False."""
    names = [()] if parts[-1].endswith(".parquet") else [(name,) for name in run.list(*parts)]
    files = [open_part(run, *parts, *name) for name in names]
    rows = sum(file.metadata.num_rows for file in files)
    found = {name: np.empty(rows, dtype) for name, dtype in columns.items()}
    start = 0
    for file in files:
        for batch in batches(file, list(columns)):
            for name, values in found.items():
                values[start : start + len(batch)] = to_numpy(batch.column(name))
            start += len(batch)
    return found


def to_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of numbers (null is NaN) or of truth values (null is False, 1 is true).

    Without Arrow's own conversions: each of them imports pandas, 28 MB in every process.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    if column.null_count:
        filler = np.nan if pa.types.is_floating(column.type) else 0
        fillers = to_arrow(np.array([filler], column.type.to_pandas_dtype()))
        column = column.fill_null(fillers[0])
    return np.from_dlpack(column)


def to_arrow(values: np.ndarray) -> pa.Array:
    """Numbers as an Arrow column that shares their memory; no pandas here either."""
    kind = pa.from_numpy_dtype(values.dtype)
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [None, data])
