"""The rate of a stage's workers from the times of its tasks, by hand."""

import pytest

from fifa_ray.engine.block_times import Operator, Task, describe_operator


def operator(*tasks: Task) -> Operator:
    return Operator("MapBatches(Some)", dict(enumerate(tasks)))


def task(started: float, seconds: float, rows: int) -> Task:
    return Task(started, started + seconds, seconds, rows, memory=1000 + rows)


def test_the_first_task_of_each_worker_warms_up():
    # Two workers; the operator's rows are sides, two for each of the stage's 160 pairs.
    found = describe_operator(
        operator(
            task(0, 9, 64), task(1, 8, 64), task(9, 2, 64), task(9, 3, 64), task(12, 3, 64)
        ),
        rows=160,
        workers=2,
    )  # fmt: skip
    assert (found["tasks"], found["tasks_warming_up"]) == (5, 2)
    assert found["seconds_per_row"]["value"] == pytest.approx((2 + 3 + 3) / 96)
    assert found["busy_seconds"] == 25
    assert found["peak_memory_bytes"] == 1064


def test_a_single_task_is_all_there_is_and_unsure():
    found = describe_operator(operator(task(0, 4, 10)), rows=10, workers=2)
    assert found["tasks_warming_up"] == 0
    assert found["seconds_per_row"] == {"value": 0.4, "low": 0.2, "high": 0.8}


def test_tasks_of_an_asynchronous_worker_count_no_more_than_the_clock():
    # After the first, four tasks of 4 s overlap within 6 s: the worker does 40 rows in 6 s.
    tasks = [task(0, 5, 10), *(task(5 + n / 2, 4, 10) for n in range(3)), task(7, 4, 10)]
    found = describe_operator(operator(*tasks), rows=50, workers=1)
    assert found["seconds_per_row"]["value"] == pytest.approx(6 / 40)
