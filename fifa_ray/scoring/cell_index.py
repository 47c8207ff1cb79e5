"""Cells of the approximate self-join: sketches of unit vectors, centers, and which cells to search.

Suffixes: N rows, D embedding width, P sketch width, C cells, Q sampled queries, k neighbours.

Searching the same number of nearest cells for every query (inverted lists as usually searched)
spends most of its work on queries that need little. Here the k-th distance found near by decides:
products of a query with a cell's rows scatter around its product with the cell's center by about
`spread`, and a cell is searched when it would take less than `deviations` spreads to come within
reach. On sentence embeddings a recall of 0.99 then takes about two thirds of the work.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fifa_ray.scoring.neighbor_join import Floats, Ints

# Below this share of the variance left over, sketches of MiniLM embeddings tell neighbours apart.
_VARIANCE_LEFT = 0.16
_WIDTH_STEP = 16
# Cells of copies have no spread of their own; the noise of a product is far below this.
_SMALLEST_SPREAD = 0.05
# Tried by `tune`, as shares of the shrinkage: 0 takes no notice of the k-th distance.
_CELL_SHRINKAGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class CellIndex:
    """How rows become sketches and find their cell. Cells near each other have near numbers."""

    axes_DA: Floats
    centers_CP: Floats
    spread_C: Floats

    @property
    def num_cells(self) -> int:
        """C."""
        return len(self.centers_CP)

    def sketch(self, vectors_ND: Floats) -> Floats:
        """Coordinates on the axes and the length of the rest (N, P): unit vectors again."""
        return sketch(vectors_ND, self.axes_DA)

    def assign(self, sketch_NP: Floats, *, chunk_rows: int = 1024) -> NDArray[np.int32]:
        """Cell with the nearest center of each row (N,)."""
        half_norm_C = np.einsum("cp,cp->c", self.centers_CP, self.centers_CP) / 2
        cells = np.empty(len(sketch_NP), np.int32)
        for start in range(0, len(sketch_NP), chunk_rows):
            rows = slice(start, start + chunk_rows)
            product = sketch_NP[rows] @ self.centers_CP.T
            product -= half_norm_C
            cells[rows] = product.argmax(axis=1)
        return cells

    def to_bytes(self) -> bytes:
        """The index as an npz file."""
        stream = io.BytesIO()
        np.savez(stream, axes=self.axes_DA, centers=self.centers_CP, spread=self.spread_C)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "CellIndex":
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(arrays["axes"], arrays["centers"], arrays["spread"])


def principal_axes(vectors_ND: Floats) -> Floats:
    """Axes (D, A) that leave at most 16% of the mean square of unit vectors; A + 1 is P.

    A + 1 is a multiple of 16 and at most D + 1; isotropic vectors need most of their width.
    """
    second_moment = (vectors_ND.T @ vectors_ND).astype(np.float64) / len(vectors_ND)
    energy, axes = np.linalg.eigh(second_moment)
    energy, axes = energy[::-1], axes[:, ::-1]
    left = 1 - np.cumsum(energy) / energy.sum()
    needed = int(np.argmax(left <= _VARIANCE_LEFT)) + 1
    width = -(-(needed + 1) // _WIDTH_STEP) * _WIDTH_STEP
    return np.ascontiguousarray(axes[:, : width - 1], np.float32)


def sketch(vectors_ND: Floats, axes_DA: Floats) -> Floats:
    """Coordinates on orthonormal axes and the length of the rest (N, A + 1)."""
    result = np.empty((len(vectors_ND), axes_DA.shape[1] + 1), np.float32)
    result[:, :-1] = vectors_ND @ axes_DA
    rest = 1 - np.einsum("np,np->n", result[:, :-1], result[:, :-1])
    result[:, -1] = np.sqrt(np.maximum(rest, 0))
    return result


def spatial_order(centers_CP: Floats) -> Ints:
    """A permutation of the cells: halves by the coordinate that varies most, again and again."""
    parts = [np.arange(len(centers_CP))]
    while max(len(part) for part in parts) > 1:
        halves = []
        for part in parts:
            axis = centers_CP[part].var(axis=0).argmax()
            ranked = part[np.argsort(centers_CP[part, axis], kind="stable")]
            halves += [ranked[: len(part) // 2], ranked[len(part) // 2 :]]
        parts = [half for half in halves if len(half)]
    return np.concatenate(parts)


def cell_spread(sketch_NP: Floats, cells_N: NDArray[np.int32], centers_CP: Floats) -> Floats:
    """Root mean square distance of each cell's rows from its center (C,); never under 0.05."""
    gap = sketch_NP - centers_CP[cells_N]
    square = np.bincount(cells_N, np.einsum("np,np->n", gap, gap), minlength=len(centers_CP))
    count = np.bincount(cells_N, minlength=len(centers_CP))
    spread = np.sqrt(square / np.maximum(count, 1)).astype(np.float32)
    return np.maximum(spread, np.float32(_SMALLEST_SPREAD))


