"""Nearest neighbours between blocks of unit vectors: the kernel of the exact and of the cell join.

Suffixes: Q queries, B rows of a block, C cells, D embedding width, P sketch width, k neighbours.

A sketch of a unit vector is its coordinates on a few axes and the length of the rest: again a unit
vector, and two sketches are never farther apart than their vectors. So a narrow matrix product of
sketches leaves few pairs to measure in full. A pair is measured when the squared distance of its
sketches is below `shrinkage` times the query's k-th squared distance so far: 1 loses nothing, and
where a sketch keeps 84% of the variance, 0.86 loses 1 neighbour in 200 and leaves far fewer pairs.
Distances are always those of the full vectors, from float32 differences and never from products: a
duplicate is at distance exactly 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
# Some queries of a block, ascending, and consecutive rows of another block to compare them with.
Work = tuple[Ints, slice]

# Elements of one product (its memory: 5 bytes each), pairs measured at once, pairs kept waiting.
_PRODUCT_ELEMENTS = 1 << 20
_MEASURED_PAIRS = 1 << 9
_WAITING_PAIRS = 1 << 17
# Shape of a product where every query meets every row.
_SEARCHED_QUERIES, _SEARCHED_ROWS = 256, 4096
# A product of float32 unit vectors is off by less than this (seen: 3e-7 at 384 dimensions).
_PRODUCT_ERROR = np.float32(1e-6)


class Products(Protocol):
    """Where the matrix products run: on the host, or on a GPU."""

    def place(self, matrix: Floats) -> Any:
        """The matrix where the products need it."""
        ...

    def pairs_above(
        self, left: Any, rows: Ints, right: Any, columns: slice, threshold: Floats
    ) -> tuple[Ints, Ints]:
        """All (i, j), ascending, with left[rows[i]] . right[columns][j] > threshold[i]."""
        ...

    def near_columns(
        self, left: Any, rows: slice, right: Any, columns: Ints, number: int, shift: int
    ) -> Ints:
        """(rows, number) distinct elements of `columns` with large products; never row + `shift`.

        The best of each of the `number` best groups: not quite the largest, but found ten times
        faster than by partitioning whole rows.
        """
        ...


class Scratch:
    """Memory used again and again: fresh pages for every product would take longer than it does."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}

    def __call__(self, name: str, shape: tuple[int, int], dtype: Any = np.float32) -> NDArray[Any]:
        """An array with anything in it; the next call with this name may overwrite it."""
        size = shape[0] * shape[1]
        if name not in self._held or self._held[name].size < size:
            self._held[name] = np.empty(size, dtype)
        return self._held[name][:size].reshape(shape)


