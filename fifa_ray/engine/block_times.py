"""How long the blocks of an executed dataset took, from Ray Data's own statistics.

It says what no stage's total can: the seconds of a row apart from the start of actors and models,
how much blocks differ, and the memory of the workers. `fifa plan` reckons with it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray.data

from fifa_ray.planning.estimates import measured_rate

# What lists and reads a stage's input and writes its partial rows: no work of the stage's own.
FRAME = ("FromItems", "_ReadItems", "_WritePartial")


@dataclass
class Task:
    """One call of an operator: when, the seconds of its blocks, its rows, the worker's memory."""

    started: float = float("inf")
    ended: float = 0.0
    seconds: float = 0.0
    rows: int = 0
    memory: int = 0


@dataclass
class Operator:
    """A step of a dataset, with its tasks by what tells them apart."""

    name: str
    tasks: dict[Any, Task] = field(default_factory=lambda: defaultdict(Task))


def describe_work(
    dataset: "ray.data.Dataset", rows: int, workers: int | None
) -> list[dict[str, Any]]:
    """Of each operator of a dataset that was iterated over, for a manifest.

    rows: of the stage, which the operators' own rows stand for. workers: actors of the pool; the
    first task of each warms up (lazy loading, compiling) and is left out of the rate, where others
    remain. Empty where Ray Data kept no statistics.
    """
    return [
        describe_operator(operator, rows, workers or 1)
        for operator in _operators(dataset)
        if operator.tasks and not any(name in operator.name for name in FRAME)
    ]


def _operators(dataset: "ray.data.Dataset") -> list[Operator]:
    # The public summary has no times of single blocks.
    executor = dataset._current_executor
    stats: Any = executor.get_stats() if executor is not None else None
    found: list[Operator] = []
    while stats is not None:
        for name, blocks in stats.metadata.items():
            operator = Operator(name)
            for block in blocks:
                _add(operator, block)
            found.append(operator)
        stats = stats.parents[0] if stats.parents else None
    return found[::-1]


def _add(operator: Operator, block: Any) -> None:
    times = block.exec_stats
    if times is None or times.wall_time_s is None:
        return
    task = operator.tasks[times.node_id, times.task_idx]
    task.started = min(task.started, times.start_time_s)
    task.ended = max(task.ended, times.end_time_s)
    task.seconds += times.wall_time_s
    task.rows += block.num_rows or 0
    if block.task_exec_stats is not None:
        task.memory = max(task.memory, block.task_exec_stats.max_uss_bytes or 0)


def describe_operator(operator: Operator, rows: int, workers: int) -> dict[str, Any]:
    """The numbers of one operator, see `describe_work`."""
    tasks = sorted(operator.tasks.values(), key=lambda task: task.started)
    warm = tasks[workers:] if len(tasks) > workers else tasks
    rows_of_all = sum(task.rows for task in tasks) or 1
    # Rows of the operator (sides of pairs, parts of prompts) to rows of the stage.
    scale = rows / rows_of_all
    rate = measured_rate([t.seconds for t in warm], [max(t.rows * scale, 1e-9) for t in warm])
    busy = sum(task.seconds for task in warm)
    # Tasks of an asynchronous actor overlap: together they are no slower than the clock.
    overlap = min(1.0, _covered(warm) * workers / busy) if busy else 1.0
    per_row = rate.seconds_per_row * overlap
    return {
        "operator": operator.name,
        "rows": rows,
        "workers": workers,
        "tasks": len(tasks),
        "tasks_warming_up": len(tasks) - len(warm),
        "busy_seconds": sum(task.seconds for task in tasks) * overlap,
        "seconds_per_row": {"value": per_row.value, "low": per_row.low, "high": per_row.high},
        "peak_memory_bytes": max(task.memory for task in tasks) or None,
    }


def _covered(tasks: Sequence[Task]) -> float:
    """Seconds in which at least one task was running."""
    seconds, until = 0.0, float("-inf")
    for task in sorted(tasks, key=lambda task: task.started):
        seconds += max(0.0, task.ended - max(task.started, until))
        until = max(until, task.ended)
    return seconds
