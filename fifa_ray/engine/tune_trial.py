"""One trial: select from the tables, train to each rung, draw, count the wins over the base.

No score of a pair is computed: a trial reads the run's tables, and adds to the shared latents what
no trial before it has needed. Its record is written before a rung is reported, so whatever dies, a
rung that was paid for is known.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray

from fifa_ray import schema
from fifa_ray.engine.select import run_select
from fifa_ray.engine.train import OutOfTime, PreparedPairs
from fifa_ray.engine.tune_devices import TrialDevices
from fifa_ray.engine.tune_judging import (
    draw_and_keep,
    first_line,
    step_name,
    trained_weights,
    wins_over_base,
)
from fifa_ray.engine.tune_records import (
    FINISHED,
    SearchJob,
    Task,
    TrialRecord,
    branch_of,
    read_record,
    record_place,
    task_config,
    write_record,
)
from fifa_ray.run_dir import Manifest, fingerprint

Report = Callable[[dict[str, Any]], None]


def run_task(job: SearchJob, task: Task, ledger: Any, report: Report) -> TrialRecord:
    """Do a task, or what is left of it; `report` is called at every rung, known ones first."""
    work = TaskRun(job, task, ledger)
    for rung in work.rungs():
        report(rung)
    return work.record


class TaskRun:
    """A task at work. What goes wrong in it is in its record; a trial that the budget, a crash or
    whoever stopped asking for rungs has cut short is not finished.
    """

    def __init__(self, job: SearchJob, task: Task, ledger: Any) -> None:
        self.job, self.task, self.ledger = job, task, ledger
        self.place = record_place(job, task)
        found = read_record(job.run, *self.place)
        self.record = found or TrialRecord(task.trial, task.params)
        self.branch = branch_of(job, task.trial)
        self.config = task_config(job, task, self.branch.uri)
        self.devices = TrialDevices(
            ledger, self.config, task.account, task.purpose, use_gpu=job.use_gpu
        )
        self.prompts = job.prompts(task.purpose)

    def rungs(self) -> Iterator[dict[str, Any]]:
        """Every rung: those that are known, then new ones, each worked for when it is asked for."""
        record = self.record
        yield from list(record.rungs)
        if record.status in FINISHED:
            return
        record.status, record.reason = "running", ""
        write_record(self.job.run, record, *self.place)
        try:
            yield from self._new_rungs()
        except OutOfTime:
            record.status = "budget"
        except ray.exceptions.RayActorError as error:
            out_of_time = self.devices.is_out_of_time()
            record.status = "budget" if out_of_time else "crashed"
            record.reason = "" if out_of_time else first_line(error)
        except Exception as error:  # whatever is wrong with one trial, the others go on
            record.status, record.reason = "failed", first_line(error)
        finally:
            self.devices.give_back()
        write_record(self.job.run, record, *self.place)

    def _new_rungs(self) -> Iterator[dict[str, Any]]:
        """The rungs that are left, as far as the budget goes."""
        todo = [steps for steps in self.task.rungs if steps > self._steps_done()]
        if not self._select():
            self.record.status = "budget"
            return
        pairs = self._pairs()
        missing = self.job.cache.missing(_items_of(pairs, self._empty_prompt))
        for steps in todo:
            if not self.devices.take(self._units(steps, len(missing))):
                self.record.status = "budget"
                return
            self._encode(missing)
            missing = missing[:0]
            manifest = self._train(pairs, steps)
            last = steps == self.task.rungs[-1] or manifest.details["stopped_early"]
            yield self._judge(manifest, steps, last=last)
            if last:
                return
        self.record.status = "complete"

    @property
    def _empty_prompt(self) -> int:
        return int(self.job.data.manifest.details["empty_prompt_item"])

    def _steps_done(self) -> int:
        return self.record.last["steps"] if self.record.rungs else 0

    def _units(self, steps: int, missing: int) -> dict[str, float]:
        """The work up to the rung of so many steps, by part."""
        starts = 0 if self.devices.alone and self.devices.is_working else self.devices.num_starts
        return {
            "start": starts,
            "encoding": 1 if missing else 0,
            "item": missing,
            "training": 1,
            "pair": (steps - self._steps_done()) * self.config.train.global_batch_size,
            "drawing": 1,
            "image": len(self.prompts),
        }

    def _select(self) -> bool:
        """Choose the pairs; on CPUs it is paid for, on GPUs none is held meanwhile."""
        if self.job.use_gpu:
            run_select(self.branch, self.config)
            return True
        if not self.devices.take({"selecting": 1}):
            return False
        self.devices.begin()
        began = time.monotonic()
        run_select(self.branch, self.config)
        self.devices.measure(selecting=(1, time.monotonic() - began))
        return True

    def _pairs(self) -> pa.Table:
        """TRAINING_PAIRS of the selection, without prompts that models are judged on."""
        job, columns = self.job, [schema.PAIR_ID, "rank", "reward_margin"]
        selected = self.branch.read_table("selected", columns=columns).sort_by(schema.PAIR_ID)
        folder = (job.data.stage, "pairs")
        files = [job.run.path(*folder, name) for name in job.run.list(*folder)]
        everything = pads.dataset(files, filesystem=job.run.filesystem, format="parquet")
        wanted = pads.field(schema.PAIR_ID).isin(selected.column(schema.PAIR_ID))
        pairs = everything.to_table(filter=wanted).combine_chunks().sort_by(schema.PAIR_ID)
        for name in ("rank", "reward_margin"):
            at = pairs.schema.get_field_index(name)
            pairs = pairs.set_column(at, name, selected.column(name))
        judged = [job.prompts(p).column(schema.PROMPT_ID).to_numpy() for p in ("search", "final")]
        is_free = ~np.isin(pairs.column(schema.PROMPT_ID).to_numpy(), np.concatenate(judged))
        if not is_free.any():
            raise ValueError(
                "no selected pair is left to train on: all have prompts that models are judged on; "
                "select more, or lower tune.search_prompts and tune.final_prompts"
            )
        return pairs.filter(pa.array(is_free)).cast(schema.TRAINING_PAIRS)

    def _encode(self, missing: np.ndarray) -> None:
        if not len(missing):
            return
        job = self.job
        items = job.cache.items(job.data, missing)
        worker = self.devices.worker()
        seconds, loading = ray.get(
            worker.encode.remote(job.cache, self.config, job.data.source, items)
        )
        self.devices.measure(encoding=(1, loading), item=(len(missing), seconds - loading))
        self.record.encoded += len(missing)

    def _train(self, pairs: pa.Table, steps: int) -> Manifest:
        """Train on to so many steps."""
        before = self.record.last["training_seconds"] if self.record.rungs else 0.0
        worker = self.devices.worker(training=True)
        prepared = self._prepared(pairs)
        self.record.pairs = len(prepared.pairs)
        manifest, seconds = ray.get(
            worker.train.remote(self.branch, self.config, prepared, steps, self.devices.alone)
        )
        stepping = max(0.0, manifest.details["training_seconds"] - before)
        num_pairs = (steps - self._steps_done()) * self.config.train.global_batch_size
        self.devices.measure(training=(1, seconds - stepping), pair=(num_pairs, stepping))
        return manifest

    def _prepared(self, pairs: pa.Table) -> PreparedPairs:
        job = self.job
        bad = job.cache.bad()
        images = [pairs.column(f"{side}_item").to_numpy() for side in ("chosen", "rejected")]
        is_bad = np.isin(images[0], list(bad)) | np.isin(images[1], list(bad))
        bad_pairs = pairs.filter(pa.array(is_bad)).column(schema.PAIR_ID).to_pylist()
        selected = self.branch.manifest("selected")
        assert selected is not None
        return PreparedPairs(
            data=job.data,
            fingerprint=fingerprint(selected.fingerprint, job.data.fingerprint),
            weights=job.weights,
            pairs=pairs.filter(pa.array(~is_bad)),
            bad=dict.fromkeys(bad_pairs, "bad_image"),
            latents=(job.cache.folder, job.cache.layout),
        )

    def _judge(self, manifest: Manifest, steps: int, *, last: bool) -> dict[str, Any]:
        """Draw with the model as it is, and count its wins over the base: a rung.

        A trial that has done its last rung is complete, whatever the scheduler says to it.
        """
        weights = trained_weights(self.config, self.branch, self.task.training)
        drawn = draw_and_keep(self.job, self.devices, self.task, weights, step_name(steps))
        wins = wins_over_base(self.job, self.task.purpose, drawn.rewards)
        if last:
            self.devices.give_back()
            self.record.status = "complete"
        rung = wins | {
            "steps": int(manifest.details["optimizer_steps"]),
            "device_seconds": ray.get(self.ledger.spent.remote(self.task.account)),
            "training_seconds": manifest.details["training_seconds"],
            "failed_images": drawn.failed,
        }
        self.record.rungs.append(rung)
        write_record(self.job.run, self.record, *self.place)
        return rung


def _items_of(pairs: pa.Table, empty_prompt: int) -> np.ndarray:
    """Sorted int64 item_ids that a training on these pairs reads."""
    names = ("chosen_item", "rejected_item", "prompt_item")
    found = [pairs.column(name).to_numpy() for name in names]
    return np.unique(np.concatenate([*found, np.array([empty_prompt])]))
