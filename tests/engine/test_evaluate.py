"""The evaluation from prompts to win rates, on tiny random pipelines."""

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from evaluation_run import (
    PROMPTS,
    evaluate_config,
    publish_training,
    save_base,
    save_full,
    save_lora,
)
from models.tiny_pipelines import RESOLUTION
from PIL import Image
from scipy import stats

from fifa_ray.cli import main
from fifa_ray.config import dump_config
from fifa_ray.demo.run import REWARD_WEIGHTS
from fifa_ray.engine.evaluate import run_evaluate
from fifa_ray.engine.evaluate_images import DrawParts, run_images
from fifa_ray.engine.evaluate_models import resolve_models
from fifa_ray.engine.evaluate_prompts import run_prompts
from fifa_ray.models.image_generator import Sampling
from fifa_ray.models.reward import build_image_transform, build_reward_model
from fifa_ray.run_dir import RunDir, part_name
from fifa_ray.schema import normalize_prompt

NUM_IMAGES = 2 * len(PROMPTS)


class Brightness:
    """A scorer that anyone can recompute: the mean of all pixels, 0 to 1. Counts its images."""

    version = "1"

    def __init__(self, seen: Path) -> None:
        self.seen = seen

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        for _ in images:
            (self.seen / str(time.time_ns())).touch()
        return np.array([np.asarray(image, np.float64).mean() / 255 for image in images])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": prompt, "category": category} for prompt, category in PROMPTS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return Brightness(tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="module")
def settings(prompt_file):
    return {"prompts": prompt_file, "images_per_prompt": 2, "trainings": ["dpo", "adapters"]}


@pytest.fixture(scope="module")
def evaluated(ray_session, base, settings, scorer, tmp_path_factory):
    """A run with a full and a LoRA training, and its results."""
    run = RunDir(str(tmp_path_factory.mktemp("run")))
    save_full(base, Path(run.path("training", "dpo", "model")))
    publish_training(run, base, "dpo")
    save_lora(base, Path(run.path("training", "adapters", "model")))
    publish_training(run, base, "adapters", lora={"rank": 2})
    results = run_evaluate(run, evaluate_config(run, base, **settings), {"brightness": scorer})
    return run, results


@pytest.fixture
def evaluated_copy(evaluated, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(evaluated[0].root, tmp_path / "copy")
    return RunDir(str(tmp_path / "copy"))


def images_of(run, model):
    return run.read_table("evaluation", "images", model).to_pandas()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)), np.int64)


def draw_by_hand(pipeline, row):
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        row.prompt,
        num_inference_steps=3,
        guidance_scale=7.5,
        height=RESOLUTION,
        width=RESOLUTION,
        generator=torch.Generator("cpu").manual_seed(row.image_seed),
    ).images[0]
    return np.asarray(image, np.int64)


def test_every_model_draws_every_prompt_with_the_same_seeds(evaluated):
    run, _ = evaluated
    prompts = run.read_table("evaluation", "prompts").to_pandas()
    assert len(prompts) == NUM_IMAGES
    assert prompts.image_seed.is_unique
    assert list(prompts.prompt[::2]) == [normalize_prompt(text) for text, _ in PROMPTS]
    for model in ("dpo", "adapters", "base"):
        images = images_of(run, model)
        assert set(images.model) == {model}
        pd.testing.assert_frame_equal(images[prompts.columns.tolist()], prompts)
        manifest = run.manifest(f"evaluation/images/{model}")
        assert (manifest.rows_in, manifest.rows_out) == (NUM_IMAGES, NUM_IMAGES)


def test_images_are_those_that_diffusers_draws_by_itself(evaluated, base):
    from diffusers import StableDiffusionPipeline

    run, _ = evaluated
    plain = StableDiffusionPipeline.from_pretrained(base)
    tuned = StableDiffusionPipeline.from_pretrained(run.path("training", "dpo", "model"))
    adapted = StableDiffusionPipeline.from_pretrained(base)
    adapted.load_lora_weights(run.path("training", "adapters", "model"))
    by_hand = {"base": plain, "dpo": tuned, "adapters": adapted}
    drawn = {}
    for model, pipeline in by_hand.items():
        for row in images_of(run, model).iloc[[0, 5, 9]].itertuples():
            expected = draw_by_hand(pipeline, row)
            drawn[model, row.image_id] = pixels(row.image)
            # Drawn in another batch: the last bits may round to another level.
            assert np.abs(drawn[model, row.image_id] - expected).max() <= 1
    for model in ("dpo", "adapters"):
        assert np.abs(drawn[model, 0] - drawn["base", 0]).max() > 3


