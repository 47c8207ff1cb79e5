"""The whole filter in order, and choosing again: what the command line and notebooks call."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fifa_ray.config import ConfigError, FifaConfig, RewardConfig, dump_config, load_config
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.embed import run_embed
from fifa_ray.engine.ingest import run_ingest
from fifa_ray.engine.judge import run_judge
from fifa_ray.engine.neighbors import run_neighbors
from fifa_ray.engine.rewards import run_rewards
from fifa_ray.engine.select import run_select
from fifa_ray.report import write_report
from fifa_ray.run_dir import RunDir
from fifa_ray.sources import stage_table

SAVED_CONFIG = "config.yaml"


def run_filter(
    config: FifaConfig | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    data: Any = None,
    write_page: bool = True,
) -> RunDir:
    """Ingest, score, judge, embed, find neighbours, select and report; skips what is complete.

    `config` is a configuration, a YAML file, a preset's name or a mapping. `data` may be a Ray
    Dataset, a pandas DataFrame, an Arrow table or a list of dicts to filter instead of
    `ingest.source`; `write_page` off leaves the report to the caller. Returns the run directory,
    whose `selected/` holds the K pairs.

    Raises ConfigError before any work starts when the configuration cannot be used, ValueError for
    a dataset that cannot, RuntimeError when a stage puts aside more rows than allowed.
    """
    if data is not None and isinstance(config, Mapping):
        config = dict(config) | {"ingest": {"source": "data", **dict(config.get("ingest", {}))}}
    loaded = config if isinstance(config, FifaConfig) else load_config(config, overrides)
    run = RunDir(loaded.run_dir)
    connect(loaded.ray)
    if data is not None:
        loaded = _with_source(loaded, stage_table(run, data))
    loaded = _with_source(loaded, _absolute(loaded.ingest.source))
    run.write_text(dump_config(loaded), SAVED_CONFIG)
    run_ingest(run, loaded)
    run_rewards(run, loaded)
    if loaded.judge.enabled:
        run_judge(run, loaded)
    run_embed(run, loaded)
    run_neighbors(run, loaded)
    run_select(run, loaded)
    if loaded.report.enabled and write_page:
        write_report(run)
    return run


def reselect(run_uri: str, overrides: Sequence[str] = ()) -> RunDir:
    """Choose again from the tables of a run: other weights, K or rules, no model is run.

    Raises ConfigError for overrides of anything but `select` and `report`.
    """
    foreign = [o for o in overrides if o.partition(".")[0] not in ("select", "report", "ray")]
    if foreign:
        raise ConfigError(
            f"{foreign[0]!r} changes more than the selection; only select.*, report.* and ray.* "
            "can change here: use `fifa filter` for the rest"
        )
    run, config = open_run(run_uri, overrides)
    connect(config.ray)
    run.write_text(dump_config(config), SAVED_CONFIG)
    run_select(run, config)
    if config.report.enabled:
        write_report(run)
    return run


def fit_reward(config: FifaConfig) -> Iterator[str]:
    """Ingest, fit the configured reward of kind fitted, and say how good it is on unseen prompts.

    Without one in the configuration, a reward named "fitted" on image statistics. Yields lines for
    a terminal.
    """
    from fifa_ray.engine.fit_reward import FITTED, describe_fit, run_fitted_reward

    found = [reward for reward in config.rewards if reward.kind == "fitted"]
    reward = found[0] if found else RewardConfig(name="fitted", kind="fitted")
    run = RunDir(config.run_dir)
    connect(config.ray)
    config = _with_source(config, _absolute(config.ingest.source))
    run_ingest(run, config)
    manifest = run_fitted_reward(run, config, reward)
    yield from describe_fit(manifest)
    folder = run.path(FITTED, reward.name)
    yield f"Rewards of these pairs, each by a model of other prompts: {run.path(manifest.stage)}"
    if "held_out" in manifest.details:
        yield f"Model for other data (weights of a reward of kind fitted): {folder}"
    rewards = "" if found else f" 'rewards=[{{name: {reward.name}, kind: fitted}}]'"
    yield f"Next: fifa filter CONFIG{rewards}  (the rewards are not computed again)"


def open_run(run_uri: str, overrides: Sequence[str] = ()) -> tuple[RunDir, FifaConfig]:
    """A run directory and the configuration saved in it, wherever the folder lies now.

    Raises ConfigError where there is no run.
    """
    run = RunDir(run_uri)
    if not run.exists(SAVED_CONFIG):
        raise ConfigError(
            f"{run_uri} is no run directory (it has no {SAVED_CONFIG}); expected the folder that "
            "`fifa filter` printed last"
        )
    import yaml

    values = yaml.safe_load(run.read_text(SAVED_CONFIG)) | {"run_dir": run_uri}
    return run, load_config(values, overrides)


def _with_source(config: FifaConfig, source: str) -> FifaConfig:
    ingest = config.ingest.model_copy(update={"source": source})
    return config.model_copy(update={"ingest": ingest})


def _absolute(source: str) -> str:
    return source if "://" in source else str(Path(source).expanduser().absolute())
