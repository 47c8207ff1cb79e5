"""From a dataset to an aligned model: filter, train, evaluate, report."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fifa_ray.config import FifaConfig, load_config
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.evaluate import check_evaluate
from fifa_ray.engine.train import check_train
from fifa_ray.evaluation import evaluate
from fifa_ray.pipeline import run_filter
from fifa_ray.run_dir import RunDir
from fifa_ray.training import train, with_absolute_paths

logger = logging.getLogger(__name__)


def run_all(
    config: FifaConfig | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> RunDir:
    """Filter, train on what was kept, evaluate, report; skips what is complete.

    `config` is a configuration, a YAML file, a preset's name or a mapping. Raises ConfigError,
    ValueError or RuntimeError before any work starts where training or evaluation cannot be done,
    as far as that can be known without the selection; else what the parts raise.
    """
    loaded = config if isinstance(config, FifaConfig) else load_config(config, overrides)
    loaded = with_absolute_paths(loaded)
    run = RunDir(loaded.run_dir)
    connect(loaded.ray)
    check_train(loaded)
    check_evaluate(run, loaded)
    logger.info("training and evaluation can use this configuration")
    run_filter(loaded, write_page=False)
    train(loaded)
    return evaluate(loaded)
