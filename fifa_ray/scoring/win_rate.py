"""How often one model's images beat another's by a score, and how sure that is.

The same prompts are drawn by both models, with one image or several per prompt. Images of one
prompt are not independent, so intervals resample whole prompts and the sign test counts prompts.

Suffixes: N images that both models drew, C prompts (clusters), B resamples, V values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# Resampled prompt numbers held at once (8 bytes each, and their values): memory stays bounded.
_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: their confidence, in (0, 1), and the resamples of prompts."""

    confidence: float = 0.95
    num_resamples: int = 2000
    seed: int = 0


DEFAULT_RESAMPLING = Resampling()


@dataclass(frozen=True)
class SignTest:
    """Prompts that each model won, drawn ones, and the two-sided p-value of the former."""

    wins: int
    losses: int
    ties: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Model a against model b over the same prompts, by one score.

    win_rate and mean_difference (a minus b, in the score's unit) have bootstrap intervals
    (low, high), NaN with fewer than two prompts. wins, losses and ties count prompts.
    """

    num_prompts: int
    num_images: int
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    wins: int
    losses: int
    ties: int
    p_value: float
    mean_difference: float
    mean_difference_low: float
    mean_difference_high: float


def win_outcome(score_a: ArrayLike, score_b: ArrayLike) -> NDArray[np.float64]:
    """(N,): 1 where a scores higher, 0 where b does, 1/2 where they are equal.

    Raises ValueError for shapes that differ, no image, and scores that are not finite.
    """
    a_N, b_N = np.asarray(score_a, np.float64), np.asarray(score_b, np.float64)
    if a_N.ndim != 1 or a_N.shape != b_N.shape or not a_N.size:
        raise ValueError(
            f"expected two score arrays of one length, at least 1, got shapes {a_N.shape} and "
            f"{b_N.shape}"
        )
    bad = ~(np.isfinite(a_N) & np.isfinite(b_N))
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(a_N)} images have a score that is not finite; leave them "
            "out of both models"
        )
    return np.where(a_N == b_N, 0.5, a_N > b_N).astype(np.float64)


def win_rate(score_a: ArrayLike, score_b: ArrayLike) -> float:
    """Share of images on which a scores higher than b, ties ½: (#{a > b} + #{a = b} / 2) / N.

    With one score per image that is the probability of superiority of paired samples (Vargha and
    Delaney 2000). Raises ValueError, see `win_outcome`.
    """
    return float(win_outcome(score_a, score_b).mean())


def sign_test(score_a: ArrayLike, score_b: ArrayLike, prompt: ArrayLike) -> SignTest:
    """Exact two-sided sign test by prompts: under the null hypothesis a prompt is a fair coin.

    A prompt goes to the model that scores higher on more of its images, Σ sign(a - b) over them;
    p = P(|X - n/2| >= |wins - n/2|) for X ~ Binomial(n, 1/2), n = wins + losses: ties are left out
    (Dixon and Mood 1946). 1 where every prompt is tied. `prompt`: (N,) ids.
    """
    outcome_N = win_outcome(score_a, score_b)
    net_C = np.sign(_totals_by_prompt(2 * outcome_N - 1, prompt)[0])
    wins, losses = int((net_C > 0).sum()), int((net_C < 0).sum())
    p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return SignTest(wins, losses, len(net_C) - wins - losses, p_value)


def bootstrap_interval(
    values: ArrayLike,
    prompt: ArrayLike,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> NDArray[np.float64]:
    """Percentile interval of the mean of `values` when prompts are drawn anew, with replacement.

    values: (N,) or (N, V), each column resampled with the same prompts; prompt: (N,) ids. A
    resample draws C of the C prompts and takes all images of each, so its mean is the ratio of two
    sums (cluster bootstrap: Davison and Hinkley 1997, section 3.8). Returns (low, high), float64 of
    shape (2,) or (2, V); NaN with fewer than two prompts. The same seed gives the same interval for
    the same prompts in any order of the images.
    """
    totals_CV, size_C = _totals_by_prompt(values, prompt)
    num_prompts = len(size_C)
    if num_prompts < 2:
        return np.full((2, *totals_CV.shape[1:]), math.nan)
    rng = np.random.default_rng(resampling.seed)
    num_resamples = resampling.num_resamples
    means_BV = np.empty((num_resamples, *totals_CV.shape[1:]))
    at_once = max(1, _DRAWS_AT_ONCE // num_prompts)
    for start in range(0, num_resamples, at_once):
        count = min(at_once, num_resamples - start)
        drawn = rng.integers(0, num_prompts, (count, num_prompts))
        # One column at a time: a gather of (B, C, V) would not stay bounded.
        sizes = size_C[drawn].sum(axis=1)
        columns = totals_CV.reshape(num_prompts, -1).T
        sums = np.stack([column[drawn].sum(axis=1) for column in columns], axis=1)
        means_BV[start : start + count] = (sums / sizes[:, None]).reshape(
            count, *totals_CV.shape[1:]
        )
    tail = (1 - resampling.confidence) / 2
    return np.quantile(means_BV, [tail, 1 - tail], axis=0)


def win_rate_interval(
    outcome: ArrayLike,
    prompt: ArrayLike,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> tuple[float, float]:
    """Interval (low, high) of the win rate, from `win_outcome`'s (N,): the bootstrap by prompts.

    Where all prompts have the same mean, as when one model wins every image, a bootstrap has no
    spread and would claim certainty. Then it is the exact binomial interval of Clopper and Pearson
    (1934) with prompts as trials, extended to shares between them by its Beta quantiles; only when
    every image is tied is there nothing uncertain.
    """
    outcome_N = np.asarray(outcome, np.float64)
    totals_C, size_C = _totals_by_prompt(outcome_N, prompt)
    num_prompts = len(size_C)
    if num_prompts > 1 and np.ptp(totals_C / size_C) < 1e-12 and (outcome_N != 0.5).any():
        tail = (1 - resampling.confidence) / 2
        won = float(outcome_N.mean()) * num_prompts
        lost = num_prompts - won
        low = stats.beta.ppf(tail, won, lost + 1) if won > 0 else 0.0
        high = stats.beta.ppf(1 - tail, won + 1, lost) if lost > 0 else 1.0
        return float(low), float(high)
    low, high = bootstrap_interval(outcome_N, prompt, resampling)
    return float(low), float(high)


def compare(
    score_a: ArrayLike,
    score_b: ArrayLike,
    prompt: ArrayLike,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> Comparison:
    """Everything about model a against model b: scores (N,) of the same images, prompt ids (N,).

    Raises ValueError, see `win_outcome`.
    """
    outcome_N = win_outcome(score_a, score_b)
    difference_N = np.asarray(score_a, np.float64) - np.asarray(score_b, np.float64)
    low, high = win_rate_interval(outcome_N, prompt, resampling)
    lower, upper = bootstrap_interval(difference_N, prompt, resampling)
    signs = sign_test(score_a, score_b, prompt)
    return Comparison(
        num_prompts=signs.wins + signs.losses + signs.ties,
        num_images=len(outcome_N),
        win_rate=float(outcome_N.mean()),
        win_rate_low=low,
        win_rate_high=high,
        wins=signs.wins,
        losses=signs.losses,
        ties=signs.ties,
        p_value=signs.p_value,
        mean_difference=float(difference_N.mean()),
        mean_difference_low=float(lower),
        mean_difference_high=float(upper),
    )


def compare_by_category(
    score_a: ArrayLike,
    score_b: ArrayLike,
    prompt: ArrayLike,
    category: Sequence[str | None],
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Comparison]:
    """The comparison within each category (N,), by name; images without one are left out."""
    a_N, b_N = np.asarray(score_a), np.asarray(score_b)
    prompt_N = np.asarray(prompt)
    names = np.array(["" if name is None else name for name in category], object)
    if len(names) != len(a_N):
        raise ValueError(f"expected a category for each of {len(a_N)} images, got {len(names)}")
    found = {}
    for name in sorted(set(names) - {""}):
        members = names == name
        found[name] = compare(
            a_N[members],
            b_N[members],
            prompt_N[members],
            resampling,
        )
    return found


def _totals_by_prompt(
    values: ArrayLike, prompt: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums (C,) or (C, V) of the values of each prompt and its number of images, by prompt id."""
    values_NV = np.asarray(values, np.float64)
    prompt_N = np.asarray(prompt)
    if prompt_N.shape != values_NV.shape[:1] or not len(prompt_N):
        raise ValueError(
            f"expected a prompt id for each of at least one value, got shapes {values_NV.shape} "
            f"and {prompt_N.shape}"
        )
    _, prompt_of_N, size_C = np.unique(prompt_N, return_inverse=True, return_counts=True)
    totals_CV = np.zeros((len(size_C), *values_NV.shape[1:]))
    np.add.at(totals_CV, prompt_of_N.reshape(-1), values_NV)
    return totals_CV, size_C
