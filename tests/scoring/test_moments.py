"""Column statistics: right, and equal to the last bit however the rows are cut and ordered."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import rankdata

from fifa_ray.scoring.moments import Moments, Ranks


def hard_columns():
    """Columns on which ordinary floating-point sums depend on the order of the rows."""
    rng = np.random.default_rng(0)
    return {
        "float32 normal": rng.normal(size=5000).astype(np.float32),
        "float64 normal": rng.normal(size=5000),
        "small spread on a huge mean": 1e12 + rng.normal(size=5000),
        "40 orders of magnitude": rng.normal(size=5000) * 10.0 ** rng.uniform(-20, 20, 5000),
        "cancelling": np.concatenate([x := rng.normal(size=2500) * 1e15, -x + 1e-3]),
        "few values": rng.integers(0, 11, 5000).astype(np.float32),
    }


HARD = pytest.mark.parametrize("values", hard_columns().values(), ids=hard_columns().keys())


@HARD
def test_sums_are_exact(values):
    moments = Moments.of(values)
    exact = [Fraction(float(value)) for value in values]
    assert moments.count == len(values)
    assert moments.total == sum(exact)
    assert moments.total_of_squares == sum(value * value for value in exact)


@HARD
@pytest.mark.parametrize("statistics", [Moments, Ranks])
@pytest.mark.parametrize("num_blocks", [2, 7, 64])
def test_any_partition_and_order_gives_the_same_bits(values, statistics, num_blocks):
    rng = np.random.default_rng(num_blocks)
    cuts = np.sort(rng.integers(0, len(values) + 1, num_blocks - 1))
    blocks = np.split(rng.permutation(values), cuts)
    streamed = statistics()
    for block in blocks:
        streamed = streamed.update(block)
    parts = [statistics.of(block) for block in blocks]
    while len(parts) > 1:  # a merge tree, from the other end
        parts = [parts[-1].merge(parts[0]), *parts[1:-1]]
    whole = statistics.of(values)
    column = values.astype(np.float64)
    for other in (streamed, pickle.loads(pickle.dumps(parts[0]))):
        assert whole.count == other.count
        assert whole.standardize(column).tobytes() == other.standardize(column).tobytes()
    if statistics is Moments:
        assert whole == streamed == parts[0]


@HARD
def test_mean_and_std_agree_with_an_exact_computation(values):
    exact = [Fraction(float(value)) for value in values]
    mean = sum(exact) / len(exact)
    variance = sum((value - mean) ** 2 for value in exact) / len(exact)
    assert Moments.of(values).mean == float(mean)
    assert Moments.of(values).std == pytest.approx(math.sqrt(variance), rel=1e-15)


@pytest.mark.parametrize("statistics", [Moments, Ranks])
def test_a_constant_column_becomes_zeros_exactly(statistics):
    column = np.full(1000, 0.1)  # its floating-point mean is not 0.1
    assert not statistics.of(column).standardize(column).any()


@pytest.mark.parametrize("statistics", [Moments, Ranks])
def test_missing_values_are_left_out_and_stay_missing(statistics):
    column = np.array([1.0, np.nan, 2.0, 4.0])
    present = column[[0, 2, 3]]
    assert statistics.of(column).count == 3
    assert statistics.of([np.inf, -np.inf, 1.0]).count == 1
    got = statistics.of(column).standardize(column)
    np.testing.assert_array_equal(got[[0, 2, 3]], statistics.of(present).standardize(present))
    assert np.isnan(got[1])


@pytest.mark.parametrize("statistics", [Moments, Ranks])
def test_without_a_value_nothing_can_be_standardised(statistics):
    assert statistics().count == 0
    assert np.isnan(statistics.of([np.nan]).standardize(np.ones(2))).all()
    assert math.isnan(Moments().mean)
    assert math.isnan(Moments().std)


def test_chunks_do_not_show():
    values = np.random.default_rng(3).normal(size=100_003)
    assert Moments.of(values).total == sum(map(Fraction, values.tolist()))


def test_ranks_are_the_middle_ranks_of_the_cut_values():
    rng = np.random.default_rng(4)
    values = np.concatenate([rng.normal(size=3000), rng.integers(-3, 3, 3000), [-0.0, 0.0]])
    values = np.float32(values)
    mantissa, exponent = np.frexp(values)
    cut = np.ldexp(np.trunc(mantissa * 2**16) / 2**16, exponent)  # 16 significant bits
    expected = math.sqrt(12) * ((rankdata(cut) - 0.5) / len(cut) - 0.5)
    np.testing.assert_allclose(Ranks.of(values).standardize(values), expected, atol=1e-12)


def test_ranks_keep_the_order_and_have_unit_scale():
    values = np.random.default_rng(5).normal(size=20_000)
    ranked = Ranks.of(values).standardize(values)
    assert (np.diff(ranked[np.argsort(values)]) >= 0).all()
    assert ranked.mean() == pytest.approx(0.0, abs=1e-9)
    assert ranked.std() == pytest.approx(1.0, abs=1e-3)


def test_ranks_place_a_value_that_they_never_saw_between_its_neighbours():
    ranks = Ranks.of([1.0, 2.0, 3.0, 4.0])
    low, between, high = ranks.standardize(np.array([0.0, 2.5, 9.0]))
    assert (low, between, high) == pytest.approx((-math.sqrt(3), 0.0, math.sqrt(3)))


def test_ranks_of_many_rows_stay_small():
    values = np.float32(np.random.default_rng(6).uniform(1.0, 2.0, size=200_000))
    assert len(Ranks.of(values).values) <= 2**15  # one octave at 16 significant bits


@pytest.mark.parametrize("statistics", [Moments, Ranks])
def test_a_broken_column_is_refused(statistics):
    with pytest.raises(ValueError, match="1-D"):
        statistics.of(np.ones((2, 2)))
    with pytest.raises(ValueError, match="1e\\+300"):
        statistics.of([1.0, -1e300])
