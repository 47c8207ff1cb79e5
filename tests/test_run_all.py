"""`fifa pipeline`: from a dataset to an aligned model at one command, or a reason at once."""

import json

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from models.tiny_pipelines import RESOLUTION, save_tiny_sd
from small_filter import write_config

from fifa_ray.cli import EXIT_BAD_INPUT, EXIT_FAILED, main
from fifa_ray.demo.world import generate_world
from fifa_ray.run_dir import RunDir


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    generate_world(folder, num_pairs=120, num_prompts=50, seed=11, num_files=1, num_processes=1)
    save_tiny_sd(folder / "base")
    return folder


@pytest.fixture
def config(world, tmp_path):
    return write_config(
        tmp_path,
        world,
        embed={"actors": {"max_actors": 1}},
        select={"selection_size": 8, "compare": ["random"]},
        train={
            "model": str(world / "base"),
            "resolution": RESOLUTION,
            "precision": "float32",
            "global_batch_size": 4,
            "max_steps": 2,
            "cache_actors": {"max_actors": 1},
        },
        evaluate={
            "num_prompts": 4,
            "num_inference_steps": 2,
            "actors": {"max_actors": 1},
        },
    )


def pipeline(config, *overrides):
    return CliRunner().invoke(main, ["pipeline", config, *overrides])


def test_filter_train_evaluate_and_report_in_one_command(ray_session, config, tmp_path):
    result = pipeline(config)
    assert result.exit_code == 0, result.output
    run = RunDir(str(tmp_path / "run"))
    assert set(run.manifests()) >= {"pairs", "selected", "training/dpo", "evaluation/results"}
    assert run.manifest("selected").rows_out == 8
    assert run.exists("training", "dpo", "model", "model_index.json")
    compared = json.loads(run.read_text("evaluation", "results.json"))["comparisons"]
    assert [(c["model"], c["baseline"]) for c in compared] == [("dpo", "base")]
    assert "win rate" in result.output
    assert result.output.strip().endswith("report.html")
    # What was trained on is what the filter kept.
    trained = pq.read_table(run.path("training", "dpo", "pairs"))
    kept = run.read_table("selected", columns=["pair_id"])
    assert set(trained["pair_id"].to_pylist()) == set(kept["pair_id"].to_pylist())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.model=/nowhere/base", "/nowhere/base"),
        ("train.data=baselines/margin_only", "needs margin_only in select.compare"),
        ("train.num_workers=64 and train.global_batch_size=64", "64"),
        ("train.optimizer.kind=adamw_8bit", "needs GPUs"),
        ("train.loggers=[mlflow]", "pip install mlflow"),
        ("evaluate.resolution=30", "evaluate.resolution must be a multiple"),
        ("evaluate.rewards=[tinny]", "no reward is named 'tinny'"),
        ("evaluate.trainings=[dpo, other]", "no complete training 'other'"),
        ("evaluate.prompts=/nowhere/prompts.txt", "/nowhere/prompts.txt"),
    ],
)
def test_what_the_later_parts_cannot_do_is_said_before_any_work(
    ray_session, config, tmp_path, override, message
):
    result = pipeline(config, *override.split(" and "))
    assert result.exit_code in (EXIT_BAD_INPUT, EXIT_FAILED), result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_settings(config, tmp_path):
    result = pipeline(config, "train.max_steps=7", "--dry-run")
    assert result.exit_code == 0
    assert yaml.safe_load(result.output)["train"]["max_steps"] == 7
    assert not (tmp_path / "run").exists()
