"""The approximate self-join on Ray: k nearest neighbours of every vector, cell by cell.

    parts ─ fit ─► index ─ regroup ─► shards ─ seed ─► reach ─ tune ─► rule ─ join ─► distances

`regroup` sorts all vectors by cell and cuts that order into shards (`cell_shards.py`). `seed`
compares each cell with the few nearest ones of its shard, which bounds the k-th distance of every
query. On a sample of queries with their true neighbours, `tune` finds the cheapest rule that keeps
enough of them. `join` takes one shard as queries and goes through all the shards. Another sample
says what recall came out.

A join task maps two shards at a time and needs about (12 k + 4 P + 40) bytes per row of a shard and
100 MB beside. Index, rule and finished shards are kept in the partial folder. Nothing depends on
the number of CPUs, so results are the same on every cluster.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from fifa_ray.config import NeighborsConfig
from fifa_ray.engine.cell_shards import Shard, fitted_index, regroup, rows_per_shard
from fifa_ray.engine.progress import Progress
from fifa_ray.run_dir import RunDir, part_name
from fifa_ray.scoring.cell_index import (
    CellIndex,
    Sample,
    SearchRule,
    recall,
    relative_errors,
    tune,
)
from fifa_ray.scoring.neighbor_join import (
    Block,
    Floats,
    HostProducts,
    Ints,
    Join,
    Nearest,
    Products,
    cells_in_reach,
)

# Rows are first compared with about this many cells, and with at most so many rows.
_SEED_CELLS = 12
_SEED_ROWS = 8_192
# Distances nearer than this are not told apart: float32 products could not.
SETTLED_DISTANCE = 1e-3


@dataclass(frozen=True)
class JoinResult:
    """k-th distances in the order of prompts, and what they cost and are worth."""

    distances: Floats
    details: dict[str, Any]


def products_on(num_gpus: float) -> Products:
    """Matrix products on the task's GPU if it has one, else on the host."""
    if not num_gpus:
        return HostProducts()
    from fifa_ray.models.torch_products import TorchProducts

    return TorchProducts("cuda")


