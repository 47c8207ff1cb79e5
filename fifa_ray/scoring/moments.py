"""Statistics of one score column: the same, to the last bit, for any partition of its rows.

A selection must not depend on how many blocks or workers computed it, yet floating-point sums do
depend on the order of their terms. Both statistics here are therefore exact: sums are kept as
rational numbers, ranks as integer counts. Merging is then associative and commutative by
construction, not up to rounding.

Not finite values (NaN for a missing score, infinities) are left out of every statistic.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK_ROWS = 1 << 15  # temporaries of one chunk stay in the processor's cache
_LARGEST = float(np.finfo(np.float32).max)  # the tables' type; squares stay finite in float64
_KEPT_BITS = np.uint32(0xFFFFFF00)  # of a float32: sign, exponent and 16 significant bits


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, exact sum and exact sum of squares of the finite values seen so far.

    `Moments.of(a).update(b)` equals (`==`) `Moments.of(b).merge(Moments.of(a))`, however cut. Mean
    and standard deviation are rounded once, at the end, so a large mean costs no digits of the
    deviation and a constant column has a deviation of exactly 0.
    """

    count: int = 0
    total: Fraction = Fraction(0)
    total_of_squares: Fraction = Fraction(0)

    @classmethod
    def of(cls, values: ArrayLike) -> Self:
        """Moments of the finite ones of some float32 or float64 values, in one pass."""
        finite = _finite_values(values)
        total = total_of_squares = Fraction(0)
        for start in range(0, len(finite), _CHUNK_ROWS):
            chunk = finite[start : start + _CHUNK_ROWS].astype(np.float64)
            total += _exact_sum(chunk)
            # The square of a 53-bit number has 106 bits: square its two halves of 26 bits instead.
            high, low = _split_in_halves(chunk)
            total_of_squares += _exact_sum(high * high)
            total_of_squares += _exact_sum(2.0 * high * low) + _exact_sum(low * low)
        return cls(len(finite), total, total_of_squares)

    def update(self, values: ArrayLike) -> Self:
        """These moments with more values added."""
        return self.merge(type(self).of(values))

    def merge(self, other: Self) -> Self:
        """Moments of both sets of values together."""
        return type(self)(
            self.count + other.count,
            self.total + other.total,
            self.total_of_squares + other.total_of_squares,
        )

    @property
    def mean(self) -> float:
        """Mean, correctly rounded; NaN when no finite value was seen."""
        return float(self.total / self.count) if self.count else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation (divisor count); NaN when no finite value was seen."""
        if not self.count:
            return math.nan
        return math.sqrt(self.total_of_squares / self.count - (self.total / self.count) ** 2)

    def standardize(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(value - mean) / std; zeros where the column is constant."""
        return (values - self.mean) / (self.std or 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """The distribution of a column: its distinct values and how often each occurs.

    Values are cut to 16 significant bits first, and those that become equal are tied. This bounds
    the memory (12 bytes for each distinct value: some MB however many rows, against gigabytes for
    the raw values) and is exact otherwise: tied values share their middle rank, as in
    `scipy.stats.rankdata`.
    """

    values: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def of(cls, values: ArrayLike) -> Self:
        """Distribution of the finite ones of some values."""
        distinct, counts = np.unique(_cut(_finite_values(values)), return_counts=True)
        return cls(distinct, counts.astype(np.int64))

    def update(self, values: ArrayLike) -> Self:
        """This distribution with more values added."""
        return self.merge(type(self).of(values))

    def merge(self, other: Self) -> Self:
        """Distribution of both sets of values together."""
        distinct, where = np.unique(
            np.concatenate([self.values, other.values]), return_inverse=True
        )
        counts = np.zeros(len(distinct), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        return type(self)(distinct, counts)

    @property
    def count(self) -> int:
        """Number of finite values seen."""
        return int(self.counts.sum())

    def standardize(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Middle rank as a fraction, shifted and scaled to mean 0 and (without ties) deviation 1.

        sqrt(12) * ((number below + half the number equal) / count - 1/2): between -1.74 and 1.74.
        """
        if not self.count:
            return np.full(len(values), np.nan)
        below = np.concatenate([[0], np.cumsum(self.counts)])
        distinct, where = np.unique(_cut(values), return_inverse=True)
        first = below[np.searchsorted(self.values, distinct, side="left")]
        last = below[np.searchsorted(self.values, distinct, side="right")]
        ranked = math.sqrt(12.0) * ((first + last) / (2.0 * self.count) - 0.5)
        return np.where(np.isnan(values), np.nan, ranked[where])


def _finite_values(values: ArrayLike) -> NDArray[Any]:
    """The finite ones of a column, checked to be in the range of float32."""
    column = np.asarray(values)
    if column.ndim != 1:
        raise ValueError(
            f"expected one column of values (1-D), got shape {column.shape}; "
            "pass one column at a time"
        )
    finite = np.isfinite(column)
    column = column if finite.all() else column[finite]
    if len(column) and max(column.max(), -column.min()) > _LARGEST:
        raise ValueError(
            f"expected values of magnitude up to {_LARGEST:.3g} (float32), "
            f"got {np.abs(column).max():.3g}; no model's score is that large: look for a broken row"
        )
    return column


def _exact_sum(values: NDArray[np.float64]) -> Fraction:
    """Sum without any rounding error (Rump, Ogita and Oishi 2008, algorithm ExtractVector).

    Adding and subtracting a large power of two, sigma, rounds every value to a multiple of sigma /
    2**53. Sigma leaves room for len(values) of them, so those parts add up exactly in any order;
    the remainders, at most sigma / 2**53 each, go through the same again until none is left.
    """
    total = Fraction(0)
    room_bits = len(values).bit_length() + 1
    while (largest := np.abs(values).max(initial=0.0)) > 0.0:
        sigma = math.ldexp(1.0, math.frexp(largest)[1] + room_bits)
        leading = (values + sigma) - sigma
        total += Fraction(float(leading.sum()))
        values = values - leading
    return total


def _split_in_halves(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each value as an exact sum of two numbers of at most 26 bits (Veltkamp; Dekker 1971)."""
    scaled = values * (2.0**27 + 1.0)
    high = scaled - (scaled - values)
    return high, values - high


def _cut(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values as float32 with the last 8 of 24 significant bits cleared; -0.0 becomes 0.0."""
    single = np.asarray(values, dtype=np.float32)
    return (single.view(np.uint32) & _KEPT_BITS).view(np.float32) + np.float32(0.0)
