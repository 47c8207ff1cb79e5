"""The demo's second half: the tiny model aligned with what was kept, and the truth as judge.

Four trainings start from the same weights: on the kept pairs, on as many random ones, on all pairs
for as many updates (equal compute), and on all pairs once (full compute). Each model draws the same
new prompts from the same noise, and the truth reader, which nothing before has asked, says whose
drawings are better.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fifa_ray.config import FifaConfig
from fifa_ray.demo.known_drawings import prompts_of
from fifa_ray.demo.scenes import Scene
from fifa_ray.demo.truth_reader import TruthReader
from fifa_ray.engine.evaluate_models import BASE
from fifa_ray.evaluation import evaluate, read_results
from fifa_ray.run_dir import RunDir
from fifa_ray.schema import normalize_prompt
from fifa_ray.training import train

PIPELINE_WEIGHTS = Path(__file__).parent / "weights" / "pipeline"
# Even, so that the pipeline has seen no prompt of it; another than the world's and the reader's.
EVALUATION_SEED = 4
TRUTH = "truth"


@dataclass(frozen=True)
class Training:
    """One of the demo's trainings: what it learns from, and for how many optimizer steps."""

    name: str
    data: str
    title: str
    max_steps: int


def demo_trainings(config: FifaConfig, num_pairs: int) -> list[Training]:
    """The four trainings; `num_pairs` of the whole dataset make the length of the last."""
    steps, batch = config.train.max_steps, config.train.global_batch_size
    full = max(steps, -(-num_pairs // batch))
    return [
        Training("fifa", "selected", "kept pairs", steps),
        Training("random", "baselines/random", "random pairs, as many", steps),
        Training("all", "pairs", "all pairs, equal compute", steps),
        Training("all_full", "pairs", "all pairs, full compute", full),
    ]


def align(run: RunDir, config: FifaConfig) -> tuple[list[Training], dict[str, Any]]:
    """Train and evaluate in the run of the demo's filter; skips what is complete.

    Returns the trainings and the evaluation's results. `config` is the run's, with `train` and
    `evaluate` as all trainings share them.
    """
    pairs = run.manifest("pairs")
    assert pairs is not None
    trainings = demo_trainings(config, pairs.rows_out)
    for training in trainings:
        train(config_of(config, training))
    prompts = run.path("world", "evaluation_prompts.jsonl")
    scenes = write_evaluation_prompts(Path(prompts), config.evaluate.num_prompts or 200, run)
    settings = {"trainings": tuple(t.name for t in trainings), "prompts": prompts}
    evaluate(
        config.model_copy(update={"evaluate": config.evaluate.model_copy(update=settings)}),
        extra_scorers={TRUTH: TruthReader.load(scenes)},
        write_page=False,
    )
    return trainings, read_results(run)


def config_of(config: FifaConfig, training: Training) -> FifaConfig:
    """The settings of one training."""
    settings = {"name": training.name, "data": training.data, "max_steps": training.max_steps}
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def write_evaluation_prompts(path: Path, count: int, run: RunDir) -> dict[str, Scene]:
    """Write `count` prompts that neither the run nor the pipeline's training has, as jsonl.

    Returns the scene that each one asks for, by its normalised text.
    """
    seen = set(run.read_table("prompts", columns=["prompt"]).column(0).to_pylist())
    listed = prompts_of((EVALUATION_SEED,), max(50, 3 * count), ("normal",))
    scenes = {normalize_prompt(prompt.text): prompt.scene for prompt in listed}
    scenes = dict([item for item in scenes.items() if item[0] not in seen][:count])
    names = {1: "one kind of object", 2: "two kinds of objects"}
    rows = [{"prompt": p, "category": names[len(s.items)]} for p, s in scenes.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return scenes


def comparison(results: Mapping[str, Any], model: str, baseline: str) -> dict[str, Any]:
    """The results' comparison of two models by the truth."""
    found: dict[str, Any] = next(
        entry
        for entry in results["comparisons"]
        if (entry["model"], entry["baseline"], entry["reward"]) == (model, baseline, TRUTH)
    )
    return found


def alignment_lines(
    trainings: Sequence[Training], results: Mapping[str, Any], batch_size: int
) -> Iterator[str]:
    """Who draws better, as lines of a plain-text table."""
    means = {model["name"]: model["mean_reward"][TRUTH] for model in results["models"]}
    count = results["prompts"]["num_prompts"]
    yield f"drawings of {count:,} new prompts, as the world's truth is estimated from them"
    yield f"{'trained on':<28}{'pair updates':>14}{'mean (0 to 6)':>15}{'wins over base (95%)':>28}"
    yield f"{'nothing: the base':<28}{0:>14,}{means[BASE]:>15.3f}"
    for training in trainings:
        updates = training.max_steps * batch_size
        wins = _interval(comparison(results, training.name, BASE))
        yield f"{training.title:<28}{updates:>14,}{means[training.name]:>15.3f}{wins:>28}"
    kept, *others = trainings
    for other in others:
        wins = _interval(comparison(results, kept.name, other.name))
        yield f"{kept.title} win over {other.title}: {wins}"


def alignment_figures(
    trainings: Sequence[Training], results: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The headline figures of the report: label -> value, interval and a note."""
    kept, *others = trainings
    pairs = [(kept.name, BASE, "the base")]
    pairs += [(kept.name, other.name, f"one trained on {other.title}") for other in others]
    figures = {}
    for model, baseline, title in pairs:
        found = comparison(results, model, baseline)
        figures[f"wins of the aligned model over {title}"] = {
            "value": found["win_rate"],
            "low": found["win_rate_low"],
            "high": found["win_rate_high"],
            "unit": "share",
            "note": f"{found['num_prompts']:,} new prompts; truth read from drawings, 95% interval",
        }
    return figures


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = entry["win_rate_low"], entry["win_rate_high"]
    return f"{entry['win_rate']:.1%} ({low:.1%}-{high:.1%})"
