"""Rows of a table by their key, in any order, and a bounded memory for what was read."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fifa_ray.run_dir import RunDir


class BoundedMemory:
    """Values by key, those used least recently dropped when together they take too many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """The value, or None."""
        found = self.values.get(key)
        if found is None:
            return None
        self.values.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        """Keep a value; at least the newest one is kept, however large."""
        if key in self.values:
            self.num_bytes -= self.values.pop(key)[1]
        self.values[key] = value, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes and len(self.values) > 1:
            self.num_bytes -= self.values.popitem(last=False)[1][1]


class SingleRows:
    """Rows of a table whose parts have one row a row group, by an int64 key."""

    def __init__(self, run: RunDir, table: str, key: str, columns: Sequence[str]) -> None:
        self.run, self.table, self.columns = run, table, list(columns)
        self.parts = run.list(table)
        keys = [
            run.read_table(table, part, columns=[key]).column(0).to_numpy() for part in self.parts
        ]
        lengths = [len(of_part) for of_part in keys]
        everything = np.concatenate([np.empty(0, np.int64), *keys])
        order = np.argsort(everything, kind="stable")
        self.keys = everything[order]
        self.part_of = np.repeat(np.arange(len(keys)), lengths)[order]
        self.row_of = np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths)])[order]
        self.opened = threading.local()

    def read(self, key: int) -> dict[str, Any]:
        """One row's columns. Raises KeyError where there is no such row."""
        at = int(np.searchsorted(self.keys, key))
        if at == len(self.keys) or self.keys[at] != key:
            raise KeyError(f"{self.table} has no row {key}; run the same command again")
        file = self._open(int(self.part_of[at]))
        row: dict[str, Any] = file.read_row_group(
            int(self.row_of[at]), columns=self.columns, use_threads=False
        ).to_pylist()[0]
        return row

    def _open(self, part: int) -> pq.ParquetFile:
        files: OrderedDict[int, pq.ParquetFile] | None = getattr(self.opened, "files", None)
        if files is None:
            files = self.opened.files = OrderedDict()
        if part not in files:
            path = self.run.path(self.table, self.parts[part])
            files[part] = pq.ParquetFile(self.run.filesystem.open_input_file(path), pre_buffer=True)
            if len(files) > 64:
                files.popitem(last=False)[1].close()
        files.move_to_end(part)
        return files[part]
