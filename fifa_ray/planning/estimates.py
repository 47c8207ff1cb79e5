"""Numbers with a range, and how a sample gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Source = Literal["measured", "given", "assumed"]
# Range of what is only assumed, or was measured on a single block: half to double.
UNSURE_FACTOR = 2.0
# Growth of the approximate self-join's CPU time between 60,000 and 1,000,000 prompts, and its CPU
# seconds at 60,000 prompts of 384 dimensions on a core of an AMD EPYC (README, Measured).
JOIN_EXPONENT = 1.35
JOIN_ANCHOR_ROWS = 60_000
JOIN_ANCHOR_SECONDS = 16.0
JOIN_DIMENSION = 384
# CPU seconds of exact search for a pair of prompts and a dimension: 791 for 240,000 of 384.
EXACT_SECONDS = 791 / (240_000**2 * 384)
# CPU seconds of select for a pair: ten million on two cores in 12 s, 2 s of them fixed.
SELECT_SECONDS = 2e-6
# CPU seconds of ingest for a row.
INGEST_SECONDS = 5e-5


@dataclass(frozen=True)
class Estimate:
    """A value with low <= value <= high."""

    value: float
    low: float
    high: float

    @classmethod
    def sure(cls, value: float) -> "Estimate":
        """Without a range."""
        return cls(value, value, value)

    @classmethod
    def unsure(cls, value: float) -> "Estimate":
        """From half to double."""
        return cls(value, value / UNSURE_FACTOR, value * UNSURE_FACTOR)

    def __add__(self, other: "Estimate") -> "Estimate":
        """Sum whose range is the sum of the ranges: as if both erred in the same direction."""
        return Estimate(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: "float | Estimate") -> "Estimate":
        """Product with a factor >= 0, ranges likewise."""
        other = factor if isinstance(factor, Estimate) else Estimate.sure(factor)
        return Estimate(self.value * other.value, self.low * other.low, self.high * other.high)


@dataclass(frozen=True)
class Rate:
    """Seconds of one worker for one row, and where the number comes from."""

    seconds_per_row: Estimate
    source: Source
    # Blocks that were measured; 0 where none was.
    blocks: int = 0


def given_rate(rows_per_second: float) -> Rate:
    """A rate that somebody vouches for: no range."""
    return Rate(Estimate.sure(1 / rows_per_second), "given")


def assumed_rate(seconds_per_row: float) -> Rate:
    """A rate of another machine: half to double."""
    return Rate(Estimate.unsure(seconds_per_row), "assumed")


def measured_rate(
    seconds: Sequence[float], rows: Sequence[float], confidence: float = 0.95
) -> Rate:
    """Seconds per row over blocks, with the interval of a ratio estimate (Student's t).

    seconds, rows: (B,) per block, rows > 0 in sum. A block alone tells nothing about its spread: it
    gets the range of what is assumed. Source: Cochran, Sampling Techniques, 1977, section 6.4.
    """
    s, r = np.asarray(seconds, np.float64), np.asarray(rows, np.float64)
    ratio = float(s.sum() / r.sum())
    if len(s) < 2:
        return Rate(Estimate.unsure(ratio), "measured", len(s))
    spread = np.sqrt(((s - ratio * r) ** 2).sum() * len(s) / (len(s) - 1)) / r.sum()
    half = float(stats.t.ppf((1 + confidence) / 2, len(s) - 1) * spread)
    # A rate below zero is none; a sample that is that noisy says at most half.
    low = max(ratio - half, ratio / UNSURE_FACTOR) if half > 0 else ratio
    return Rate(Estimate(ratio, low, ratio + half), "measured", len(s))


def self_join_seconds(rows: float, dimension: int, *, exact: bool) -> float:
    """CPU seconds of the k-NN self-join of so many vectors: quadratic where exact.

    Measured on one machine; the approximate join grows with the power JOIN_EXPONENT of the rows.
    """
    if exact:
        return EXACT_SECONDS * rows**2 * dimension
    scale = (rows / JOIN_ANCHOR_ROWS) ** JOIN_EXPONENT
    return JOIN_ANCHOR_SECONDS * scale * dimension / JOIN_DIMENSION


def distinct_values(pieces: Sequence[np.ndarray], total: int) -> Estimate:
    """Distinct values (prompts, images) among `total`, from pieces spread over them.

    pieces: int64 (R_i,) ids in the order of the source. Equal ones often stand together, so not
    rows but the distinct values of each piece count as draws, and are taken as random ones: the
    first-order jackknife for the number of classes (Haas and Stokes 1998, D_uj1). Low: those that
    were seen. High: no draw outside the sample repeats another.
    """
    rows = sum(len(piece) for piece in pieces)
    if rows == 0:
        return Estimate.sure(0.0)
    draws = np.concatenate([np.unique(piece) for piece in pieces])
    seen, times = np.unique(draws, return_counts=True)
    share = min(1.0, rows / total)
    if share == 1.0:
        return Estimate.sure(float(len(seen)))
    once = (times == 1).sum() / len(draws)
    value = len(seen) / (1 - (1 - share) * once)
    high = len(seen) + len(draws) * (1 / share - 1)
    return Estimate(float(min(value, high)), float(len(seen)), float(high))
