"""Training from a configuration or a run: what the command line and notebooks call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fifa_ray.config import FifaConfig, dump_config, load_config
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.ingest import run_ingest
from fifa_ray.engine.train import run_train
from fifa_ray.pipeline import SAVED_CONFIG, open_run
from fifa_ray.run_dir import RunDir


def train(
    config: FifaConfig | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> RunDir:
    """Fine-tune `train.model` on the pairs of a run; skips what is complete, resumes what is not.

    `config` is a configuration, a YAML file, a preset's name, a mapping, or a run directory, whose
    saved configuration then holds. The model is in `training/<name>/model` of the returned run.

    Raises ConfigError where the run has no pairs to train on, with the command that makes them, or
    the settings cannot be used; RuntimeError when workers failed more often than allowed.
    """
    run, loaded = open_training(config, overrides)
    connect(loaded.ray)
    save_config(run, loaded)
    if loaded.train.data == "pairs" and run.manifest("pairs") is None:
        run_ingest(run, loaded)
    run_train(run, loaded)
    return run


def open_training(
    config: FifaConfig | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[RunDir, FifaConfig]:
    """The run that a configuration or a run directory names, and its settings."""
    if isinstance(config, FifaConfig):
        return RunDir(config.run_dir), with_absolute_paths(config)
    if not isinstance(config, Mapping) and RunDir(str(config)).exists(SAVED_CONFIG):
        run, saved = open_run(str(config), overrides)
        return run, with_absolute_paths(saved)
    loaded = load_config(config, overrides)
    return RunDir(loaded.run_dir), with_absolute_paths(loaded)


def with_absolute_paths(config: FifaConfig) -> FifaConfig:
    """The configuration with local paths that mean the same from any working folder."""
    source = config.ingest.source
    if "://" not in source:
        source = str(Path(source).expanduser().absolute())
    model = Path(config.train.model).expanduser()
    updates: dict[str, Any] = {
        "ingest": config.ingest.model_copy(update={"source": source}),
    }
    if model.exists():
        updates["train"] = config.train.model_copy(update={"model": str(model.absolute())})
    return config.model_copy(update=updates)


def save_config(run: RunDir, config: FifaConfig) -> None:
    """Keep the settings with the run; what filtered it stays as it was."""
    if run.exists(SAVED_CONFIG):
        _, saved = open_run(run.uri)
        own = {"train": config.train, "evaluate": config.evaluate, "tune": config.tune}
        config = saved.model_copy(update=own)
    run.write_text(dump_config(config), SAVED_CONFIG)
