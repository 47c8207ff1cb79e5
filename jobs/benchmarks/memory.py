"""(d) Peak memory of the driver and of a worker while images stream through the reward stage."""

import os
import tempfile
from pathlib import Path

import click

from fifa_ray.config import load_config
from fifa_ray.run_dir import RunDir
from jobs.benchmarks.drawn_pairs import save_random_clip, write_pairs
from jobs.benchmarks.measuring import MEGABYTE, descendants, peak_memory, say_machine

# Small pictures of much detail: 20 KB each, and little time to decode.
SIDE = 124
SAMPLE_SECONDS = 1.0


@click.command()
@click.option("--pairs", default="20000,60000,200000", help="Sizes to compare, comma-separated.")
@click.option("--image-bytes", default=20_000, help="Size of an image as JPEG.")
@click.option("--folder", default=None, help="Where to put the data; temporary if unset.")
def memory(pairs: str, image_bytes: int, folder: str | None) -> None:
    """Peak memory for growing datasets: flat, if streaming works."""
    say_machine()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        base = Path(temporary)
        weights = save_random_clip(base / "clip", width=64, layers=1, patch=32, side=64)
        click.echo(
            f"{'pairs':>10} {'driver MB':>10} {'a worker MB':>12} {'object store MB':>16} {'s':>8}"
        )
        for count in (int(text) for text in pairs.split(",")):
            data = base / "data"
            write_pairs(data, count, side=SIDE, target_bytes=image_bytes, num_files=8)
            driver, worker, store, seconds = _measure(base, data, weights, count)
            click.echo(f"{count:10,} {driver:10,.0f} {worker:12,.0f} {store:16,.0f} {seconds:8.0f}")
            for file in data.iterdir():
                file.unlink()


def _measure(
    base: Path, data: Path, weights: Path, count: int
) -> tuple[float, float, float, float]:
    """Peak MB of the driver, of the largest scoring worker and of the store; stage seconds."""
    from fifa_ray.engine.cluster import connect
    from fifa_ray.engine.ingest import run_ingest
    from fifa_ray.engine.rewards import run_reward

    config = load_config(
        {
            "run_dir": str(base / f"run-{count}"),
            "ingest": {"source": str(data)},
            "rewards": [{"name": "clip", "kind": "pickscore", "weights": str(weights)}],
        }
    )
    connect(config.ray)
    run = RunDir(config.run_dir)
    run_ingest(run, config)
    me = os.getpid()
    cluster = descendants(me)
    with (
        peak_memory(lambda pid, _: pid == me, every_seconds=SAMPLE_SECONDS) as driver,
        peak_memory(
            lambda pid, command: "MapWorker" in command, each=True, every_seconds=SAMPLE_SECONDS
        ) as worker,
        peak_memory(
            lambda pid, command: pid in cluster and "raylet" in command,
            every_seconds=SAMPLE_SECONDS,
        ) as store,
    ):
        manifest = run_reward(run, config, config.rewards[0])
    peaks = [peak.total / MEGABYTE for peak in (driver, worker, store)]
    return peaks[0], peaks[1], peaks[2], manifest.seconds
