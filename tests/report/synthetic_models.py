"""The last part of a synthetic run: two trainings, and an evaluation of them against the base."""

import json

import numpy as np
import pyarrow as pa
from synthetic_selection import HOSTILE_PROMPTS, picture

from fifa_ray import schema
from fifa_ray.config import ActorsConfig, FifaConfig
from fifa_ray.engine.evaluate_models import EvaluatedModel
from fifa_ray.engine.evaluate_prompts import image_rows
from fifa_ray.engine.evaluate_results import write_results
from fifa_ray.engine.evaluate_scorers import Scorer
from fifa_ray.models.image_generator import GeneratorWeights
from fifa_ray.run_dir import Manifest, RunDir, fingerprint, part_name
from fifa_ray.sources.prompt_sets import prompt_table

TRAININGS = ("fifa", "random")
SAMPLE_PROMPTS = ("a small red cat by the sea", HOSTILE_PROMPTS[0])
EVALUATED = (
    *((text, "hostile") for text in HOSTILE_PROMPTS[:3]),
    ("", None),
    *((f"a {thing} in the snow, take {n}", kind) for n in range(6) for thing, kind in (
        ("fox", "animals"), ("red lamp", "objects"), ("sign that says hello", "text"),
    )),
)  # fmt: skip


def write_models(run: RunDir, rng: np.random.Generator, config: FifaConfig) -> None:
    """Write training/ and evaluation/ as the stages leave them."""
    for gain, name in zip((1.0, 0.4), TRAININGS, strict=True):
        _write_training(run, rng, name, gain)
    _write_evaluation(run, rng, config)


def _write_training(run: RunDir, rng: np.random.Generator, name: str, gain: float) -> None:
    stage = f"training/{name}"
    lines = []
    for step in range(10, 2001, 10):
        pull = gain * (1 - np.exp(-step / 500))
        lines.append(_metrics(rng, "train", step, pull, 0.08))
        if step % 200 == 0:
            lines.append(_metrics(rng, "validation", step, 0.7 * pull, 0.01) | {"pairs": 400})
            if step % 500 == 0 or step == 200:
                for index in range(len(SAMPLE_PROMPTS)):
                    file = f"step-{step:08d}-prompt-{index:03d}.png"
                    with run.open_atomic(stage, "samples", file) as stream:
                        stream.write(picture(rng, 64))
    run.write_text("".join(json.dumps(line) + "\n" for line in lines), stage, "metrics.jsonl")
    run.publish(
        Manifest(
            stage=stage,
            fingerprint=fingerprint(stage),
            rows_in=200,
            rows_out=200,
            seconds=4000.0,
            config={
                "data": "selected" if name == "fifa" else "baselines/random",
                "lora": {"rank": 8} if name == "random" else None,
                "loss": {"kind": "dpo"},
                "sample_prompts": list(SAMPLE_PROMPTS),
            },
            details={"pairs": 200},
        )
    )


def _metrics(rng: np.random.Generator, kind: str, step: int, pull: float, noise: float) -> dict:
    reference = 0.12 + 0.01 * rng.normal()
    return {
        "kind": kind,
        "optimizer_step": step,
        "loss": float(np.log(2) - 0.25 * pull + noise * rng.normal()),
        "implicit_accuracy": float(np.clip(0.5 + 0.3 * pull + noise * rng.normal(), 0, 1)),
        "implicit_reward_margin": float(1.5 * pull + 3 * noise * rng.normal()),
        "policy_error_chosen": reference * (1 + 0.02 * pull),
        "policy_error_rejected": reference * (1 + 0.09 * pull),
        "reference_error_chosen": reference,
        "reference_error_rejected": reference,
        "gradient_norm": 0.5,
        "learning_rate": 1e-5,
        "pairs_per_second": float(3 + 0.1 * rng.normal()),
        "gpu_memory_bytes": 11_200_000_000,
        "pairs_seen": 64 * step,
    }


def _write_evaluation(run: RunDir, rng: np.random.Generator, config: FifaConfig) -> None:
    listed = [(f"row {n}", text, kind) for n, (text, kind) in enumerate(EVALUATED)]
    rows = image_rows(prompt_table(listed, "here"), config.evaluate.images_per_prompt, 0)
    run.write_table(rows, "evaluation", "prompts", part_name(0))
    start = GeneratorWeights("example/base")
    models = [
        *(EvaluatedModel(name, "full", "there", name, start, 512) for name in TRAININGS),
        EvaluatedModel("base", "base", "example/base", "base", start, 512),
    ]
    scorers = [
        Scorer(name, "pickscore", took_part, name, str, ActorsConfig())  # type: ignore[arg-type]
        for name, took_part in (("pickscore", True), ("hpsv2", False))
    ]
    talent = rng.normal(0, 0.5, len(rows))
    for model, gain in zip(models, (0.9, 0.3, 0.0), strict=True):
        images = [picture(rng, 64) for _ in range(len(rows))]
        table = rows.append_column("model", pa.array([model.name] * len(rows)))
        table = table.append_column("image", pa.array(images, pa.binary()))
        _publish(run, table.cast(schema.EVALUATION_IMAGES), "images", model.name)
        for scorer in scorers:
            reward = 20 + talent + gain + rng.normal(0, 1, len(rows))
            columns = [rows["image_id"], rows["prompt_id"], reward]
            scored = pa.table(columns, schema=schema.EVALUATION_REWARDS)
            _publish(run, scored, "rewards", model.name, scorer.name)
    write_results(run, config, models, scorers)


def _publish(run: RunDir, table: pa.Table, *parts: str) -> None:
    stage = "/".join(("evaluation", *parts))
    run.write_table(table, stage, part_name(0))
    run.publish(
        Manifest(
            stage=stage, fingerprint=fingerprint(stage), rows_in=len(table), rows_out=len(table)
        )
    )
