"""How far a prompt is from the others: k-th neighbour distance and the entropy estimated from it.

Suffixes: N prompts, Q queries, C candidates, D embedding width. Distances are Euclidean, entropies
are in nats. This is the exact reference, O(N^2 D); approximate search lives in the engine.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

DISTANCE_FLOOR = 1e-6
"""Smallest distance that enters an entropy: about the noise of float32 unit vectors."""

_SPARE_CANDIDATES = 16


def kth_neighbor_distance(
    embeddings: ArrayLike, num_neighbors: int, *, query_chunk_rows: int = 64
) -> NDArray[np.float64]:
    """Euclidean distance from each row to its num_neighbors-th nearest other row (N,).

    Exact: a row itself is left out by its index, so a duplicate is a neighbour at distance exactly
    0. A matrix product in the type of `embeddings` (N, D) finds candidates; their distances are
    computed again as float64 differences, because |a|^2 + |b|^2 - 2ab in float32 puts duplicates up
    to 1e-3 apart. Where the error bound of the product cannot rule out the rows not among the
    candidates, all rows within that bound are computed again too. The result does not depend on
    `query_chunk_rows`; each chunk takes about query_chunk_rows * (12 N + 8 D (num_neighbors + 16))
    bytes.
    """
    embeddings_ND = checked_embeddings(embeddings)
    num_rows = len(embeddings_ND)
    _check_num_neighbors(num_neighbors, num_rows)
    if query_chunk_rows < 1:
        raise ValueError(f"query_chunk_rows must be at least 1, got {query_chunk_rows}")
    # Around the mean the norms, and with them the rounding errors of the product, are smallest.
    mean_D = embeddings_ND.mean(axis=0, dtype=np.float64)
    centered_ND = (embeddings_ND - mean_D).astype(embeddings_ND.dtype)
    squared_norm_N = np.einsum("nd,nd->n", centered_ND, centered_ND)
    norm_N = np.sqrt(squared_norm_N)
    error_N = _product_error(centered_ND) * (norm_N + norm_N.max()) ** 2
    num_candidates = min(num_neighbors + _SPARE_CANDIDATES, num_rows - 1)

    distance_N = np.empty(num_rows)
    for start in range(0, num_rows, query_chunk_rows):
        rows_Q = np.arange(start, min(start + query_chunk_rows, num_rows))
        approximate_QN = centered_ND[rows_Q] @ centered_ND.T
        approximate_QN *= -2.0
        approximate_QN += squared_norm_N
        approximate_QN += squared_norm_N[rows_Q, None]
        approximate_QN[rows_Q - start, rows_Q] = np.inf
        nearest_QC = np.argpartition(approximate_QN, num_candidates - 1, axis=1)[:, :num_candidates]
        exact_QC = _distances(embeddings_ND[rows_Q], embeddings_ND[nearest_QC])
        distance_N[rows_Q] = np.partition(exact_QC, num_neighbors - 1, axis=1)[:, num_neighbors - 1]
        if num_candidates == num_rows - 1:
            continue
        farthest_Q = np.take_along_axis(approximate_QN, nearest_QC, axis=1).max(axis=1)
        reach_Q = distance_N[rows_Q] ** 2 + error_N[rows_Q]
        for row in np.flatnonzero((farthest_Q < reach_Q) & (distance_N[rows_Q] > 0.0)):
            near = np.flatnonzero(approximate_QN[row] <= reach_Q[row])
            exact = _distances(embeddings_ND[[start + row]], embeddings_ND[None, near])[0]
            distance_N[start + row] = np.partition(exact, num_neighbors - 1)[num_neighbors - 1]
    return distance_N


def log_kth_neighbor_distance(distance: ArrayLike, floor: float) -> NDArray[np.float64]:
    """log(max(distance, floor)): the diversity term of each prompt, in nats; NaN stays NaN.

    The floor keeps duplicates (distance 0) finite. It also says how far a duplicate may stand out:
    with a tiny floor a handful of them dominate the standard deviation of the whole column.
    """
    if not (math.isfinite(floor) and floor > 0):
        raise ValueError(f"the distance floor must be positive and finite, got {floor}")
    return np.log(np.maximum(np.asarray(distance, dtype=np.float64), floor))


def knn_entropy(
    embeddings: ArrayLike,
    num_neighbors: int,
    *,
    dimension: int | None = None,
    distance_floor: float = DISTANCE_FLOOR,
) -> float:
    """Differential entropy, in nats, of the distribution that the rows (N, D) were drawn from.

    The Kozachenko-Leonenko estimate of `knn_entropy_from_distances`, which says what `dimension`
    (by default D) and the floor mean.
    """
    embeddings_ND = checked_embeddings(embeddings)
    return knn_entropy_from_distances(
        kth_neighbor_distance(embeddings_ND, num_neighbors),
        num_neighbors,
        embeddings_ND.shape[1] if dimension is None else dimension,
        distance_floor=distance_floor,
    )


def knn_entropy_from_distances(
    distances: ArrayLike,
    num_neighbors: int,
    dimension: int,
    *,
    distance_floor: float = DISTANCE_FLOOR,
) -> float:
    """Entropy in nats from the distance r_i of each of N points to its k-th nearest other point:

        psi(N) - psi(k) + log V_D + (D / N) * sum_i log r_i,    V_D = pi^(D/2) / Gamma(D/2 + 1)

    with k = num_neighbors, psi the digamma function and V_D the volume of the unit ball in D =
    dimension dimensions (Kozachenko and Leonenko 1987 for k = 1; Kraskov, Stoegbauer and
    Grassberger 2004, equation 20, the same with twice the distance and the ball of unit diameter).

    Distances below `distance_floor` are raised to it: one exact duplicate would otherwise make the
    entropy minus infinity. With D = 384, each such point still costs 384 / N * log(floor / typical
    distance).

    Unit vectors lie on a sphere, a surface of D - 1 dimensions: for them `dimension = D - 1`
    estimates the entropy with respect to area (the small curvature inside a ball aside), and the
    width D none at all in the strict sense. Text embeddings fill far fewer dimensions still. For
    the same N, k and dimension, sets compare by their mean log distance whichever dimension is
    chosen.
    """
    distance_N = np.asarray(distances, dtype=np.float64)
    if distance_N.ndim != 1 or not (distance_N >= 0).all():
        raise ValueError(
            f"expected one distance of 0 or more per point, got shape {distance_N.shape} "
            f"with {np.count_nonzero(~(distance_N >= 0))} negative or NaN"
        )
    _check_num_neighbors(num_neighbors, len(distance_N))
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")
    log_unit_ball = dimension / 2 * math.log(math.pi) - math.lgamma(dimension / 2 + 1)
    mean_log_distance = log_kth_neighbor_distance(distance_N, distance_floor).mean()
    # Of whole numbers, psi(N) - psi(k) = 1/k + 1/(k + 1) + ... + 1/(N - 1).
    psi_difference = math.fsum(1.0 / i for i in range(num_neighbors, len(distance_N)))
    return float(psi_difference + log_unit_ball + dimension * mean_log_distance)


def _distances(
    rows_QD: NDArray[np.floating], others_QCD: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Distance of each row to each of its C others, from float64 differences."""
    difference_QCD = others_QCD.astype(np.float64) - rows_QD[:, None, :]
    squared_QC: NDArray[np.float64] = np.einsum("qcd,qcd->qc", difference_QCD, difference_QCD)
    return np.sqrt(squared_QC)


