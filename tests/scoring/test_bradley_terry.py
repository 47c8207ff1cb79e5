"""The Bradley-Terry fit against scikit-learn, and its honesty about prompts it has seen."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from fifa_ray.scoring.bradley_terry import (
    assign_folds,
    choose_l2,
    cross_fit,
    fit_bradley_terry,
    fit_weights,
    fixed_blocks,
)
from fifa_ray.scoring.moments import Moments


def world(num_pairs=3000, num_features=12, seed=0):
    """Features of both images, prompt ids and true weights; labels follow Bradley-Terry."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(0.01, 100, num_features)
    first, second = (
        (rng.standard_normal((num_pairs, num_features)) * scale + 3 * scale).astype(np.float32)
        for _ in range(2)
    )
    truth = rng.standard_normal(num_features) * 0.5
    first_wins = rng.random(num_pairs) < expit(((first - second) / scale) @ truth)
    chosen = np.where(first_wins[:, None], first, second)
    rejected = np.where(first_wins[:, None], second, first)
    prompts = rng.integers(-(2**63), 2**63 - 1, num_pairs // 4)[
        rng.integers(0, num_pairs // 4, num_pairs)
    ]
    return chosen, rejected, prompts, truth


@pytest.mark.parametrize("l2", [0.5, 30.0])
def test_weights_are_those_of_logistic_regression_without_intercept(l2):
    chosen, rejected, *_ = world()
    differences = chosen - rejected
    std = np.linspace(0.5, 2.0, differences.shape[1]) * np.geomspace(0.01, 100, 12)
    ours = fit_weights([differences], std, l2)
    # The mirrored pairs, at half weight each, give scikit-learn its two classes.
    scaled = differences.astype(np.float64) / std
    theirs = LogisticRegression(
        C=1 / l2, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000
    ).fit(
        np.concatenate([scaled, -scaled]),
        np.repeat([1, 0], len(scaled)),
        sample_weight=np.full(2 * len(scaled), 0.5),
    )
    np.testing.assert_allclose(ours, theirs.coef_[0], atol=1e-6, rtol=0)


def test_true_weights_come_back_and_rewards_are_centred_logits():
    chosen, rejected, prompts, truth = world(num_pairs=30_000)
    moments = [Moments.of(c) for c in np.concatenate([chosen, rejected]).T]
    model = fit_bradley_terry([chosen - rejected], assign_folds(prompts, 5), moments, l2=1.0)
    np.testing.assert_allclose(model.weights, truth, atol=0.07)
    both = np.concatenate([model.reward(chosen), model.reward(rejected)])
    assert abs(both.mean()) < 1e-9
    margin = model.reward(chosen) - model.reward(rejected)
    # Logits: the mean probability of the labels' side matches how often it is right.
    assert expit(np.abs(margin)).mean() == pytest.approx(np.mean(margin > 0), abs=0.01)


def test_any_partition_of_the_pairs_gives_the_same_bits():
    chosen, rejected, prompts, _ = world(num_pairs=9000)
    differences = chosen - rejected
    fold = assign_folds(prompts, 4)
    moments = [Moments.of(c) for c in chosen.T]
    whole = fit_bradley_terry([differences], fold, moments, held_out=1)
    cut = np.split(differences, [1, 17, 4096, 4097, 8999])
    parts = fit_bradley_terry(cut, fold, moments, held_out=1)
    assert whole.l2 == parts.l2
    np.testing.assert_array_equal(whole.weights, parts.weights)
    np.testing.assert_array_equal(
        whole.reward(chosen), np.concatenate([whole.reward(p) for p in np.split(chosen, [5, 4100])])
    )
    assert [len(block) for block in fixed_blocks(cut)] == [4096, 4096, 808]


def test_folds_are_whole_prompts_of_about_equal_size_and_depend_on_the_seed():
    prompts = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20_000)
    fold = assign_folds(prompts, 5, seed=3)
    assert np.bincount(fold).min() > 3800
    shuffled = np.random.default_rng(1).permutation(len(prompts))
    np.testing.assert_array_equal(assign_folds(prompts[shuffled], 5, seed=3), fold[shuffled])
    assert np.mean(assign_folds(prompts, 5, seed=4) == fold) == pytest.approx(0.2, abs=0.02)
    # Small consecutive ids spread just as well.
    assert np.bincount(assign_folds(np.arange(10_000), 5)).min() > 1850


