"""The whole filter on real pairs of real images, held to a truth that it never reads.

2,400 pairs of AGIQA-3K (Li et al., arXiv 2306.04717) in Pick-a-Pic v2's layout, each labelled by
one simulated rater, and beside them the mean opinion of many people. The data is not in the
repository: FIFA_TEST_DATA names its folder, else `../shared/data` beside the checkout is tried.

Measured when this was written, on 2,198 labelled pairs of 240 prompts: held-out accuracy 0.763 (95%
interval 0.743 to 0.783) where a perfect reward would reach 0.925, the share of labels that agree
with the mean opinion. Bounds below leave room for another platform's rounding, not for a worse
method.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from fifa_ray.config import load_config
from fifa_ray.demo.packaged import JUDGE_ADAPTER, judge_folder, text_encoder_folder
from fifa_ray.engine.fit_reward import describe_fit
from fifa_ray.pipeline import reselect, run_filter
from fifa_ray.run_dir import RunDir
from fifa_ray.scoring.agreement import share_with_interval

DATA = Path(
    os.environ.get("FIFA_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data"
).resolve()
PAIRS = DATA / "agiqa3k"

pytestmark = [
    pytest.mark.skipif(
        not PAIRS.is_dir(),
        reason=f"no real data at {PAIRS}; set FIFA_TEST_DATA to the folder that holds agiqa3k/",
    ),
    pytest.mark.timeout(900),
]

TENTH, QUARTER = 220, 550


def judge_settings() -> dict:
    """The demo's judge, or none where its adapter does not come with this checkout."""
    if not (JUDGE_ADAPTER / "adapter_config.json").is_file():
        return {
            "judge": {"enabled": False},
            "select": {"quality_weight": 0, "exclude_harmful": False},
        }
    judge = {
        "engine": "transformers",
        "model": str(judge_folder()),
        "options": {"adapter": str(JUDGE_ADAPTER)},
        "actors": {"max_actors": 1},
    }
    return {"judge": judge, "select": {}}


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory) -> RunDir:
    judged = judge_settings()
    config = load_config(
        {
            "run_dir": str(tmp_path_factory.mktemp("real") / "run"),
            "ingest": {"source": str(PAIRS / "train-*.parquet")},
            "rewards": [{"name": "fitted", "kind": "fitted", "actors": {"max_actors": 1}}],
            "judge": judged["judge"],
            "embed": {"model": str(text_encoder_folder()), "actors": {"max_actors": 1}},
            "select": judged["select"] | {"selection_size": TENTH, "images": False},
            "report": {"enabled": False},
        }
    )
    return run_filter(config)


@pytest.fixture(scope="module")
def pairs(run) -> pd.DataFrame:
    """Each labelled pair: prompt, terms, and whether the mean opinion agrees with its label."""
    truth = pq.read_table(PAIRS / "mos.parquet").to_pandas()
    table = run.read_table("pairs").to_pandas()
    table["ranking_id"] = table.source_id.astype(np.int64)
    table = table.merge(truth, on="ranking_id", validate="one_to_one")
    first_chosen = table.chosen_uid == table.image_0_uid
    assert (first_chosen | (table.chosen_uid == table.image_1_uid)).all()
    table["label_is_right"] = np.where(first_chosen, 1, -1) * (table.mos_0 - table.mos_1) > 0
    rewards = run.read_table("rewards", "fitted").to_pandas()
    return table.merge(rewards, on="pair_id", validate="one_to_one")


@pytest.fixture
def say(capsys):
    """Print past pytest's capture: these figures are what the test is for."""

    def print_line(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="")

    return print_line


def share_right(pairs: pd.DataFrame, ids=None) -> tuple[float, float, float]:
    """Share of labels that the mean opinion confirms, with its interval."""
    rows = pairs if ids is None else pairs[pairs.pair_id.isin(ids)]
    return share_with_interval(rows.label_is_right, rows.prompt_id)


def test_all_rows_are_accounted_for(run):
    ingest = run.manifest("pairs")
    assert (ingest.rows_in, ingest.rows_out) == (2400, 2198)
    assert ingest.quarantined == {"tie": 202}
    assert run.manifest("rewards/fitted").rows_out == 2198
    assert run.manifest("prompts").rows_out == 240


def test_reward_predicts_the_labels_of_prompts_it_never_saw(run, pairs, say):
    manifest = run.manifest("rewards/fitted")
    for line in describe_fit(manifest):
        say(line)
    held_out = manifest.details["held_out"]
    assert held_out["pairwise_accuracy"] > 0.72
    assert held_out["log_loss"] < 0.55
    assert all(abs(row["predicted"] - row["observed"]) < 0.08 for row in held_out["calibration"])
    prefers_chosen = pairs.reward_margin > 0
    right, low, high = share_with_interval(prefers_chosen == pairs.label_is_right, pairs.prompt_id)
    say(f"Agreement of the reward with the mean opinion: {right:.3f} ({low:.3f} to {high:.3f})")
    # It follows the people's opinion, not the noise of single raters.
    assert right > held_out["pairwise_accuracy"] - 0.01


def test_kept_pairs_are_labelled_right_more_often(run, pairs, say):
    everything = share_right(pairs)
    say(f"Labels right, all {len(pairs):,} pairs: {describe(everything)}")
    for size in (TENTH, QUARTER):
        if size != TENTH:
            reselect(run.uri, [f"select.selection_size={size}"])
        shares = {}
        for name, table in {
            "fifa": ("selected",),
            "margin only": ("baselines", "margin_only"),
            "random": ("baselines", "random"),
        }.items():
            kept = run.read_table(*table, columns=["pair_id"])["pair_id"].to_pylist()
            assert len(kept) == size
            shares[name] = share_right(pairs, kept)
            say(f"Labels right, {name:11} K = {size}: {describe(shares[name])}")
        # Measured 0.93 for all and at random, 0.99 by margin; the other terms cost a little of it.
        assert shares["margin only"][1] > everything[0]
        assert shares["fifa"][0] > max(everything[0], shares["random"][0]) + 0.02


def test_prompts_at_both_ends_of_each_term(run, pairs, say):
    prompts = run.read_table("prompts").to_pandas()
    terms = {"log_kth_neighbor_distance": run.read_table("neighbors").to_pandas()}
    if run.manifest("quality") is None:
        say("No judge: its adapter is not in this checkout.")
    else:
        quality = terms["prompt_quality"] = run.read_table("quality").to_pandas()
        prompts["harmful"] = prompts.prompt_id.isin(quality.prompt_id[quality.harmful])
        say(f"harmful: {prompts.harmful.sum()} of {len(prompts)} prompts flagged, not shown below")
    for name, table in terms.items():
        ranked = prompts.merge(table[["prompt_id", name]], on="prompt_id").sort_values(name)
        assert len(ranked) == len(prompts) == 240
        assert np.isfinite(ranked[name]).all()
        if "harmful" in ranked:
            ranked = ranked[~ranked.harmful]
        for title, rows in (("highest", ranked[:-11:-1]), ("lowest", ranked[:10])):
            say(f"{name}, {title}:")
            for value, prompt in zip(rows[name], rows.prompt, strict=True):
                say(f"  {value:6.2f}  {prompt[:90]}")


def describe(share: tuple[float, float, float]) -> str:
    return "{:.3f} (95% interval {:.3f} to {:.3f})".format(*share)
