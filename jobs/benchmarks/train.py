"""(e) Training: pairs a second and memory against the plain loop, the cache, and two workers."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from fifa_ray.config import load_config
from fifa_ray.run_dir import RunDir
from jobs.benchmarks.drawn_pairs import write_pairs
from jobs.benchmarks.measuring import MEGABYTE, peak_memory, say_machine, spread
from jobs.benchmarks.sized_pipeline import SIZES, Size, save_sized_pipeline

WARMUP_STEPS = 2


@click.command()
@click.option("--size", default="small", type=click.Choice(sorted(SIZES)), help="Of the pipeline.")
@click.option("--pairs", default=64, help="Pairs of the dataset.")
@click.option("--steps", default=12, help="Timed optimizer steps.")
@click.option("--batch", default=4, help="Pairs per optimizer step.")
@click.option("--repeats", default=3, help="Timed runs of each, in turn.")
@click.option("--workers", default=2, help="Workers of the last comparison; 1 leaves it out.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
def train(
    size: str, pairs: int, steps: int, batch: int, repeats: int, workers: int, device: str
) -> None:
    """Pairs per second and peak memory: LoRA and full, cached and not, against the plain loop."""
    say_machine()
    shape = SIZES[size]
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        save_sized_pipeline(base / "pipeline", shape)
        write_pairs(base / "data", pairs, side=shape.side, num_files=1)
        kinds: dict[str, dict[str, Any]] = {
            "plain loop, LoRA": {},
            "LoRA, cached": {"lora": {"rank": 8}, "cache_latents": True},
            "LoRA, on the fly": {"lora": {"rank": 8}, "cache_latents": False},
            "full, cached": {"cache_latents": True},
        }
        if workers > 1:
            # As many pairs for each worker: what the exchange of gradients costs.
            kinds[f"full, cached, {workers} workers"] = {
                "cache_latents": True,
                "num_workers": workers,
                "global_batch_size": workers * batch,
            }
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        memory: dict[str, list[float]] = {kind: [] for kind in kinds}
        cache: list[float] = []
        for repeat in range(repeats):
            for kind, settings in kinds.items():
                if kind.startswith("plain"):
                    rate, size_bytes = _plain(base, shape, steps, batch, device)
                else:
                    run = RunDir(str(base / f"run-{repeat}-{len(rates[kind])}-{abs(hash(kind))}"))
                    rate, size_bytes, cached = _engine(
                        run, base, shape, steps, batch, device, settings
                    )
                    cache += [cached] if cached else []
                rates[kind].append(rate)
                memory[kind].append(size_bytes / MEGABYTE)
        plain = "plain loop, LoRA"
        for kind in kinds:
            ratios = [mine / other for mine, other in zip(rates[kind], rates[plain], strict=True)]
            shares = [mine / other for mine, other in zip(memory[kind], memory[plain], strict=True)]
            click.echo(
                f"{kind:26} {spread(rates[kind], ' pairs/s')}, {spread(memory[kind], ' MB', 0)}; "
                f"against the plain loop: rate {spread(ratios)}, memory {spread(shares)}"
            )
        click.echo(f"cache of latents: {spread(cache, ' images/s', 1)}, model loading included")


def _plain(base: Path, shape: Size, steps: int, batch: int, device: str) -> tuple[float, float]:
    """Pairs per second, and peak bytes of the GPU or of the process."""
    command = [
        sys.executable, "-m", "jobs.benchmarks.plain_dpo", str(base / "pipeline"),
        str(base / "data"), "--steps", str(steps), "--warmup", str(WARMUP_STEPS), "--batch",
        str(batch), "--side", str(shape.side), "--device", device, "--dtype",
        "float32" if device == "cpu" else "bfloat16",
    ]  # fmt: skip
    with peak_memory(lambda _, line: "jobs.benchmarks.plain_dpo" in line, each=True) as peak:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return found["pairs_per_second"], found["gpu_bytes"] or peak.total


def _engine(
    run: RunDir,
    base: Path,
    shape: Size,
    steps: int,
    batch: int,
    device: str,
    settings: dict[str, Any],
) -> tuple[float, float, float | None]:
    """Pairs per second after the warm-up, peak bytes of one worker, images per second cached."""
    from fifa_ray.engine.cluster import connect
    from fifa_ray.engine.ingest import run_ingest
    from fifa_ray.engine.train import run_train
    from fifa_ray.engine.train_metrics import read_metrics

    config = load_config(
        {
            "run_dir": run.uri,
            "ingest": {"source": str(base / "data")},
            "train": {
                "model": str(base / "pipeline"),
                "data": "pairs",
                "resolution": shape.side,
                "random_flip": False,
                "max_steps": WARMUP_STEPS + steps,
                "global_batch_size": batch,
                "per_device_batch_size": batch,
                "log_every": 1,
                "checkpoint_every": 10_000,
                "use_gpu": device == "cuda",
            }
            | settings,
        }
    )
    connect(config.ray)
    run_ingest(run, config)
    with peak_memory(lambda _, line: "RayTrainWorker" in line, each=True) as peak:
        manifest = run_train(run, config)
    lines = [line for line in read_metrics(run, manifest.stage) if line["kind"] == "train"]
    timed = lines[WARMUP_STEPS:]
    size = config.train.global_batch_size
    seconds = sum(size / line["pairs_per_second"] for line in timed)
    cached = None
    if config.train.cache_latents:
        stage = next(m for name, m in run.manifests().items() if name.startswith("latents/"))
        cached = stage.rows_out / stage.seconds
    return (
        len(timed) * size / seconds,
        max(line["gpu_memory_bytes"] for line in lines) or peak.total,
        cached,
    )