def test_rewards_are_those_of_the_kept_images(evaluated):
    run, results = evaluated
    transform = build_image_transform("pickscore", str(REWARD_WEIGHTS))
    model = build_reward_model("pickscore", str(REWARD_WEIGHTS))
    for name in ("dpo", "base"):
        images = images_of(run, name)
        bright = run.read_table("evaluation", "rewards", name, "brightness").to_pandas()
        assert list(bright.image_id) == list(images.image_id)
        np.testing.assert_allclose(
            bright.reward, [pixels(data).mean() / 255 for data in images.image], rtol=1e-12
        )
        arrays = [transform(Image.open(io.BytesIO(data))) for data in images.image]
        index = np.arange(len(arrays))
        expected = model.score(arrays, list(images.prompt), index, index)
        tiny = run.read_table("evaluation", "rewards", name, "tiny").to_pandas()
        np.testing.assert_allclose(tiny.reward, expected, atol=1e-4)
        (entry,) = [m for m in results["models"] if m["name"] == name]
        assert entry["mean_reward"]["brightness"] == pytest.approx(bright.reward.mean())


def test_results_equal_a_recount_from_the_tables(evaluated):
    run, results = evaluated
    assert results == json.loads(run.read_text("evaluation", "results.json"))
    prompts = run.read_table("evaluation", "prompts").to_pandas()
    found = {(c["model"], c["baseline"], c["reward"]): c for c in results["comparisons"]}
    assert set(found) == {
        (a, b, reward)
        for a, b in (("dpo", "adapters"), ("dpo", "base"), ("adapters", "base"))
        for reward in ("tiny", "brightness")
    }
    for (a, b, reward), entry in found.items():
        scores = [
            run.read_table("evaluation", "rewards", model, reward).to_pandas().reward
            for model in (a, b)
        ]
        difference = scores[0] - scores[1]
        assert entry["num_images"] == NUM_IMAGES
        assert entry["num_prompts"] == len(PROMPTS)
        assert entry["win_rate"] == pytest.approx(
            ((difference > 0) + 0.5 * (difference == 0)).mean()
        )
        assert entry["mean_difference"] == pytest.approx(difference.mean())
        signs = np.sign(np.sign(difference).groupby(prompts.prompt_id).sum())
        wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
        assert (entry["wins"], entry["losses"]) == (wins, losses)
        if wins + losses:
            assert entry["p_value"] == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
        assert entry["win_rate_low"] <= entry["win_rate"] <= entry["win_rate_high"]
        by_category = {row["category"]: row for row in entry["categories"]}
        assert {name: row["num_prompts"] for name, row in by_category.items()} == {
            "animals": 2, "counting": 1, "text": 2,
        }  # fmt: skip
        animals = difference[prompts.category == "animals"]
        assert by_category["animals"]["mean_difference"] == pytest.approx(animals.mean())
        assert by_category["counting"]["win_rate_low"] is None
        assert entry["took_part_in_filtering"] == (reward == "tiny")


def stamps(run):
    return {name: m.finished_at + m.fingerprint for name, m in run.manifests().items()
            if name != "evaluation/results"}  # fmt: skip


def test_the_same_again_does_nothing(evaluated, base, settings, scorer):
    run, results = evaluated
    before, seen = stamps(run), len(list(scorer.seen.iterdir()))
    again = run_evaluate(run, evaluate_config(run, base, **settings), {"brightness": scorer})
    assert again == results
    assert stamps(run) == before
    assert len(list(scorer.seen.iterdir())) == seen


def test_another_training_leaves_the_others_as_they_are(
    ray_session, evaluated, evaluated_copy, base, settings, scorer
):
    run = evaluated_copy
    save_full(base, Path(run.path("training", "second", "model")), scale=0.7)
    publish_training(run, base, "second", seed=1)
    before, seen = stamps(run), len(list(scorer.seen.iterdir()))
    # Of the scorers, one is enough here.
    more = settings | {"trainings": ["dpo", "adapters", "second"], "rewards": []}
    results = run_evaluate(run, evaluate_config(run, base, **more), {"brightness": scorer})
    assert stamps(run).items() >= before.items()
    assert len(list(scorer.seen.iterdir())) == seen + NUM_IMAGES
    assert len(results["comparisons"]) == 6
    comparisons = evaluated[1]["comparisons"]
    old = {json.dumps(c) for c in comparisons if c["reward"] == "brightness"}
    assert old < {json.dumps(c) for c in results["comparisons"]}


