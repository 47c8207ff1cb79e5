"""evaluation/images/<model>/ -> evaluation/rewards/<model>/<reward>/: every drawn image scored.

One pass a scorer over the images of all models, so that it is loaded once however many there are.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fifa_ray import schema
from fifa_ray.config import FifaConfig
from fifa_ray.engine.cluster import (
    actor_pool,
    gpus_per_actor,
    quiet_ray_data,
    reserved_seconds,
)
from fifa_ray.engine.evaluate_images import failed_images, images_stage
from fifa_ray.engine.evaluate_models import EvaluatedModel
from fifa_ray.engine.evaluate_scorers import ImageScorer, Scorer
from fifa_ray.engine.map_stage import check_quarantine
from fifa_ray.engine.progress import Progress
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.sources.images import BadImage, decode_image

logger = logging.getLogger(__name__)

# Says of which images and scorer the parts beside it are, before the manifest does.
MARKER = "fingerprint.txt"

# (reward, None, None), or (None, quarantine reason, detail)
Outcome = tuple[float | None, str | None, str | None]


def rewards_stage(model: EvaluatedModel, scorer: Scorer) -> str:
    """Name of the stage and folder of a model's scores by one scorer."""
    return f"evaluation/rewards/{model.name}/{scorer.name}"


def run_scorer(
    run: RunDir, config: FifaConfig, models: Sequence[EvaluatedModel], scorer: Scorer
) -> list[Manifest]:
    """Score the images of all models with one scorer, or those that are left, in one pass.

    A part of the images is the unit of work: its scores are written as one part when it is done,
    and a killed run goes on with those that have none. Raises RuntimeError when more images fail
    than `max_quarantine_fraction` allows.
    """
    started = time.monotonic()
    todo: list[dict[str, str]] = []
    changed: list[tuple[EvaluatedModel, str]] = []
    for model in models:
        images = run.manifest(images_stage(model))
        assert images is not None
        stage = rewards_stage(model, scorer)
        wanted = fingerprint(stage, images.fingerprint, scorer.identity)
        if run.is_complete(stage, wanted):
            logger.info("%s: already complete", stage)
            continue
        changed.append((model, wanted))
        _keep_only(run, stage, wanted)
        there = set(run.list(stage))
        for part in run.list(images_stage(model)):
            if part not in there:
                todo.append({"images": images_stage(model), "stage": stage, "part": part})
    pool: dict[str, Any] = {}
    if todo:
        _score_parts(run, config, scorer, todo, pool)
    seconds = (time.monotonic() - started) / max(1, len(changed))
    cost = reserved_seconds(pool, seconds)
    return [
        _publish(run, config, model, scorer, wanted, seconds, cost) for model, wanted in changed
    ]


def _keep_only(run: RunDir, stage: str, wanted: str) -> None:
    """Take back a stage's parts, unless an interrupted run of the same inputs wrote them."""
    if run.exists(stage, MARKER) and run.read_text(stage, MARKER) == wanted:
        return
    run.invalidate(stage)
    run.write_text(wanted, stage, MARKER)


def _score_parts(
    run: RunDir,
    config: FifaConfig,
    scorer: Scorer,
    todo: list[dict[str, str]],
    pool: dict[str, Any],
) -> None:
    import ray.data

    quiet_ray_data()
    pool.update(actor_pool(scorer.actors))
    device = "cuda" if gpus_per_actor(scorer.actors) else "cpu"
    threads = max(1, int(scorer.actors.num_cpus))
    receipts = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        ScoreParts,
        fn_constructor_args=(run, scorer.load, device, threads, config.images.max_pixels),
        batch_size=None,
        batch_format="pyarrow",
        **pool,
    )
    total = sum(run.num_rows(stage) for stage in sorted({entry["images"] for entry in todo}))
    progress = Progress(f"evaluation/rewards/*/{scorer.name}", total)
    for batch in receipts.iter_batches(batch_size=None, batch_format="numpy"):
        progress.advance(int(batch["images"].sum()))
    progress.close()


def _publish(
    run: RunDir,
    config: FifaConfig,
    model: EvaluatedModel,
    scorer: Scorer,
    wanted: str,
    seconds: float,
    cost: dict[str, float],
) -> Manifest:
    stage = rewards_stage(model, scorer)
    reasons = run.read_table(
        "quarantine", *stage.split("/"), columns=["reason"], schema=schema.QUARANTINE
    )
    counts = {row["values"]: row["counts"] for row in reasons["reason"].value_counts().to_pylist()}
    manifest = Manifest(
        stage=stage,
        fingerprint=wanted,
        rows_in=run.num_rows(images_stage(model)),
        rows_out=run.num_rows(stage),
        quarantined=dict(sorted(counts.items())),
        seconds=seconds,
        config={"kind": scorer.kind, "identity": scorer.identity},
        details={"took_part_in_filtering": scorer.took_part} | cost,
    )
    check_quarantine(manifest, config.max_quarantine_fraction, run)
    return run.publish(manifest)


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
        """Score and write one part or several."""
        counts = []
        for entry in parts.to_pylist():
            columns = ["image_id", schema.PROMPT_ID, "prompt", "image"]
            rows = self.run.read_table(entry["images"], entry["part"], columns=columns)
            scored, failed = self.score(rows, entry["stage"])
            stage = entry["stage"].split("/")
            if len(failed):
                self.run.write_table(failed, "quarantine", *stage, entry["part"])
            self.run.write_table(scored, *stage, entry["part"])
            counts.append(len(rows))
        return pa.table({"images": counts})

    def score(self, rows: pa.Table, stage: str) -> tuple[pa.Table, pa.Table]:
        """Rows of images -> their rewards, and quarantine rows of those without one."""
        outcomes = score_encoded(
            self.scorer,
            rows.column("image").to_pylist(),
            rows.column("prompt").to_pylist(),
            self.max_pixels,
        )
        rewards, errors, details = (list(column) for column in zip(*outcomes, strict=True))
        good = pa.array([error is None for error in errors])
        scored = pa.table(
            [
                rows.column("image_id"),
                rows.column(schema.PROMPT_ID),
                pa.array(rewards, pa.float64()),
            ],
            names=schema.EVALUATION_REWARDS.names,
        )
        bad = pc.invert(good)
        failed = rows.filter(bad)
        answers = pa.table({"error": errors, "detail": details}).filter(bad)
        return (
            scored.filter(good).cast(schema.EVALUATION_REWARDS),
            failed_images(stage, failed, answers),
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
