"""Importance score and top-K: what a user may rely on whatever the blocks and their order."""

import math

import numpy as np
import pytest
from scipy.stats import rankdata

from fifa_ray.scoring.importance import (
    TopK,
    empty_statistics,
    importance_score,
    select_top_k,
    standardize,
)
from fifa_ray.scoring.moments import Moments

RULES = pytest.mark.parametrize("rule", ["zscore", "rank"])


def sorted_selection(scores, pair_id, selection_size, prompt_id, limit):
    """The definition: walk through the pairs from the best on and take what the limit allows."""
    taken, per_prompt = [], {}
    finite = np.flatnonzero(np.isfinite(scores))
    for row in sorted(finite, key=lambda row: (-scores[row], pair_id[row])):
        seen = per_prompt.get(prompt_id[row], 0)
        if seen < limit and len(taken) < selection_size:
            taken.append(row)
            per_prompt[prompt_id[row]] = seen + 1
    return taken


def pairs_with_ties(seed, num_pairs=400):
    """Coarse scores (many ties), some not finite, shuffled ids, prompts with few and many pairs."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, num_pairs).astype(float)
    scores[rng.integers(0, num_pairs, 10)] = np.nan
    scores[rng.integers(0, num_pairs, 3)] = np.inf
    return scores, rng.permutation(num_pairs) << 42, rng.zipf(1.5, num_pairs) % 60


def random_blocks(rng, num_rows, num_blocks):
    """Row indices in random order, cut into blocks of which some are empty."""
    cuts = np.sort(rng.integers(0, num_rows + 1, num_blocks - 1))
    return np.split(rng.permutation(num_rows), cuts)


# standardize


def test_zscore_has_mean_zero_and_unit_deviation():
    values = np.random.default_rng(0).gamma(2.0, size=1000).astype(np.float32)
    np.testing.assert_allclose(
        standardize(values), (values - values.mean(dtype=float)) / values.std(dtype=float)
    )


def test_rank_depends_on_the_order_alone():
    values = np.random.default_rng(1).integers(0, 50, 1000).astype(float)
    ranked = standardize(values, "rank")
    np.testing.assert_allclose(
        ranked, math.sqrt(12) * ((rankdata(values) - 0.5) / len(values) - 0.5), atol=1e-12
    )
    np.testing.assert_array_equal(ranked, standardize(values**3 + 5, "rank"))


def test_none_leaves_the_values_alone():
    np.testing.assert_array_equal(standardize([3.0, 1.0, np.nan], "none"), [3.0, 1.0, np.nan])


@RULES
def test_shifting_and_rescaling_a_term_changes_nothing(rule):
    values = np.random.default_rng(2).normal(size=300)
    scaled = standardize(4.0 * values + 8.0, rule)
    np.testing.assert_allclose(standardize(values, rule), scaled, atol=1e-2 * (rule == "rank"))


@RULES
def test_a_constant_column_says_nothing(rule):
    np.testing.assert_array_equal(standardize(np.full(7, 0.1), rule), np.zeros(7))


@pytest.mark.parametrize("rule", ["zscore", "rank", "none"])
def test_not_finite_values_become_nan_and_count_for_nothing(rule):
    values = np.array([1.0, np.nan, 2.0, np.inf, 6.0, -np.inf])
    got = standardize(values, rule)
    np.testing.assert_array_equal(np.isnan(got), ~np.isfinite(values))
    np.testing.assert_array_equal(got[[0, 2, 4]], standardize([1.0, 2.0, 6.0], rule))


@RULES
def test_blocks_standardised_by_the_statistics_of_all_give_the_same_bits(rule):
    values = np.random.default_rng(3).normal(size=10_000).astype(np.float32)
    statistics = empty_statistics(rule)
    for block in np.split(values, [17, 5000, 5001]):
        statistics = statistics.update(block)
    blocks = [standardize(block, rule, statistics) for block in np.array_split(values, 7)]
    assert np.concatenate(blocks).tobytes() == standardize(values, rule).tobytes()


def test_statistics_of_another_rule_and_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="needs Ranks, got Moments"):
        standardize([1.0, 2.0], "rank", Moments.of([1.0, 2.0]))
    with pytest.raises(ValueError, match="zscore, rank, none"):
        standardize([1.0, 2.0], "minmax")  # type: ignore[arg-type]


# importance_score


def test_importance_is_the_weighted_sum():
    margin, quality, distance = np.random.default_rng(4).normal(size=(3, 50))
    np.testing.assert_allclose(
        importance_score(
            margin, quality, distance, margin_weight=2.0, quality_weight=0.5, diversity_weight=3.0
        ),
        2.0 * margin + 0.5 * quality + 3.0 * distance,
    )


def test_weight_zero_removes_a_term_even_a_missing_one():
    margin = np.array([1.0, 2.0])
    for absent in (None, [np.nan, np.inf]):
        np.testing.assert_array_equal(
            importance_score(margin, absent, absent, quality_weight=0.0, diversity_weight=0.0),
            margin,
        )


def test_a_missing_value_in_a_weighted_term_makes_the_score_missing():
    score = importance_score([1.0, 1.0], [np.nan, 1.0], None, quality_weight=1, diversity_weight=0)
    np.testing.assert_array_equal(score, [np.nan, 2.0])


def test_senseless_weights_and_terms_are_refused():
    with pytest.raises(ValueError, match=r"prompt_quality must be 0 or more and finite, got -1\.0"):
        importance_score([1.0], [1.0], [1.0], quality_weight=-1.0, diversity_weight=1.0)
    with pytest.raises(ValueError, match=r"prompt_quality has weight 1\.0 but no values"):
        importance_score([1.0], None, [1.0], quality_weight=1.0, diversity_weight=1.0)
    with pytest.raises(ValueError, match="nothing is left to score by"):
        importance_score([1.0], [1.0], [1.0], margin_weight=0, quality_weight=0, diversity_weight=0)
    with pytest.raises(ValueError, match="every term of the same pairs"):
        importance_score([1.0, 2.0], [1.0], [1.0], quality_weight=1.0, diversity_weight=1.0)


# select_top_k and TopK


@pytest.mark.parametrize("selection_size", [1, 7, 100, 387, 1000])
@pytest.mark.parametrize("limit", [None, 1, 3])
def test_top_k_is_its_definition(selection_size, limit):
    for seed in range(5):
        scores, pair_id, prompt_id = pairs_with_ties(seed)
        got = select_top_k(
            scores, pair_id, selection_size, prompt_id=prompt_id, max_pairs_per_prompt=limit
        )
        expected = sorted_selection(scores, pair_id, selection_size, prompt_id, limit or math.inf)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 40])
@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("selection_size", [5, 60, 1000])
def test_any_partition_order_and_merge_tree_gives_the_same_selection(
    num_blocks, limit, selection_size
):
    for seed in range(10):
        scores, pair_id, prompt_id = pairs_with_ties(seed)
        rng = np.random.default_rng(seed)
        accumulators = [TopK(selection_size, max_pairs_per_prompt=limit) for _ in range(3)]
        for block in random_blocks(rng, len(scores), num_blocks):
            rng.choice(accumulators).push(
                scores[block], pair_id[block], prompt_id=prompt_id[block], row=block
            )
        first, second, third = accumulators
        third.merge(second)
        first.merge(third)
        got = first.best()
        expected = sorted_selection(scores, pair_id, selection_size, prompt_id, limit or math.inf)
        np.testing.assert_array_equal(got["row"], expected)
        np.testing.assert_array_equal(got["pair_id"], pair_id[expected])
        np.testing.assert_array_equal(got["importance_score"], scores[expected])


def test_a_pair_that_its_own_block_prefers_may_lose_to_another_blocks_pair_of_its_prompt():
    topk = TopK(2, max_pairs_per_prompt=1)
    topk.push([5.0, 4.0, 3.0], [1, 2, 3], prompt_id=[10, 10, 11])
    topk.push([9.0, 1.0], [4, 5], prompt_id=[10, 12])
    np.testing.assert_array_equal(topk.best()["pair_id"], [4, 3])


def test_a_stream_is_held_in_bounded_memory():
    rng = np.random.default_rng(5)
    topk = TopK(50)
    for block in range(100):
        topk.push(rng.normal(size=200), np.arange(200) + 200 * block)
        assert topk._num_rows <= 2 * 50


def test_scores_that_are_not_finite_are_never_selected():
    np.testing.assert_array_equal(
        select_top_k([np.nan, 1.0, np.inf, -np.inf], [1, 2, 3, 4], 4), [1]
    )
    assert len(select_top_k([np.nan], [1], 1)) == 0
    assert len(select_top_k([], [], 3)) == 0


def test_nothing_pushed_and_nothing_selectable():
    assert TopK(3).best() == {}
    topk = TopK(3)
    topk.push([np.nan], [7], row=[0])
    topk.merge(TopK(3))
    assert {name: len(values) for name, values in topk.best().items()} == {
        "importance_score": 0,
        "pair_id": 0,
        "row": 0,
    }


def test_senseless_selections_are_refused():
    with pytest.raises(ValueError, match="selection_size must be at least 1, got 0"):
        select_top_k([1.0], [1], 0)
    with pytest.raises(ValueError, match="max_pairs_per_prompt must be at least 1, got 0"):
        select_top_k([1.0], [1], 1, prompt_id=[1], max_pairs_per_prompt=0)
    with pytest.raises(ValueError, match="max_pairs_per_prompt needs prompt_id"):
        select_top_k([1.0], [1], 1, max_pairs_per_prompt=1)
    with pytest.raises(ValueError, match="columns of one length"):
        select_top_k([1.0, 2.0], [1], 1)
    with pytest.raises(ValueError, match="selection_size must be at least 1, got -2"):
        TopK(-2)
    with pytest.raises(ValueError, match="needs the column prompt_id"):
        TopK(1, max_pairs_per_prompt=1).push([1.0], [1])
    with pytest.raises(ValueError, match="cannot merge"):
        TopK(1).merge(TopK(2))
    topk = TopK(1)
    topk.push([1.0], [1], row=[0])
    with pytest.raises(ValueError, match="as in the first block"):
        topk.push([1.0], [2])
