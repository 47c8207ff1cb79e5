"""A reward fitted to the labels themselves: the Bradley-Terry model on features of images.

    P(chosen preferred to rejected) = sigmoid(reward_chosen - reward_rejected)
    reward = weights . (features - mean) / std        in logits

Only differences within a pair enter the fit (Bradley and Terry 1952, with the strengths linear in
the features), so there is no intercept and the reward's zero is a convention: the mean image. A
pair must never be judged by a model that saw its prompt; `cross_fit` therefore scores each fold of
prompts with a model of the other folds.

Everything here gives the same bits for any partition of the pairs into blocks: the statistics are
exact, and sums over pairs run over blocks of a fixed size.

Suffixes: P pairs, F features.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from fifa_ray.scoring.moments import Moments

# Penalties tried where none is given: 1 / variance of a normal prior on the weights of
# standardised features.
L2_GRID = (3000.0, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
# The penalty is chosen on at most so many pairs: a prior does not depend on how many there are.
MAX_TUNING_PAIRS = 20_000

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class BradleyTerry:
    """A fitted reward: `weights` (F,) of standardised features, their `mean` and `std` (F,)."""

    weights: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    l2: float

    def reward(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Rewards (N,) in logits of features (N, F); each row's depends on that row alone."""
        if features.ndim != 2 or features.shape[1] != len(self.weights):
            raise ValueError(
                f"expected features of shape (N, {len(self.weights)}), as the model was fitted to, "
                f"got {features.shape}"
            )
        # A sum along each row, not a matrix product, whose last bits depend on the other rows.
        blocks = [
            (((block - self.mean) / self.std) * self.weights).sum(axis=1)
            for block in fixed_blocks([features])
        ]
        return np.concatenate([np.empty(0), *blocks])


@dataclass(frozen=True)
class CrossFit:
    """Out-of-fold rewards (P,) of both images, the fold (P,) of each pair, a model per fold."""

    reward_chosen: NDArray[np.float64]
    reward_rejected: NDArray[np.float64]
    fold: NDArray[np.int64]
    models: tuple[BradleyTerry, ...]


def cross_fit(
    features_chosen: NDArray[np.floating],
    features_rejected: NDArray[np.floating],
    prompt_id: ArrayLike,
    *,
    num_folds: int = 5,
    l2: float | None = None,
    seed: int = 0,
) -> CrossFit:
    """Fit one model per fold of prompts to the other folds, and score each pair by its fold's.

    features_chosen, features_rejected: (P, F), the pairs in an order of their own such as pair_id.
    l2: penalty; None chooses it for each model by cross-validation inside its own folds. Raises
    ValueError where a fold leaves no pair to fit to.
    """
    fold_P = assign_folds(prompt_id, num_folds, seed)
    differences = [features_chosen - features_rejected]
    rewards = np.zeros((2, len(fold_P)))
    models = []
    for held_out in range(num_folds):
        seen_P = fold_P != held_out
        columns = np.concatenate([features_chosen[seen_P], features_rejected[seen_P]]).T
        moments = [Moments.of(column) for column in columns]
        model = fit_bradley_terry(differences, fold_P, moments, held_out=held_out, l2=l2)
        rewards[0, ~seen_P] = model.reward(features_chosen[~seen_P])
        rewards[1, ~seen_P] = model.reward(features_rejected[~seen_P])
        models.append(model)
    return CrossFit(rewards[0], rewards[1], fold_P, tuple(models))


def fit_bradley_terry(
    differences: Sequence[NDArray[np.floating]],
    fold: NDArray[np.int64],
    moments: Sequence[Moments],
    *,
    held_out: int | None = None,
    l2: float | None = None,
) -> BradleyTerry:
    """A model of all folds but `held_out` (None: of all).

    differences: features of the chosen minus those of the rejected image, as blocks of shape
    (any, F) that together have P rows. fold: (P,). moments: of each feature over the images of the
    pairs that may be seen. l2: penalty; None chooses it (`choose_l2`).
    """
    mean = np.array([feature.mean for feature in moments])
    # A feature that is the same everywhere has no differences either: its weight will be 0.
    std = np.array([feature.std or 1.0 for feature in moments])
    seen_P = np.ones(len(fold), bool) if held_out is None else fold != held_out
    if l2 is None:
        l2 = choose_l2(differences, fold, std, held_out=held_out)
    return BradleyTerry(fit_weights(differences, std, l2, keep=seen_P), mean, std, l2)


