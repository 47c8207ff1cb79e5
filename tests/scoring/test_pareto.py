"""The Pareto front against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa_ray.scoring.pareto import pareto_front

# Few distinct numbers: many equal costs and values.
POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30)


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(points):
    cost, value = np.array(points).T
    front = pareto_front(cost, value)
    dominated = [
        any(
            (cost[j] <= cost[i] and value[j] > value[i])
            or (cost[j] < cost[i] and value[j] >= value[i])
            for j in range(len(points))
        )
        for i in range(len(points))
    ]
    assert {points[i] for i in front} == {
        p for p, d in zip(points, dominated, strict=True) if not d
    }
    assert (np.diff(cost[front]) > 0).all()
    assert (np.diff(value[front]) > 0).all()
    # Of equal points the first.
    assert all(points.index(points[i]) == i for i in front)


def test_no_points_and_bad_ones():
    assert pareto_front([], []).tolist() == []
    with pytest.raises(ValueError, match="one length"):
        pareto_front([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        pareto_front([1.0], [np.nan])
