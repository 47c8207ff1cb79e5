"""(c) Select the best K of millions of scored pairs: this engine against polars in memory."""

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import pyarrow as pa

from fifa_ray import schema
from fifa_ray.config import FifaConfig, load_config
from fifa_ray.run_dir import Manifest, RunDir, part_name
from jobs.benchmarks.measuring import (
    MEGABYTE,
    Peak,
    is_own_process,
    peak_memory,
    say_machine,
    spread,
    timed,
)

PAIRS_PER_PROMPT = 14  # Pick-a-Pic v2
ROWS_PER_PART = 250_000


@click.command()
@click.option("--pairs", default=10_000_000, help="Scored pairs.")
@click.option("--selection-size", default=5000, help="K.")
@click.option("--repeats", default=3, help="Timed runs of each.")
@click.option(
    "--folder", default=None, help="Where to put the tables; a temporary folder if unset."
)
def select(pairs: int, selection_size: int, repeats: int, folder: str | None) -> None:
    """Time and peak memory of `select`, and that both choose the same pairs."""
    say_machine()
    with tempfile.TemporaryDirectory() as temporary:
        run = RunDir(folder or temporary)
        if run.manifest("neighbors") is None:
            write_tables(run, pairs)
        config = load_config(
            {
                "run_dir": run.uri,
                "ingest": {"source": "unused"},
                "rewards": [{"name": "drawn"}],
                "select": {"selection_size": selection_size, "images": False, "compare": []},
                "report": {"enabled": False},
            }
        )
        context = get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            seconds, peak, chosen = process.submit(_with_polars, run.uri, config, repeats).result()
        # Each in a process of its own, which holds nothing but what it needs.
        with ProcessPoolExecutor(1, mp_context=context) as process:
            ours, our_peak, our_chosen = process.submit(_with_ray, run, config, repeats).result()
    click.echo(f"{pairs:,} pairs, K = {selection_size:,}, {repeats} runs")
    click.echo(f"polars in memory  {spread(seconds, ' s')}  peak {peak / MEGABYTE:,.0f} MB")
    working = our_peak.total / MEGABYTE
    parts = {name: size for name, size in sorted(our_peak.by_name.items(), key=lambda i: -i[1])}
    click.echo(f"fifa-ray          {spread(ours, ' s')}  peak {working:,.0f} MB, of which:")
    for name, size in parts.items():
        click.echo(f"    {name:30} {size / MEGABYTE:8,.0f} MB")
    click.echo(f"same {selection_size:,} pairs: {chosen == our_chosen}")
    click.echo(
        f"time ratio {np.median(ours) / np.median(seconds):.2f}, "
        f"memory ratio {our_peak.total / peak:.2f}"
    )


def write_tables(run: RunDir, num_pairs: int) -> None:
    """Drawn scores in the layout of a run: what `select` reads, nothing else."""
    rng = np.random.default_rng(0)
    num_prompts = num_pairs // PAIRS_PER_PROMPT
    ids = np.unique(rng.integers(-(2**63), 2**63, num_prompts))
    prompts = {
        "prompts": pa.table(
            [ids, [f"prompt {i}" for i in range(len(ids))], np.full(len(ids), PAIRS_PER_PROMPT)],
            schema=schema.PROMPTS,
        ),
        "quality": pa.table(
            [
                ids,
                rng.uniform(0, 10, len(ids)).astype(np.float32),
                rng.random(len(ids)) < 0.02,
                pa.nulls(len(ids), pa.string()),
                [""] * len(ids),
                pa.nulls(len(ids), pa.string()),
            ],
            schema=schema.QUALITY,
        ),
        "neighbors": pa.table(
            [
                ids,
                rng.uniform(0.1, 1, len(ids)).astype(np.float32),
                rng.normal(-1, 0.4, len(ids)).astype(np.float32),
            ],
            schema=schema.NEIGHBORS,
        ),
        "embeddings": pa.table(
            [
                ids,
                pa.FixedSizeListArray.from_arrays(
                    rng.normal(size=4 * len(ids)).astype(np.float32), 4
                ),
            ],
            schema=schema.embeddings_schema(4),
        ),
    }
    for name, table in prompts.items():
        run.write_table(table, name, part_name(0))
    for index, start in enumerate(range(0, num_pairs, ROWS_PER_PART)):
        _write_pair_part(run, index, np.arange(start, min(start + ROWS_PER_PART, num_pairs)), ids)
    for stage in ("pairs", "rewards/drawn", *prompts):
        run.publish(Manifest(stage=stage, fingerprint="drawn", rows_in=0, rows_out=0))