def choose_l2(
    differences: Sequence[NDArray[np.floating]],
    fold: NDArray[np.int64],
    std: NDArray[np.float64],
    *,
    held_out: int | None = None,
    grid: Sequence[float] = L2_GRID,
) -> float:
    """The penalty of `grid` with the least log loss on folds left out in turn, never `held_out`.

    At most MAX_TUNING_PAIRS pairs take part, evenly spaced. Equal losses: the strongest penalty.
    """
    usable = np.flatnonzero(np.ones(len(fold), bool) if held_out is None else fold != held_out)
    chosen = usable[:: -(-len(usable) // MAX_TUNING_PAIRS) or 1]
    keep_P = np.zeros(len(fold), bool)
    keep_P[chosen] = True
    sample = [np.concatenate([np.empty((0, len(std))), *fixed_blocks(differences, keep_P)])]
    inner = fold[chosen]
    folds = np.unique(inner)
    if len(folds) < 2:
        raise ValueError(
            "choosing l2 needs prompts in at least 2 folds besides the one held out; use more "
            "prompts, other folds or a fixed l2"
        )
    strongest_first = sorted(grid, reverse=True)
    losses = np.zeros(len(strongest_first))
    for left_out in folds:
        weights = None
        for i, l2 in enumerate(strongest_first):
            weights = fit_weights(
                sample, std, l2, keep=inner != left_out, start=weights, tolerance=1e-5
            )
            margin = sample[0][inner == left_out] @ (weights / std)
            losses[i] -= special.log_expit(margin).sum()
    return strongest_first[int(np.argmin(losses))]


def assign_folds(prompt_id: ArrayLike, num_folds: int, seed: int = 0) -> NDArray[np.int64]:
    """Fold (P,) in 0..num_folds-1 of each prompt: a hash of its id and the seed, nothing else.

    Raises ValueError for fewer than two folds.
    """
    if num_folds < 2:
        raise ValueError(f"cross-fitting needs at least 2 folds, got {num_folds}")
    # SplitMix64 (Steele, Lea and Flood 2014), whose every output bit depends on every input bit.
    mixed = np.asarray(prompt_id, np.int64).astype(np.uint64)
    mixed = mixed + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed % np.uint64(num_folds)).astype(np.int64)


def fit_weights(
    differences: Sequence[NDArray[np.floating]],
    std: NDArray[np.float64],
    l2: float,
    *,
    keep: NDArray[np.bool_] | None = None,
    start: NDArray[np.float64] | None = None,
    tolerance: float = 1e-9,
) -> NDArray[np.float64]:
    """Weights (F,) that minimise the penalised negative log likelihood of the pairs, in float64.

        sum over pairs of log(1 + exp(-weights . difference / std)) + l2 / 2 * |weights|^2

    keep: (P,) which pairs count (None: all). start: weights to begin with. tolerance: norm of the
    gradient per pair at which to stop. The objective is strictly convex and the optimiser Newton's
    method in a trust region, so the result does not depend on `start`. `differences` are never
    copied as a whole. Raises ValueError without a pair or a positive l2, RuntimeError if the
    optimiser does not get there.
    """
    if not l2 > 0:
        raise ValueError(f"l2 must be positive, got {l2}: separable labels have no finite fit")
    num_pairs = sum(map(len, differences)) if keep is None else int(np.count_nonzero(keep))
    if not num_pairs:
        raise ValueError("no pair to fit a reward to; use more prompts or other folds")

    def loss_and_gradient(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = weights / std
        loss, gradient = 0.5 * l2 * (weights @ weights), np.zeros_like(weights)
        for block in fixed_blocks(differences, keep):
            margin = block @ scaled
            loss -= special.log_expit(margin).sum()
            gradient -= special.expit(-margin) @ block
        return float(loss) / num_pairs, (gradient / std + l2 * weights) / num_pairs

    def hessian(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = weights / std
        total = np.zeros((len(weights), len(weights)))
        for block in fixed_blocks(differences, keep):
            probability = special.expit(block @ scaled)
            total += (block.T * (probability * (1.0 - probability))) @ block
        return (total / np.outer(std, std) + l2 * np.eye(len(weights))) / num_pairs

    found = optimize.minimize(
        loss_and_gradient,
        np.zeros(len(std)) if start is None else start,
        jac=True,
        hess=hessian,
        method="trust-exact",
        options={"gtol": tolerance},
    )
    # Rounding can end the search a little above a very small tolerance.
    if np.linalg.norm(found.jac) > max(10 * tolerance, 1e-7):
        raise RuntimeError(f"the Bradley-Terry fit did not converge: {found.message}")
    return np.asarray(found.x, np.float64)


def fixed_blocks(
    blocks: Iterable[NDArray[np.floating]], keep: NDArray[np.bool_] | None = None
) -> Iterator[NDArray[np.float64]]:
    """The same rows in float64 blocks of _BLOCK_ROWS, wherever the given blocks end.

    Of each block only the rows that `keep` (over all rows) marks.
    """
    pieces: list[NDArray[np.floating]] = []
    start = 0
    for block in blocks:
        at = 0
        while at < len(block):
            room = _BLOCK_ROWS - sum(map(len, pieces))
            pieces.append(block[at : at + room])
            at += room
            if len(pieces[-1]) == room:
                yield _merge(pieces, keep, start)
                start, pieces = start + _BLOCK_ROWS, []
    if pieces:
        yield _merge(pieces, keep, start)


def _merge(
    pieces: list[NDArray[np.floating]], keep: NDArray[np.bool_] | None, start: int
) -> NDArray[np.float64]:
    rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if keep is not None:
        rows = rows[keep[start : start + len(rows)]]
    return rows.astype(np.float64, copy=False)
