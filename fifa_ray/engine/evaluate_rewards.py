"""evaluation/images/<model>/ -> evaluation/rewards/<model>/<reward>/: every drawn image scored.

A scorer gives images a number for their prompts. The configured reward models are scorers, with the
preprocessing of their authors; anything else with a method `score` can be one, such as a known
truth.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fifa_ray import schema
from fifa_ray.config import ActorsConfig, ConfigError, FifaConfig, RewardConfig
from fifa_ray.config.suggestions import suggest
from fifa_ray.engine.cluster import actor_pool, gpus_per_actor
from fifa_ray.engine.evaluate_images import failed_images, images_stage, in_order
from fifa_ray.engine.evaluate_models import EvaluatedModel, local_copy
from fifa_ray.engine.fit_reward import FITTED
from fifa_ray.engine.map_stage import MapStage, run_map_stage
from fifa_ray.models.image_encoder import build_encoder_transform
from fifa_ray.models.reward import build_image_transform, build_reward_model
from fifa_ray.models.reward_fitted import FittedRewardModel, is_fitted_reward, read_fitted_reward
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.sources.images import BadImage, decode_image

if TYPE_CHECKING:
    import ray.data

IMAGES_PER_ITEM = 64
_PARTIAL = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("reward", pa.float64()),
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


class ImageScorer(Protocol):
    """Anything that says how good an image is for its prompt; larger is better.

    It travels to Ray's actors by pickle. A change of what it computes has to change its attribute
    `version` (any text; none counts as ""), or images that it has scored keep their scores.
    """

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        """A finite number for each RGB image, in order."""
        ...


@dataclass(frozen=True)
class Scorer:
    """A named scorer: how it is loaded in an actor, and what its scores depend on.

    took_part: whether the selection that a model was trained on went by it.
    """

    name: str
    kind: str
    took_part: bool
    identity: Any
    load: Callable[[str], ImageScorer]
    actors: ActorsConfig


def resolve_scorers(
    run: RunDir, config: FifaConfig, extra: Mapping[str, ImageScorer]
) -> list[Scorer]:
    """The scorers of `evaluate.rewards`, and the `extra` ones.

    Raises ConfigError for names that are unknown or taken, and what the reward models' image
    transforms raise, before any work starts.
    """
    configured = (*config.rewards, *config.evaluate.extra_rewards)
    known = [reward.name for reward in configured]
    wanted = config.evaluate.rewards or tuple(known)
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"evaluate.rewards: no reward is named {name!r}; configured are "
                f"{', '.join(known)}{suggest(name, known)}"
            )
    taken = sorted(set(extra) & set(known))
    if taken:
        raise ConfigError(f"extra scorers need names of their own; {taken} are rewards' names")
    scorers = [_of_reward(run, config, r) for r in configured if r.name in wanted]
    for name, scorer in extra.items():
        identity = [type(scorer).__qualname__, str(getattr(scorer, "version", ""))]
        on_cpu = ActorsConfig(num_gpus=0.0)
        scorers.append(Scorer(name, "external", False, identity, _Constant(scorer), on_cpu))
    return scorers


def rewards_stage(model: EvaluatedModel, scorer: Scorer) -> str:
    """Name of the stage and folder of a model's scores by one scorer."""
    return f"evaluation/rewards/{model.name}/{scorer.name}"


def run_rewards_of(
    run: RunDir, config: FifaConfig, model: EvaluatedModel, scorer: Scorer
) -> Manifest:
    """Score the images of one model, or those that are left.

    Raises RuntimeError when more fail than `max_quarantine_fraction` allows.
    """
    images = run.manifest(images_stage(model))
    assert images is not None
    name = rewards_stage(model, scorer)
    stage = MapStage(
        name=name,
        fingerprint=fingerprint(name, images.fingerprint, scorer.identity),
        input_table=images_stage(model),
        key="image_id",
        input_columns=("image_id", "prompt", "image"),
        partial_schema=_PARTIAL,
        assemble=AssembleScores(name),
        rows_per_item=IMAGES_PER_ITEM,
        whole_items=True,
    )
    pool: dict[str, Any] = {}

    def transform(rows: "ray.data.Dataset") -> "ray.data.Dataset":
        pool.update(actor_pool(scorer.actors))
        device = "cuda" if gpus_per_actor(scorer.actors) else "cpu"
        threads = max(1, int(scorer.actors.num_cpus))
        return rows.map_batches(
            ScoreImages,
            fn_constructor_args=(scorer.load, device, threads, config.images.max_pixels),
            batch_size=None,
            batch_format="pyarrow",
            **pool,
        )

    return run_map_stage(
        run,
        stage,
        transform,
        config={"kind": scorer.kind, "identity": scorer.identity},
        max_quarantine_fraction=config.max_quarantine_fraction,
        details=lambda: {"took_part_in_filtering": scorer.took_part},
        pool=pool,
    )


