"""Shares with intervals for clustered pairs, log loss and calibration."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy.special import expit

from fifa_ray.scoring.agreement import (
    calibration,
    log_loss,
    pairwise_success,
    share_with_interval,
    wilson_interval,
)


def test_wilson_interval_solves_its_equation():
    # Its ends are the shares p at which the observed share is exactly z standard errors away.
    z = NormalDist().inv_cdf(0.975)
    for end in wilson_interval(0.9, 50):
        assert abs(0.9 - end) == pytest.approx(z * np.sqrt(end * (1 - end) / 50), rel=1e-6)


def test_independent_pairs_give_the_plain_wilson_interval():
    success = np.random.default_rng(0).random(2000) < 0.7
    share, low, high = share_with_interval(success, np.arange(2000))
    assert share == success.mean()
    assert (low, high) == pytest.approx(wilson_interval(share, 2000), abs=1e-4)


def test_repeating_every_pair_under_its_prompt_adds_no_certainty():
    success = np.random.default_rng(0).random(500) < 0.7
    once = share_with_interval(success, np.arange(500))
    eight = share_with_interval(np.repeat(success, 8), np.repeat(np.arange(500), 8))
    assert eight == pytest.approx(once, abs=1e-3)


def test_the_interval_agrees_with_a_bootstrap_of_prompts():
    rng = np.random.default_rng(0)
    of_prompt = rng.beta(4, 2, 300)
    sizes = rng.integers(1, 15, 300)
    prompt = np.repeat(np.arange(300), sizes)
    success = rng.random(len(prompt)) < of_prompt[prompt]
    _, low, high = share_with_interval(success, prompt)
    totals = np.bincount(prompt, success)
    draws = rng.integers(0, 300, (4000, 300))
    shares = totals[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    assert (low, high) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.006)


def test_a_perfect_share_and_no_pair():
    share, low, high = share_with_interval(np.ones(40), np.arange(40) // 4)
    assert (share, high) == pytest.approx((1.0, 1.0))
    assert low == pytest.approx(wilson_interval(1.0, 10)[0])
    assert np.isnan(share_with_interval([], [])).all()


def test_ties_count_half_and_a_coin_has_log_loss_of_log_2():
    np.testing.assert_array_equal(pairwise_success([2.0, -1.0, 0.0]), [1.0, 0.0, 0.5])
    assert log_loss(np.zeros(7)) == pytest.approx(np.log(2))
    assert log_loss([3.0, -2.0]) == pytest.approx(-np.log([expit(3.0), expit(-2.0)]).mean())


def test_calibration_of_true_logits_matches_and_of_doubled_ones_does_not():
    rng = np.random.default_rng(0)
    logits = np.abs(rng.normal(0, 1.5, 50_000))
    margin = np.where(rng.random(50_000) < expit(logits), logits, -logits)
    for row in calibration(margin):
        assert row["pairs"] == 10_000
        assert row["observed"] == pytest.approx(row["predicted"], abs=0.015)
    assert calibration(2 * margin)[2]["predicted"] - calibration(2 * margin)[2]["observed"] > 0.1
