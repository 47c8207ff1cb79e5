"""pairs/ -> rewards/<name>/: every image of every pair scored by a proxy reward model.

    pairs ─ requests ─ read, decode, resize (CPU) ─ score (actor pool) ─ one small row a side

A request is one distinct (image, prompt) of a row group, whatever number of pairs share it, so an
image is decoded and encoded once there. On GPUs decoding runs in tasks of its own, on any node, and
uint8 arrays of the model's size travel to the scorers; on CPUs both run in the same actor, and no
image ever enters the object store.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from fifa_ray import schema
from fifa_ray.config import FifaConfig, RewardConfig
from fifa_ray.engine.cluster import actor_pool, gpus_per_actor
from fifa_ray.engine.map_stage import (
    Assemble,
    MapStage,
    first_by_key,
    partial_folder,
    quarantine_rows,
    run_map_stage,
)
from fifa_ray.engine.pair_images import INPUT_COLUMNS, LoadImages, share_prompts
from fifa_ray.models.reward import ImageTransform, build_image_transform, build_reward_model
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.sources import open_source

# Pairs per work item, rounded up to whole row groups of the source.
PAIRS_PER_ITEM = 512


def partial_schema(value: pa.DataType) -> pa.Schema:
    """One row for each side of a pair: what the model says of its image, or why it cannot."""
    return pa.schema(
        [
            pa.field(schema.PAIR_ID, pa.int64()),
            pa.field("is_chosen", pa.bool_()),
            pa.field("value", value),
            pa.field("error", pa.string()),
        ]
    )


def run_rewards(run: RunDir, config: FifaConfig) -> list[Manifest]:
    """Score all pairs with every configured reward model; each is a stage of its own.

    Raises RuntimeError when more pairs are quarantined than `max_quarantine_fraction` allows.
    """
    from fifa_ray.engine.fit_reward import run_fitted_reward

    return [
        run_fitted_reward(run, config, reward)
        if reward.kind == "fitted"
        else run_reward(run, config, reward)
        for reward in config.rewards
    ]


def run_reward(run: RunDir, config: FifaConfig, reward: RewardConfig) -> Manifest:
    """Score all pairs with one reward model."""
    stage = reward_stage(
        run, config, reward, value=pa.float32(), assemble=AssembleRewards(f"rewards/{reward.name}")
    )
    image_transform = build_image_transform(reward.kind, reward.weights, options=reward.options)
    model = partial(
        build_reward_model,
        reward.kind,
        reward.weights,
        dtype=reward.dtype,
        batch_size=reward.batch_size,
        trust_remote_code=reward.trust_remote_code,
        options=reward.options,
    )
    return run_reward_stage(run, config, reward, stage, image_transform, model)


def reward_stage(
    run: RunDir,
    config: FifaConfig,
    reward: RewardConfig,
    *,
    value: pa.DataType,
    assemble: Assemble,
    **settings: Any,
) -> MapStage:
    """The stage rewards/<name>/ whose model gives a value of this type for each image.

    `settings`: JSON-like values besides those of `reward` that the rewards depend on.
    """
    pairs = run.manifest("pairs")
    if pairs is None:
        raise ValueError(f"{run.uri} has no complete pairs/ table; run the ingest stage first")
    name = f"rewards/{reward.name}"
    settings |= reward.model_dump(mode="json", exclude={"actors", "batch_size", "vote_weight"})
    return MapStage(
        name=name,
        fingerprint=fingerprint(name, pairs.fingerprint, settings, config.images.model_dump()),
        input_table="pairs",
        key=schema.PAIR_ID,
        input_columns=INPUT_COLUMNS,
        partial_schema=partial_schema(value),
        assemble=assemble,
        rows_per_item=PAIRS_PER_ITEM,
        keys_in=lambda sides: len(sides) / 2,
        boundary="source_group",
        answered_keys=pairs_with_both_sides,
        # The same batches again after a crash: the last bits of a reward depend on its batch.
        whole_items=True,
    )


def run_reward_stage(
    run: RunDir,
    config: FifaConfig,
    reward: RewardConfig,
    stage: MapStage,
    image_transform: ImageTransform,
    load_model: "LoadModel",
    *,
    before_align: Callable[[RunDir], None] | None = None,
    details: Callable[[], dict[str, Any]] = dict,
) -> Manifest:
    """The streaming pass over the images of a stage that `reward_stage` made."""
    pool: dict[str, Any] = {}
    info = partial_folder(run, stage)

    def transform(items: "ray.data.Dataset") -> "ray.data.Dataset":
        source = open_source(config.ingest, config.images)
        loader = LoadImages(source, config.images, image_transform, share_prompts(run))
        pool.update(actor_pool(reward.actors))
        scorer = {
            "load_model": load_model,
            "value": stage.partial_schema.field("value").type,
            "device": "cuda" if gpus_per_actor(reward.actors) else "cpu",
            "num_threads": max(1, int(reward.actors.num_cpus)),
            "info": info,
        }
        return score_dataset(items, loader, scorer, max(reward.batch_size, 64), pool)

    return run_map_stage(
        run,
        stage,
        transform,
        config=reward.model_dump(mode="json"),
        max_quarantine_fraction=config.max_quarantine_fraction,
        details=lambda: _details(info, reward, pool) | details(),
        pool=pool,
        before_align=before_align,
    )


def score_dataset(
    items: "ray.data.Dataset",
    loader: "LoadImages",
    scorer: dict[str, Any],
    batch_size: int,
    pool: dict[str, Any],
) -> "ray.data.Dataset":
    """Pairs in, partial rows out; decoding is fused with scoring unless there is a GPU to feed.

    `scorer`: arguments of `Scorer`. batch_size: images that reach a GPU's scorer at once.
    """
    if scorer["device"] == "cpu":
        return items.map_batches(
            LoadAndScore,
            fn_constructor_kwargs=scorer | {"loader": loader},
            batch_size=None,
            batch_format="pyarrow",
            **pool,
        )
    return items.map_batches(
        loader.as_columns, batch_size=None, batch_format="pyarrow", num_cpus=1
    ).map_batches(
        ScoreColumns,
        fn_constructor_kwargs=scorer,
        batch_size=batch_size,
        batch_format="numpy",
        **pool,
    )


def _details(info: RunDir, reward: RewardConfig, pool: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(info.read_text("model.json")) if info.exists("model.json") else {}
    return {
        "model": found,
        "actors": pool["compute"].max_size if pool else 0,
        "num_cpus": reward.actors.num_cpus,
        "num_gpus": pool.get("num_gpus", 0),
    }


class ModelInfo(Protocol):
    """What a manifest says of a model."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        ...


