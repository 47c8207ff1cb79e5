"""Vectors sorted by cell: an index fitted on a sample, and shards of rows in Ray's object store.

Cells near each other have near numbers, so a shard is a region. A crowded cell is simply cut, so no
shard is larger than the others. Takes 4 (D + P) bytes a vector of the object store, which spills to
disk, and twice that while regrouping.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import ray
from numpy.typing import NDArray

from fifa_ray import schema
from fifa_ray.run_dir import RunDir
from fifa_ray.scoring.cell_index import (
    CellIndex,
    cell_spread,
    principal_axes,
    sketch,
    spatial_order,
)
from fifa_ray.scoring.neighbor_join import Block, Floats, Ints, Products

_AXES_SAMPLE = 20_000
# Cells, as a multiple of the square root of the rows: more make the search finer and the index
# dearer. Few rows and rounds are enough to place them.
_CELLS = 8
_ROWS_PER_CENTER = 16
_KMEANS_ITERATIONS = 4
_SHARDS = 16
_SHARD_ROWS = (4_096, 262_144)


@dataclass(frozen=True)
class Shard:
    """Consecutive rows in the order of cells; `rows` are their places in the order of prompts."""

    first_row: int
    rows: Ints
    cells: NDArray[np.int32]
    vectors: Floats
    sketch: Floats

    def block(self, products: Products) -> Block:
        """What the kernel takes."""
        return Block(self.first_row, self.vectors, self.sketch, products)

    def cell_slices(self) -> tuple[NDArray[np.int32], list[slice]]:
        """The cells that the shard has rows of, and where those are."""
        starts = np.flatnonzero(np.diff(self.cells, prepend=-1))
        stops = np.append(starts[1:], len(self.cells))
        return self.cells[starts], [
            slice(int(a), int(b)) for a, b in zip(starts, stops, strict=True)
        ]


def read_vectors(run: RunDir, part: str) -> Floats:
    """The embeddings (rows, D) of one part; raises ValueError unless they are unit vectors."""
    vectors = schema.embedding_matrix(run.read_table("embeddings", part, columns=["embedding"]))
    norms = np.einsum("nd,nd->n", vectors, vectors)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if len(wrong):
        raise ValueError(
            f"expected unit vectors in {run.path('embeddings', part)}, found one of length "
            f"{math.sqrt(norms[wrong[0]]):.4g} in row {wrong[0]}; run the embed stage again"
        )
    return vectors


def rows_per_shard(total: int) -> int:
    """A sixteenth of all rows, between 4,096 and 262,144."""
    return int(np.clip(-(-total // _SHARDS), *_SHARD_ROWS))


def fitted_index(
    run: RunDir, partial: RunDir, parts: Sequence[tuple[str, int]], num_cells: int | None, seed: int
) -> CellIndex:
    """The index of all parts (name, rows), fitted on a sample, or the one kept in `partial`.

    Fitting takes one core and about C * 16 * 4 (D + 2 P) bytes.
    """
    if partial.exists("index.npz"):
        with partial.filesystem.open_input_stream(partial.path("index.npz")) as stream:
            return CellIndex.from_bytes(stream.read())
    total = sum(rows for _, rows in parts)
    num_cells = min(num_cells or max(1, round(_CELLS * math.sqrt(total))), total)
    size = min(total, max(_AXES_SAMPLE, num_cells * _ROWS_PER_CENTER))
    chosen = np.sort(np.random.default_rng(seed).choice(total, size, replace=False))
    starts = np.cumsum([0, *(rows for _, rows in parts)])
    pieces = [
        _sampled_vectors.remote(run, name, chosen[(chosen >= start) & (chosen < stop)] - start)
        for (name, _), start, stop in zip(parts, starts[:-1], starts[1:], strict=True)
    ]
    index: CellIndex = ray.get(_fit.remote(num_cells, seed, *pieces))
    with partial.open_atomic("index.npz") as stream:
        stream.write(index.to_bytes())
    return index


@ray.remote
def _sampled_vectors(run: RunDir, part: str, rows: Ints) -> Floats:
    return read_vectors(run, part)[rows]


@ray.remote
def _fit(num_cells: int, seed: int, *pieces: Floats) -> CellIndex:
    vectors = np.concatenate(pieces)
    order = np.random.default_rng(seed).permutation(len(vectors))
    axes = principal_axes(vectors[order[:_AXES_SAMPLE]])
    sketches = sketch(vectors[order[: max(num_cells * _ROWS_PER_CENTER, num_cells)]], axes)
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(
        sketches.shape[1],
        num_cells,
        niter=_KMEANS_ITERATIONS,
        seed=seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=_ROWS_PER_CENTER,
    )
    kmeans.train(sketches)
    centers: Floats = kmeans.centroids  # type: ignore[assignment]
    centers = np.ascontiguousarray(centers[spatial_order(centers)])
    index = CellIndex(axes, centers, np.ones(num_cells, np.float32))
    return replace(index, spread_C=cell_spread(sketches, index.assign(sketches), centers))


def regroup(
    run: RunDir, parts: Sequence[tuple[str, int]], index: CellIndex
) -> list["ray.ObjectRef[Shard]"]:
    """All rows in the order of cells, cut into shards of equal length in the object store."""
    total = sum(rows for _, rows in parts)
    shard_rows = rows_per_shard(total)
    num_shards = -(-total // shard_rows)
    index_ref = ray.put(index)
    assigned: list[Any] = [
        _assign.options(num_returns=2).remote(run, name, index_ref) for name, _ in parts
    ]
    counts = np.stack(ray.get([count for _, count in assigned]))
    # Places of a part's rows of a cell: after the smaller cells, and after the parts before it.
    start_of_cell = np.concatenate([[0], np.cumsum(counts.sum(axis=0))[:-1]])
    starts = start_of_cell + np.cumsum(counts, axis=0) - counts
    row_starts = np.cumsum([0, *(rows for _, rows in parts)])
    pieces: list[list[Any]] = []
    for place, ((name, _), (cells, _)) in enumerate(zip(parts, assigned, strict=True)):
        split: Any = _split.options(num_returns=num_shards).remote(
            run, name, cells, starts[place], int(row_starts[place]), shard_rows, num_shards
        )
        pieces.append([split] if num_shards == 1 else split)
    return [
        _gather.remote(shard * shard_rows, index_ref, *(split[shard] for split in pieces))
        for shard in range(num_shards)
    ]


@ray.remote
def _assign(
    run: RunDir, part: str, index: CellIndex
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    cells = index.assign(index.sketch(read_vectors(run, part)))
    return cells, np.bincount(cells, minlength=index.num_cells)


@ray.remote
def _split(
    run: RunDir,
    part: str,
    cells: NDArray[np.int32],
    starts: Ints,
    first_row: int,
    shard_rows: int,
    num_shards: int,
) -> Any:
    """For each shard: the places, row numbers, cells and vectors that this part gives it."""
    vectors = read_vectors(run, part)
    order = np.argsort(cells, kind="stable")
    ranked = cells[order]
    within = np.arange(len(ranked)) - np.searchsorted(ranked, ranked)
    places = starts[ranked] + within
    cuts = np.searchsorted(places, np.arange(1, num_shards) * shard_rows)
    pieces = [
        (places[group], first_row + order[group], ranked[group], vectors[order[group]])
        for group in np.split(np.arange(len(places)), cuts)
    ]
    return pieces[0] if num_shards == 1 else pieces


@ray.remote
def _gather(first_row: int, index: CellIndex, *pieces: Any) -> Shard:
    places = np.concatenate([piece[0] for piece in pieces]) - first_row
    rows = np.empty(len(places), np.int64)
    cells = np.empty(len(places), np.int32)
    vectors = np.empty((len(places), index.axes_DA.shape[0]), np.float32)
    start = 0
    for piece in pieces:
        here = places[start : start + len(piece[0])]
        rows[here], cells[here], vectors[here] = piece[1], piece[2], piece[3]
        start += len(piece[0])
    return Shard(first_row, rows, cells, vectors, index.sketch(vectors))
