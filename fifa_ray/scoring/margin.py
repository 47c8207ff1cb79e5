"""The reward margin of a pair: how much more a reward model likes the image that people chose.

Suffixes: P pairs, M reward models. Everything is float64; NaN (an image without a reward) stays
NaN.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fifa_ray.scoring.importance import standardize
from fifa_ray.scoring.moments import Moments

MarginRule = Literal["signed", "absolute", "clipped"]


def reward_margin(reward_chosen: ArrayLike, reward_rejected: ArrayLike) -> NDArray[np.float64]:
    """reward_chosen - reward_rejected of each pair (P,), on the reward model's own scale.

    Signed: negative where the reward model contradicts the people. Float64 whatever the inputs.
    """
    chosen_P = np.asarray(reward_chosen, dtype=np.float64)
    rejected_P = np.asarray(reward_rejected, dtype=np.float64)
    if chosen_P.shape != rejected_P.shape:
        raise ValueError(
            f"expected one reward for each image of a pair, got reward_chosen of shape "
            f"{chosen_P.shape} and reward_rejected of shape {rejected_P.shape}"
        )
    return chosen_P - rejected_P


def disagrees_with_human(reward_margin: ArrayLike) -> NDArray[np.bool_]:
    """True where the reward model prefers the rejected image; a tie or a NaN is no disagreement."""
    return np.asarray(reward_margin, dtype=np.float64) < 0.0


def apply_margin_rule(
    reward_margin: ArrayLike, rule: MarginRule, clip: tuple[float, float] | None = None
) -> NDArray[np.float64]:
    """What a margin (P,) is worth, under one of three rules.

    signed: itself, so that a pair on which the reward model contradicts the people scores low.
    absolute: its size, whichever image the reward model prefers.
    clipped: itself, saturated at both ends of the band `clip`. A very large margin often shows a
    broken image or a reward model out of its depth, so beyond the band more margin is worth no
    more; a bound may be infinite. The band is in the margin's units: standard deviations if
    standardised before. The other rules do not look at `clip`.
    """
    margin_P = np.asarray(reward_margin, dtype=np.float64)
    if rule == "signed":
        return margin_P.copy()
    if rule == "absolute":
        return np.abs(margin_P)
    if rule == "clipped":
        if clip is None or not clip[0] < clip[1]:
            raise ValueError(f"rule 'clipped' needs clip=(low, high) with low < high, got {clip}")
        return np.clip(margin_P, *clip)
    raise ValueError(
        f"unknown margin rule {rule!r}; choose one of {', '.join(get_args(MarginRule))}"
    )


def average_margins(
    margins_MP: Sequence[ArrayLike],
    moments: Sequence[Moments],
    vote_weights: Sequence[float] | None = None,
) -> NDArray[np.float64]:
    """Vote of several reward models: standardise each one's margins by its moments, then average.

    Reward models differ in scale by a factor of hundreds, so raw margins cannot be averaged.
    `moments` are those of each model's whole column. A pair that one of the models could not score
    is NaN: an average over fewer voters would not compare with the others. Unless all voters
    agree, the average has a standard deviation below 1; standardise it again where it has to weigh
    as much as a single model's.
    """
    if not len(margins_MP) == len(moments) > 0:
        raise ValueError(
            f"expected margins and moments of at least one reward model and equally many of both, "
            f"got {len(margins_MP)} and {len(moments)}"
        )
    weights_M = np.asarray([1.0] * len(moments) if vote_weights is None else vote_weights, float)
    if len(weights_M) != len(moments) or not (weights_M >= 0).all() or not weights_M.sum() > 0:
        raise ValueError(
            f"expected {len(moments)} vote weights, none negative and not all 0, got {vote_weights}"
        )
    columns = [np.asarray(margins, dtype=np.float64) for margins in margins_MP]
    if len({column.shape for column in columns}) > 1:
        raise ValueError(
            f"expected margins of the same pairs from every reward model, "
            f"got shapes {[column.shape for column in columns]}"
        )
    total_P = np.zeros_like(columns[0])
    for weight, column, column_moments in zip(weights_M, columns, moments, strict=True):
        if weight > 0:  # a model without a vote cannot make a pair NaN either
            total_P += weight * standardize(column, "zscore", column_moments)
    total_P /= weights_M.sum()
    return total_P
