"""Neighbour distances against other exact searches, entropies against known distributions."""

import math

import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn.neighbors import NearestNeighbors

from fifa_ray.scoring import diversity
from fifa_ray.scoring.diversity import (
    knn_entropy,
    knn_entropy_from_distances,
    kth_neighbor_distance,
    log_kth_neighbor_distance,
)


def brute_force(embeddings, num_neighbors):
    points = np.asarray(embeddings, dtype=np.float64)
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=-1))
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, num_neighbors - 1]


def unit_vectors(num_rows, width, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(num_rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def hard_embeddings():
    """Sets on which a float32 matrix product alone gets distances or neighbours wrong."""
    rng = np.random.default_rng(1)
    copies = np.repeat(unit_vectors(15, 64), 20, axis=0)
    return {
        "unit vectors": unit_vectors(250, 128),
        "duplicates": copies,
        "near-duplicates": (copies + 1e-5 * rng.normal(size=copies.shape)).astype(np.float32),
        "far from the origin": (1000.0 + rng.normal(size=(300, 8))).astype(np.float32),
        "one outlier": np.vstack([rng.normal(size=(299, 8)), np.full((1, 8), 1e6)]).astype("f4"),
        "equidistant": np.eye(200, dtype=np.float32),
        "many ties": rng.integers(0, 3, size=(300, 4)),
        "float64": rng.normal(size=(300, 5)),
    }


HARD = pytest.mark.parametrize("embeddings", hard_embeddings().values(), ids=hard_embeddings())


@HARD
@pytest.mark.parametrize("num_neighbors", [1, 5, 25, 199])
def test_distances_equal_brute_force(embeddings, num_neighbors):
    got = kth_neighbor_distance(embeddings, num_neighbors)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, brute_force(embeddings, num_neighbors), rtol=1e-12, atol=0)


@HARD
def test_distances_do_not_depend_on_the_chunks(embeddings):
    got = [kth_neighbor_distance(embeddings, 3, query_chunk_rows=rows) for rows in (1, 7, 5000)]
    assert got[0].tobytes() == got[1].tobytes() == got[2].tobytes()


def test_distances_equal_those_of_other_exact_searches():
    points = np.random.default_rng(2).normal(size=(2000, 3))
    by_tree = cKDTree(points).query(points, k=5)[0][:, 4]  # the point itself comes first
    np.testing.assert_allclose(kth_neighbor_distance(points, 4), by_tree, rtol=1e-12)
    vectors = unit_vectors(2000, 64).astype(np.float64)
    search = NearestNeighbors(n_neighbors=4, algorithm="ball_tree").fit(vectors)
    np.testing.assert_allclose(
        kth_neighbor_distance(vectors, 4), search.kneighbors()[0][:, 3], rtol=1e-12
    )


def test_a_duplicate_is_a_neighbour_at_distance_exactly_zero():
    vectors = unit_vectors(500, 384)
    pair = np.vstack([vectors, vectors[:1]])
    distances = kth_neighbor_distance(pair, 1)
    np.testing.assert_array_equal(np.flatnonzero(distances == 0.0), [0, 500])
    assert (kth_neighbor_distance(pair, 2)[[0, 500]] > 0.5).all()  # itself is never counted
    assert not kth_neighbor_distance(np.repeat(vectors[:2], 40, axis=0), 39).any()


def test_distances_follow_their_rows():
    vectors = unit_vectors(400, 32)
    order = np.random.default_rng(3).permutation(400)
    np.testing.assert_array_equal(
        kth_neighbor_distance(vectors[order], 5), kth_neighbor_distance(vectors, 5)[order]
    )


def test_rescaling_the_embeddings_rescales_the_distances():
    points = np.random.default_rng(4).normal(size=(300, 6))
    np.testing.assert_allclose(
        kth_neighbor_distance(2.5 * points, 5), 2.5 * kth_neighbor_distance(points, 5), rtol=1e-12
    )


def test_impossible_requests_name_the_valid_range():
    points = np.ones((4, 2))
    for num_neighbors in (0, 4, -1):
        with pytest.raises(ValueError, match=f"between 1 and 3, got {num_neighbors}"):
            kth_neighbor_distance(points, num_neighbors)
    with pytest.raises(ValueError, match="at least 2 rows"):
        kth_neighbor_distance(points[:1], 1)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        kth_neighbor_distance(points[0], 1)
    with pytest.raises(ValueError, match="first in row 2"):
        kth_neighbor_distance(np.where(np.arange(4)[:, None] == 2, np.nan, points), 1)
    with pytest.raises(ValueError, match="query_chunk_rows must be at least 1"):
        kth_neighbor_distance(points, 1, query_chunk_rows=0)


def test_the_floor_keeps_duplicates_finite_and_leaves_the_others_alone():
    got = log_kth_neighbor_distance([0.0, 1e-4, 1e-2, 1.0, np.nan], 1e-3)
    expected = [math.log(1e-3), math.log(1e-3), math.log(1e-2), 0.0, math.nan]
    np.testing.assert_allclose(got, expected)
    for floor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive"):
            log_kth_neighbor_distance([1.0], floor)


@pytest.mark.parametrize("num_neighbors", [1, 3, 10])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_entropy_of_a_gaussian(num_neighbors, width):
    """Of moderate correlation: the estimate takes the density as even in each point's ball."""
    rng = np.random.default_rng(5)
    mixing = np.eye(width) + 0.3 * rng.normal(size=(width, width))
    sample = rng.normal(size=(4000, width)) @ mixing
    log_det = np.linalg.slogdet(2 * math.pi * math.e * mixing.T @ mixing)[1]
    assert knn_entropy(sample, num_neighbors) == pytest.approx(log_det / 2, abs=0.12)


def test_entropy_of_a_uniform_box():
    sample = np.random.default_rng(6).uniform(size=(4000, 2)) * [4.0, 0.5]
    assert knn_entropy(sample, 3) == pytest.approx(math.log(4.0 * 0.5), abs=0.08)


def test_entropy_of_unit_vectors_is_that_of_the_spheres_area():
    points = unit_vectors(4000, 3).astype(np.float64)
    assert knn_entropy(points, 3, dimension=2) == pytest.approx(math.log(4 * math.pi), abs=0.05)


def test_entropy_shifts_with_the_log_of_the_scale():
    points = np.random.default_rng(7).normal(size=(500, 4))
    shift = knn_entropy(3.0 * points, 5) - knn_entropy(points, 5)
    assert shift == pytest.approx(4 * math.log(3.0), abs=1e-9)


def test_entropy_has_the_published_constants():
    distances = np.array([0.5, 1.0, 2.0, 4.0])
    psi_4, psi_2 = 11 / 6 - np.euler_gamma, 1 - np.euler_gamma  # harmonic numbers
    expected = psi_4 - psi_2 + math.log(4 / 3 * math.pi) + 3 * np.log(distances).mean()
    assert knn_entropy_from_distances(distances, 2, 3) == pytest.approx(expected)


def test_one_duplicate_costs_the_entropy_a_stated_amount():
    distances = np.ones(100)
    clean = knn_entropy_from_distances(distances, 5, 384)
    distances[0] = 0.0
    floored = knn_entropy_from_distances(distances, 5, 384, distance_floor=1e-3)
    assert clean - floored == pytest.approx(384 / 100 * math.log(1e3))
    assert math.isfinite(knn_entropy(np.ones((50, 3)), 5))


def test_entropy_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="1 negative or NaN"):
        knn_entropy_from_distances([1.0, -1.0, 2.0], 1, 3)
    with pytest.raises(ValueError, match="1 negative or NaN"):
        knn_entropy_from_distances([1.0, math.nan, 2.0], 1, 3)
    with pytest.raises(ValueError, match="between 1 and 2, got 3"):
        knn_entropy_from_distances([1.0, 1.0, 2.0], 3, 3)
    with pytest.raises(ValueError, match="dimension must be at least 1"):
        knn_entropy_from_distances([1.0, 1.0, 2.0], 1, 0)


def test_rows_beyond_the_candidates_are_looked_at_where_rounding_could_hide_them(monkeypatch):
    """With one spare candidate, 19 near-duplicates at float32 noise must still be told apart."""
    monkeypatch.setattr(diversity, "_SPARE_CANDIDATES", 1)
    near = hard_embeddings()["near-duplicates"]
    np.testing.assert_allclose(kth_neighbor_distance(near, 3), brute_force(near, 3), rtol=1e-12)
