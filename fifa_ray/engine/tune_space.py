"""What a search may vary: dotted settings and their ranges, put into a configuration and taken out.

Keys are those of the configuration, `select.quality_weight` or `train.optimizer.learning_rate`, and
a trial's parameters are a value for each. A trial is named by its parameters.
"""

import math
from collections.abc import Mapping
from typing import Any

from fifa_ray.config import ConfigError, DimensionConfig, FifaConfig, load_config
from fifa_ray.config.suggestions import suggest
from fifa_ray.run_dir import fingerprint

Params = dict[str, Any]
Space = dict[str, DimensionConfig]

# What decides how trials share latents, prompts and devices has to be the same for all of them.
_SHARED = {
    "select": {"images", "column_names", "compare"},
    "train": {
        "name",
        "data",
        "max_pairs",
        "model",
        "revision",
        "variant",
        "resolution",
        "random_crop",
        "random_flip",
        "cache_latents",
        "cache_dtype",
        "precision",
        "num_workers",
        "min_workers",
        "num_cpus_per_worker",
        "use_gpu",
        "seed",
        "loggers",
        "sample_prompts",
        "cache_actors",
    },
}


def search_space(config: FifaConfig) -> Space:
    """`tune.space`, or ranges around what is configured; every end of it is a valid setting.

    Raises ConfigError for a setting that is not there, that trials have to share, or whose ends
    the configuration refuses.
    """
    space = config.tune.space if config.tune.space is not None else default_space(config)
    if not space:
        raise ConfigError("tune.space is empty: name a setting to search, or leave it out")
    settings = {"select": config.select.model_dump(), "train": config.train.model_dump()}
    known = [key for name in settings for key in _leaves(name, settings[name])]
    for key, dimension in space.items():
        section, _, rest = key.partition(".")
        if section in _SHARED and rest.partition(".")[0] in _SHARED[section]:
            raise ConfigError(
                f"tune.space: {key} has to be the same for all trials, which share what it decides"
            )
        if key not in known:
            raise ConfigError(
                f"tune.space: no setting of select or train is {key}{suggest(key, known)}"
            )
        for value in dimension.ends:
            try:
                with_params(config, {key: value})
            except ConfigError as error:
                raise ConfigError(f"tune.space: {key} cannot be {value}: {error}") from None
    return dict(space)


def default_space(config: FifaConfig) -> Space:
    """Weights, K, margin rule, floor, selector, dpo_beta, learning rate and steps, around these."""
    select, train = config.select, config.train
    space: dict[str, Any] = {
        "select.selection_size": {"log_integer": _around(select.selection_size, 4, 2)},
        "select.diversity_weight": {"uniform": (0.0, 2.0)},
        "select.margin_rule": {"choice": ("signed", "clipped")},
        "select.selector": {"choice": ("top_k", "greedy")},
        "train.loss.dpo_beta": {
            "loguniform": (train.loss.dpo_beta / 5, train.loss.dpo_beta * 5),
        },
        "train.optimizer.learning_rate": {
            "loguniform": (train.optimizer.learning_rate / 5, train.optimizer.learning_rate * 5),
        },
        "train.max_steps": {"log_integer": _around(train.max_steps, 3, 1)},
    }
    if config.judge.enabled:
        space["select.quality_weight"] = {"uniform": (0.0, 2.0)}
        floors = sorted({3.0, 5.0, 7.0} | {select.min_quality or 5.0})
        space["select.min_quality"] = {"choice": (None, *floors)}
    return {key: DimensionConfig.model_validate(value) for key, value in sorted(space.items())}


def configured_params(config: FifaConfig, space: Space) -> Params:
    """The values that a space's settings have in a configuration: the trial of no change."""
    values = {"select": config.select.model_dump(), "train": config.train.model_dump()}
    found: Params = {}
    for key in space:
        here: Any = values
        for step in key.split("."):
            here = here[step]
        found[key] = here
    return found


def with_params(config: FifaConfig, params: Mapping[str, Any]) -> FifaConfig:
    """The configuration with other values. Raises ConfigError where it refuses one."""
    values = config.model_dump()
    for key, value in params.items():
        *path, last = key.split(".")
        here = values
        for step in path:
            here = here[step]
        here[last] = value
    return load_config(values)


def is_inside(space: Space, params: Mapping[str, Any]) -> bool:
    """Whether the search could propose these very parameters."""
    return set(space) == set(params) and all(space[k].contains(v) for k, v in params.items())


def plain_params(params: Mapping[str, Any]) -> Params:
    """Parameters without NumPy's types, which some algorithms propose."""
    return {k: v.item() if hasattr(v, "item") else v for k, v in params.items()}


def trial_name(params: Mapping[str, Any]) -> str:
    """Name of the trial with these parameters: the same parameters, the same trial."""
    return fingerprint(dict(params))[:10]


def most_steps(config: FifaConfig, space: Space) -> int:
    """The largest number of optimizer steps that a trial may have."""
    dimension = space.get("train.max_steps")
    ends = dimension.ends if dimension else (config.train.max_steps,)
    return max(int(end) for end in ends if end is not None)


def rungs_of(grace_steps: int, reduction_factor: float, last: int) -> list[int]:
    """Optimizer steps at which a trial of `last` steps is judged: a geometric ladder and the last.

    As Tune's ASHA has them: grace_steps · reduction_factor^k.
    """
    count = max(0, math.ceil(math.log(last / grace_steps) / math.log(reduction_factor) - 1e-9))
    ladder = [math.ceil(grace_steps * reduction_factor**k - 1e-9) for k in range(count)]
    return [steps for steps in ladder if steps < last] + [last]


def grace_steps(config: FifaConfig, space: Space) -> int:
    """`tune.asha.grace_steps`, or the most steps divided by the reduction factor twice."""
    asha = config.tune.asha
    most = most_steps(config, space)
    if not asha.enabled:
        return most
    wanted = asha.grace_steps or max(1, math.ceil(most / asha.reduction_factor**2))
    return min(wanted, most)


def _around(value: int, below: int, above: int) -> tuple[int, int]:
    return max(1, value // below), max(1, value * above)


def _leaves(prefix: str, values: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in values.items():
        key = f"{prefix}.{name}"
        found += _leaves(key, value) if isinstance(value, dict) else [key]
    return found
