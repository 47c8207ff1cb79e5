"""Which stages a plan has, by name, and which of them a sample has to run.

Names are those of the manifests (`pairs`, `rewards/<name>`, `quality`, `embeddings`, `neighbors`,
`selected`), and `latents`, `training`, `evaluation/images`, `evaluation/rewards/<name>`.
"""

from fifa_ray.config import ConfigError, FifaConfig
from fifa_ray.config.suggestions import suggest


def stage_names(config: FifaConfig, *, train: bool) -> list[str]:
    """Stages of a plan in the order in which they run."""
    names = ["pairs", *(f"rewards/{reward.name}" for reward in config.rewards)]
    names += ["quality"] if config.judge.enabled else []
    names += ["embeddings", "neighbors", "selected"]
    if train:
        names += ["latents"] if config.train.cache_latents else []
        names += ["training", "evaluation/images"]
        names += [f"evaluation/rewards/{name}" for name in scorer_names(config)]
    return names


def scorer_names(config: FifaConfig) -> list[str]:
    """Reward models that score the evaluation's images."""
    known = [reward.name for reward in (*config.rewards, *config.evaluate.extra_rewards)]
    wanted = config.evaluate.rewards
    return known if wanted is None else [name for name in known if name in wanted]


def check_rates(config: FifaConfig) -> None:
    """Raise ConfigError for a given rate of a stage that this configuration does not have."""
    known = stage_names(config, train=True)
    for name in config.cost.rates:
        if name not in known:
            raise ConfigError(
                f"cost.rates: no stage is named {name!r}; there are "
                f"{', '.join(known)}{suggest(name, known)}"
            )


def stages_to_measure(config: FifaConfig, *, train: bool) -> set[str]:
    """What a sample has to run: stages with models whose rate is not given.

    `selected` and `training` come along where all that they need is measured anyway.
    """
    given = set(config.cost.rates)
    models = {n for n in stage_names(config, train=False)} - {"pairs", "neighbors", "selected"}
    wanted = models - given
    if wanted == models and "selected" not in given:
        wanted.add("selected")
    if train:
        later = set(stage_names(config, train=True)) - set(stage_names(config, train=False))
        if later - given and wanted != models | {"selected"}:
            raise ConfigError(
                "training and evaluation can be measured only on a sample that goes through every "
                "stage: give the rates of all of them in cost.rates "
                f"({', '.join(sorted(later - given))} are missing), or of none"
            )
        if later - given:
            wanted |= {"training", "evaluation"}
    return wanted
