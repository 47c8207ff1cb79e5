"""Numbers from a sample, against simulation, scipy and hand computation."""

import numpy as np
import pytest
from scipy import stats

from fifa_ray.planning.estimates import (
    Estimate,
    assumed_rate,
    distinct_values,
    given_rate,
    measured_rate,
    self_join_seconds,
)


def test_the_sample_itself_is_counted():
    pieces = [np.array([1, 1, 2]), np.array([2, 3])]
    assert distinct_values(pieces, 5) == Estimate.sure(3.0)


def test_prompts_that_never_repeat_grow_with_the_rows():
    pieces = [np.arange(100), np.arange(100, 200)]
    found = distinct_values(pieces, 2000)
    assert found.value == pytest.approx(2000)
    assert found.low == 200
    assert found.high == pytest.approx(2000)


def test_repeats_inside_a_piece_are_not_repeats_across_the_dataset():
    # Each prompt has 4 rows that stand together: a quarter of the rows are prompts.
    pieces = [np.repeat(np.arange(i, i + 25), 4) for i in (0, 500, 900)]
    assert distinct_values(pieces, 12_000).value == pytest.approx(3000)


@pytest.mark.parametrize(("prompts", "copies"), [(500, 8), (5000, 3)])
def test_shuffled_rows_of_equally_common_prompts(prompts, copies):
    rng = np.random.default_rng(3)
    rows = rng.permutation(np.repeat(np.arange(prompts), copies))
    pieces = [rows[start : start + 60] for start in range(0, len(rows), len(rows) // 20)]
    found = distinct_values(pieces, len(rows))
    assert found.value == pytest.approx(prompts, rel=0.15)
    assert found.low <= prompts <= found.high


def test_an_interval_is_that_of_a_mean_where_all_blocks_are_alike_in_size():
    seconds = [1.0, 1.2, 0.9, 1.1, 1.3]
    rate = measured_rate(seconds, [10.0] * 5)
    low, high = stats.t.interval(0.95, 4, np.mean(seconds) / 10, stats.sem(seconds) / 10)
    assert rate.seconds_per_row.value == pytest.approx(0.11)
    assert rate.seconds_per_row.high == pytest.approx(high)
    assert rate.seconds_per_row.low == pytest.approx(low)
    assert rate.source == "measured"


def test_blocks_of_different_sizes_at_one_rate_have_no_spread():
    rate = measured_rate([1.0, 2.0, 4.0], [10.0, 20.0, 40.0])
    assert rate.seconds_per_row.value == pytest.approx(0.1)
    assert rate.seconds_per_row.high == pytest.approx(0.1)


def test_one_block_and_an_assumption_are_unsure_and_a_given_rate_is_sure():
    assert measured_rate([3.0], [6.0]).seconds_per_row == Estimate(0.5, 0.25, 1.0)
    assert assumed_rate(0.5).seconds_per_row == Estimate(0.5, 0.25, 1.0)
    assert given_rate(4.0).seconds_per_row == Estimate(0.25, 0.25, 0.25)


def test_a_noisy_sample_never_gives_a_rate_below_zero():
    rate = measured_rate([0.1, 9.0], [10.0, 10.0])
    assert 0 < rate.seconds_per_row.low < rate.seconds_per_row.value


def test_sums_and_products_of_ranges():
    a, b = Estimate(2, 1, 4), Estimate(3, 2, 5)
    assert a + b == Estimate(5, 3, 9)
    assert a * b == Estimate(6, 2, 20)
    assert a * 2.0 == Estimate(4, 2, 8)


def test_growth_of_the_self_join():
    exact = [self_join_seconds(n, 384, exact=True) for n in (1000, 2000)]
    assert exact[1] / exact[0] == pytest.approx(4)
    approximate = [self_join_seconds(n, 384, exact=False) for n in (60_000, 1_000_000)]
    # What was measured: 16 and 707 CPU seconds.
    assert approximate[0] == pytest.approx(16)
    assert approximate[1] == pytest.approx(707, rel=0.02)