def _write_pair_part(run: RunDir, index: int, rows: np.ndarray, ids: np.ndarray) -> None:
    rng = np.random.default_rng(index + 1)
    pair_id = schema.make_pair_id(0, rows)
    # Pairs of one prompt lie near each other, as people label them in one sitting.
    prompt = np.clip(rows // PAIRS_PER_PROMPT + rng.integers(-50, 50, len(rows)), 0, len(ids) - 1)
    shuffled = (prompt * 2_654_435_761) % len(ids)
    nothing = pa.nulls(len(rows), pa.string())
    pairs = pa.table(
        [
            pair_id,
            ids[shuffled],
            pa.array(["part.parquet"]).dictionary_encode().take(pa.array(np.zeros(len(rows), int))),
            rows,
            (rows // 500).astype(np.int32),
            ["jpg_0"] * len(rows),
            ["jpg_1"] * len(rows),
            nothing,
            nothing,
            nothing,
            nothing,
            nothing,
        ],
        schema=schema.PAIRS,
    )
    run.write_table(pairs, "pairs", part_name(index))
    chosen, rejected = rng.normal(20.3, 1, (2, len(rows))).astype(np.float32)
    rewards = pa.table([pair_id, chosen, rejected, chosen - rejected], schema=schema.REWARDS)
    run.write_table(rewards, "rewards", "drawn", part_name(index))


def _with_polars(uri: str, config: FifaConfig, repeats: int) -> tuple[list[float], int, list[int]]:
    """The same selection in polars, everything in memory: seconds, peak bytes, pair ids."""
    import polars as pl

    select = config.select
    chosen: list[int] = []

    def work() -> None:
        pairs = pl.read_parquet(f"{uri}/pairs/*.parquet", columns=["pair_id", "prompt_id"])
        rewards = pl.read_parquet(
            f"{uri}/rewards/drawn/*.parquet", columns=["pair_id", "reward_margin"]
        )
        quality = pl.read_parquet(
            f"{uri}/quality/*.parquet", columns=["prompt_id", "prompt_quality", "harmful"]
        )
        neighbors = pl.read_parquet(
            f"{uri}/neighbors/*.parquet", columns=["prompt_id", "log_kth_neighbor_distance"]
        )
        kept = (
            pairs.join(rewards, on="pair_id")
            .join(quality, on="prompt_id")
            .join(neighbors, on="prompt_id")
            .filter(~pl.col("harmful") & pl.col("prompt_quality").is_not_null())
        )

        def z(name: str) -> pl.Expr:
            column = pl.col(name).cast(pl.Float64)
            return (column - column.mean()) / column.std(ddof=0)

        score = (
            select.margin_weight * z("reward_margin")
            + select.quality_weight * z("prompt_quality")
            + select.diversity_weight * z("log_kth_neighbor_distance")
        )
        top = kept.select("pair_id", score.alias("score")).top_k(
            select.selection_size, by=["score", -pl.col("pair_id")]
        )
        ordered = top.sort(["score", "pair_id"], descending=[True, False])
        chosen[:] = ordered["pair_id"].to_list()

    me = os.getpid()
    with peak_memory(lambda pid, _: pid == me) as peak:
        seconds = [timed(work) for _ in range(repeats)]
    return seconds, peak.total, chosen


def _with_ray(run: RunDir, config: FifaConfig, repeats: int) -> tuple[list[float], Peak, list[int]]:
    """Our selection on a local Ray: seconds, peak of the driver, workers and object store."""
    from fifa_ray.engine.cluster import connect
    from fifa_ray.engine.select import run_select

    # polars runs at this process's priority; Ray would give its workers a lower one.
    os.environ.setdefault("RAY_worker_niceness", "0")
    connect(config.ray)
    run_select(run, config)  # starts the workers: a cluster's start is not what is measured
    me, is_own = os.getpid(), is_own_process()

    def is_mine(pid: int, command: str) -> bool:
        counts = "ray::" in command or pid == me or "raylet" in command
        return counts and is_own(pid, command)

    seconds = []
    with peak_memory(is_mine) as peak:
        for _ in range(repeats):
            run.invalidate("selected")
            seconds.append(timed(lambda: run_select(run, config)))
    chosen = run.read_table("selected", columns=["pair_id"]).column(0).to_pylist()
    assert Path(run.root).is_dir()
    return seconds, peak, chosen
