"""evaluation/rewards/ -> evaluation/results.json: who wins against whom by which score.

Every two models are compared by every scorer, on the images that both have a score for.
"""

import itertools
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from fifa_ray import schema
from fifa_ray.config import FifaConfig
from fifa_ray.engine.evaluate_images import images_stage
from fifa_ray.engine.evaluate_models import EvaluatedModel
from fifa_ray.engine.evaluate_rewards import rewards_stage
from fifa_ray.engine.evaluate_scorers import Scorer
from fifa_ray.engine.observed import observed, publish
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.scoring.win_rate import Resampling, compare, compare_by_category

STAGE = "evaluation/results"
RESULTS = ("evaluation", "results.json")
PROMPTS = "evaluation/prompts"


@observed(lambda *_: STAGE)
def write_results(
    run: RunDir, config: FifaConfig, models: list[EvaluatedModel], scorers: list[Scorer]
) -> dict[str, Any]:
    """Compute, write and publish the results; they are a function of the tables and settings."""
    settings = config.evaluate
    prompts = run.read_table(PROMPTS)
    scores = {
        (model.name, scorer.name): run.read_table(
            rewards_stage(model, scorer), schema=schema.EVALUATION_REWARDS
        )
        for model in models
        for scorer in scorers
    }
    resampling = Resampling(settings.confidence, settings.num_resamples, config.seed)
    comparisons = [
        compared
        for one, other in itertools.combinations(models, 2)
        for scorer in scorers
        if (compared := _comparison(one, other, scorer, scores, prompts, resampling))
    ]
    categories = prompts.group_by("category").aggregate([(schema.PROMPT_ID, "count_distinct")])
    results = {
        "models": [_model_entry(run, model, scorers, scores) for model in models],
        "rewards": [
            {"name": s.name, "kind": s.kind, "took_part_in_filtering": s.took_part} for s in scorers
        ],
        "prompts": {
            "source": settings.prompts,
            "num_prompts": len(prompts.column(schema.PROMPT_ID).unique()),
            "images_per_prompt": settings.images_per_prompt,
            "categories": {
                row["category"]: row[f"{schema.PROMPT_ID}_count_distinct"]
                for row in sorted(categories.to_pylist(), key=lambda row: row["category"] or "")
                if row["category"] is not None
            },
        },
        "settings": {
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "seed": config.seed,
            "confidence": settings.confidence,
            "num_resamples": settings.num_resamples,
            "gallery_size": settings.gallery_size,
        },
        "comparisons": comparisons,
    }
    run.invalidate(STAGE)
    run.write_text(json.dumps(results, indent=2, allow_nan=False), *RESULTS)
    publish(
        run,
        Manifest(
            stage=STAGE,
            fingerprint=fingerprint(results),
            rows_in=len(comparisons),
            rows_out=len(comparisons),
            config=settings.model_dump(mode="json"),
        ),
    )
    return results


def read_results(run: RunDir) -> dict[str, Any]:
    """What `write_results` wrote. Raises FileNotFoundError before an evaluation."""
    if not run.exists(*RESULTS):
        raise FileNotFoundError(f"{run.path(*RESULTS)} is not there; run `fifa evaluate` first")
    found: dict[str, Any] = json.loads(run.read_text(*RESULTS))
    return found


def _comparison(
    one: EvaluatedModel,
    other: EvaluatedModel,
    scorer: Scorer,
    scores: dict[tuple[str, str], pa.Table],
    prompts: pa.Table,
    resampling: Resampling,
) -> dict[str, Any] | None:
    """One entry of the results; None where no image has a score of both models."""
    image_a, score_a = _columns(scores[one.name, scorer.name])
    image_b, score_b = _columns(scores[other.name, scorer.name])
    both, at_a, at_b = np.intersect1d(image_a, image_b, return_indices=True)
    if not len(both):
        return None
    a_N, b_N = score_a[at_a], score_b[at_b]
    # image_id is the row of the prompts' table.
    shared = prompts.take(pa.array(both))
    prompt_N = shared.column(schema.PROMPT_ID).to_numpy()
    categories = compare_by_category(
        a_N, b_N, prompt_N, shared.column("category").to_pylist(), resampling
    )
    return {
        "model": one.name,
        "baseline": other.name,
        "reward": scorer.name,
        "took_part_in_filtering": scorer.took_part,
        **_plain(asdict(compare(a_N, b_N, prompt_N, resampling))),
        "categories": [
            {"category": name, **_plain(asdict(compared))} for name, compared in categories.items()
        ],
    }


def _model_entry(
    run: RunDir,
    model: EvaluatedModel,
    scorers: list[Scorer],
    scores: dict[tuple[str, str], pa.Table],
) -> dict[str, Any]:
    manifest = run.manifest(images_stage(model))
    assert manifest is not None
    means = {}
    for scorer in scorers:
        _, values = _columns(scores[model.name, scorer.name])
        means[scorer.name] = float(values.mean()) if len(values) else None
    return {
        "name": model.name,
        "kind": model.kind,
        "source": model.source,
        "base_model": model.start.model,
        "num_images": manifest.rows_out,
        "failed_images": manifest.quarantined,
        "mean_reward": means,
    }


def _columns(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    return table.column("image_id").to_numpy(), table.column("reward").to_numpy()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an interval that does not exist is null."""
    return {
        name: None if isinstance(value, float) and np.isnan(value) else value
        for name, value in values.items()
    }