def _product_error(embeddings_ND: NDArray[np.floating]) -> float:
    """Bound of the error of |a|^2 + |b|^2 - 2ab, in units of (|a| + |b|)^2.

    A dot product of length D is off by at most D * eps / 2 * |a| |b| (Higham 2002, section 3.1);
    the norms, the sums and the rounding of the centred vectors add a few eps.
    """
    return float((embeddings_ND.shape[1] + 8) * np.finfo(embeddings_ND.dtype).eps)


def checked_embeddings(embeddings: ArrayLike) -> NDArray[np.floating]:
    """Embeddings (N, D) as float32 if they are, else float64; refused unless all are finite."""
    embeddings_ND = np.asarray(embeddings)
    if embeddings_ND.ndim != 2 or not embeddings_ND.shape[1]:
        raise ValueError(f"expected embeddings of shape (N, D), got {embeddings_ND.shape}")
    if embeddings_ND.dtype != np.float32:
        embeddings_ND = embeddings_ND.astype(np.float64)
    if not np.isfinite(embeddings_ND).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings_ND).all(axis=1))[0])
        raise ValueError(f"embeddings have NaN or infinite values, first in row {row}")
    return embeddings_ND


def _check_num_neighbors(num_neighbors: int, num_rows: int) -> None:
    if num_rows < 2:
        raise ValueError(f"a nearest neighbour needs at least 2 rows, got {num_rows}")
    if not 1 <= num_neighbors <= num_rows - 1:
        raise ValueError(
            f"num_neighbors counts other rows, of which there are {num_rows - 1}: "
            f"it must be between 1 and {num_rows - 1}, got {num_neighbors}"
        )
