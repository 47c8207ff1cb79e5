"""The few rows that a selection needs, by their place or their prompt: no more is read for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from fifa_ray import schema
from fifa_ray.engine.part_reader import batches, open_part, part_task, to_arrow, to_numpy
from fifa_ray.run_dir import RunDir, part_name

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Lookup:
    """Rows of pairs/ and texts of prompts/ that are needed, sorted by their ids."""

    pairs: pa.Table
    prompts: pa.Table

    def rows_of(self, pair_ids: np.ndarray) -> pa.Table:
        """Rows of pairs/, in the order of these ids."""
        return self.pairs.take(_positions(self.pairs.column("pair_id"), pair_ids))

    def texts_of(self, prompt_ids: np.ndarray) -> pa.ChunkedArray:
        """Prompts, in the order of these ids."""
        at = _positions(self.prompts.column("prompt_id"), prompt_ids)
        return self.prompts.column("prompt").take(at)


def _positions(known: pa.ChunkedArray, wanted: np.ndarray) -> pa.Array:
    """Where ids are in a sorted column that holds them all."""
    return to_arrow(np.searchsorted(to_numpy(known), wanted))


def look_up_pairs(run: RunDir, chosen: Sequence[Columns]) -> Lookup:
    """Read what is needed of pairs/ and prompts/ once, and only the row groups that hold it."""
    part = np.concatenate([columns["part"] for columns in chosen])
    row = np.concatenate([columns["row"] for columns in chosen])
    refs = [
        _take_rows.remote(run, part_name(int(index)), np.unique(row[part == index]))
        for index in np.unique(part)
    ]
    prompt_ids = np.unique(np.concatenate([columns["prompt_id"] for columns in chosen]))
    prompts = _rows_with_ids(run, "prompts", ["prompt_id", "prompt"], prompt_ids)
    return Lookup(_gather(refs).sort_by("pair_id"), prompts)


def _gather(refs: Sequence["ray.ObjectRef[list[pa.RecordBatch]]"]) -> pa.Table:
    """One table of what tasks picked; as batches, since sending Arrow tables imports pandas."""
    picked = [batch for found in ray.get(list(refs)) for batch in found]
    return pa.Table.from_batches(picked).unify_dictionaries().combine_chunks()


@part_task
def _take_rows(run: RunDir, part: str, rows: np.ndarray) -> list[pa.RecordBatch]:
    file = open_part(run, "pairs", part)
    lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ends = np.cumsum(lengths)
    taken = []
    for index in np.unique(np.searchsorted(ends, rows, side="right")):
        start = int(ends[index] - lengths[index])
        for batch in batches(file, row_groups=[int(index)]):
            stop = start + len(batch)
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            if len(inside):
                taken.append(batch.take(to_arrow(inside - start)))
            start = stop
    return taken


def _rows_with_ids(run: RunDir, table: str, columns: list[str], prompt_ids: np.ndarray) -> pa.Table:
    """Rows of a table by prompt_id, sorted by it; row groups that hold none are not read."""
    wanted = ray.put(np.sort(prompt_ids))
    refs = [_rows_of_part.remote(run, table, part, columns, wanted) for part in run.list(table)]
    return _gather(refs).sort_by("prompt_id")


@part_task
def _rows_of_part(
    run: RunDir, table: str, part: str, columns: list[str], wanted: np.ndarray
) -> list[pa.RecordBatch]:
    """Rows of one part with these ids (sorted), a batch in memory at a time."""
    file = open_part(run, table, part)
    place = file.schema_arrow.get_field_index("prompt_id")
    taken = []
    for index in range(file.num_row_groups):
        statistics = file.metadata.row_group(index).column(place).statistics
        if statistics is not None and statistics.has_min_max:
            first = np.searchsorted(wanted, statistics.min)
            if first == np.searchsorted(wanted, statistics.max, side="right"):
                continue
        for batch in batches(file, columns, [index]):
            ids = to_numpy(batch.column("prompt_id"))
            at = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
            kept = np.flatnonzero(wanted[at] == ids)
            if len(kept):
                taken.append(batch.take(to_arrow(kept)))
    return taken


def read_embeddings(run: RunDir, prompt_ids: np.ndarray) -> np.ndarray:
    """float32 (N, D) embeddings of these distinct prompts, in their order."""
    table = _rows_with_ids(run, "embeddings", ["prompt_id", "embedding"], np.sort(prompt_ids))
    return schema.embedding_matrix(table.take(_positions(table.column("prompt_id"), prompt_ids)))
