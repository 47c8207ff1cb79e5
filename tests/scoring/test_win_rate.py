"""Win rates, their intervals and the sign test against scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fifa_ray.scoring import win_rate as module
from fifa_ray.scoring.win_rate import (
    Resampling,
    bootstrap_interval,
    compare,
    compare_by_category,
    sign_test,
    win_outcome,
    win_rate,
    win_rate_interval,
)


def scores(num_prompts: int, images: int, shift: float, seed: int):
    """Scores whose prompts differ in how much better a is: images of one prompt are correlated."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(num_prompts), images)
    gain = rng.normal(shift, 0.7, num_prompts)[prompt]
    a, b = rng.normal(gain, 1), rng.normal(0, 1, len(prompt))
    return a, b, prompt


def test_ties_count_half():
    assert win_rate([2, 1, 3, 0], [1, 1, 5, 0]) == (1 + 0.5 + 0 + 0.5) / 4
    np.testing.assert_array_equal(win_outcome([1.0, 0.0], [0.0, 0.0]), [1.0, 0.5])
    a, b, _ = scores(60, 2, 0.3, 0)
    assert win_rate(a, b) == pytest.approx(1 - win_rate(b, a))
    assert win_rate(a, a) == 0.5


def test_win_rate_is_that_of_the_mann_whitney_count_of_each_pair():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 4, 40), rng.integers(0, 4, 40)
    counted = sum(stats.mannwhitneyu([x], [y]).statistic for x, y in zip(a, b, strict=True))
    assert win_rate(a, b) == pytest.approx(counted / 40)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, math.nan], [0.0, 1.0], "1 of 2 images have a score that is not finite"),
        ([1.0], [0.0, 1.0], "one length"),
        ([], [], "at least 1"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        win_rate(a, b)


def test_interval_agrees_with_scipys_bootstrap_for_one_image_a_prompt():
    a, b, prompt = scores(80, 1, 0.4, 1)
    outcome = win_outcome(a, b)
    reference = stats.bootstrap(
        (outcome,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = bootstrap_interval(outcome, prompt, Resampling(num_resamples=20_000))
    assert found == pytest.approx([reference.low, reference.high], abs=0.013)
    difference = bootstrap_interval(a - b, prompt, Resampling(num_resamples=20_000))
    reference = stats.bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert difference == pytest.approx([reference.low, reference.high], abs=0.02)


def test_interval_agrees_with_every_possible_resample_of_few_unequal_prompts():
    values = np.array([1, 1, 0, 0.5, 0, 1, 0, 1, 1], float)
    prompt = np.array([7, 7, 7, 2, 9, 9, 4, 4, 5])
    groups = [values[prompt == p] for p in np.unique(prompt)]
    means = [
        np.concatenate([groups[i] for i in drawn]).mean()
        for drawn in itertools.product(range(5), repeat=5)
    ]
    expected = np.quantile(means, [0.05, 0.95])
    found = bootstrap_interval(values, prompt, Resampling(confidence=0.9, num_resamples=60_000))
    assert found == pytest.approx(expected, abs=0.012)


def test_interval_is_the_same_for_any_chunk_and_order_and_columns_share_resamples(monkeypatch):
    a, b, prompt = scores(30, 3, 0.2, 2)
    values = np.stack([win_outcome(a, b), a - b], axis=1)
    settings, other = (Resampling(num_resamples=500, seed=seed) for seed in (4, 5))
    whole = bootstrap_interval(values, prompt, settings)
    assert whole.shape == (2, 2)
    shuffled = np.random.default_rng(0).permutation(len(prompt))
    np.testing.assert_allclose(
        bootstrap_interval(values[shuffled], prompt[shuffled], settings), whole
    )
    alone = bootstrap_interval(values[:, 1], prompt, settings)
    np.testing.assert_array_equal(alone, whole[:, 1])
    monkeypatch.setattr(module, "_DRAWS_AT_ONCE", 31)
    np.testing.assert_array_equal(bootstrap_interval(values, prompt, settings), whole)
    assert not np.array_equal(bootstrap_interval(values, prompt, other), whole)


def test_interval_covers_the_true_win_rate_as_often_as_it_says():
    # Images of a prompt share its gain: an interval that took them for independent would be short.
    true_rate = stats.norm.cdf(0.3 / math.sqrt(2 + 0.7**2))
    covered = {"by prompt": 0, "by image": 0}
    trials = 300
    for trial in range(trials):
        a, b, prompt = scores(60, 8, 0.3, 100 + trial)
        outcome = win_outcome(a, b)
        settings = Resampling(num_resamples=300, seed=trial)
        for name, cluster in (("by prompt", prompt), ("by image", np.arange(len(prompt)))):
            low, high = bootstrap_interval(outcome, cluster, settings)
            covered[name] += low <= true_rate <= high
    # Of 300 intervals at 95%, four standard errors are five points.
    assert covered["by prompt"] / trials == pytest.approx(0.95, abs=0.05)
    assert covered["by image"] / trials < 0.88


def test_a_clean_sweep_is_not_certainty():
    outcome, prompt = np.ones(20), np.arange(20) // 2
    low, high = win_rate_interval(outcome, prompt)
    assert (low, high) == pytest.approx((0.025 ** (1 / 10), 1.0))
    assert win_rate_interval(1 - outcome, prompt) == pytest.approx((0.0, 1 - low))
    exact = stats.binomtest(10, 10).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))
    # One image won and one lost of each prompt has no spread either.
    half = win_rate_interval(np.tile([0.0, 1.0], 4), np.arange(8) // 2)
    exact = stats.binomtest(2, 4).proportion_ci(0.95, method="exact")
    assert half == pytest.approx((exact.low, exact.high))
    # Every image tied is no sweep: the same model twice.
    assert win_rate_interval(outcome / 2, prompt) == (0.5, 0.5)


def test_one_prompt_has_no_interval():
    assert np.isnan(win_rate_interval(np.ones(3), np.zeros(3))).all()
    assert np.isnan(bootstrap_interval(np.ones((3, 2)), np.zeros(3))).all()


def test_sign_test_counts_prompts_and_leaves_ties_out():
    a = np.array([1, 1, 0, 5, 0, 2, 3, 1.0])
    b = np.array([0, 0, 9, 5, 1, 1, 1, 1.0])
    prompt = np.array([0, 0, 0, 1, 2, 3, 4, 5])
    found = sign_test(a, b, prompt)
    assert (found.wins, found.losses, found.ties) == (3, 1, 2)
    assert found.p_value == pytest.approx(2 * stats.binom.cdf(1, 4, 0.5))
    assert sign_test(a, a, prompt).p_value == 1.0
    swapped = sign_test(b, a, prompt)
    assert (swapped.wins, swapped.losses) == (1, 3)
    assert swapped.p_value == found.p_value


def test_sign_test_rejects_a_true_null_as_often_as_it_may():
    rng = np.random.default_rng(0)
    p_values = [
        sign_test(rng.normal(size=40), rng.normal(size=40), np.arange(40) // 2).p_value
        for _ in range(400)
    ]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_comparison_puts_it_together():
    a, b, prompt = scores(50, 3, 0.5, 7)
    settings = Resampling(confidence=0.9, num_resamples=400, seed=2)
    found = compare(a, b, prompt, settings)
    assert (found.num_prompts, found.num_images) == (50, 150)
    assert found.win_rate == win_rate(a, b)
    assert found.mean_difference == pytest.approx(np.mean(a - b))
    expected = bootstrap_interval(a - b, prompt, settings)
    assert (found.mean_difference_low, found.mean_difference_high) == tuple(expected)
    assert found.wins + found.losses + found.ties == 50
    assert found.p_value == sign_test(a, b, prompt).p_value
    assert found.win_rate_low < found.win_rate < found.win_rate_high


def test_each_category_is_compared_on_its_own_prompts():
    a, b, prompt = scores(30, 2, 0.5, 8)
    kinds = np.array(["animals", "text", None], object)[prompt % 3]
    found = compare_by_category(a, b, prompt, list(kinds), Resampling(seed=1))
    assert list(found) == ["animals", "text"]
    chosen = prompt % 3 == 1
    assert found["text"] == compare(a[chosen], b[chosen], prompt[chosen], Resampling(seed=1))
    with pytest.raises(ValueError, match="a category for each of 60 images, got 2"):
        compare_by_category(a, b, prompt, ["x", "y"])
