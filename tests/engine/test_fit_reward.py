"""Fitted rewards end to end: honest about what they saw, the same for any partition, resumable."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa_ray.config import ConfigError, load_config
from fifa_ray.engine.fit_reward import describe_fit, read_fitted, run_fitted_reward
from fifa_ray.engine.ingest import run_ingest
from fifa_ray.engine.rewards import run_rewards
from fifa_ray.models.image_encoder import build_image_encoder
from fifa_ray.run_dir import RunDir
from fifa_ray.scoring.bradley_terry import assign_folds, cross_fit

NUM_PROMPTS, PAIRS_EACH = 30, 8


def picture(rng, brightness: float) -> bytes:
    """Noise around a brightness, as PNG."""
    pixels = np.clip(brightness * 255 + rng.normal(0, 30, (24, 24, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_dataset(folder, *, shuffled=False, corrupt=(), seed=0) -> str:
    """People prefer the brighter image (nine times in ten), or nobody knows what (shuffled)."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(NUM_PROMPTS):
        for _ in range(PAIRS_EACH):
            dark, light = np.sort(rng.uniform(0.2, 0.8, 2))
            better, worse = picture(rng, light), picture(rng, dark)
            if rng.random() < (0.5 if shuffled else 0.1):
                better, worse = worse, better
            if len(rows) in corrupt:
                worse = better[:60]
            rows.append({"prompt": f"scene number {prompt}", "chosen": better, "rejected": worse})
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=10)
    return str(folder)


def fit(folder, source, *, rows_per_part=1000, options=None, seed=0, weights=None):
    config = load_config(
        {
            "run_dir": str(folder),
            "seed": seed,
            "ingest": {"source": source, "format": "generic", "rows_per_part": rows_per_part},
            "rewards": [
                {
                    "name": "fitted",
                    "kind": "fitted",
                    "weights": weights,
                    "options": {"l2": 30.0} if options is None else options,
                    "actors": {"max_actors": 1},
                }
            ],
        }
    )
    run = RunDir(config.run_dir)
    run_ingest(run, config)
    return run, config, run_fitted_reward(run, config, config.rewards[0])


@pytest.fixture(scope="module")
def fitted(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    return fit(folder / "run", write_dataset(folder / "data"))


def features_and_prompts(run, config):
    """Image statistics of both images of each pair, straight from the file."""
    pairs = run.read_table("pairs").to_pylist()
    rows = pq.read_table(f"{config.ingest.source}/train.parquet").to_pylist()
    encoder = build_image_encoder(None)
    sides = [
        encoder.encode([Image.open(io.BytesIO(rows[p["source_row"]][side])) for p in pairs])
        for side in ("chosen", "rejected")
    ]
    return *sides, np.array([pair["prompt_id"] for pair in pairs])


def test_rewards_are_those_of_a_cross_fit_on_the_images_features(fitted):
    run, config, manifest = fitted
    chosen, rejected, prompts = features_and_prompts(run, config)
    expected = cross_fit(chosen, rejected, prompts, num_folds=5, l2=30.0)
    rewards = run.read_table("rewards", "fitted")
    assert rewards["pair_id"].to_pylist() == run.read_table("pairs")["pair_id"].to_pylist()
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(
            rewards[f"reward_{side}"], getattr(expected, f"reward_{side}"), atol=1e-4
        )
    margin = rewards["reward_margin"].to_numpy()
    held_out = manifest.details["held_out"]
    assert held_out["pairwise_accuracy"] == pytest.approx(np.mean(margin > 0))
    # Nine labels in ten are right and the rule is simple: nearly that much is learned.
    assert held_out["pairwise_accuracy"] > 0.8
    low, high = held_out["interval_95"]
    assert low < held_out["pairwise_accuracy"] < high


def test_shuffled_labels_are_learned_by_heart_but_predict_nothing(ray_session, tmp_path):
    source = write_dataset(tmp_path / "data", shuffled=True, seed=4)
    run, config, manifest = fit(tmp_path / "run", source, options={"l2": 0.01})
    chosen, rejected, prompts = features_and_prompts(run, config)
    fold = assign_folds(prompts, 5)
    in_fold = []
    for held_out, model in enumerate(read_fitted(run, "fitted").folds):
        seen = fold != held_out
        in_fold.append(np.mean(model.reward(chosen[seen]) > model.reward(rejected[seen])))
    assert np.mean(in_fold) > 0.65
    low, high = manifest.details["held_out"]["interval_95"]
    assert low < 0.5 < high
    margin = run.read_table("rewards", "fitted")["reward_margin"].to_numpy()
    assert np.mean(margin > 0) == manifest.details["held_out"]["pairwise_accuracy"]


def test_one_part_or_four_give_the_same_rewards_and_model(fitted, tmp_path):
    run, config, _ = fitted
    other, _, _ = fit(tmp_path / "run", config.ingest.source, rows_per_part=100)
    assert len(other.list("rewards", "fitted")) > len(run.list("rewards", "fitted")) == 1
    assert other.read_table("rewards", "fitted").equals(run.read_table("rewards", "fitted"))
    mine, theirs = read_fitted(run, "fitted"), read_fitted(other, "fitted")
    np.testing.assert_array_equal(mine.model.weights, theirs.model.weights)


def test_a_fit_that_died_goes_on_from_the_features(fitted, tmp_path, monkeypatch):
    run, config, _ = fitted

    def power_cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fifa_ray.engine.fit_reward.fit_folds", power_cut)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", config.ingest.source)
    again, _, manifest = fit(tmp_path / "run", config.ingest.source)
    assert manifest.details["rows_reused"] == manifest.rows_in == NUM_PROMPTS * PAIRS_EACH
    assert again.read_table("rewards", "fitted").equals(run.read_table("rewards", "fitted"))
    assert not again.exists("partial") or not again.filesystem.get_file_info(
        pa.fs.FileSelector(again.path("partial"))
    )


