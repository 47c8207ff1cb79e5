"""Stages on cluster shapes, against hand computation."""

import pytest

from fifa_ray.planning.estimates import Estimate, given_rate
from fifa_ray.planning.stages import Group, StageWork, Worker, predict_stage, rounds, total

GPU = Group(
    name="gpu", max_nodes=4, cpus=8, gpus=2, memory=64e9, price_per_hour=10.0,
    stages=("rewards",), overhead_seconds=100.0,
)  # fmt: skip
CPU = Group(name="cpu", max_nodes=3, cpus=4, price_per_hour=1.0)
HEAD = Group(name="head", max_nodes=1, cpus=2, price_per_hour=0.5, stages=())


def work(**changes) -> StageWork:
    values = {
        "stage": "rewards/a",
        "unit": "pairs",
        "rows": Estimate.sure(36_000),
        "rate": given_rate(10.0),
        "start": Estimate.sure(60.0),
        "start_source": "given",
        "worker": Worker(cpus=1, gpus=0.5),
        "pieces": 360,
    }
    return StageWork(**values | changes)


def test_a_gpu_stage_by_hand():
    found = predict_stage(work(), [GPU, CPU])
    # 2 GPUs / 0.5 = 4 workers a node, 4 nodes: 16 workers. 360 pieces in 22.5 -> 23 rounds.
    assert found.workers == 16
    assert found.nodes == {"gpu": 4}
    seconds = 60 + 3600 / 16 * (23 * 16 / 360)
    assert found.seconds.value == pytest.approx(seconds)
    assert found.gpu_seconds.value == pytest.approx(seconds * 16 * 0.5)
    assert found.node_seconds["gpu"].value == pytest.approx(4 * (seconds + 100))
    assert found.cost.value == pytest.approx(4 * (seconds + 100) / 3600 * 10.0)


@pytest.mark.parametrize(
    ("pieces", "workers", "expected"),
    [(6, 2, 3), (7, 2, 4), (6.25, 2, 3.25), (5.25, 2, 3), (1.9, 1, 1.9), (0.2, 4, 0.2), (3, 8, 1)],
)
def test_rounds_of_the_busiest_worker(pieces, workers, expected):
    assert rounds(pieces, workers) == pytest.approx(expected)


def test_nodes_that_are_there_already_need_not_join():
    found = predict_stage(work(), [GPU], held={"gpu": 3, "cpu": 9})
    assert found.node_seconds["gpu"].value == pytest.approx(4 * found.seconds.value + 100)


def test_no_more_workers_than_allowed_or_than_there_is_work_for():
    assert predict_stage(work(max_workers=3), [GPU]).workers == 3
    assert predict_stage(work(max_workers=3), [GPU]).nodes == {"gpu": 1}
    assert predict_stage(work(pieces=5), [GPU]).workers == 5
    assert predict_stage(work(pieces=5), [GPU]).nodes == {"gpu": 2}
    assert predict_stage(work(pieces=0.2), [GPU]).seconds.value == pytest.approx(60 + 3600)


def test_a_worker_on_cpus_takes_the_first_group_with_room():
    found = predict_stage(work(worker=Worker(cpus=2), stage="pairs"), [GPU, CPU])
    assert found.nodes == {"cpu": 3}
    assert found.workers == 6


def test_decoding_on_other_nodes_of_the_stage():
    helper = Group(name="decode", max_nodes=5, cpus=10, stages=("rewards",), price_per_hour=1.0)
    # 16 workers take 230 s; 36,000 pairs at 0.2 core seconds are 7,200 core seconds, so 31.3 cores
    # keep up; the GPU nodes have 32 - 16 = 16 left, 2 helpers bring 20.
    found = predict_stage(work(decoding=given_rate(5.0)), [GPU, helper])
    assert found.nodes == {"gpu": 4, "decode": 2}
    assert found.warnings == ()
    # Without them it is decoding that takes the time.
    alone = predict_stage(work(decoding=given_rate(5.0)), [GPU])
    assert alone.seconds.value == pytest.approx(60 + 7200 / 16)
    assert "decoding is slower" in alone.warnings[0]


def test_what_fits_nowhere_says_why():
    assert "no node group is for it" in predict_stage(work(stage="quality"), [GPU])
    too_big = predict_stage(work(worker=Worker(cpus=1, memory=80e9)), [GPU])
    assert "asks for 1 CPU and 80.0 GB of memory" in too_big
    assert "gpu (8 CPU, 2 GPU, 64 GB) has less" in too_big
    waiting = predict_stage(work(min_workers=20, max_workers=20), [GPU])
    assert "needs 20 workers, gpu holds 16" in waiting
    assert "no node group is for it" in predict_stage(work(groups=("another",)), [GPU])


def test_ranges_of_rows_and_rate_multiply_and_those_of_stages_add():
    rows = Estimate(100, 50, 200)
    found = predict_stage(work(rows=rows, pieces=1, start=Estimate(10, 5, 20)), [GPU])
    assert found.seconds == Estimate(20, 10, 40)
    totals = total([found, found], [GPU])
    assert totals.seconds == Estimate(40, 20, 80)


def test_totals_pay_the_head_throughout_and_lack_a_cost_without_a_price():
    stage = predict_stage(work(stage="pairs", worker=Worker(), bytes_per_row=100), [CPU])
    totals = total([stage, stage], [CPU, HEAD])
    seconds = 2 * stage.seconds.value
    assert totals.node_seconds["head"].value == pytest.approx(seconds)
    assert totals.cost.value == pytest.approx((3 * seconds * 1.0 + seconds * 0.5) / 3600)
    assert totals.bytes.value == 2 * 36_000 * 100
    free = Group(name="cpu", max_nodes=1, cpus=4)
    assert predict_stage(work(worker=Worker()), [free]).cost is None
    assert total([predict_stage(work(worker=Worker()), [free])], [free]).cost is None