class PairModel(Protocol):
    """Anything that gives an (image, prompt) a number or a row of them; a `RewardModel` is one."""

    @property
    def info(self) -> ModelInfo:
        """Goes into the manifest."""
        ...

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """float32 (S,) or (S, F), see `RewardModel.score`."""
        ...


class LoadModel(Protocol):
    """Builds the model inside an actor; picklable."""

    def __call__(self, *, device: str) -> PairModel:
        """On "cpu" or "cuda"."""
        ...


class Scorer:
    """A model in an actor: batches in, partial rows out."""

    def __init__(
        self,
        load_model: LoadModel,
        value: pa.DataType,
        device: str,
        num_threads: int,
        info: RunDir,
    ) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(num_threads)
        self.value = value
        self.model = load_model(device=device)
        info.write_text(json.dumps(self.model.info.as_dict(), default=str), "model.json")

    def score(self, images: list[np.ndarray], prompts: list[str]) -> np.ndarray:
        """float32 (S,) or (S, F) of each image for its prompt, each distinct one encoded once."""
        distinct_prompts, prompt_index = np.unique(np.array(prompts, object), return_inverse=True)
        at: dict[int, int] = {}
        image_index = np.array([at.setdefault(id(image), len(at)) for image in images])
        distinct_images = list({id(image): image for image in images}.values())
        return self.model.score(
            distinct_images, list(distinct_prompts), image_index, prompt_index.reshape(-1)
        )


class LoadAndScore(Scorer):
    """Decode and score in one CPU actor."""

    def __init__(self, loader: LoadImages, **scorer: Any) -> None:
        super().__init__(**scorer)
        self.loader = loader

    def __call__(self, pairs: pa.Table) -> Iterator[pa.Table]:
        for batch in self.loader(pairs):
            values = self.score(batch.images, batch.prompts) if batch.images else np.empty(0)
            errors = [""] * len(batch.images) + [reason for reason, _ in batch.errors]
            sides = batch.sides + [sides for _, sides in batch.errors]
            yield partial_rows(values, errors, sides, self.value)


