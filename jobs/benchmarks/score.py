"""(a) The scoring pass on CPUs against a bare loop with the same model on decoded tensors."""

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np

from fifa_ray.config import FifaConfig, load_config
from fifa_ray.run_dir import RunDir
from jobs.benchmarks.drawn_pairs import save_random_clip, write_pairs
from jobs.benchmarks.measuring import say_machine, spread

# ViT-B/32, the smallest CLIP that people use.
VISION = {"width": 768, "layers": 12, "patch": 32, "side": 224}
BATCH = 64


@click.command()
@click.option("--pairs", default=400, help="Pairs of the larger run; the smaller has a quarter.")
@click.option("--side", default=512, help="Width and height of the JPEG images in pixels.")
@click.option("--processes", default=2, help="Actors, and processes of the bare loop.")
@click.option("--repeats", default=3, help="Timed runs of each.")
def score(pairs: int, side: int, processes: int, repeats: int) -> None:
    """Rows per second from JPEG bytes to rewards, as a share of the model's own speed.

    The rate is that of the additional rows of the larger run over the smaller one, so that starting
    actors and loading weights, the same in both, do not count.
    """
    say_machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = save_random_clip(folder / "clip", **VISION)
        few = max(1, pairs // 4)
        for count in (few, pairs):
            write_pairs(folder / f"data-{count}", count, side)
        bare, ours = [], []
        for repeat in range(repeats):
            bare.append(_bare_rate(weights, pairs, processes))
            ours.append(_our_rate(folder, weights, (few, pairs), processes, repeat))
            click.echo(f"run {repeat + 1}: bare {bare[-1]:.2f}, fifa-ray {ours[-1]:.2f} pairs/s")
    click.echo(f"bare loop on decoded tensors  {spread(bare, ' pairs/s')}")
    click.echo(f"fifa-ray from JPEG bytes      {spread(ours, ' pairs/s')}")
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    click.echo(f"ratio                         {spread(ratios)}")


def _bare_rate(weights: Path, pairs: int, processes: int) -> float:
    """Pairs per second of the model alone, in processes of one thread each."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        shares = [pairs // processes] * processes
        spans = list(pool.map(_bare_loop, [str(weights)] * processes, shares))
    start, end = max(span[0] for span in spans), min(span[1] for span in spans)
    seconds = np.mean([span[1] - span[0] for span in spans])
    assert end > start, "the processes did not run at the same time"
    return sum(shares) / float(seconds)


def _bare_loop(weights: str, pairs: int) -> tuple[float, float]:
    import torch
    from transformers import AutoTokenizer, CLIPModel

    torch.set_num_threads(1)
    model = CLIPModel.from_pretrained(weights).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    images = torch.rand(BATCH, 3, VISION["side"], VISION["side"])
    prompts = [f"picture {i} of a series of drawn scenes" for i in range(max(1, BATCH // 20))]
    with torch.inference_mode():
        model.get_image_features(pixel_values=images[:8])  # warm up
        time.sleep(1.0)
        start = time.time()
        for first in range(0, 2 * pairs, BATCH):
            batch = images[: min(BATCH, 2 * pairs - first)]
            tokens = tokenizer(prompts, return_tensors="pt", padding=True)
            text = model.get_text_features(**tokens).pooler_output
            image = model.get_image_features(pixel_values=batch).pooler_output
            torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(
                text, dim=-1
            ).T
        return start, time.time()


def _our_rate(
    folder: Path, weights: Path, counts: tuple[int, int], processes: int, repeat: int
) -> float:
    from fifa_ray.engine.cluster import connect
    from fifa_ray.engine.ingest import run_ingest
    from fifa_ray.engine.rewards import run_reward

    seconds = []
    for count in counts:
        config = _config(folder, weights, count, processes, repeat)
        connect(config.ray)
        run = RunDir(config.run_dir)
        run_ingest(run, config)
        seconds.append(run_reward(run, config, config.rewards[0]).seconds)
    return (counts[1] - counts[0]) / (seconds[1] - seconds[0])


def _config(folder: Path, weights: Path, count: int, processes: int, repeat: int) -> FifaConfig:
    actors = {"min_actors": processes, "max_actors": processes, "num_gpus": 0}
    return load_config(
        {
            "run_dir": str(folder / f"run-{count}-{repeat}"),
            "ingest": {"source": str(folder / f"data-{count}")},
            "rewards": [
                {
                    "name": "clip",
                    "kind": "pickscore",
                    "weights": str(weights),
                    "batch_size": BATCH,
                    "actors": actors,
                }
            ],
        }
    )
