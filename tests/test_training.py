"""`fifa train`: where its settings come from, what it keeps, and its messages."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fifa_ray.cli import EXIT_BAD_INPUT, main
from fifa_ray.config import ConfigError, load_config
from fifa_ray.training import open_training, save_config


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run directory with a configuration, as the filter leaves it."""
    folder = tmp_path / "run"
    config = load_config(
        {
            "run_dir": str(folder),
            "ingest": {"source": "s3://bucket/data"},
            "select": {"selection_size": 12},
        }
    )
    folder.mkdir()
    save_config(open_training(config)[0], config)
    return folder


def test_a_run_directory_brings_its_settings_and_training_leaves_the_filters_alone(saved):
    run, config = open_training(str(saved), ["train.name=lora", "train.lora.rank=4"])
    assert config.select.selection_size == 12
    assert config.train.lora.rank == 4
    changed = config.model_copy(update={"ingest": config.ingest.model_copy(update={"source": "x"})})
    save_config(run, changed)
    kept = yaml.safe_load((saved / "config.yaml").read_text())
    assert kept["ingest"]["source"] == "s3://bucket/data"
    assert kept["train"]["name"] == "lora"


def test_a_file_a_mapping_and_a_preset_name_a_run_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    values = {"run_dir": "out", "ingest": {"source": "data"}, "train": {"model": "base"}}
    Path("c.yaml").write_text(yaml.safe_dump(values))
    for given in ("c.yaml", values):
        run, config = open_training(given)
        assert run.root == str(tmp_path / "out")
        # Workers have another working folder, so paths are absolute; hub names stay.
        assert config.ingest.source == str(tmp_path / "data")
        assert config.train.model == str(tmp_path / "base")
    _, preset = open_training("pickapic_sd15", ["ingest.source=s3://bucket/data"])
    assert preset.train.model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert preset.ingest.source == "s3://bucket/data"
    with pytest.raises(ConfigError, match="no configuration file"):
        open_training("absent")


def test_the_command_line_prints_its_settings_and_explains_mistakes(saved):
    runner = CliRunner()
    shown = runner.invoke(main, ["train", str(saved), "train.max_steps=7", "--dry-run"])
    assert shown.exit_code == 0
    assert yaml.safe_load(shown.output)["train"]["max_steps"] == 7
    wrong = runner.invoke(main, ["train", str(saved), "train.maxsteps=7"])
    assert wrong.exit_code == EXIT_BAD_INPUT
    assert "max_steps" in wrong.output