class ScoreImages:
    """(image_id, prompt, image) -> partial rows with the reward, or why there is none."""

    def __init__(
        self, load: Callable[[str], ImageScorer], device: str, num_threads: int, max_pixels: int
    ) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(num_threads)
        self.scorer, self.max_pixels = load(device), max_pixels

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block to its partial rows."""
        images: list[Image.Image] = []
        outcome: list[tuple[float | None, str | None, str | None]] = []
        good = []
        for data in rows.column("image").to_pylist():
            try:
                images.append(decode_image(data, self.max_pixels))
                good.append(len(outcome))
                outcome.append((None, None, None))
            except BadImage as bad:
                outcome.append((None, bad.reason, bad.detail))
        prompts = rows.column("prompt").to_pylist()
        scored = score_each(self.scorer, images, [prompts[i] for i in good])
        for place, result in zip(good, scored, strict=True):
            outcome[place] = result
        return pa.table(
            [rows.column("image_id"), *([row[i] for row in outcome] for i in range(3))],
            schema=_PARTIAL,
        )


def score_each(
    scorer: ImageScorer, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[tuple[float | None, str | None, str | None]]:
    """(reward, error, detail) of each image; when the scorer raises, they are tried one by one."""
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


@dataclass(frozen=True)
class AssembleScores:
    """Partial rows -> EVALUATION_REWARDS; images without a score go to quarantine."""

    stage: str

    def __call__(self, rows: pa.Table, answers: pa.Table) -> tuple[pa.Table, pa.Table]:
        found = in_order(self.stage, rows, answers)
        bad = pc.is_valid(found.column("error"))
        scored = pa.table(
            [rows.column("image_id"), rows.column(schema.PROMPT_ID), found.column("reward")],
            names=schema.EVALUATION_REWARDS.names,
        ).filter(pc.invert(bad))
        return (
            scored.cast(schema.EVALUATION_REWARDS),
            failed_images(self.stage, rows.filter(bad), found.filter(bad)),
        )


class RewardScorer:
    """A configured reward model as an ImageScorer."""

    def __init__(self, transform: Any, model: Any) -> None:
        self.transform, self.model = transform, model

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See `ImageScorer`; each distinct prompt is encoded once."""
        distinct, prompt_of = np.unique(np.array(prompts, object), return_inverse=True)
        arrays = [self.transform(image) for image in images]
        places = np.arange(len(arrays))
        return np.asarray(self.model.score(arrays, list(distinct), places, prompt_of.reshape(-1)))


@dataclass(frozen=True)
class _Constant:
    scorer: ImageScorer

    def __call__(self, device: str) -> ImageScorer:
        return self.scorer


def _of_reward(run: RunDir, config: FifaConfig, reward: RewardConfig) -> Scorer:
    identity: dict[str, Any] = reward.model_dump(
        mode="json", exclude={"name", "actors", "batch_size", "vote_weight"}
    )
    if reward.kind == "fitted":
        folder, identity["fit"] = _fitted_folder(run, reward)
        load = partial(load_fitted_scorer, reward, folder)
    else:
        build_image_transform(reward.kind, reward.weights, options=reward.options)
        load = partial(load_reward_scorer, reward)
    voted = [r for r in config.rewards if r.vote_weight > 0]
    # The same model under another name is not independent.
    took_part = any((r.kind, r.weights) == (reward.kind, reward.weights) for r in voted)
    return Scorer(reward.name, reward.kind, took_part, identity, load, reward.actors)


def load_reward_scorer(reward: RewardConfig, device: str) -> ImageScorer:
    """One of the authors' reward models with its preprocessing."""
    return RewardScorer(
        build_image_transform(reward.kind, reward.weights, options=reward.options),
        build_reward_model(
            reward.kind,
            reward.weights,
            device=device,
            dtype=reward.dtype,
            batch_size=reward.batch_size,
            trust_remote_code=reward.trust_remote_code,
            options=reward.options,
        ),
    )


def load_fitted_scorer(reward: RewardConfig, folder: str, device: str) -> ImageScorer:
    """A reward that was fitted to labels: the model of all folds, since no prompt is one of them.

    A dataset's own held-out prompts are: their labels have helped to fit it.
    """
    with tempfile.TemporaryDirectory(prefix="fitted-reward-") as copies:
        local = local_copy(folder, copies)
        spec = read_fitted_reward(local).spec
        model = FittedRewardModel(
            local,
            device=device,
            dtype=reward.dtype,
            batch_size=reward.batch_size,
            trust_remote_code=reward.trust_remote_code,
        )
    return RewardScorer(build_encoder_transform(spec.encoder, revision=spec.revision), model)


def _fitted_folder(run: RunDir, reward: RewardConfig) -> tuple[str, str]:
    """Where a fitted reward lies, and what changes when it is fitted again."""
    if is_fitted_reward(reward.weights):
        return str(reward.weights), fingerprint(read_fitted_reward(str(reward.weights)).config)
    manifest = run.manifest(f"rewards/{reward.name}")
    if manifest is None:
        raise ConfigError(
            f"the reward {reward.name!r} of kind fitted is not fitted yet; run `fifa filter` or "
            "`fifa fit-reward` first, or leave it out of evaluate.rewards"
        )
    return f"{run.uri.rstrip('/')}/{FITTED}/{reward.name}", manifest.fingerprint
