"""What is worth its price: the points that no other one beats at the same cost or less."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(cost: ArrayLike, value: ArrayLike) -> NDArray[np.int64]:
    """Indices, by rising cost, of the points of which none costs at most as much and is better.

    cost, value: (N,), a lower cost and a higher value are better. Of points that are equal in both,
    the first; a point is on the front when every other that costs no more has a lower value.
    Raises ValueError for shapes that differ and for numbers that are not finite.
    """
    cost_N, value_N = np.asarray(cost, np.float64), np.asarray(value, np.float64)
    if cost_N.ndim != 1 or cost_N.shape != value_N.shape:
        raise ValueError(
            f"expected costs and values of one length, got shapes {cost_N.shape} and "
            f"{value_N.shape}"
        )
    if not (np.isfinite(cost_N).all() and np.isfinite(value_N).all()):
        raise ValueError("expected costs and values that are finite")
    order = np.lexsort((np.arange(len(cost_N)), -value_N, cost_N))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(value_N[order])[:-1]])
    front: NDArray[np.int64] = order[value_N[order] > best_before].astype(np.int64)
    return front