def test_cross_fit_scores_every_pair_with_a_model_that_did_not_see_its_prompt():
    chosen, rejected, prompts, _ = world()
    fitted = cross_fit(chosen, rejected, prompts, num_folds=3, l2=2.0, seed=1)
    fold = assign_folds(prompts, 3, seed=1)
    for held_out in range(3):
        seen = fold != held_out
        std = np.concatenate([chosen[seen], rejected[seen]]).astype(np.float64).std(axis=0)
        weights = fit_weights([(chosen - rejected)[seen]], std, 2.0)
        np.testing.assert_allclose(fitted.models[held_out].weights, weights, atol=1e-6)
        margin = fitted.reward_chosen[~seen] - fitted.reward_rejected[~seen]
        expected = (chosen - rejected)[~seen].astype(np.float64) @ (weights / std)
        np.testing.assert_allclose(margin, expected, atol=1e-4)


def test_features_that_name_the_prompt_learn_nothing_for_other_prompts():
    # Each prompt has a feature of its own that tells its (random) winner: a perfect fit in the
    # folds it was fitted to, worth nothing outside them.
    rng = np.random.default_rng(0)
    num_prompts, pairs_each = 60, 10
    prompt = np.repeat(np.arange(num_prompts), pairs_each)
    sign = rng.choice([-1.0, 1.0], num_prompts)[prompt]
    chosen = np.zeros((len(prompt), num_prompts), np.float32)
    chosen[np.arange(len(prompt)), prompt] = sign * rng.random(len(prompt))
    rejected = np.zeros_like(chosen)
    fitted = cross_fit(chosen, rejected, prompt, num_folds=5, l2=0.1)
    out_of_fold = fitted.reward_chosen - fitted.reward_rejected
    assert np.abs(out_of_fold).max() < 1e-6  # nothing known about a new prompt: a tie
    seen = fitted.fold != 0
    in_fold = fitted.models[0].reward(chosen[seen]) - fitted.models[0].reward(rejected[seen])
    assert np.mean(in_fold > 0) == 1.0


def test_the_penalty_is_strong_for_noise_and_weak_for_signal_and_ignores_the_held_out_fold():
    chosen, rejected, prompts, _ = world(num_pairs=4000)
    differences = chosen - rejected
    fold = assign_folds(prompts, 5)
    std = differences.std(axis=0).astype(np.float64)
    signal = choose_l2([differences], fold, std)
    coin = np.random.default_rng(0).choice([-1.0, 1.0], len(differences))[:, None]
    assert choose_l2([differences * coin], fold, std) > 10 * signal
    spoiled = differences.copy()
    spoiled[fold == 2] *= coin[fold == 2]
    kept = choose_l2([differences], fold, std, held_out=2)
    assert choose_l2([spoiled], fold, std, held_out=2) == kept


def test_errors_say_what_to_do():
    chosen, rejected, prompts, _ = world(num_pairs=50)
    with pytest.raises(ValueError, match="at least 2 folds"):
        assign_folds(prompts, 1)
    with pytest.raises(ValueError, match="l2 must be positive"):
        fit_weights([chosen - rejected], np.ones(12), 0.0)
    with pytest.raises(ValueError, match="no pair to fit"):
        cross_fit(chosen, rejected, np.zeros(50, np.int64), num_folds=2, l2=1.0)
    model = cross_fit(chosen, rejected, prompts, num_folds=2, l2=1.0).models[0]
    with pytest.raises(ValueError, match=r"\(N, 12\)"):
        model.reward(chosen[:, :5])
