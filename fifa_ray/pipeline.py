"""The whole filter in order, and choosing again: what the command line and notebooks call."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fifa_ray.config import ConfigError, FifaConfig, dump_config, load_config
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.embed import run_embed
from fifa_ray.engine.ingest import run_ingest, stage_table
from fifa_ray.engine.judge import run_judge
from fifa_ray.engine.neighbors import run_neighbors
from fifa_ray.engine.rewards import run_rewards
from fifa_ray.engine.select import run_select
from fifa_ray.report import write_report
from fifa_ray.run_dir import RunDir

logger = logging.getLogger(__name__)

SAVED_CONFIG = "config.yaml"


def run_filter(
    config: FifaConfig | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    data: Any = None,
) -> RunDir:
    """Ingest, score, judge, embed, find neighbours, select and report; skips what is complete.

    `config` is a configuration, a YAML file, a preset's name or a mapping. `data` may be a Ray
    Dataset, a pandas DataFrame, an Arrow table or a list of dicts to filter instead of
    `ingest.source`. Returns the run directory, whose `selected/` holds the K pairs.

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
    _select_and_report(run, loaded)
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
    _select_and_report(run, config)
    return run


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


def _select_and_report(run: RunDir, config: FifaConfig) -> None:
    run_select(run, config)
    if config.report.enabled:
        logger.info("report: %s", write_report(run))


def _with_source(config: FifaConfig, source: str) -> FifaConfig:
    ingest = config.ingest.model_copy(update={"source": source})
    return config.model_copy(update={"ingest": ingest})


def _absolute(source: str) -> str:
    return source if "://" in source else str(Path(source).expanduser().absolute())
