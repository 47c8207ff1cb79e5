"""The re-run of a search's winner, with seeds and prompts that the search has not used."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from fifa_ray.config import FifaConfig
from fifa_ray.engine.train import OutOfTime
from fifa_ray.engine.tune_devices import num_devices
from fifa_ray.engine.tune_judging import draw_base
from fifa_ray.engine.tune_records import SearchJob, Task, TrialRecord, read_record
from fifa_ray.engine.tune_results import best_record, read_trials
from fifa_ray.engine.tune_space import Params, with_params
from fifa_ray.engine.tune_trial import run_task

logger = logging.getLogger(__name__)


def run_final(
    job: SearchJob, ledger: Any, default: TrialRecord, seed: int, at_once: int
) -> dict[str, list[str]]:
    """Train the winner and the configured settings again, with other seeds, and judge them on the
    other prompts: for as many seeds as the budget has room for.

    Returns the accounts of the trainings of each, "best" and "default", seed by seed.
    """
    best = best_record(read_trials(job))
    models = {"best": best} | ({"default": default} if best.trial != default.trial else {})
    done: dict[str, list[str]] = {label: [] for label in models}
    try:
        draw_base(job, "final", ledger)
    except OutOfTime:
        logger.warning("tuning: the budget has no room for a re-run of the winner")
        return done
    for number in range(job.config.tune.final_seeds):
        tasks = [
            _final_task(job, label, record, seed + 1 + number) for label, record in models.items()
        ]
        if not _all_fit(job, ledger, tasks):
            logger.warning(
                "tuning: the budget has room for %d of %d seeds of the re-run; raise it, or "
                "tune.final_share",
                number,
                job.config.tune.final_seeds,
            )
            break
        with ThreadPoolExecutor(min(at_once, len(tasks))) as pool:
            records = list(
                pool.map(lambda task: run_task(job, task, ledger, report=_say_nothing), tasks)
            )
        unfinished = [record for record in records if record.status != "complete"]
        if unfinished:
            logger.warning(
                "tuning: the re-run ended with seed %d: %s",
                tasks[0].seed,
                ", ".join(record.reason or record.status for record in unfinished),
            )
            break
        for label, task in zip(models, tasks, strict=True):
            done[label].append(task.account)
    return done


def _final_task(job: SearchJob, label: str, record: TrialRecord, seed: int) -> Task:
    steps = int(record.params.get("train.max_steps", job.config.train.max_steps))
    return Task(
        trial=record.trial,
        params=record.params,
        rungs=(steps,),
        seed=seed,
        purpose="final",
        account=f"final-{label}-{record.trial}-s{seed}",
        training=f"final-s{seed}",
    )


def _all_fit(job: SearchJob, ledger: Any, tasks: list[Task]) -> bool:
    """Whether the budget has room for all of these: half a comparison is none."""
    total: dict[str, float] = {}
    for task in tasks:
        if read_record(job.run, job.folder, "final", f"{task.account}.json") is not None:
            continue
        config = with_params(job.config, task.params)
        units = {
            "selecting": 0.0 if job.use_gpu else 1.0,
            "start": 1.0,
            "training": 1.0,
            "pair": float(task.rungs[-1] * config.train.global_batch_size),
            "drawing": 1.0,
            "image": float(len(job.prompts("final"))),
        }
        for part, count in units.items():
            total[part] = total.get(part, 0.0) + count
    devices = num_devices(job.config, use_gpu=job.use_gpu)
    return not total or bool(ray.get(ledger.room.remote("final", total, devices)) == "yes")


def _say_nothing(rung: Mapping[str, Any]) -> None:
    pass


def best_config(config: FifaConfig, params: Params) -> FifaConfig:
    """The configuration of the winner, to be run as it is: its training is called tuned."""
    found = with_params(config, params)
    return found.model_copy(update={"train": found.train.model_copy(update={"name": "tuned"})})