def approximate_distances(
    run: RunDir,
    partial: RunDir,
    parts: Sequence[tuple[str, int]],
    config: NeighborsConfig,
    seed: int,
) -> JoinResult:
    """k-th neighbour distances of all rows of `embeddings/`, given its parts (name, rows)."""
    total = sum(rows for _, rows in parts)
    index = fitted_index(run, partial, parts, config.num_lists, seed)
    num_shards = -(-total // rows_per_shard(total))
    todo = sorted(set(range(num_shards)) - {number_of(name) for name in partial.list("joined")})
    if todo:
        shards = regroup(run, parts, index)
        plan = _Plan(partial, config, ray.put(index), shards, total)
        seeds = [
            _seed.options(num_gpus=config.num_gpus).remote(s, plan.index, config) for s in shards
        ]
        rule, check = _tuned_rule(plan, seeds, index, seed)
        _join_all(plan, seeds, rule, check, todo)
    return _collected(partial, index, total)


@dataclass(frozen=True)
class _Plan:
    partial: RunDir
    config: NeighborsConfig
    index: "ray.ObjectRef[CellIndex]"
    shards: list["ray.ObjectRef[Shard]"]
    total: int

    @property
    def shard_rows(self) -> int:
        return rows_per_shard(self.total)


@ray.remote
def _seed(shard: Shard, index: CellIndex, config: NeighborsConfig) -> Nearest:
    """Each cell against the nearest cells of its shard: a first bound of every k-th distance."""
    products = products_on(config.num_gpus)
    join = Join(products, shrinkage=1.0, settled=SETTLED_DISTANCE)
    block = shard.block(products)
    nearest = Nearest(len(shard.rows), config.num_neighbors)
    cells, slices = shard.cell_slices()
    centers = index.centers_CP[cells]
    half_norm = np.einsum("cp,cp->c", centers, centers) / 2
    near = np.argsort(half_norm - centers @ centers.T, axis=1, kind="stable")
    sizes = np.array([piece.stop - piece.start for piece in slices])
    for rows, others in zip(slices, near, strict=True):
        enough = np.searchsorted(np.cumsum(sizes[others]), 4 * config.num_neighbors) + 1
        chosen = [slices[other] for other in others[: max(_SEED_CELLS, int(enough))]]
        columns = np.concatenate([np.arange(piece.start, piece.stop) for piece in chosen])
        for start in range(rows.start, rows.stop, 1024):
            some = slice(start, min(start + 1024, rows.stop))
            join.seed(nearest, block, block, some, columns[:_SEED_ROWS])
    return nearest


@ray.remote
def _take(shard: Shard, seeded: Nearest, places: Ints) -> tuple[Floats, Floats, Ints]:
    """Vectors, seeded squared k-th distances and seeded neighbours of some rows of a shard."""
    return shard.vectors[places], seeded.squared_Qk[places, -1], seeded.rows_Qk[places]


@ray.remote
def _nearest_in(
    shard: Shard, index: CellIndex, config: NeighborsConfig, vectors: Floats, reach: Floats
) -> tuple[Floats, Ints, Floats, NDArray[np.int32]]:
    """The k + 1 rows of a shard nearest to each vector: squared, row, sketch, cell.

    Exact, as far as rows are within `reach`: sketches are never farther apart than their vectors.
    """
    products = products_on(config.num_gpus)
    # Rows of no shard, so that none is taken for the query itself.
    query = Block(-len(vectors), vectors, index.sketch(vectors), products)
    nearest = Nearest(len(vectors), config.num_neighbors + 1)
    nearest.squared_Qk[:] = reach[:, None] * np.float32(1 + 1e-5) + np.float32(1e-9)
    join = Join(products, shrinkage=1.0, settled=SETTLED_DISTANCE)
    join.search(nearest, query, shard.block(products))
    found = np.maximum(nearest.rows_Qk - shard.first_row, 0)
    squared = np.where(nearest.rows_Qk < 0, np.inf, nearest.squared_Qk)
    return squared, nearest.rows_Qk, shard.sketch[found], shard.cells[found]


def _true_neighbors(
    plan: _Plan, seeds: Sequence["ray.ObjectRef[Nearest]"], rows: Ints, index: CellIndex
) -> Sample:
    """Exact neighbours of sampled rows, given by ascending places in the order of cells."""
    edges = np.searchsorted(rows, np.arange(len(plan.shards) + 1) * plan.shard_rows)
    taken = ray.get(
        [
            _take.remote(shard, seed, rows[start:stop] - number * plan.shard_rows)
            for number, (shard, seed, start, stop) in enumerate(
                zip(plan.shards, seeds, edges[:-1], edges[1:], strict=True)
            )
        ]
    )
    vectors, reach, seeded = (np.concatenate(pieces) for pieces in zip(*taken, strict=True))
    queries = ray.put(vectors), ray.put(reach)
    task = _nearest_in.options(num_gpus=plan.config.num_gpus)
    found = ray.get(
        [task.remote(shard, plan.index, plan.config, *queries) for shard in plan.shards]
    )
    squared, places, sketches, cells = (
        np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)
    )
    # The row itself is no neighbour; should its copies have crowded it out, the last one goes.
    squared = np.where(places == rows[:, None], np.inf, squared)
    kept = np.argsort(squared, axis=1, kind="stable")[:, : plan.config.num_neighbors]
    true_rows = np.take_along_axis(places, kept, axis=1)
    # A query among its copies looked no further than its seeds, which are as near as any.
    settled = (reach <= np.float32(SETTLED_DISTANCE) ** 2)[:, None]
    true_squared = np.take_along_axis(squared, kept, axis=1)
    return Sample(
        sketch_QP=index.sketch(vectors),
        reach_Q=reach,
        seeded_Qk=settled | (true_rows[:, :, None] == seeded[:, None, :]).any(axis=2),
        true_squared_Qk=np.where(settled, reach[:, None], true_squared),
        true_sketch_QkP=np.take_along_axis(sketches, kept[:, :, None], axis=1),
        true_cells_Qk=np.take_along_axis(cells, kept, axis=1),
    )


@dataclass(frozen=True)
class _Check:
    """Rows whose recall is measured (places in the order of cells), and their true distances."""

    rows: Ints
    true_squared_Qk: Floats


def _tuned_rule(
    plan: _Plan, seeds: Sequence["ray.ObjectRef[Nearest]"], index: CellIndex, seed: int
) -> tuple[SearchRule, _Check]:
    if plan.partial.exists("rule.json"):
        return _kept_rule(plan.partial)
    size = min(2 * plan.config.recall_sample, plan.total)
    rows = np.sort(np.random.default_rng(seed + 2).choice(plan.total, size, replace=False))
    sample = _true_neighbors(plan, seeds, rows, index)
    # Every second one tunes, the others measure what came out.
    tuning = Sample(*(getattr(sample, field.name)[::2] for field in fields(Sample)))
    rule = tune(tuning, index, plan.config.target_recall, plan.config.num_probes)
    check = _Check(rows[1::2], sample.true_squared_Qk[1::2])
    plan.partial.write_table(
        pa.table({"row": check.rows, "squared": _lists(check.true_squared_Qk)}), "check.parquet"
    )
    plan.partial.write_text(json.dumps(asdict(rule)), "rule.json")
    return rule, check


