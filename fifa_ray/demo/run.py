"""`fifa demo`: make a world, filter it as any dataset, align a model, hold both to the truth."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fifa_ray.config import FifaConfig, load_config
from fifa_ray.demo.align import PIPELINE_WEIGHTS, align, alignment_figures, alignment_lines
from fifa_ray.demo.packaged import JUDGE_ADAPTER, judge_folder, text_encoder_folder
from fifa_ray.demo.proof import Proof, proof_lines, prove
from fifa_ray.demo.world import generate_world
from fifa_ray.pipeline import run_filter
from fifa_ray.report import write_report
from fifa_ray.run_dir import RunDir

logger = logging.getLogger(__name__)

REWARD_WEIGHTS = Path(__file__).parent / "weights" / "reward"
WORLD_PAIRS = 24_000
WORLD_PROMPTS = 2_200
WORLD_SEED = 0


def run_demo(
    run_dir: str,
    overrides: Sequence[str] = (),
    *,
    num_pairs: int = WORLD_PAIRS,
    num_prompts: int = WORLD_PROMPTS,
    train: bool = True,
) -> tuple[RunDir, list[str]]:
    """Filter the embedded world into `run_dir`, and with `train` align the tiny model with it.

    Returns the run and what it proves, as lines. Filter and training see the dataset alone; the
    truth beside it is read when they have finished.
    """
    world = make_world(Path(run_dir) / "world", num_pairs, num_prompts)
    config = demo_config(run_dir, world, overrides)
    run = run_filter(config, write_page=False)
    proof = prove_run(run, world)
    lines, figures = proof_lines(proof), proof_for_report(proof)
    run.write_text(json.dumps(figures, indent=2), "proof.json")
    if train:
        trainings, results = align(run, config)
        lines += ["", *alignment_lines(trainings, results, config.train.global_batch_size)]
        figures = alignment_figures(trainings, results) | figures
        run.write_text(json.dumps(figures, indent=2), "proof.json")
    write_report(run)
    return run, lines


def make_world(folder: Path, num_pairs: int, num_prompts: int) -> Path:
    """Generate the world into a folder, unless it is there already, whole and of this size."""
    complete = folder / "complete.json"
    settings = {"num_pairs": num_pairs, "num_prompts": num_prompts, "seed": WORLD_SEED}
    wanted = json.dumps(settings)
    if not (complete.is_file() and complete.read_text() == wanted):
        logger.info("demo: drawing %s pairs of images into %s", f"{num_pairs:,}", folder)
        shutil.rmtree(folder, ignore_errors=True)
        generate_world(folder, **settings)
        complete.write_text(wanted)
    return folder


def demo_config(run_dir: str, world: Path, overrides: Sequence[str] = ()) -> FifaConfig:
    """The preset `demo` with the paths of the world and of the packaged models filled in."""
    paths = {
        "run_dir": run_dir,
        "ingest.source": world / "data",
        "rewards.0.weights": REWARD_WEIGHTS,
        "judge.model": judge_folder(),
        "judge.options.adapter": JUDGE_ADAPTER,
        "embed.model": text_encoder_folder(),
        "train.model": PIPELINE_WEIGHTS,
    }
    filled = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
    return load_config("demo", [*filled, *overrides])


def prove_run(run: RunDir, world: Path) -> Proof:
    """Hold the kept pairs and as many random ones to the world's truth."""
    columns = ["source_id", "prompt_id"]
    return prove(
        run.read_table("selected", columns=columns),
        run.read_table("baselines", "random", columns=columns),
        pq.read_table(world / "truth" / "pairs.parquet"),
        run.read_table("embeddings"),
        num_neighbors=5,
    )


def proof_for_report(proof: Proof) -> dict[str, Any]:
    """The proof as the report's headline figures: label -> value, interval and a note."""
    figures: dict[str, Any] = {}
    for name, title in (("kept", "kept"), ("random", "random K"), ("whole", "whole dataset")):
        share = proof[name]["labels_correct"]  # type: ignore[literal-required]
        figures[f"labels right, {title}"] = {
            "value": share["share"],
            "low": share["low"],
            "high": share["high"],
            "unit": "share",
            "note": f"{share['num_labels']:,} labels held to the world's truth, 95% interval",
        }
    kept, random = proof["kept"], proof["random"]
    for kind in ("harmful", "junk"):
        figures[f"{kind} prompts kept"] = {
            "value": kept["pairs_by_kind"][kind],
            "note": f"pairs; {random['pairs_by_kind'][kind]:,} in a random K",
        }
    figures["distinct prompts kept"] = {
        "value": kept["distinct_prompts"],
        "note": f"{random['distinct_prompts']:,} in a random K",
    }
    return figures
