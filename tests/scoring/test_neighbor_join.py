"""The kernel of the joins: nothing lost, nothing twice, and the tuned rule keeps its word."""

import numpy as np
import pytest

from fifa_ray.models.torch_products import TorchProducts
from fifa_ray.scoring.cell_index import (
    CellIndex,
    Sample,
    cell_spread,
    principal_axes,
    recall,
    relative_errors,
    sketch,
    spatial_order,
    tune,
)
from fifa_ray.scoring.neighbor_join import Block, HostProducts, Join, Nearest, cells_in_reach

HOST = HostProducts()


def unit_vectors(count: int, width: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, width)) * 0.8 ** np.arange(width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def squared_distances(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    gap = wide[:, None] - wide[None]
    squared = (gap**2).sum(axis=2)
    np.fill_diagonal(squared, np.inf)
    return squared


def test_sketches_are_unit_vectors_never_farther_apart_than_their_vectors():
    vectors = unit_vectors(300)
    for width in (1, 7, 24):
        axes = np.linalg.qr(np.random.default_rng(1).standard_normal((24, width)))[0]
        sketches = sketch(vectors, axes.astype(np.float32))
        assert sketches.shape == (300, width + 1)
        np.testing.assert_allclose(np.linalg.norm(sketches, axis=1), 1, atol=1e-6)
        gap = squared_distances(vectors) - squared_distances(sketches)
        assert gap[np.isfinite(gap)].min() > -1e-5


def test_principal_axes_keep_what_varies():
    vectors = unit_vectors(2000)
    axes = principal_axes(vectors)
    np.testing.assert_allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-5)
    assert ((vectors @ axes) ** 2).sum() / len(vectors) >= 0.85


@pytest.mark.parametrize("products", [HOST, TorchProducts("cpu")], ids=["numpy", "torch"])
@pytest.mark.parametrize("block_rows", [37, 200, 1000])
def test_search_with_a_true_bound_finds_the_nearest_whatever_the_blocks(products, block_rows):
    vectors = unit_vectors(700)
    vectors[50:60] = vectors[0]
    sketches = sketch(vectors, principal_axes(vectors)[:, :9])
    blocks = [
        Block(
            start,
            vectors[start : start + block_rows],
            sketches[start : start + block_rows],
            products,
        )
        for start in range(0, 700, block_rows)
    ]
    expected = squared_distances(vectors)
    for query in blocks:
        nearest = Nearest(len(query), 4)
        for block in blocks:
            Join(products, shrinkage=1.0, settled=0.0).search(nearest, query, block)
        rows = query.first_row + np.arange(len(query))
        np.testing.assert_allclose(
            nearest.squared_Qk, np.sort(expected[rows], axis=1)[:, :4], rtol=1e-4, atol=1e-9
        )
        assert not (nearest.rows_Qk == rows[:, None]).any()
        for query_row, found in zip(rows, nearest.rows_Qk, strict=True):
            assert len(set(found)) == 4
            np.testing.assert_allclose(
                expected[query_row, found],
                nearest.squared_Qk[query_row - query.first_row],
                rtol=1e-4,
                atol=1e-9,
            )


def test_adding_a_known_pair_again_changes_nothing():
    nearest = Nearest(2, 3)
    queries, rows = np.array([0, 1, 0, 0, 0]), np.array([5, 5, 6, 7, 8])
    squared = np.array([0.4, 0.1, 0.2, 0.3, 0.1], np.float32)
    nearest.add(queries, rows, squared)
    assert nearest.rows_Qk.tolist() == [[8, 6, 7], [5, -1, -1]]
    nearest.add(queries, rows, squared)
    assert nearest.rows_Qk.tolist() == [[8, 6, 7], [5, -1, -1]]
    np.testing.assert_array_equal(
        nearest.squared_Qk[1], np.array([0.1, np.inf, np.inf], np.float32)
    )


def test_both_places_of_products_agree():
    vectors = unit_vectors(300)
    rows, columns = np.arange(10, 200, 3), slice(20, 280)
    threshold = np.linspace(0.2, 0.9, len(rows)).astype(np.float32)
    expected = np.nonzero(vectors[rows] @ vectors[columns].T > threshold[:, None])
    for products in (HOST, TorchProducts("cpu")):
        placed = products.place(vectors)
        found = products.pairs_above(placed, rows, placed, columns, threshold)
        np.testing.assert_array_equal(found, expected)
        near = products.near_columns(placed, slice(30, 90), placed, np.arange(5, 290), 4, 0)
        assert all(len(set(row)) == 4 for row in near.tolist())
        assert not (near == np.arange(30, 90)[:, None]).any()
        # Much nearer than rows drawn at random.
        product = np.take_along_axis(vectors[30:90] @ vectors.T, near, axis=1)
        assert product.mean() > np.quantile(vectors @ vectors.T, 0.97)


def small_index(vectors: np.ndarray, num_cells: int) -> tuple[CellIndex, np.ndarray, np.ndarray]:
    axes = principal_axes(vectors)
    sketches = sketch(vectors, axes)
    centers = sketches[:num_cells].copy()
    index = CellIndex(axes, centers[spatial_order(centers)], np.ones(num_cells, np.float32))
    cells = index.assign(sketches)
    index = CellIndex(axes, index.centers_CP, cell_spread(sketches, cells, index.centers_CP))
    return index, sketches, cells


def test_cells_are_the_nearest_and_their_order_a_permutation():
    vectors = unit_vectors(500)
    index, sketches, cells = small_index(vectors, 40)
    gap = ((sketches[:, None] - index.centers_CP[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(gap[np.arange(500), cells], gap.min(axis=1), atol=1e-5)
    assert sorted(spatial_order(index.centers_CP)) == list(range(40))
    again = CellIndex.from_bytes(index.to_bytes())
    np.testing.assert_array_equal(again.assign(sketches), cells)


def test_cells_in_reach_are_those_of_the_definition():
    vectors = unit_vectors(400)
    index, sketches, _ = small_index(vectors, 30)
    query = Block(0, vectors[:100], sketches[:100], HOST)
    threshold = np.linspace(0.5, 0.95, 100).astype(np.float32)
    margin = 0.7 * index.spread_C
    slices = [slice(10 * c, 10 * c + 10) for c in range(30)]
    work = cells_in_reach(HOST, query, threshold, index.centers_CP, margin, slices)
    found = {(int(q), piece.start // 10) for queries, piece in work for q in queries}
    reached = sketches[:100] @ index.centers_CP.T + margin > threshold[:, None]
    assert found == set(zip(*map(np.ndarray.tolist, np.nonzero(reached)), strict=True))


@pytest.mark.parametrize("seeded_share", [0.0, 0.3])
@pytest.mark.parametrize("target", [0.8, 0.95, 0.99])
def test_the_tuned_rule_reaches_its_target_on_the_sample_it_was_tuned_on(target, seeded_share):
    vectors = unit_vectors(2000)
    index, sketches, cells = small_index(vectors, 150)
    squared = squared_distances(vectors)
    nearest = np.argsort(squared, axis=1)[:, :5]
    true = np.take_along_axis(squared, nearest, axis=1).astype(np.float32)
    # What the seeds have found need not be found again.
    seeded = np.random.default_rng(3).random(nearest.shape) < seeded_share
    reach = true[:, -1] * 1.1
    sample = Sample(sketches, reach, seeded, true, sketches[nearest], cells[nearest])
    rule = tune(sample, index, target, None)
    # What the rule says, computed pair by pair.
    reach = sample.reach_Q[:, None]
    product = sketches @ index.centers_CP.T + np.float32(rule.deviations) * index.spread_C
    searched = product > 1 - np.float32(rule.cell_shrinkage) * reach / 2
    of_sketch = squared_distances(sketches)[np.arange(2000)[:, None], nearest]
    measured = of_sketch < rule.shrinkage * true[:, -1:]
    kept = seeded | np.take_along_axis(searched, cells[nearest], axis=1) & measured
    assert target - 0.002 <= kept.mean() <= 1
    assert rule.expected_recall == pytest.approx(kept.mean(), abs=0.002)
    assert rule.num_probes == pytest.approx(searched.sum(axis=1).mean(), abs=0.5)
    fixed = tune(sample, index, target, 20)
    assert fixed.num_probes == pytest.approx(20, abs=1)


def test_recall_and_errors_go_by_distance():
    true = np.array([[0.1, 0.2], [0.0, 0.0], [0.3, 0.4]], np.float32)
    found = np.array([[0.1, 0.25], [0.0, 5e-4], [0.3, 0.4]], np.float32)
    assert recall(found, true, 1e-3) == pytest.approx(5 / 6)
    np.testing.assert_allclose(
        relative_errors(found[:, 1], true[:, 1], 1e-3), [0.25, 0, 0], atol=1e-6
    )