class ScoreColumns(Scorer):
    """Score blocks that `LoadImages.as_columns` made elsewhere."""

    def __call__(self, columns: dict[str, np.ndarray]) -> pa.Table:
        """One block of images to its partial rows."""
        good = [i for i, error in enumerate(columns["error"]) if not error]
        bad = [i for i, error in enumerate(columns["error"]) if error]
        values = np.empty(0)
        if good:
            images = [columns["image"][i] for i in good]
            values = self.score(images, [columns["prompt"][i] for i in good])
        errors = [columns["error"][i] for i in good + bad]
        sides = [json.loads(columns["sides"][i]) for i in good + bad]
        return partial_rows(values, errors, sides, self.value)


def partial_rows(
    values: np.ndarray,
    errors: list[str],
    sides: list[list[tuple[int, bool]]],
    value: pa.DataType,
) -> pa.Table:
    """One row for each side of a pair; values are those of the rows whose error is empty.

    A value that is not finite becomes the error `nan_reward`.
    """
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    reasons = [None if ok else "nan_reward" for ok in finite] + errors[len(values) :]
    column = pa.array([*values, *[None] * (len(errors) - len(values))], value)
    counts = [len(of_request) for of_request in sides]
    flat = [side for of_request in sides for side in of_request]
    repeat = np.repeat(np.arange(len(errors)), counts)
    return pa.table(
        {
            schema.PAIR_ID: pa.array([pair for pair, _ in flat], pa.int64()),
            "is_chosen": pa.array([bool(chosen) for _, chosen in flat], pa.bool_()),
            "value": column.take(pa.array(repeat)),
            "error": pa.array([reasons[i] for i in repeat], pa.string()),
        },
        schema=partial_schema(value),
    )


def pairs_with_both_sides(rows: pa.Table) -> np.ndarray:
    """int64 ids of pairs whose chosen and rejected image both have an answer."""
    keys = rows.column(schema.PAIR_ID).to_numpy()
    chosen = rows.column("is_chosen").to_numpy()
    return np.intersect1d(keys[chosen], keys[~chosen])


@dataclass(frozen=True)
class AssembleRewards:
    """Sides -> pairs; a pair with a bad side goes to quarantine with that side's reason."""

    stage: str

    def __call__(self, pairs: pa.Table, answers: pa.Table) -> tuple[pa.Table, pa.Table]:
        is_chosen = answers.column("is_chosen")
        chosen = first_by_key(answers.filter(is_chosen), schema.PAIR_ID)
        rejected = first_by_key(answers.filter(pc.invert(is_chosen)), schema.PAIR_ID)
        keys = pairs.column(schema.PAIR_ID).to_numpy()
        for side in (chosen, rejected):
            if not np.array_equal(side.column(schema.PAIR_ID).to_numpy(), keys):
                missing = np.setdiff1d(keys, side.column(schema.PAIR_ID).to_numpy())
                raise RuntimeError(
                    f"stage {self.stage}: {len(missing):,} pairs have no answer (first: "
                    f"{missing[:1]}); run the same command again to redo them"
                )
        reasons = pc.coalesce(chosen.column("error"), rejected.column("error"))
        bad = pc.is_valid(reasons)
        reward_chosen, reward_rejected = chosen.column("value"), rejected.column("value")
        rewards = pa.table(
            [
                pairs.column(schema.PAIR_ID),
                reward_chosen,
                reward_rejected,
                pc.subtract(reward_chosen, reward_rejected),
            ],
            schema=schema.REWARDS,
        )
        sides = pc.if_else(chosen.column("error").is_valid(), "chosen", "rejected")
        detail = pc.binary_join_element_wise(sides, "image", " ")
        quarantined = pairs.filter(bad)
        return rewards.filter(pc.invert(bad)), quarantine_rows(
            self.stage,
            reasons.filter(bad),
            detail=detail.filter(bad),
            pair_id=quarantined.column(schema.PAIR_ID),
            prompt_id=quarantined.column(schema.PROMPT_ID),
            source_file=quarantined.column("source_file").cast(pa.string()),
            source_row=quarantined.column("source_row"),
        )