class HostProducts:
    """Matrix products by NumPy's BLAS."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def place(self, matrix: Floats) -> Floats:
        """The matrix as it is."""
        return matrix

    def pairs_above(
        self, left: Floats, rows: Ints, right: Floats, columns: slice, threshold: Floats
    ) -> tuple[Ints, Ints]:
        """See `Products`."""
        product = self._product(left, rows, right[columns])
        above = np.greater(product, threshold[:, None], out=self._scratch("b", product.shape, bool))
        flat = np.flatnonzero(above)
        return flat // product.shape[1], flat % product.shape[1]

    def near_columns(
        self, left: Floats, rows: slice, right: Floats, columns: Ints, number: int, shift: int
    ) -> Ints:
        """See `Products`."""
        numbers = np.arange(rows.start, rows.stop)
        database = self._scratch("right", (len(columns), right.shape[1]))
        product = self._product(left, numbers, np.take(right, columns, 0, database, "clip"))
        itself = numbers + shift
        product[columns[None, :] == itself[:, None]] = -np.inf
        width = group_width(len(columns), number)
        groups = len(columns) // width
        grouped = product[:, : groups * width].reshape(-1, width, groups)
        best = np.argpartition(grouped.max(axis=1), -number, axis=1)[:, -number:]
        inside = np.take_along_axis(grouped, best[:, None, :], axis=2).argmax(axis=1)
        return columns[inside * groups + best]

    def _product(self, left: Floats, rows: Ints, right: Floats) -> Floats:
        chosen = np.take(left, rows, 0, self._scratch("left", (len(rows), left.shape[1])), "clip")
        product: Floats = self._scratch("product", (len(rows), len(right)))
        return np.matmul(chosen, right.T, out=product)


def group_width(num_columns: int, number: int) -> int:
    """Columns per group, so that there are at least 4 * `number` groups, or groups of one."""
    return max(1, min(16, num_columns // (4 * number)))


class Nearest:
    """The k nearest rows found so far of each query: squared distances ascending, and row numbers.

    Nothing found yet is infinity and -1. Takes 12 k bytes per query.
    """

    def __init__(self, num_queries: int, num_neighbors: int) -> None:
        self.squared_Qk = np.full((num_queries, num_neighbors), np.inf, np.float32)
        self.rows_Qk = np.full((num_queries, num_neighbors), -1, np.int64)

    def copy(self) -> "Nearest":
        """One to go on with, where this one lies in shared memory."""
        other = Nearest(0, 1)
        other.squared_Qk, other.rows_Qk = self.squared_Qk.copy(), self.rows_Qk.copy()
        return other

    def add(self, queries: Ints, rows: Ints, squared: Floats) -> None:
        """Take in distinct pairs (query, row) in any order; those known already are left out."""
        closer = squared < self.squared_Qk[queries, -1]
        queries, rows, squared = queries[closer], rows[closer], squared[closer]
        new = (self.rows_Qk[queries] != rows[:, None]).all(axis=1)
        queries, rows, squared = queries[new], rows[new], squared[new]
        order = np.lexsort((rows, squared, queries))
        queries, rows, squared = queries[order], rows[order], squared[order]
        distinct, start, count = np.unique(queries, return_index=True, return_counts=True)
        place = np.arange(len(queries)) - np.repeat(start, count)
        group = np.repeat(np.arange(len(distinct)), count)
        k = self.squared_Qk.shape[1]
        first = place < k
        all_squared = np.full((len(distinct), 2 * k), np.inf, np.float32)
        all_rows = np.full((len(distinct), 2 * k), -1, np.int64)
        all_squared[:, :k], all_rows[:, :k] = self.squared_Qk[distinct], self.rows_Qk[distinct]
        all_squared[group[first], k + place[first]] = squared[first]
        all_rows[group[first], k + place[first]] = rows[first]
        kept = np.argsort(all_squared, axis=1, kind="stable")[:, :k]
        self.squared_Qk[distinct] = np.take_along_axis(all_squared, kept, axis=1)
        self.rows_Qk[distinct] = np.take_along_axis(all_rows, kept, axis=1)


class Block:
    """Consecutive rows of the whole, with their sketches where the products need them."""

    def __init__(
        self, first_row: int, vectors_BD: Floats, sketch_BP: Floats, products: Products
    ) -> None:
        self.first_row, self.vectors_BD, self.sketch_BP = first_row, vectors_BD, sketch_BP
        self.placed = products.place(sketch_BP)

    def __len__(self) -> int:
        return len(self.vectors_BD)


@dataclass(frozen=True)
class Join:
    """Compares a query block with blocks of the whole and keeps the nearest rows.

    `settled` is a distance: queries whose k-th neighbour is that near look no further, so that ten
    thousand copies of a prompt do not become a hundred million pairs. Beside the two blocks and
    `Nearest` it needs about 50 MB, whatever their size.
    """

    products: Products
    shrinkage: float
    settled: float

    def thresholds(self, nearest: Nearest) -> Floats:
        """Product of sketches above which a pair is measured (Q,)."""
        return self.limits(nearest, self.shrinkage) - _PRODUCT_ERROR

    def limits(self, nearest: Nearest, shrinkage: float) -> Floats:
        """1 - shrinkage * squared k-th distance / 2 (Q,), and 2 where a query is settled."""
        reach = nearest.squared_Qk[:, -1]
        settled = reach <= np.float32(self.settled) ** 2
        return np.where(settled, np.float32(2), 1 - np.float32(shrinkage) * reach / 2)

    def seed(
        self, nearest: Nearest, query: Block, block: Block, rows: slice, columns: Ints
    ) -> None:
        """Give `rows` of the query block near rows among `columns`: a first reach for `join`.

        Does nothing where `columns` are too few.
        """
        k = nearest.squared_Qk.shape[1]
        if len(columns) <= k:
            return
        near = self.products.near_columns(
            query.placed, rows, block.placed, columns, k, query.first_row - block.first_row
        )
        queries = np.repeat(np.arange(rows.start, rows.stop), k)
        self._measure(nearest, query, block, queries, near.ravel())

    def join(self, nearest: Nearest, query: Block, block: Block, work: Iterable[Work]) -> int:
        """Take in the near pairs of `work`; each (query, row) may occur once in it.

        Returns the number of pairs whose sketches were compared.
        """
        compared = 0
        waiting: list[tuple[Ints, Ints]] = []
        num_waiting = 0
        threshold = self.thresholds(nearest)
        for queries, columns in work:
            compared += len(queries) * (columns.stop - columns.start)
            for some in _pieces(queries, columns):
                i, j = self.products.pairs_above(
                    query.placed, some, block.placed, columns, threshold[some]
                )
                waiting.append((some[i], j + columns.start))
                num_waiting += len(i)
                if num_waiting > _WAITING_PAIRS:
                    self._measure(nearest, query, block, *_joined(waiting))
                    waiting, num_waiting = [], 0
                    threshold = self.thresholds(nearest)
        if num_waiting:
            self._measure(nearest, query, block, *_joined(waiting))
        return compared

    def search(self, nearest: Nearest, query: Block, block: Block) -> None:
        """Compare every query with every row of the block; exact where `shrinkage` is 1."""
        for start in range(0, len(query), _SEARCHED_QUERIES):
            rows = slice(start, min(start + _SEARCHED_QUERIES, len(query)))
            if np.isinf(nearest.squared_Qk[rows, -1]).any():
                first = np.arange(min(len(block), _SEARCHED_ROWS))
                self.seed(nearest, query, block, rows, first)
        every_query = np.arange(len(query))
        starts = range(0, len(block), _SEARCHED_ROWS)
        pieces = (slice(start, min(start + _SEARCHED_ROWS, len(block))) for start in starts)
        self.join(nearest, query, block, ((every_query, piece) for piece in pieces))

    def _measure(
        self, nearest: Nearest, query: Block, block: Block, queries: Ints, rows: Ints
    ) -> None:
        other = queries + query.first_row != rows + block.first_row
        queries, rows = queries[other], rows[other]
        squared = np.empty(len(queries), np.float32)
        width = query.vectors_BD.shape[1]
        gap, there = np.empty((2, min(len(queries), _MEASURED_PAIRS), width), np.float32)
        for start in range(0, len(queries), _MEASURED_PAIRS):
            piece = slice(start, min(start + _MEASURED_PAIRS, len(queries)))
            size = piece.stop - piece.start
            np.take(query.vectors_BD, queries[piece], 0, gap[:size], "clip")
            np.take(block.vectors_BD, rows[piece], 0, there[:size], "clip")
            gap[:size] -= there[:size]
            np.einsum("nd,nd->n", gap[:size], gap[:size], out=squared[piece])
        nearest.add(queries, rows + block.first_row, squared)


def cells_in_reach(
    products: Products,
    query: Block,
    threshold_Q: Floats,
    centers_CP: Floats,
    margin_C: Floats,
    slices: Sequence[slice],
) -> Iterator[Work]:
    """For each cell of a block, given by center and rows, the queries that may find rows in it.

    Products of a query with the rows of a cell scatter around its product with the cell's mean
    sketch. A cell is searched unless it would take more than its `margin` to exceed the threshold.
    """
    # One more coordinate each turns center . query + margin > threshold into a plain comparison.
    queries = products.place(np.column_stack([query.sketch_BP, -threshold_Q]))
    centers = products.place(np.column_stack([centers_CP, np.ones_like(margin_C)]))
    step = max(1, _PRODUCT_ELEMENTS // max(1, len(query)))
    for start in range(0, len(slices), step):
        cells = np.arange(start, min(start + step, len(slices)))
        i, j = products.pairs_above(centers, cells, queries, slice(0, len(query)), -margin_C[cells])
        edges = np.searchsorted(i, np.arange(len(cells) + 1))
        for place in range(len(cells)):
            if edges[place] < edges[place + 1]:
                yield j[edges[place] : edges[place + 1]], slices[start + place]


def _pieces(queries: Ints, columns: slice) -> Iterator[Ints]:
    step = max(1, _PRODUCT_ELEMENTS // (columns.stop - columns.start))
    return (queries[start : start + step] for start in range(0, len(queries), step))


def _joined(pairs: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
