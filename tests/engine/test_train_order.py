"""The order of pairs: every pair once an epoch, every position one worker's, for any numbers."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa_ray.engine.train_order import PairOrder, lane_places, positions_of_step, split_batches

sizes = st.integers(1, 200)


@given(num_pairs=sizes, seed=st.integers(0, 2**31), epoch=st.integers(0, 50), groups=sizes)
@settings(deadline=None)
def test_an_epoch_is_a_permutation_with_and_without_groups(num_pairs, seed, epoch, groups):
    group_of = np.arange(num_pairs) * groups // num_pairs
    for order in (PairOrder(num_pairs, seed), PairOrder(num_pairs, seed, group_of, num_lanes=4)):
        positions = np.arange(epoch * num_pairs, (epoch + 1) * num_pairs)
        assert sorted(order.pairs_at(positions)) == list(range(num_pairs))


@given(step=st.integers(0, 1000), batch=st.integers(1, 300), workers=st.integers(1, 40))
def test_workers_share_out_the_positions_of_a_step(step, batch, workers):
    parts = [positions_of_step(step, batch, worker, workers) for worker in range(workers)]
    together = np.sort(np.concatenate(parts))
    assert together.tolist() == list(range(step * batch, (step + 1) * batch))
    if batch >= workers:
        assert all(len(part) for part in parts)


def test_the_sequence_does_not_depend_on_where_one_starts_and_differs_by_epoch():
    order = PairOrder(7, seed=3)
    whole = order.pairs_at(np.arange(21))
    again = PairOrder(7, seed=3)
    assert [int(again.pairs_at(np.array([p]))[0]) for p in reversed(range(21))] == whole[
        ::-1
    ].tolist()
    assert whole[:7].tolist() != whole[7:14].tolist()
    assert PairOrder(7, seed=4).pairs_at(np.arange(21)).tolist() != whole.tolist()


@given(count=sizes, lanes=st.integers(1, 50))
def test_lanes_deal_a_sequence_out_evenly(count, lanes):
    places = lane_places(count, lanes)
    assert sorted(places) == list(range(count))
    # Within a lane the sequence is read in order, without gaps.
    for lane in range(min(lanes, count)):
        assert np.all(np.diff(places[lane::lanes]) == 1)


def test_with_groups_a_worker_reads_few_groups_at_a_time_and_a_batch_mixes_many():
    group_of = np.repeat(np.arange(64), 50)
    order = PairOrder(len(group_of), seed=0, group_of=group_of, num_lanes=16)
    epoch = order.epoch(0)
    assert len(np.unique(group_of[epoch[:16]])) > 8
    mine = group_of[epoch[0::4]]  # worker 0 of 4 has four lanes
    open_groups = [len(np.unique(mine[i : i + 80])) for i in range(0, len(mine), 80)]
    assert max(open_groups) <= 8
    # A group is read by the one or two workers whose lanes it lies in.
    workers_of_group = [
        {w for w in range(4) if group in group_of[epoch[w::4]]} for group in range(64)
    ]
    assert np.mean([len(workers) for workers in workers_of_group]) < 1.3
    alone = group_of[PairOrder(len(group_of), seed=0).epoch(0)]
    assert len(np.unique(alone[:80])) > 40


@given(count=st.integers(0, 100), size=st.integers(1, 40))
def test_batches_cover_everything_evenly(count, size):
    lengths = [s.stop - s.start for s in split_batches(count, size)]
    assert sum(lengths) == count
    assert not lengths or (max(lengths) <= size and max(lengths) - min(lengths) <= 1)