@dataclass(frozen=True)
class SearchRule:
    """What a join searches and measures, and what that is expected to cost and find.

    A cell is searched where query . center + deviations * spread > 1 - cell_shrinkage * reach / 2,
    with `reach` the query's squared k-th distance found near by.
    """

    shrinkage: float
    cell_shrinkage: float
    deviations: float
    num_probes: float
    expected_recall: float


@dataclass(frozen=True)
class Sample:
    """Sampled queries with what was found near by (reach, squared) and their true k nearest.

    seeded: which of the true ones were already found near by.
    """

    sketch_QP: Floats
    reach_Q: Floats
    seeded_Qk: NDArray[np.bool_]
    true_squared_Qk: Floats
    true_sketch_QkP: Floats
    true_cells_Qk: NDArray[np.int32]


def tune(
    sample: Sample, index: CellIndex, target_recall: float, num_probes: int | None
) -> SearchRule:
    """The cheapest rule that finds `target_recall` of the sample's true neighbours.

    With `num_probes`, instead, the best rule that searches that many cells for the mean query. A
    third of the permitted losses goes to the sketch, the rest to cells left out. What the seeds
    found is kept whatever the rule.
    """
    reach = sample.reach_Q[:, None]
    # What is measured is decided by the distances found so far, which end at the true ones.
    gap = sample.true_sketch_QkP - sample.sketch_QP[:, None]
    true_reach = np.maximum(sample.true_squared_Qk[:, -1:], np.float32(1e-6))
    ratio = np.where(sample.seeded_Qk, 0, np.einsum("qkp,qkp->qk", gap, gap) / true_reach)
    shrinkage = min(1.0, _quantile(ratio, 1 - (1 - target_recall) / 3) + 1e-6)
    true_centers = index.centers_CP[sample.true_cells_Qk]
    true_product = np.einsum("qp,qkp->qk", sample.sketch_QP, true_centers)
    true_spread = index.spread_C[sample.true_cells_Qk]
    product = sample.sketch_QP @ index.centers_CP.T

    def rule(cell_shrinkage: float) -> SearchRule:
        threshold = 1 - np.float32(cell_shrinkage) * reach / 2
        needed = np.where(ratio < shrinkage, (threshold - true_product) / true_spread, np.inf)
        needed = np.where(sample.seeded_Qk, -np.inf, needed)
        of_cells = (threshold - product) / index.spread_C
        if num_probes is None:
            limit = _quantile(needed, target_recall)
        else:
            limit = _quantile(of_cells, min(1.0, num_probes / index.num_cells))
        limit = float(np.clip(limit, of_cells.min(), of_cells.max())) + 1e-6
        return SearchRule(
            shrinkage=shrinkage,
            cell_shrinkage=cell_shrinkage,
            deviations=limit,
            num_probes=float((of_cells < limit).sum(axis=1).mean()),
            expected_recall=float((needed < limit).mean()),
        )

    rules = [rule(share * shrinkage) for share in _CELL_SHRINKAGES]
    if num_probes is None:
        return min(rules, key=lambda r: r.num_probes)
    return max(rules, key=lambda r: r.expected_recall)


def recall(found_Qk: Floats, true_Qk: Floats, settled: float) -> float:
    """Mean share of the k true neighbours found, by distance, so that any of equals will do.

    Distances under `settled` count as equal.
    """
    reach = np.maximum(true_Qk[:, -1:] * (1 + 1e-5), settled)
    return float((found_Qk <= reach).mean())


def relative_errors(found_Q: Floats, true_Q: Floats, settled: float) -> NDArray[np.floating]:
    """How much too long each distance is (Q,); those under `settled` count as that."""
    true = np.maximum(true_Q, np.float32(settled))
    return (np.maximum(found_Q, np.float32(settled)) - true) / true


def _quantile(values: NDArray[np.floating], share: float) -> float:
    return float(np.quantile(values, share, method="higher"))
