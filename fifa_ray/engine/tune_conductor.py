"""Does the work of the search's trials for Tune's processes, which only report what comes of it.

Whatever such a process starts itself would have to fit into the placement group that Tune gives it;
this actor is bound to none, and the libraries of a trial are loaded once.
"""

from dataclasses import dataclass
from typing import Any

import ray

from fifa_ray.engine.tune_records import FINISHED, SearchJob, Task, drop_model, write_record
from fifa_ray.engine.tune_space import Params, plain_params, rungs_of, trial_name
from fifa_ray.engine.tune_trial import TaskRun

METRIC, TIME = "win_rate", "optimizer_step"


@dataclass
class _Work:
    run: TaskRun
    rungs: Any
    # Whether it had ended before, and only its record is told once more.
    was_over: bool


class Conductor:
    """An actor with a thread for each trial at work, known by the id that Tune gave it."""

    def __init__(self, job: SearchJob, ledger: Any, grace: int, seed: int) -> None:
        self.job, self.ledger, self.grace, self.seed = job, ledger, grace, seed
        self.works: dict[str, _Work] = {}

    def next_rung(self, trial_id: str, params: Params) -> dict[str, Any] | None:
        """Work for the next rung of a trial: what Tune is told of it; None: it has ended.

        A trial that another one does already, with the same parameters, ends at once.
        """
        if trial_id not in self.works:
            task = task_of(self.job, plain_params(params), self.grace, self.seed)
            if any(work.run.task.trial == task.trial for work in self.works.values()):
                return None
            run = TaskRun(self.job, task, self.ledger)
            was_over = run.record.status in FINISHED
            self.works[trial_id] = _Work(run, run.rungs(), was_over)
        work = self.works[trial_id]
        rung = next(work.rungs, None)
        if rung is not None:
            return {METRIC: rung["win_rate"], TIME: rung["steps"]}
        return None

    def end(self, trial_id: str, status: str) -> str | None:
        """A trial is over: take its devices; `status` says why, where it was still at work.

        Returns what became of it, for a log; None where that is no news.
        """
        work = self.works.pop(trial_id, None)
        if work is None:
            return None
        try:
            work.rungs.close()
        except ValueError:  # its thread is at work still: it ends without its devices
            work.run.devices.give_back()
        record = work.run.record
        if work.was_over:
            return None
        if record.status == "running":
            record.status = status
            write_record(self.job.run, record, *work.run.place)
        if record.status in FINISHED and not self.job.config.tune.keep_models:
            drop_model(self.job, record.trial)
        if not record.rungs:
            return f"{record.trial}: {record.status}{record.reason and ', ' + record.reason}"
        last = record.last
        return (
            f"{record.trial}: {record.status} at step {last['steps']:,}, "
            f"win rate {last['win_rate']:.1%}"
        )

    def failed_at_once(self, trial_id: str) -> bool:
        """Whether a trial has come to nothing by its own fault."""
        work = self.works.get(trial_id)
        return work is not None and work.run.record.status == "failed" and not work.run.record.rungs


def start_conductor(job: SearchJob, ledger: Any, grace: int, seed: int, max_concurrent: int) -> Any:
    """A conductor for so many trials at a time."""
    # One thread is left to end trials while all others are at work.
    threads = max_concurrent + 2
    options = {"num_cpus": 0, "max_concurrency": threads}
    return ray.remote(Conductor).options(**options).remote(job, ledger, grace, seed)


def task_of(job: SearchJob, params: Params, grace: int, seed: int) -> Task:
    """The search's task of these parameters."""
    name = trial_name(params)
    last = int(params.get("train.max_steps", job.config.train.max_steps))
    rungs = rungs_of(min(grace, last), job.config.tune.asha.reduction_factor, last)
    return Task(trial=name, params=params, rungs=tuple(rungs), seed=seed, account=name)
