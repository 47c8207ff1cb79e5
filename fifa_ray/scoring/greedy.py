"""Set-level selection: choose pairs for what they add to the pairs already chosen.

The importance score of a pair takes its prompt's distance to the prompts of the whole dataset,
chosen or not. Here the diversity term is that of the chosen set S itself, and the objective is

    sum over S of base_score  +  diversity_weight * sum over S of log max(r, distance_floor).

r is the Euclidean distance from the pair's prompt to the num_neighbors-th nearest other prompt of
S. Only the best pair of a prompt has it; any further pair of that prompt is a duplicate with r = 0.
With one pair per prompt, the second sum is thus K times the mean log distance in the
Kozachenko-Leonenko entropy (diversity.py). A mean over the distinct prompts alone would not do: a
second pair would be free, a new prompt not, and the more diversity counts the fewer prompts would
be chosen. While S has too few prompts, a missing neighbour is at distance 2, the diameter of the
unit sphere.

Greedy adds the pair of largest gain, K times. The objective is neither monotone nor submodular (a
new prompt shortens the distances of others, and that loss may shrink as well as grow with S). So
the 1 - 1/e guarantees of greedy and stochastic greedy (Mirzasoleiman et al. 2015) do not hold, and
the cached gains of lazy greedy bound nothing. But one part of a gain can only fall as S grows,
base_score + diversity_weight * log r, and the other, what the chosen lose, is never a gain. By this
bound the choice of plain greedy is found without evaluating every candidate at every turn. Swapping
chosen pairs for others afterwards, tried on small pools, added 0 to 2%: not worth it.

Suffixes: P pairs of the pool, N distinct prompts of the pool, W watched prompts, D embedding width,
k = num_neighbors. Distances are kept squared, as float32 unless the embeddings are float64.
"""

import heapq
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fifa_ray.scoring.diversity import (
    checked_embeddings,
    kth_neighbor_distance,
    log_kth_neighbor_distance,
)

_Ball = tuple[NDArray[np.intp], NDArray[np.floating], NDArray[np.float64]]
"""Rows nearer than the k-th neighbour, their squared distances, the change by adding each."""

_FARTHEST = 2.0  # diameter of the unit sphere
_CHUNK_ROWS = 8192
_FEWEST_ACTIVE = 4096
_FEWEST_PICKS = 64  # per round; after a shorter one the active set doubles


def set_objective(
    base_score: ArrayLike,
    embeddings: ArrayLike,
    prompt_index: ArrayLike,
    *,
    diversity_weight: float,
    num_neighbors: int,
    distance_floor: float,
) -> float:
    """What `select_greedy` maximises, for a set of pairs (P,) and unit vectors (N, D)."""
    base_P, unit_ND, prompt_P = _checked_pool(base_score, embeddings, prompt_index)
    prompts = np.unique(prompt_P)
    if num_neighbors < len(prompts):
        distance_N = kth_neighbor_distance(unit_ND[prompts], num_neighbors)
    else:
        distance_N = np.full(len(prompts), _FARTHEST)
    log_distance = log_kth_neighbor_distance(distance_N, distance_floor).sum()
    log_distance += (len(base_P) - len(prompts)) * math.log(distance_floor)
    return float(base_P.sum() + diversity_weight * log_distance)


def select_greedy(
    base_score: ArrayLike,
    embeddings: ArrayLike,
    prompt_index: ArrayLike,
    pair_id: ArrayLike,
    selection_size: int,
    *,
    diversity_weight: float,
    num_neighbors: int,
    distance_floor: float,
    max_pairs_per_prompt: int | None = None,
) -> NDArray[np.intp]:
    """Indices of the pairs chosen greedily for the set objective, in the order of choice (K,).

    base_score (P,) is the weighted sum of the standardised margin and quality terms, embeddings (N,
    D) the unit vectors of the pool's distinct prompts and prompt_index (P,) the row of each pair's
    prompt. Fewer than selection_size where fewer pairs have a finite score or the limit per prompt
    allows fewer. Equal gains go to the smaller pair_id; the order of the input does not matter and
    nothing is random. To weigh the log distance as `importance_score` does, divide its
    diversity_weight by the standard deviation of the log distances in the dataset.

    The time goes into O(N K D) of matrix products and, for each choice, one pass over the watched
    prompts (some thousands; more, the more distances matter beside scores).
    """
    base_P, unit_ND, prompt_P = _checked_pool(base_score, embeddings, prompt_index)
    ids_P = np.asarray(pair_id)
    if ids_P.shape != base_P.shape:
        raise ValueError(f"expected a pair_id for each base_score, got shape {ids_P.shape}")
    for name, value in [
        ("selection_size", selection_size),
        ("num_neighbors", num_neighbors),
        ("max_pairs_per_prompt", 1 if max_pairs_per_prompt is None else max_pairs_per_prompt),
    ]:
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (math.isfinite(diversity_weight) and diversity_weight >= 0):
        raise ValueError(f"diversity_weight must be 0 or more and finite, got {diversity_weight}")
    if not (math.isfinite(distance_floor) and 0 < distance_floor < _FARTHEST):
        raise ValueError(f"distance_floor must be between 0 and 2, got {distance_floor}")

    # The pairs of each prompt, best first; prompts in the order of their best pairs' ids.
    best_first = np.lexsort((ids_P, -base_P))
    best_first = best_first[np.isfinite(base_P[best_first])]
    pairs_of: dict[int, list[int]] = {}
    for pair in best_first:
        pairs = pairs_of.setdefault(int(prompt_P[pair]), [])
        if max_pairs_per_prompt is None or len(pairs) < max_pairs_per_prompt:
            pairs.append(int(pair))
    queues = sorted(pairs_of.values(), key=lambda pairs: ids_P[pairs[0]])
    leaders = np.array([pairs[0] for pairs in queues], dtype=np.intp)
    if not len(leaders):
        return leaders

    spread = _SpreadOut(
        base_P[leaders],
        unit_ND[prompt_P[leaders]],
        diversity_weight,
        num_neighbors,
        distance_floor,
    )
    chosen: list[int] = []
    followers: list[tuple[float, int, int]] = []  # (-gain, pair_id, pair): a heap
    duplicate_term = diversity_weight * math.log(distance_floor)
    while len(chosen) < selection_size:
        best = spread.best()
        first = (-best[1], int(ids_P[leaders[best[0]]])) if best else (math.inf, 0)
        if followers and followers[0][:2] < first:
            chosen.append(heapq.heappop(followers)[2])
        elif best:
            spread.add(best[0])
            chosen.append(int(leaders[best[0]]))
            for pair in queues[best[0]][1:]:
                gain = float(base_P[pair]) + duplicate_term
                heapq.heappush(followers, (-gain, int(ids_P[pair]), pair))
        else:
            break
    return np.array(chosen, dtype=np.intp)