def without_evaluation(run, folder):
    """A copy of a run's trainings alone."""
    copy = RunDir(str(folder))
    for part in ("training", "manifests"):
        shutil.copytree(run.path(part), copy.path(part))
    for manifest in Path(copy.path("manifests")).glob("evaluation*"):
        manifest.unlink()
    return copy


def assert_same_images(run, other, model):
    """Images that both runs have are equal; in another batch the last bits may round otherwise."""
    key = ["prompt_id", "image_index"]
    both = images_of(run, model).merge(images_of(other, model), on=key, validate="one_to_one")
    assert len(both) == NUM_IMAGES
    assert (both.image_seed_x == both.image_seed_y).all()
    for one, two in zip(both.image_x, both.image_y, strict=True):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1


def test_images_do_not_depend_on_batches_and_actors(
    ray_session, evaluated, base, settings, tmp_path
):
    run = without_evaluation(evaluated[0], tmp_path / "run")
    pool = {"batch_size": 3, "actors": {"min_actors": 2, "max_actors": 2}, "images_per_prompt": 3}
    config = evaluate_config(run, base, **settings | pool)
    models = resolve_models(run, config)
    run_prompts(run, config, models)
    assert len(run.list("evaluation/prompts")) == 2
    run_images(run, config, models[-1:], RESOLUTION)
    assert_same_images(evaluated[0], run, "base")


def test_a_killed_driver_goes_on_where_it_was(ray_session, evaluated, base, settings, tmp_path):
    run = without_evaluation(evaluated[0], tmp_path / "run")
    more = {"trainings": ["dpo"], "images_per_prompt": 7}
    config = evaluate_config(run, base, **settings | more)
    address = ray_session.get_runtime_context().gcs_address
    ray_settings = config.ray.model_copy(update={"address": address})
    run.write_text(dump_config(config.model_copy(update={"ray": ray_settings})), "config.yaml")
    command = [sys.executable, "-m", "fifa_ray.cli", "evaluate", run.root]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    drawn = Path(run.path("evaluation", "images", "dpo"))
    while process.poll() is None and not any(drawn.glob("*.parquet")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert run.manifest("evaluation/images/base") is None, process.communicate()[0]
    before = {path: path.stat().st_mtime_ns for path in drawn.glob("*.parquet")}

    done = CliRunner().invoke(main, ["evaluate", run.root])
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in drawn.glob("*.parquet")}.items() >= (
        before.items()
    )
    assert len(images_of(run, "dpo")) == 7 * len(PROMPTS)
    lines = done.stdout.splitlines()
    assert lines[1].split()[:4] == ["dpo", "over", "base", "tiny*"]
    assert lines[-1] == f"Report: {run.path('report.html')}"
    assert_same_images(evaluated[0], run, "dpo")


def test_a_part_is_the_same_bytes_whenever_and_after_whatever_it_is_drawn(
    evaluated, base, settings, tmp_path
):
    run = RunDir(str(tmp_path))
    config = evaluate_config(run, base, **settings)
    models = {f"evaluation/images/{m.name}": m for m in resolve_models(evaluated[0], config)}
    run_prompts(run, config, [])
    sampling = Sampling(RESOLUTION, 3, 7.5)
    draw = DrawParts(run, models, sampling, config.evaluate, "cpu")
    for name in ("base", "adapters", "base"):
        entry = {"input": "evaluation/prompts", "part": part_name(0)}
        entry["stage"] = f"evaluation/images/{name}"
        assert draw(pa.Table.from_pylist([entry])).to_pydict() == {"rows": [NUM_IMAGES]}
        assert list(images_of(run, name).image) == list(images_of(evaluated[0], name).image)


def test_parts_that_were_scored_before_a_crash_are_kept(
    ray_session, evaluated_copy, base, settings, scorer
):
    run = evaluated_copy
    name = "manifests/evaluation.rewards.dpo.brightness.json"
    Path(run.path(name)).unlink()
    seen = len(list(scorer.seen.iterdir()))
    config = evaluate_config(run, base, **settings)
    run_evaluate(run, config, {"brightness": scorer})
    assert len(list(scorer.seen.iterdir())) == seen
    assert run.manifest("evaluation/rewards/dpo/brightness").rows_out == NUM_IMAGES
    # Another version of the scorer computes something else.
    newer = Brightness(scorer.seen)
    newer.version = "2"
    run_evaluate(run, config, {"brightness": newer})
    assert len(list(scorer.seen.iterdir())) == seen + 3 * NUM_IMAGES
