"""Selection: the paper's score computed another way, and the same K however the work is cut."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
from drawn_scores import select_config, write_scores
from scipy import stats

from fifa_ray.config import ConfigError
from fifa_ray.engine import part_reader
from fifa_ray.engine.select import run_select
from fifa_ray.engine.strategies import uniform_hash
from fifa_ray.engine.terms import read_prompt_terms, read_terms
from fifa_ray.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(str(tmp_path / "run"))


def frame_of(drawn, rewards=("pick",)) -> pd.DataFrame:
    """Every pair with its terms, as pandas sees them."""
    prompt = drawn["prompt"]
    frame = pd.DataFrame(
        {
            "pair_id": drawn["pair_id"],
            "prompt_id": drawn["prompt_id"],
            "quality": drawn["quality"][prompt].astype(float),
            "harmful": drawn["harmful"][prompt],
            "log_distance": drawn["log_distance"][prompt].astype(float),
            **{name: drawn[name].astype(float) for name in rewards},
        }
    )
    return frame[np.arange(len(frame)) % 97 != 5]


def z(values):
    return (values - values.mean()) / values.std(ddof=0)


def expected_selection(frame, score, size) -> list[int]:
    ordered = frame.assign(score=score).sort_values(["score", "pair_id"], ascending=[False, True])
    return ordered["pair_id"].head(size).tolist()


def selected_ids(run) -> list[int]:
    return run.read_table("selected").column("pair_id").to_pylist()


def test_selection_is_the_papers_sum_of_standardised_terms(ray_session, run):
    frame = frame_of(write_scores(run))
    config = select_config(
        run.uri,
        ["select.quality_weight=0.7", "select.diversity_weight=0.3", "select.min_quality=2"],
    )
    manifest = run_select(run, config)
    kept = frame[~frame.harmful & (frame.quality >= 2)]
    score = z(kept.pick) + 0.7 * z(kept.quality) + 0.3 * z(kept.log_distance)
    assert selected_ids(run) == expected_selection(kept, score, 50)
    table = run.read_table("selected").to_pandas()
    assert table["rank"].tolist() == list(range(1, 51))
    expected_scores = np.sort(score.to_numpy())[::-1][:50]
    np.testing.assert_allclose(table.importance_score, expected_scores, rtol=1e-6)
    terms = table[["margin_term", "quality_term", "diversity_term"]].sum(axis=1)
    np.testing.assert_allclose(terms, table.importance_score, rtol=1e-12)
    assert manifest.rows_in == 2000
    assert manifest.details["dropped"] == {
        "unscored": 2000 - len(frame),
        "harmful": int((frame.harmful & frame.quality.notna()).sum()),
        "quality_error": int(frame.quality.isna().sum()),
        "low_quality": int((~frame.harmful & (frame.quality < 2)).sum()),
    }


@pytest.mark.parametrize("settings", [
    [],
    ["select.standardization=rank"],
    ["select.standardization=none"],
    ["select.margin_rule=absolute"],
    ["select.max_pairs_per_prompt=1"],
    ["select.selector=greedy", "select.greedy_pool=5"],
    ["select.strategy=random"],
])  # fmt: skip
def test_the_selection_does_not_depend_on_the_parts(ray_session, tmp_path, settings):
    found = []
    for parts in (1, 7):
        run = RunDir(str(tmp_path / f"{parts} parts"))
        write_scores(run, parts=parts)
        run_select(run, select_config(run.uri, settings))
        table = run.read_table("selected").to_pandas()
        found.append(table)
        assert len(table) == 50
    pd.testing.assert_frame_equal(found[0], found[1], check_exact=True)


def test_terms_are_the_same_in_blocks_of_any_size(ray_session, run, monkeypatch):
    write_scores(run, parts=1)
    config = select_config(run.uri)
    of_prompt = ray.get(read_prompt_terms.remote(run, config))
    (whole,) = read_terms(run, "part-000000.parquet", config, of_prompt)
    monkeypatch.setattr(part_reader, "BATCH_ROWS", 300)
    blocks = list(read_terms(run, "part-000000.parquet", config, of_prompt))
    assert len(blocks) == 7
    np.testing.assert_array_equal(whole.row, np.arange(2000))
    assert np.isnan(whole.margins["pick"]).any()
    for name in ("pair_id", "prompt_id", "row", "prompt_quality", "dropped"):
        joined = np.concatenate([getattr(block, name) for block in blocks])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    margins = np.concatenate([block.margins["pick"] for block in blocks])
    np.testing.assert_array_equal(margins, whole.margins["pick"])


def test_null_reads_as_nan_or_false(tmp_path):
    table = pa.table({"score": pa.array([1, None], pa.float32()), "flag": [None, True]})
    run = RunDir(str(tmp_path))
    run.write_table(table, "scores", "part-000000.parquet")
    found = part_reader.read_columns(run, "scores", columns={"score": np.float32, "flag": bool})
    np.testing.assert_array_equal(found["score"], [1, np.nan])
    np.testing.assert_array_equal(found["flag"], [False, True])


@pytest.mark.parametrize("strategy", ["margin_only", "quality_only", "diversity_only"])
def test_baselines_rank_by_one_term_over_all_scored_pairs(ray_session, run, strategy):
    frame = frame_of(write_scores(run))
    run_select(run, select_config(run.uri))
    term = {"margin_only": "pick", "quality_only": "quality", "diversity_only": "log_distance"}
    rated = frame.dropna(subset=[term[strategy]])
    found = run.read_table("baselines", strategy).column("pair_id").to_pylist()
    assert found == expected_selection(rated, z(rated[term[strategy]]), 50)


def test_random_baseline_is_uniform_and_changes_with_the_seed(ray_session, run):
    frame = frame_of(write_scores(run))
    run_select(run, select_config(run.uri))
    first = run.read_table("baselines", "random").column("pair_id").to_pylist()
    run_select(run, select_config(run.uri, ["seed=1"]))
    second = run.read_table("baselines", "random").column("pair_id").to_pylist()
    assert set(first) != set(second)
    assert set(first) | set(second) <= set(frame.pair_id)
    assert stats.kstest(uniform_hash(np.arange(20_000) << 10, 3), "uniform").pvalue > 1e-3


def test_margin_rules(ray_session, run):
    frame = frame_of(write_scores(run))
    base = ["select.quality_weight=0", "select.diversity_weight=0"]
    kept = frame[~frame.harmful & frame.quality.notna()]
    run_select(run, select_config(run.uri, [*base, "select.margin_rule=absolute"]))
    assert selected_ids(run) == expected_selection(kept, kept.pick.abs(), 50)
    clip = [*base, "select.margin_rule=clipped", "select.margin_clip=[-1, 1]"]
    run_select(run, select_config(run.uri, clip))
    clipped = np.where(z(kept.pick) > 1, 1.0, z(kept.pick))
    assert selected_ids(run) == expected_selection(kept, clipped, 50)
    assert run.read_table("selected").to_pandas().margin_term.nunique() == 1


def test_several_reward_models_vote_on_one_scale(ray_session, run):
    names = ("pick", "hps")
    drawn = write_scores(run, rewards=names)
    drawn["hps"] = drawn["hps"]
    frame = frame_of(drawn, names)
    overrides = ["rewards.1.vote_weight=3", "select.quality_weight=0", "select.diversity_weight=0"]
    run_select(run, select_config(run.uri, overrides, rewards=names))
    kept = frame[~frame.harmful & frame.quality.notna()]
    score = (z(kept.pick) + 3 * z(kept.hps)) / 4
    assert selected_ids(run) == expected_selection(kept, np.round(score, 9), 50)
    table = run.read_table("selected").to_pandas()
    assert {"reward_margin_pick", "reward_margin_hps"} <= set(table.columns)
    raw = kept.set_index("pair_id").loc[table.pair_id]
    np.testing.assert_array_equal(table.reward_margin_hps, raw.hps)


def test_prompts_without_a_rating_follow_the_policy(ray_session, run):
    frame = frame_of(write_scores(run))
    unrated = set(frame.pair_id[frame.quality.isna()])
    base = ["select.selection_size=1500"]
    run_select(run, select_config(run.uri, base))
    assert not unrated & set(selected_ids(run))
    run_select(run, select_config(run.uri, [*base, "select.quality_error_policy=neutral"]))
    table = run.read_table("selected").to_pandas()
    neutral = table[table.pair_id.isin(unrated)]
    assert len(neutral) > 0
    assert (neutral.quality_term == 0).all()


def test_a_prompt_gives_at_most_its_share(ray_session, run):
    frame = frame_of(write_scores(run))
    run_select(run, select_config(run.uri, ["select.max_pairs_per_prompt=2"]))
    table = run.read_table("selected").to_pandas()
    assert table.prompt_id.value_counts().max() == 2
    kept = frame[~frame.harmful & frame.quality.notna()]
    score = z(kept.pick) + 0.5 * z(kept.quality) + 0.5 * z(kept.log_distance)
    ordered = kept.assign(score=score).sort_values(["score", "pair_id"], ascending=[False, True])
    assert table.pair_id.tolist() == ordered.groupby("prompt_id").head(2).pair_id.head(50).tolist()


def test_greedy_spreads_the_chosen_prompts_further(ray_session, run):
    write_scores(run)
    # One pair a prompt: both sets then have as many prompts, and their entropies compare.
    settings = [
        "select.diversity_weight=3",
        "select.selection_size=60",
        "select.max_pairs_per_prompt=1",
    ]
    run_select(run, select_config(run.uri, settings))
    plain = run.manifest("selected").details["sets"]["fifa"]["knn_entropy"]
    run_select(run, select_config(run.uri, [*settings, "select.selector=greedy"]))
    assert run.manifest("selected").details["sets"]["fifa"]["knn_entropy"] > plain


def test_k_beyond_the_dataset_keeps_all_and_says_so(ray_session, run, caplog):
    frame = frame_of(write_scores(run))
    manifest = run_select(run, select_config(run.uri, ["select.selection_size=100000"]))
    assert manifest.rows_out == int((~frame.harmful & frame.quality.notna()).sum())
    assert "all of them are kept" in caplog.text


def test_nothing_left_to_choose_names_the_reasons(ray_session, run):
    write_scores(run)
    with pytest.raises(ValueError, match=r"no pair is left to choose from: .*'low_quality': \d+"):
        run_select(run, select_config(run.uri, ["select.min_quality=10"]))


def test_missing_stages_are_named(ray_session, run):
    with pytest.raises(ConfigError, match=r"lacks the complete stages \['pairs', 'rewards/pick'"):
        run_select(run, select_config(run.uri))


def test_choosing_again_touches_no_other_table(ray_session, run):
    write_scores(run)
    run_select(run, select_config(run.uri))
    first = selected_ids(run)
    others = {
        name: Path(run.path(name, "part-000000.parquet")).stat().st_mtime_ns
        for name in ("pairs", "prompts", "quality", "neighbors", "rewards/pick")
    }
    run_select(run, select_config(run.uri, ["select.quality_weight=5"]))
    assert selected_ids(run) != first
    for name, changed in others.items():
        assert Path(run.path(name, "part-000000.parquet")).stat().st_mtime_ns == changed


def test_the_selection_opens_with_the_datasets_library(ray_session, run, tmp_path):
    write_scores(run)
    run_select(run, select_config(run.uri))
    loaded = datasets.load_dataset(
        "parquet", data_files=run.path("selected", "*.parquet"), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert loaded["pair_id"][:] == selected_ids(run)
    ids = run.read_table("selected_ids").to_pandas()
    assert ids.source_id.tolist() == [str(pair_id >> 10) for pair_id in ids.pair_id]


def test_gallery_and_sample_agree_with_the_scores(ray_session, run):
    frame = frame_of(write_scores(run))
    run_select(run, select_config(run.uri))
    sample = run.read_table("scored_sample").to_pandas()
    assert sample.pair_id.tolist() == frame.pair_id.tolist()
    assert sample.selected.sum() == 50
    dropped = sample.set_index("pair_id").dropped_by
    assert (dropped[frame.pair_id[frame.quality.isna()]] == "quality_error").all()