class _SpreadOut:
    """The distinct prompts of the pool, those added so far, and the exact gain of each candidate.

    A round watches some rows: the candidates of highest bound, and the added prompts. `ceiling` is
    the highest bound of the other candidates at its start. Bounds only fall, so while the best
    watched gain is above the ceiling, it is the best of all. When it no longer is, the other rows
    learn of the prompts added meanwhile in one matrix product, and a new round begins.

    Adding a candidate that is nearer to an added prompt than its k-th neighbour shortens that
    distance. The ball of an added prompt lists the rows for which this is so, and what each would
    change; balls shrink as prompts are added, and hold about k * N rows in all.
    """

    def __init__(
        self,
        base_N: NDArray[np.float64],
        unit_ND: NDArray[np.floating],
        diversity_weight: float,
        num_neighbors: int,
        distance_floor: float,
    ) -> None:
        self.base_N, self.unit_ND = base_N, unit_ND
        self.squared_norm_N = np.einsum("nd,nd->n", unit_ND, unit_ND)
        self.weight, self.squared_floor = diversity_weight, distance_floor**2
        self.added: list[int] = []
        self.is_added_N = np.zeros(len(base_N), dtype=bool)
        # Squared distances to the k nearest added prompts, ascending.
        self.nearest_Nk = np.full((len(base_N), num_neighbors), _FARTHEST**2, unit_ND.dtype)
        self.change_N = np.zeros(len(base_N))  # of others' log distances, by adding a row
        self.balls: dict[int, _Ball] = {}
        self.watched_W = np.empty(0, dtype=np.intp)
        self.watched_WD = unit_ND[:0]
        self.num_active = _FEWEST_ACTIVE
        self.num_told = 0  # how many of the added prompts the unwatched rows know of
        self.ceiling = math.inf

    def best(self) -> tuple[int, float] | None:
        """The candidate of largest gain and that gain; None when all are added."""
        if len(self.added) == len(self.base_N):
            return None
        while True:
            gain_W = self._bound(self.watched_W) + self.weight * self.change_N[self.watched_W]
            gain_W[self.is_added_N[self.watched_W]] = -math.inf
            if gain_W.max(initial=-math.inf) > self.ceiling:
                best = int(gain_W.argmax())
                return int(self.watched_W[best]), float(gain_W[best])
            self._start_round()

    def add(self, prompt: int) -> None:
        """Add a watched candidate, and let the watched rows know."""
        others_W = self.watched_W != prompt
        squared_W = self._squared_distances(self.watched_W, self.watched_WD, [prompt])[:, 0]
        closer_W = others_W & (squared_W < self.nearest_Nk[self.watched_W, -1])
        closer = self.watched_W[closer_W]
        self._insert(closer, squared_W[closer_W, None])
        for shortened in closer[self.is_added_N[closer]]:
            self._set_ball(shortened, *self.balls[shortened][:2])
        self._set_ball(prompt, self.watched_W[others_W], squared_W[others_W])
        self.is_added_N[prompt] = True
        self.added.append(prompt)

    def _start_round(self) -> None:
        """Bring every row up to date and watch the candidates of highest bound."""
        news = self.added[self.num_told :]
        self.num_told = len(self.added)
        if news:
            self._tell_unwatched(news)
        if len(self.watched_W) and len(news) < _FEWEST_PICKS:
            self.num_active *= 2
        candidates = np.flatnonzero(~self.is_added_N)
        bound = self._bound(candidates)
        self.ceiling = -math.inf
        if self.num_active < len(candidates):
            order = np.argpartition(-bound, self.num_active)
            self.ceiling = float(bound[order[self.num_active]])
            candidates = candidates[order[: self.num_active]]
        self.watched_W = np.union1d(candidates, np.array(self.added, dtype=np.intp))
        self.watched_WD = self.unit_ND[self.watched_W]

    def _tell_unwatched(self, news: list[int]) -> None:
        """Let the rows that were not watched know of prompts added meanwhile."""
        unwatched = np.setdiff1d(np.arange(len(self.base_N)), self.watched_W)
        reach_M = self.nearest_Nk[news, -1]
        found: list[tuple[NDArray[Any], ...]] = []
        for start in range(0, len(unwatched), _CHUNK_ROWS):
            rows = unwatched[start : start + _CHUNK_ROWS]
            squared_RM = self._squared_distances(rows, self.unit_ND[rows], news)
            self._insert(rows, squared_RM)
            row, new = np.nonzero(squared_RM < reach_M)
            found.append((new, rows[row], squared_RM[row, new]))
        if not found:
            return
        new_F, row_F, squared_F = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(new_F, kind="stable")
        cuts = np.searchsorted(new_F[order], np.arange(1, len(news)))
        for prompt, part in zip(news, np.split(order, cuts), strict=True):
            rows, squared, _ = self.balls[prompt]
            self._set_ball(
                prompt,
                np.concatenate([rows, row_F[part]]),
                np.concatenate([squared, squared_F[part]]),
            )

    def _bound(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Score and own log distance of candidates: no gain can be larger, now or later."""
        return self.base_N[rows] + self.weight * self._log_distance(self.nearest_Nk[rows, -1])

    def _insert(self, rows: NDArray[np.intp], squared_RM: NDArray[np.floating]) -> None:
        """Take distances to further added prompts into the nearest ones of these rows."""
        num_neighbors = self.nearest_Nk.shape[1]
        merged = np.concatenate([self.nearest_Nk[rows], squared_RM], axis=1)
        if merged.shape[1] > 2 * num_neighbors:
            merged = np.partition(merged, num_neighbors - 1, axis=1)[:, :num_neighbors]
        self.nearest_Nk[rows] = np.sort(merged, axis=1)[:, :num_neighbors]

    def _set_ball(self, prompt: int, rows: NDArray[np.intp], squared: NDArray[np.floating]) -> None:
        """Keep of these rows those within the k-th distance, and what each would change."""
        if prompt in self.balls:
            old_rows, _, old_change = self.balls[prompt]
            self.change_N[old_rows] -= old_change
        kth = self.nearest_Nk[prompt, -1]
        inside = squared < kth
        rows, squared = rows[inside], squared[inside]
        # The new k-th distance is the candidate's, or that of the neighbour before the k-th.
        new_kth = squared
        if self.nearest_Nk.shape[1] > 1:
            new_kth = np.maximum(squared, self.nearest_Nk[prompt, -2])
        change = self._log_distance(new_kth) - self._log_distance(kth)
        self.change_N[rows] += change
        self.balls[prompt] = (rows, squared, change)

    def _log_distance(self, squared: NDArray[np.floating]) -> NDArray[np.float64]:
        half_log: NDArray[np.float64] = 0.5 * np.log(
            np.maximum(squared, self.squared_floor, dtype=np.float64)
        )
        return half_log

    def _squared_distances(
        self, rows: NDArray[np.intp], rows_RD: NDArray[np.floating], others: list[int]
    ) -> NDArray[np.floating]:
        """Squared distances (R, M); in float32 good to about 1e-6 for unit vectors."""
        squared_RM = rows_RD @ self.unit_ND[others].T
        squared_RM *= -2.0
        squared_RM += self.squared_norm_N[rows, None]
        squared_RM += self.squared_norm_N[others]
        return squared_RM


def _checked_pool(
    base_score: ArrayLike, embeddings: ArrayLike, prompt_index: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.floating], NDArray[np.intp]]:
    base_P = np.asarray(base_score, dtype=np.float64)
    unit_ND = checked_embeddings(embeddings)
    prompt_P = np.asarray(prompt_index)
    if base_P.ndim != 1 or prompt_P.shape != base_P.shape:
        raise ValueError(
            f"expected a base_score and a prompt_index for each pair, "
            f"got shapes {base_P.shape} and {prompt_P.shape}"
        )
    if len(prompt_P) and not 0 <= prompt_P.min() <= prompt_P.max() < len(unit_ND):
        raise ValueError(
            f"prompt_index must be rows of embeddings, 0 to {len(unit_ND) - 1}, "
            f"got {prompt_P.min()} to {prompt_P.max()}"
        )
    longest = math.sqrt(np.einsum("nd,nd->n", unit_ND, unit_ND).max(initial=0.0))
    if longest > 1.01:
        raise ValueError(f"expected unit vectors, got one of length {longest:.4g}; normalise them")
    return base_P, unit_ND, prompt_P.astype(np.intp)
