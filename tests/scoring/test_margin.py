"""Reward margins: sign, rules and the vote of several models."""

import numpy as np
import pytest

from fifa_ray.scoring.margin import (
    apply_margin_rule,
    average_margins,
    disagrees_with_human,
    reward_margin,
)
from fifa_ray.scoring.moments import Moments


def test_swapping_the_images_flips_the_sign():
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 100)).astype(np.float32)
    np.testing.assert_array_equal(reward_margin(chosen, rejected), -reward_margin(rejected, chosen))


def test_margin_is_subtracted_in_float64_whatever_the_rewards_are():
    margin = reward_margin([3, 1], [1, 3])
    assert margin.dtype == np.float64
    np.testing.assert_array_equal(margin, [2.0, -2.0])
    close = reward_margin(np.float16([1000.0]), np.float32([1000.0001]))
    np.testing.assert_allclose(close, [1000.0 - np.float64(np.float32(1000.0001))])


def test_rewards_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        reward_margin([1.0, 2.0, 3.0], [1.0, 2.0])


def test_only_a_negative_margin_disagrees_with_the_people():
    margins = [-0.1, 0.0, 0.1, np.nan]
    np.testing.assert_array_equal(disagrees_with_human(margins), [True, False, False, False])


def test_margin_rules():
    margins = np.array([-3.0, -0.5, 0.5, 3.0, np.nan])
    np.testing.assert_array_equal(apply_margin_rule(margins, "signed"), margins)
    np.testing.assert_array_equal(apply_margin_rule(margins, "absolute"), [3, 0.5, 0.5, 3, np.nan])
    np.testing.assert_array_equal(
        apply_margin_rule(margins, "clipped", (-2.0, 1.0)), [-2, -0.5, 0.5, 1, np.nan]
    )
    np.testing.assert_array_equal(
        apply_margin_rule(margins, "clipped", (-np.inf, 1.0)), [-3, -0.5, 0.5, 1, np.nan]
    )


@pytest.mark.parametrize("clip", [None, (1.0, 1.0), (2.0, 1.0), (np.nan, 1.0)])
def test_the_clipped_rule_needs_a_band(clip):
    with pytest.raises(ValueError, match="low < high"):
        apply_margin_rule([1.0], "clipped", clip)


def test_an_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match="signed, absolute, clipped"):
        apply_margin_rule([1.0], "squared")  # type: ignore[arg-type]


def test_voters_of_any_scale_have_equal_votes():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 1000))
    rescaled = 0.01 * second + 7.0
    voted = average_margins([first, rescaled], [Moments.of(first), Moments.of(rescaled)])
    expected = ((first - first.mean()) / first.std() + (second - second.mean()) / second.std()) / 2
    np.testing.assert_allclose(voted, expected, rtol=1e-9, atol=1e-9)


def test_vote_weights_weigh_and_a_weight_of_zero_silences():
    first, second = np.random.default_rng(2).normal(size=(2, 500))
    moments = [Moments.of(first), Moments.of(second)]
    z_first, z_second = (
        (first - first.mean()) / first.std(),
        (second - second.mean()) / second.std(),
    )
    np.testing.assert_allclose(
        average_margins([first, second], moments, [3.0, 1.0]), 0.75 * z_first + 0.25 * z_second
    )
    unscored = np.full_like(second, np.nan)
    np.testing.assert_allclose(average_margins([first, unscored], moments, [2.0, 0.0]), z_first)


def test_a_pair_that_a_voter_could_not_score_has_no_vote():
    first, second = np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 5.0])
    voted = average_margins([first, second], [Moments.of(first), Moments.of(second)])
    np.testing.assert_array_equal(np.isnan(voted), [False, True, False])


def test_a_vote_without_voters_or_with_misfitting_ones_is_refused():
    moments = Moments.of([1.0, 2.0])
    with pytest.raises(ValueError, match="at least one reward model"):
        average_margins([], [])
    with pytest.raises(ValueError, match="equally many"):
        average_margins([[1.0, 2.0]], [moments, moments])
    with pytest.raises(ValueError, match="same pairs"):
        average_margins([[1.0, 2.0], [1.0]], [moments, moments])
    for vote_weights in ([1.0], [0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(ValueError, match="2 vote weights"):
            average_margins([[1.0, 2.0], [1.0, 2.0]], [moments, moments], vote_weights)
