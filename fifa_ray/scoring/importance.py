"""The importance score of a pair and the choice of the best K, the same for any partition of the
pairs.

    importance_score = margin_weight * z(reward_margin) + quality_weight * z(prompt_quality)
                       + diversity_weight * z(log_kth_neighbor_distance)

z is `standardize`. The best K are those of highest score; equal scores go to the smaller pair_id,
which makes the order of pairs total. A pair whose score is not finite is never selected.

Suffix: P pairs.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fifa_ray.scoring.moments import Moments, Ranks

Standardization = Literal["zscore", "rank", "none"]


def empty_statistics(rule: Standardization) -> Moments | Ranks:
    """What a pass over a column has to collect (by `update` and `merge`) for this rule."""
    if rule not in get_args(Standardization):
        raise ValueError(
            f"unknown standardization {rule!r}; "
            f"choose one of {', '.join(get_args(Standardization))}"
        )
    return Ranks() if rule == "rank" else Moments()


def standardize(
    values: ArrayLike,
    rule: Standardization = "zscore",
    statistics: Moments | Ranks | None = None,
) -> NDArray[np.float64]:
    """Values (P,) on a scale that terms can share; not finite values become NaN.

    zscore: (value - mean) / population standard deviation. rank: the rank (ties share the middle
    one) scaled to mean 0 and deviation 1. none: the values themselves, the paper's raw sum.
    A constant column becomes zeros. `statistics` are those of the whole column where `values` is
    only a block of it (start from `empty_statistics(rule)`); None: taken from `values`.
    """
    empty = empty_statistics(rule)
    if statistics is None:
        statistics = empty.update(values)
    elif type(statistics) is not type(empty):
        raise ValueError(
            f"standardization {rule!r} needs {type(empty).__name__}, "
            f"got {type(statistics).__name__}; collect them with empty_statistics({rule!r})"
        )
    values_P = np.array(values, dtype=np.float64)
    values_P[~np.isfinite(values_P)] = np.nan
    return values_P if rule == "none" else statistics.standardize(values_P)


def importance_score(
    reward_margin: ArrayLike | None,
    prompt_quality: ArrayLike | None,
    log_kth_neighbor_distance: ArrayLike | None,
    *,
    margin_weight: float = 1.0,
    quality_weight: float,
    diversity_weight: float,
) -> NDArray[np.float64]:
    """Weighted sum of three already standardised terms (P,).

    A term of weight 0 takes no part: it may be None, and a NaN in it does no harm. A NaN in any
    other term makes the score NaN, and the pair cannot be selected.
    """
    terms = {
        "reward_margin": (margin_weight, reward_margin),
        "prompt_quality": (quality_weight, prompt_quality),
        "log_kth_neighbor_distance": (diversity_weight, log_kth_neighbor_distance),
    }
    weighted: dict[str, NDArray[np.float64]] = {}
    for name, (weight, values) in terms.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {name} must be 0 or more and finite, got {weight}")
        if weight > 0 and values is None:
            raise ValueError(f"{name} has weight {weight} but no values; give them or weight 0")
        if weight > 0:
            weighted[name] = weight * np.asarray(values, dtype=np.float64)
    if not weighted:
        raise ValueError("all three weights are 0: nothing is left to score by; raise one of them")
    shapes = {name: values.shape for name, values in weighted.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected every term of the same pairs, got shapes {shapes}")
    return sum(weighted.values(), start=np.zeros(next(iter(shapes.values()))))


def select_top_k(
    importance_score: ArrayLike,
    pair_id: ArrayLike,
    selection_size: int,
    *,
    prompt_id: ArrayLike | None = None,
    max_pairs_per_prompt: int | None = None,
) -> NDArray[np.intp]:
    """Indices of the best `selection_size` pairs, best first; fewer where fewer have a finite
    score.

    Equal scores go to the smaller pair_id (ids are taken to be distinct). With
    `max_pairs_per_prompt` (needs `prompt_id`), all but the best so many pairs of each prompt are
    left out first, which is the subset of highest total score that keeps to the limit. O(P)
    without that limit, O(P log P) with it.
    """
    _check_at_least_one("selection_size", selection_size)
    score_P = np.asarray(importance_score, dtype=np.float64)
    ids_P = np.asarray(pair_id)
    _check_columns(score_P, [ids_P])
    candidates = np.flatnonzero(np.isfinite(score_P))
    if max_pairs_per_prompt is not None:
        _check_at_least_one("max_pairs_per_prompt", max_pairs_per_prompt)
        if prompt_id is None:
            raise ValueError("max_pairs_per_prompt needs prompt_id, the prompt of each pair")
        prompts_P = np.asarray(prompt_id)
        _check_columns(score_P, [prompts_P])
        by_prompt = candidates[
            np.lexsort((ids_P[candidates], -score_P[candidates], prompts_P[candidates]))
        ]
        candidates = by_prompt[_position_in_run(prompts_P[by_prompt]) < max_pairs_per_prompt]
    if len(candidates) > selection_size:
        scores = score_P[candidates]
        threshold = np.partition(scores, -selection_size)[-selection_size]
        above, tied = candidates[scores > threshold], candidates[scores == threshold]
        room = selection_size - len(above)
        tied = tied[np.argpartition(ids_P[tied], room - 1)[:room]]
        candidates = np.concatenate([above, tied])
    return candidates[np.lexsort((ids_P[candidates], -score_P[candidates]))]


class TopK:
    """The best `selection_size` pairs of a stream of blocks, in memory for a few times as many.

    Any partition of the pairs into blocks, pushed in any order, and any tree of merges give what
    `select_top_k` gives on all pairs at once. Proof, m being `max_pairs_per_prompt` (or infinite):
    pair x of a set S is selected if and only if fewer than m pairs of its prompt are better, and

        sum over prompts p of min(m, number of pairs of p in S better than x) < selection_size.

    Both counts can only grow with S, so what a part of the data rejects, the whole rejects too:
    dropping it early loses nothing that is selected. Nor does it let a wrong pair in. If S selects
    selection_size pairs, they are still selected from what is left of S, and fill it. If it selects
    fewer, they are the m best of every prompt, and still keep the others of their prompts out.
    """

    def __init__(self, selection_size: int, *, max_pairs_per_prompt: int | None = None) -> None:
        """An empty selection; `max_pairs_per_prompt` makes the column prompt_id obligatory."""
        _check_at_least_one("selection_size", selection_size)
        if max_pairs_per_prompt is not None:
            _check_at_least_one("max_pairs_per_prompt", max_pairs_per_prompt)
        self.selection_size = selection_size
        self.max_pairs_per_prompt = max_pairs_per_prompt
        self._blocks: list[dict[str, NDArray[Any]]] = []
        self._num_rows = 0
        self._threshold = -math.inf

    def push(self, importance_score: ArrayLike, pair_id: ArrayLike, **columns: ArrayLike) -> None:
        """Offer a block of pairs; each further column (prompt_id, a row index...) comes along."""
        block = {
            "importance_score": np.asarray(importance_score, dtype=np.float64),
            "pair_id": np.asarray(pair_id),
        } | {name: np.asarray(values) for name, values in columns.items()}
        _check_columns(block["importance_score"], list(block.values()))
        if self._blocks and self._blocks[0].keys() != block.keys():
            raise ValueError(
                f"expected columns {sorted(self._blocks[0])} as in the first block, "
                f"got {sorted(block)}"
            )
        if self.max_pairs_per_prompt is not None and "prompt_id" not in block:
            raise ValueError("max_pairs_per_prompt needs the column prompt_id in every block")
        score = block["importance_score"]
        kept = np.flatnonzero(np.isfinite(score) & (score >= self._threshold))
        if len(kept) or not self._blocks:
            self._blocks.append({name: values[kept] for name, values in block.items()})
            self._num_rows += len(kept)
        if self._num_rows > 2 * self.selection_size:
            self._compact()

    def merge(self, other: Self) -> None:
        """Take in what another accumulator of the same settings has selected."""
        mine = (self.selection_size, self.max_pairs_per_prompt)
        if (other.selection_size, other.max_pairs_per_prompt) != mine:
            raise ValueError(
                "cannot merge selections of different selection_size or max_pairs_per_prompt: "
                f"{mine} and {(other.selection_size, other.max_pairs_per_prompt)}"
            )
        if other._blocks:
            self.push(**other.best())

    def best(self) -> dict[str, NDArray[Any]]:
        """All columns of the selected pairs, best first; {} before the first push."""
        if self._blocks:
            self._compact()
        return dict(self._blocks[0]) if self._blocks else {}

    def _compact(self) -> None:
        """Drop what the selection of the rows so far rejects."""
        block = {
            name: np.concatenate([block[name] for block in self._blocks])
            for name in self._blocks[0]
        }
        chosen = select_top_k(
            block["importance_score"],
            block["pair_id"],
            self.selection_size,
            prompt_id=block.get("prompt_id"),
            max_pairs_per_prompt=self.max_pairs_per_prompt,
        )
        self._blocks = [{name: values[chosen] for name, values in block.items()}]
        self._num_rows = len(chosen)
        if len(chosen) == self.selection_size:
            self._threshold = float(self._blocks[0]["importance_score"][-1])


def _position_in_run(values: NDArray[Any]) -> NDArray[np.intp]:
    """0, 1, 2... within each run of equal neighbours: [7, 7, 3, 7] -> [0, 1, 0, 0]."""
    index = np.arange(len(values))
    starts = np.append(True, values[1:] != values[:-1])[: len(values)]
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_columns(score: NDArray[Any], columns: Sequence[NDArray[Any]]) -> None:
    if score.ndim != 1 or any(column.shape != score.shape for column in columns):
        raise ValueError(
            f"expected columns of one length, one value per pair, got importance_score of shape "
            f"{score.shape} beside {[column.shape for column in columns]}"
        )