def _kept_rule(partial: RunDir) -> tuple[SearchRule, _Check]:
    rule = SearchRule(**json.loads(partial.read_text("rule.json")))
    table = partial.read_table("check.parquet")
    return rule, _Check(table.column("row").to_numpy(), _matrix(table.column("squared")))


def _join_all(
    plan: _Plan,
    seeds: Sequence["ray.ObjectRef[Nearest]"],
    rule: SearchRule,
    check: _Check,
    todo: Sequence[int],
) -> None:
    left = sum(min(plan.shard_rows, plan.total - n * plan.shard_rows) for n in todo)
    progress = Progress("neighbors", plan.total, done=plan.total - left)
    task = _join_shard.options(num_gpus=plan.config.num_gpus)
    waiting = [task.remote(plan, rule, check.rows, seeds[number], number) for number in todo]
    while waiting:
        finished, waiting = ray.wait(waiting)
        progress.advance(sum(ray.get(finished)))
    progress.close()


@ray.remote
def _join_shard(
    plan: _Plan, rule: SearchRule, check_rows: Ints, seeded: Nearest, number: int
) -> int:
    """Compare one shard with all, and write its distances and those of its rows to be checked."""
    products = products_on(plan.config.num_gpus)
    join = Join(products, rule.shrinkage, SETTLED_DISTANCE)
    index: CellIndex = ray.get(plan.index)
    own: Shard = ray.get(plan.shards[number])
    query = own.block(products)
    nearest = seeded.copy()
    # By the seeds alone, as tuned: what is searched does not depend on what was found meanwhile.
    threshold = join.limits(seeded, rule.cell_shrinkage)
    margin = np.float32(rule.deviations) * index.spread_C
    compared = 0
    for other in sorted(range(len(plan.shards)), key=lambda n: abs(n - number)):
        shard: Shard = ray.get(plan.shards[other])
        cells, slices = shard.cell_slices()
        centers, margins = index.centers_CP[cells], margin[cells]
        work = cells_in_reach(products, query, threshold, centers, margins, slices)
        compared += join.join(nearest, query, shard.block(products), work)
    places = np.flatnonzero(np.isin(own.first_row + np.arange(len(own.rows)), check_rows))
    plan.partial.write_table(
        pa.table({"row": own.first_row + places, "squared": _lists(nearest.squared_Qk[places])}),
        "checked",
        part_name(number),
    )
    joined = pa.table({"row": own.rows, "distance": np.sqrt(nearest.squared_Qk[:, -1])})
    joined = joined.append_column(
        "compared", pa.array(np.full(len(joined), compared // len(joined)))
    )
    plan.partial.write_table(joined, "joined", part_name(number))
    return len(joined)


def _collected(partial: RunDir, index: CellIndex, total: int) -> JoinResult:
    rule, check = _kept_rule(partial)
    joined = partial.read_table("joined")
    distances = np.full(total, np.nan, np.float32)
    distances[joined.column("row").to_numpy()] = joined.column("distance").to_numpy()
    found = np.sqrt(_matrix(partial.read_table("checked").column("squared")))
    true = np.sqrt(check.true_squared_Qk)
    error = relative_errors(found[:, -1], true[:, -1], SETTLED_DISTANCE)
    return JoinResult(
        distances,
        {
            "num_lists": index.num_cells,
            "num_probes": round(rule.num_probes, 2),
            "recall": recall(found, true, SETTLED_DISTANCE),
            "recall_sample": len(true),
            "relative_error_median": float(np.median(error)),
            "relative_error_p95": float(np.quantile(error, 0.95)),
            "compared_fraction": float(joined.column("compared").to_numpy().mean() / total),
            "sketch_width": index.axes_DA.shape[1] + 1,
            "search_rule": asdict(rule),
        },
    )


def number_of(name: str) -> int:
    """The index in the name of a part."""
    return int(name.removeprefix("part-").removesuffix(".parquet"))


def _lists(matrix: Floats) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> Floats:
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    width = column.type.list_size
    result: Floats = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return result
