"""Which pair is learned from when: one endless sequence of positions, whoever works on it.

Position p belongs to epoch p // n and holds the pair at place p % n of that epoch's order, a seeded
permutation of all n pairs. Optimizer step s takes positions [s*G, (s+1)*G), and worker w of W those
with p % W == w. So nothing is dropped or repeated whatever n, G and W are, every worker takes part
in every step, the number of workers may change at any step, and the step alone is what a resumed
run has to know. Plain numpy: no Ray, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

# Places of an epoch are dealt to this many lanes where reading has locality: a worker that takes
# whole lanes keeps one group of the source open for each, and a batch mixes as many groups.
NUM_LANES = 16


@dataclass
class PairOrder:
    """The order of `num_pairs` pairs in every epoch.

    With `group_of`, int (num_pairs,), pairs of one group (neighbours in the source that are read
    together) stay near each other: groups are permuted, pairs are permuted inside them, the
    sequence is cut into lanes, and places take turns among the lanes. Without it an epoch is one
    permutation of all pairs.
    """

    num_pairs: int
    seed: int
    group_of: np.ndarray | None = None
    num_lanes: int = NUM_LANES
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.num_pairs < 1:
            raise ValueError(f"expected at least one pair to learn from, got {self.num_pairs}")
        if self.group_of is not None and len(self.group_of) != self.num_pairs:
            raise ValueError(f"expected {self.num_pairs} groups, got {len(self.group_of)}")

    def pairs_at(self, positions: np.ndarray) -> np.ndarray:
        """int64 index of the pair at each position (any positions, in any order)."""
        positions = np.asarray(positions, np.int64)
        epochs, places = np.divmod(positions, self.num_pairs)
        pairs = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            pairs[chosen] = self.epoch(int(epoch))[places[chosen]]
        return pairs

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 (num_pairs,): the pairs of one epoch in their order, each once."""
        if epoch not in self._epochs:
            # A step may end one epoch and begin the next; the worker reads a little ahead.
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        if self.group_of is None or len(np.unique(self.group_of)) <= self.num_lanes:
            return rng.permutation(self.num_pairs)
        order = rng.permutation(self.num_pairs)
        shuffled_groups = rng.permutation(int(self.group_of.max()) + 1)
        sequence = order[np.argsort(shuffled_groups[self.group_of[order]], kind="stable")]
        return sequence[lane_places(self.num_pairs, self.num_lanes)]


def lane_places(count: int, num_lanes: int) -> np.ndarray:
    """int64 (count,): for each place, where in a sequence cut into lanes its pair stands.

    Place q takes the next of lane q % num_lanes; the lanes are consecutive stretches of the
    sequence whose lengths differ by at most one. A permutation of range(count).
    """
    places = np.arange(count)
    lane, row = places % num_lanes, places // num_lanes
    lengths = np.bincount(lane, minlength=num_lanes)
    starts = np.cumsum(lengths) - lengths
    return starts[lane] + row


def positions_of_step(
    step: int, global_batch_size: int, worker: int, num_workers: int
) -> np.ndarray:
    """int64 positions of one worker in one optimizer step (the first step is 0)."""
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    return positions[positions % num_workers == worker]


def split_batches(count: int, batch_size: int) -> Sequence[slice]:
    """Slices of at most `batch_size` that cover range(count) evenly: 5 by 4 is 3 and 2."""
    num_batches = -(-count // batch_size)
    edges = [count * i // num_batches for i in range(num_batches + 1)] if num_batches else [0]
    return [slice(a, b) for a, b in pairwise(edges)]
