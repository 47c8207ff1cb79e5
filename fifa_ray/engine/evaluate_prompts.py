"""evaluation/prompts/: what every model draws, one row for each image with its seed.

The seed of an image is a hash of the run's seed, the prompt and the image's number among those of
the prompt. So every model begins with the same noise, and a prompt has the same seeds in every
list, however long.
"""

import hashlib
import logging
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from fifa_ray import schema
from fifa_ray.config import ConfigError, FifaConfig
from fifa_ray.engine.evaluate_models import EvaluatedModel, trained_prompts
from fifa_ray.engine.observed import observed, publish
from fifa_ray.run_dir import Manifest, RunDir, fingerprint, part_name
from fifa_ray.sources.prompt_sets import (
    PROMPT_SET,
    read_prompt_set,
    sample_prompts,
    seeded_rank,
)

logger = logging.getLogger(__name__)

STAGE = "evaluation/prompts"
HELD_OUT = "held_out"
# What one task draws, and what a killed run loses of each actor.
IMAGES_PER_PART = 16


@observed(lambda *_: STAGE)
def run_prompts(run: RunDir, config: FifaConfig, models: list[EvaluatedModel]) -> Manifest:
    """Choose the prompts and write the table; at once if it is the same as before.

    Raises ConfigError where no prompt is left, and what `read_prompt_set` raises.
    """
    settings = config.evaluate
    started = time.monotonic()
    if settings.prompts == HELD_OUT:
        prompts = held_out_prompts(run, config, models)
    else:
        listed = read_prompt_set(settings.prompts)
        prompts = sample_prompts(listed, settings.num_prompts, config.seed)
    rows = image_rows(prompts, settings.images_per_prompt, config.seed)
    # Of what is in it: another way to the same prompts draws nothing again.
    stage_fingerprint = fingerprint(STAGE, rows.to_pylist())
    found = run.manifest(STAGE)
    if found is not None and found.fingerprint == stage_fingerprint:
        return found
    run.invalidate(STAGE)
    for index, start in enumerate(range(0, len(rows), IMAGES_PER_PART)):
        run.write_table(rows.slice(start, IMAGES_PER_PART), STAGE, part_name(index))
    return publish(
        run,
        Manifest(
            stage=STAGE,
            fingerprint=stage_fingerprint,
            rows_in=len(rows),
            rows_out=len(rows),
            seconds=time.monotonic() - started,
            config={
                "prompts": settings.prompts,
                "num_prompts": settings.num_prompts,
                "images_per_prompt": settings.images_per_prompt,
            },
            details={"num_prompts": len(prompts), "num_images": len(rows)},
        ),
    )


def image_rows(prompts: pa.Table, images_per_prompt: int, seed: int) -> pa.Table:
    """Rows of EVALUATION_PROMPTS for prompts of PROMPT_SET, those of one prompt together."""
    ids = prompts.column(schema.PROMPT_ID).to_pylist()
    of_prompt = pa.array(np.repeat(np.arange(len(ids)), images_per_prompt))
    repeated = prompts.take(of_prompt)
    numbers = np.tile(np.arange(images_per_prompt, dtype=np.int32), len(ids))
    seeds = [image_seed(seed, i, n) for i in ids for n in range(images_per_prompt)]
    return pa.table(
        [
            np.arange(len(seeds)),
            repeated.column(schema.PROMPT_ID),
            numbers,
            repeated.column("prompt"),
            repeated.column("category"),
            seeds,
        ],
        schema=schema.EVALUATION_PROMPTS,
    )


def image_seed(run_seed: int, prompt_id: int, image_index: int) -> int:
    """Seed of one image, 0 to 2**63 - 1: 63 bits of BLAKE2b of the three numbers."""
    text = f"{run_seed} {prompt_id} {image_index}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def held_out_prompts(run: RunDir, config: FifaConfig, models: list[EvaluatedModel]) -> pa.Table:
    """A seeded sample of the dataset's prompts that no training could have seen.

    Left out are the prompts of every selection and baseline of the run, whether a model was trained
    on it or not, so that evaluating one more training changes nothing for the others; those of the
    trainings of `models`; and, where the judge has rated them, prompts that are harmful, unrated or
    below `select.min_quality`. One part of the tables is in memory at a time.
    """
    if run.manifest("prompts") is None:
        raise ConfigError(
            f"{run.uri} has no complete prompts/ table to hold prompts out of; run `fifa filter` "
            "first, or set evaluate.prompts to a file or to general"
        )
    seen = np.union1d(_chosen_prompts(run), trained_prompts(models))
    rated = run.manifest("quality") is not None
    wanted = config.evaluate.num_prompts
    kept = PROMPT_SET.empty_table()
    counts = {"all": 0, "seen": 0, "unfit": 0}
    for part in run.list("prompts"):
        rows = run.read_table("prompts", part, columns=[schema.PROMPT_ID, "prompt"])
        unseen = ~np.isin(rows.column(schema.PROMPT_ID).to_numpy(), seen)
        fit = _fit_to_draw(run, part, rows, config) if rated else np.ones(len(rows), bool)
        counts["all"] += len(rows)
        counts["seen"] += int((~unseen).sum())
        counts["unfit"] += int((unseen & ~fit).sum())
        new = rows.filter(pa.array(unseen & fit))
        new = new.append_column("category", pa.nulls(len(new), pa.string())).cast(PROMPT_SET)
        kept = sample_prompts(pa.concat_tables([kept, new]), wanted, config.seed)
    if not len(kept):
        raise ConfigError(
            f"no prompt of {run.uri} is left to evaluate with: of {counts['all']:,}, selections "
            f"and trainings have {counts['seen']:,}, and {counts['unfit']:,} are harmful, unrated "
            "or below select.min_quality; set evaluate.prompts to a file or to general"
        )
    if wanted is not None and len(kept) < wanted:
        logger.warning(
            "evaluation: %s held-out prompts, fewer than evaluate.num_prompts=%s",
            f"{len(kept):,}",
            f"{wanted:,}",
        )
    order = np.argsort(seeded_rank(kept.column(schema.PROMPT_ID).to_numpy(), config.seed))
    return kept.take(order)


def _chosen_prompts(run: RunDir) -> np.ndarray:
    """int64 ids of the prompts of `selected/` and of every table of `baselines/`."""
    tables = ["selected"] if run.list("selected") else []
    selector = pafs.FileSelector(run.path("baselines"), allow_not_found=True)
    tables += [
        f"baselines/{info.base_name}"
        for info in run.filesystem.get_file_info(selector)
        if info.type == pafs.FileType.Directory and run.list("baselines", info.base_name)
    ]
    columns = [
        run.read_table(table, columns=[schema.PROMPT_ID]).column(0).to_numpy() for table in tables
    ]
    return np.unique(np.concatenate([np.empty(0, np.int64), *columns]))


def _fit_to_draw(run: RunDir, part: str, prompts: pa.Table, config: FifaConfig) -> np.ndarray:
    columns = [schema.PROMPT_ID, "prompt_quality", "harmful"]
    rated = run.read_table("quality", part, columns=columns)
    if not rated.column(schema.PROMPT_ID).equals(prompts.column(schema.PROMPT_ID)):
        raise RuntimeError(f"quality/{part} does not match prompts/{part}; run `fifa filter` again")
    floor = config.select.min_quality or 0.0
    good = pc.and_(
        pc.invert(pc.fill_null(rated.column("harmful"), True)),
        pc.fill_null(pc.greater_equal(rated.column("prompt_quality"), floor), False),
    )
    return np.asarray(good.to_numpy(zero_copy_only=False), bool)