def test_corrupt_images_are_put_aside_and_take_no_part_in_the_fit(ray_session, tmp_path):
    source = write_dataset(tmp_path / "data", corrupt=(3, 50))
    run, _, manifest = fit(tmp_path / "run", source)
    assert manifest.quarantined == {"corrupt_image": 2}
    assert (
        manifest.rows_out == manifest.details["held_out"]["pairs"] == NUM_PROMPTS * PAIRS_EACH - 2
    )
    put_aside = run.read_table("quarantine", "rewards", "fitted")
    assert put_aside["source_row"].to_pylist() == [3, 50]
    assert put_aside["detail"].to_pylist() == ["rejected image", "rejected image"]
    assert np.isfinite(run.read_table("rewards", "fitted")["reward_margin"]).all()


def test_the_saved_model_scores_other_data(fitted, tmp_path):
    run, *_ = fitted
    source = write_dataset(tmp_path / "data", seed=9)
    other, config, manifest = fit(tmp_path / "run", source, weights=run.path("fitted", "fitted"))
    chosen, rejected, _ = features_and_prompts(other, config)
    model = read_fitted(run, "fitted").model
    rewards = other.read_table("rewards", "fitted")
    np.testing.assert_allclose(rewards["reward_chosen"], model.reward(chosen), atol=1e-4)
    np.testing.assert_allclose(rewards["reward_rejected"], model.reward(rejected), atol=1e-4)
    assert not other.exists("fitted")
    assert manifest.details["model"]["kind"] == "fitted"
    assert run_rewards(other, config) == [manifest]  # complete: not run again
    saved = json.loads(run.read_text("fitted", "fitted", "config.json"))
    assert saved["held_out"]["pairs"] == NUM_PROMPTS * PAIRS_EACH


def test_what_is_said_in_the_terminal(fitted):
    *_, manifest = fitted
    text = "\n".join(describe_fit(manifest))
    assert f"{manifest.details['held_out']['pairwise_accuracy']:.3f}" in text
    assert "Image statistics see blur" in text


def test_unusable_settings_are_refused_before_any_work(ray_session, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown option 'fold'.*did you mean folds"):
        fit(tmp_path / "run", "nowhere", options={"fold": 3})
    with pytest.raises(ConfigError, match=r"option folds.*greater than or equal to 2"):
        fit(tmp_path / "run", "nowhere", options={"folds": 1})
    source = write_dataset(tmp_path / "data")
    with pytest.raises(ValueError, match=r"options\.folds lower"):
        fit(tmp_path / "run", source, options={"folds": 90})
