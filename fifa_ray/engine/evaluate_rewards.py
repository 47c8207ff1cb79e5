"""evaluation/images/<model>/ -> evaluation/rewards/<model>/<reward>/: every drawn image scored.

One pass a scorer over the images of all models, so that it is loaded once however many there are.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fifa_ray import schema
from fifa_ray.config import FifaConfig
from fifa_ray.engine.evaluate_images import failed_images, images_stage
from fifa_ray.engine.evaluate_models import EvaluatedModel
from fifa_ray.engine.evaluate_parts import PartsStage, run_parts_stages, write_part
from fifa_ray.engine.evaluate_scorers import ImageScorer, Scorer
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.sources.images import BadImage, decode_image

# Parts whose images one call of a scorer gets: 64 images, a batch of most reward models.
PARTS_PER_TASK = 4

# (reward, None, None), or (None, quarantine reason, detail)
Outcome = tuple[float | None, str | None, str | None]


def rewards_stage(model: EvaluatedModel, scorer: Scorer) -> str:
    """Name of the stage and folder of a model's scores by one scorer."""
    return f"evaluation/rewards/{model.name}/{scorer.name}"


def run_scorer(
    run: RunDir, config: FifaConfig, models: Sequence[EvaluatedModel], scorer: Scorer
) -> list[Manifest]:
    """Score the images of all models with one scorer, or those that are left.

    Raises RuntimeError when more images fail than `max_quarantine_fraction` allows.
    """
    stages = []
    for model in models:
        images = run.manifest(images_stage(model))
        assert images is not None
        stage = PartsStage(
            name=rewards_stage(model, scorer),
            fingerprint=fingerprint("evaluation/rewards", images.fingerprint, scorer.identity),
            input_table=images_stage(model),
            config={"kind": scorer.kind, "identity": scorer.identity},
            details={"took_part_in_filtering": scorer.took_part},
        )
        stages.append(stage)
    threads = max(1, int(scorer.actors.num_cpus))
    return run_parts_stages(
        run,
        stages,
        ScoreParts,
        lambda device: (run, scorer.load, device, threads, config.images.max_pixels),
        actors=scorer.actors,
        wait_seconds=config.ray.wait_seconds,
        label=f"evaluation/rewards/*/{scorer.name}",
        parts_per_task=PARTS_PER_TASK,
        max_quarantine_fraction=config.max_quarantine_fraction,
    )


class ScoreParts:
    """Names of parts of images -> parts of EVALUATION_REWARDS; passes on how many it scored."""

    def __init__(
        self,
        run: RunDir,
        load: Callable[[str], ImageScorer],
        device: str,
        num_threads: int,
        max_pixels: int,
    ) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(num_threads)
        self.run, self.scorer, self.max_pixels = run, load(device), max_pixels

    def __call__(self, parts: pa.Table) -> pa.Table:
        """Score the images of one part or several together, and write each part."""
        entries = parts.to_pylist()
        columns = ["image_id", schema.PROMPT_ID, "prompt", "image"]
        tables = [
            self.run.read_table(entry["input"], entry["part"], columns=columns) for entry in entries
        ]
        rows = pa.concat_tables(tables)
        outcomes = score_encoded(
            self.scorer,
            rows.column("image").to_pylist(),
            rows.column("prompt").to_pylist(),
            self.max_pixels,
        )
        start = 0
        for entry, table in zip(entries, tables, strict=True):
            of_part = outcomes[start : start + len(table)]
            write_part(self.run, entry, *reward_tables(table, of_part, entry["stage"]))
            start += len(table)
        return pa.table({"rows": [len(table) for table in tables]})


def reward_tables(
    rows: pa.Table, outcomes: Sequence[Outcome], stage: str
) -> tuple[pa.Table, pa.Table]:
    """EVALUATION_REWARDS of images with a reward, and quarantine rows of those without."""
    answers = pa.table(
        {
            "reward": pa.array([reward for reward, _, _ in outcomes], pa.float64()),
            "error": pa.array([error for _, error, _ in outcomes], pa.string()),
            "detail": pa.array([detail for _, _, detail in outcomes], pa.string()),
        }
    )
    bad = pc.is_valid(answers.column("error"))
    scored = pa.table(
        [rows.column("image_id"), rows.column(schema.PROMPT_ID), answers.column("reward")],
        names=schema.EVALUATION_REWARDS.names,
    ).filter(pc.invert(bad))
    return (
        scored.cast(schema.EVALUATION_REWARDS),
        failed_images(stage, rows.filter(bad), answers.filter(bad)),
    )


def score_encoded(
    scorer: ImageScorer, images: Sequence[bytes], prompts: Sequence[str], max_pixels: int
) -> list[Outcome]:
    """Outcomes of encoded images; those that cannot be decoded never reach the scorer."""
    outcomes: list[Outcome] = []
    decoded: list[Image.Image] = []
    places: list[int] = []
    for place, data in enumerate(images):
        try:
            decoded.append(decode_image(data, max_pixels))
            places.append(place)
            outcomes.append((None, None, None))
        except BadImage as bad:
            outcomes.append((None, bad.reason, bad.detail))
    results = score_each(scorer, decoded, [prompts[place] for place in places])
    for place, result in zip(places, results, strict=True):
        outcomes[place] = result
    return outcomes


def score_each(
    scorer: ImageScorer, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[Outcome]:
    """The outcome of each image; when the scorer raises, they are tried one by one."""
    if not images:
        return []
    try:
        rewards = np.asarray(scorer.score(images, prompts), np.float64)
        if rewards.shape != (len(images),):
            raise ValueError(
                f"expected a score for each of {len(images)} images, got shape {rewards.shape}"
            )
    except Exception as error:
        if len(images) == 1:
            return [(None, "scoring_failed", f"{type(error).__name__}: {error}"[:500])]
        return [
            result
            for image, prompt in zip(images, prompts, strict=True)
            for result in score_each(scorer, [image], [prompt])
        ]
    return [
        (float(reward), None, None)
        if math.isfinite(reward)
        else (None, "nan_reward", f"the scorer gave {reward}")
        for reward in rewards
    ]
