"""How well rewards agree with labels, in shares and probabilities, with intervals that know that
the pairs of one prompt are not independent.

Suffix: P pairs.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

_Z_95 = 1.959964


def pairwise_success(reward_margin: ArrayLike) -> NDArray[np.float64]:
    """1 where the chosen image has the higher reward, 0 where the rejected one, 1/2 for ties."""
    margin_P = np.asarray(reward_margin, np.float64)
    return np.where(margin_P == 0, 0.5, margin_P > 0).astype(np.float64)


def share_with_interval(success: ArrayLike, cluster: ArrayLike) -> tuple[float, float, float]:
    """Mean of `success` (P,) in [0, 1] and its 95% interval (low, high); NaN without a pair.

    cluster: (P,) ids, such as the prompt's; pairs of one cluster may be correlated. Wilson's (1927)
    interval at the effective sample size share (1 - share) / V, where V is the linearised variance
    of a ratio of cluster totals (Korn and Graubard 1998 do the same with Clopper-Pearson's). Where
    V is 0, the number of clusters.
    """
    success_P = np.asarray(success, np.float64)
    if not len(success_P):
        return math.nan, math.nan, math.nan
    _, cluster_of = np.unique(np.asarray(cluster), return_inverse=True)
    share = float(success_P.mean())
    residuals = np.bincount(cluster_of, success_P - share)
    num_clusters = len(residuals)
    correction = num_clusters / max(1, num_clusters - 1)
    variance = correction * float(residuals @ residuals) / len(success_P) ** 2
    count = share * (1.0 - share) / variance if variance > 0 else float(num_clusters)
    return share, *wilson_interval(share, count)


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Wilson (1927) 95% score interval of a share seen in `count` > 0 trials."""
    z2 = _Z_95 * _Z_95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def log_loss(reward_margin: ArrayLike) -> float:
    """Mean negative log probability (nats a pair) of the labels under Bradley-Terry.

    log(2) = 0.693 is a coin. Margins are in logits.
    """
    return float(-special.log_expit(np.asarray(reward_margin, np.float64)).mean())


def calibration(reward_margin: ArrayLike, num_bins: int = 5) -> list[dict[str, Any]]:
    """Bins of equal counts by |reward_margin| (logits), the least sure first.

    predicted: mean probability that the model gives to the image that it prefers. observed: how
    often people chose that image. A calibrated model has them equal.
    """
    margin_P = np.asarray(reward_margin, np.float64)
    order = np.argsort(np.abs(margin_P), kind="stable")
    return [
        {
            "pairs": len(members),
            "predicted": float(special.expit(np.abs(margin_P[members])).mean()),
            "observed": float(pairwise_success(margin_P[members]).mean()),
        }
        for members in np.array_split(order, num_bins)
        if len(members)
    ]
