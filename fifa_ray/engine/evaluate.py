"""The evaluation: prompts chosen, drawn by every model, scored by every scorer, and compared.

    evaluation/  prompts/  images/<model>/  rewards/<model>/<reward>/  results.json

Each of them is a stage: what is complete and unchanged is not done again.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from fifa_ray.config import ConfigError, FifaConfig
from fifa_ray.config.sections import NAME_PATTERN
from fifa_ray.engine.evaluate_images import run_images
from fifa_ray.engine.evaluate_models import resolve_models
from fifa_ray.engine.evaluate_prompts import HELD_OUT, run_prompts
from fifa_ray.engine.evaluate_results import write_results
from fifa_ray.engine.evaluate_rewards import rewards_stage, run_scorer
from fifa_ray.engine.evaluate_scorers import ImageScorer, resolve_scorers
from fifa_ray.models.image_generator import RESOLUTION_STEP
from fifa_ray.models.reward_fitted import is_fitted_reward
from fifa_ray.run_dir import RunDir, manifest_name
from fifa_ray.sources.prompt_sets import read_prompt_set

logger = logging.getLogger(__name__)


def run_evaluate(
    run: RunDir, config: FifaConfig, extra_scorers: Mapping[str, ImageScorer] | None = None
) -> dict[str, Any]:
    """Evaluate what `config.evaluate` says, or the rest of it; returns the results.

    `extra_scorers`: further scorers by name, such as a known truth. Raises ConfigError before any
    image is drawn where a training, reward or prompt is missing; RuntimeError when more images
    fail than `max_quarantine_fraction` allows.
    """
    extra = dict(extra_scorers or {})
    for name in extra:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(f"a scorer's name must match {NAME_PATTERN}, got {name!r}")
    scorers = resolve_scorers(run, config, extra)
    models = resolve_models(run, config)
    stages = [manifest_name(rewards_stage(m, s)) for m in models for s in scorers]
    if len(set(stages)) < len(stages):
        raise ConfigError(
            "names of models and rewards run together where they are joined by dots: "
            f"{[m.name for m in models]} and {[s.name for s in scorers]}; give a model another one "
            "as LABEL=NAME"
        )
    resolution = _resolution(config, models[-1].resolution)
    prompts = run_prompts(run, config, models)
    logger.info(
        "evaluation: %s prompts, %s images by each of %s",
        f"{prompts.details['num_prompts']:,}",
        f"{prompts.rows_out:,}",
        ", ".join(model.name for model in models),
    )
    run_images(run, config, models, resolution)
    for scorer in scorers:
        run_scorer(run, config, models, scorer)
    return write_results(run, config, models, scorers)


def check_evaluate(run: RunDir, config: FifaConfig) -> None:
    """Raise what `run_evaluate` would after a filter and a training with this configuration.

    As far as it is known: what they will leave (rewards that are fitted, the model) is taken for
    granted, the rest has to be there.
    """
    settings = config.evaluate
    configured = (*config.rewards, *settings.extra_rewards)
    wanted = [r.name for r in configured] if settings.rewards is None else settings.rewards
    to_fit = {
        r.name for r in config.rewards if r.kind == "fitted" and not is_fitted_reward(r.weights)
    }
    there = tuple(name for name in wanted if name not in to_fit)
    if there or not wanted:
        resolve_scorers(run, _with(config, rewards=there), {})
    entries = settings.trainings or ()
    others = tuple(e for e in entries if e.rpartition("=")[2] != config.train.name)
    if others:
        resolve_models(run, _with(config, trainings=others))
    _resolution(config, config.train.resolution)
    if settings.prompts != HELD_OUT:
        read_prompt_set(settings.prompts)


def _with(config: FifaConfig, **updates: Any) -> FifaConfig:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=updates)})


def _resolution(config: FifaConfig, of_model: int) -> int:
    """Side of the images, pixels. Raises ConfigError where the model cannot draw it."""
    resolution = config.evaluate.resolution or of_model
    if resolution % RESOLUTION_STEP:
        raise ConfigError(
            f"evaluate.resolution must be a multiple of {RESOLUTION_STEP} pixels, got {resolution}"
        )
    return resolution
