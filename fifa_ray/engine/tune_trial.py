"""One trial: select from the tables, train to each rung, draw, count the wins over the base.

    tuning/<name>/trials/<trial>/   trial.json  selected/  training/trial/     of parameters
    tuning/<name>/scores/<account>/ step-000123.parquet                        of a model

No score of a pair is computed: a trial reads the run's tables, and adds to the shared latents what
no trial before it has needed. `trial.json` is written before a rung is reported, so whatever dies,
a rung that was paid for is known.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray

from fifa_ray import schema
from fifa_ray.config import FifaConfig
from fifa_ray.engine.evaluate_scorers import Scorer
from fifa_ray.engine.select import run_select
from fifa_ray.engine.train import OutOfTime, PreparedPairs
from fifa_ray.engine.training_data import TrainingData
from fifa_ray.engine.tune_devices import TrialDevices
from fifa_ray.engine.tune_latents import LatentCache
from fifa_ray.engine.tune_ledger import Purpose
from fifa_ray.engine.tune_space import Params, with_params
from fifa_ray.engine.tune_worker import Drawn
from fifa_ray.models.image_generator import GeneratorWeights
from fifa_ray.run_branch import BranchDir
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.scoring.win_rate import Resampling, compare

logger = logging.getLogger(__name__)

BASE = "base"
# A trial in one of these is over; in any other, the same search may go on with it.
FINISHED = ("complete", "stopped", "failed")
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """What all trials of a search share. Picklable; paths are absolute."""

    run: RunDir
    config: FifaConfig
    weights: dict[str, Any]
    data: TrainingData
    cache: LatentCache
    scorer: Scorer
    use_gpu: bool

    @property
    def folder(self) -> str:
        """Folder of the search in its run."""
        return f"tuning/{self.config.tune.name}"

    def prompts(self, purpose: Purpose) -> pa.Table:
        """Rows of EVALUATION_PROMPTS that models draw for a purpose."""
        return self.run.read_table(self.folder, "prompts", f"{purpose}.parquet")

    def scores(self, account: str, name: str) -> pa.Table | None:
        """EVALUATION_REWARDS of a model, if they are known."""
        place = (self.folder, "scores", account, f"{name}.parquet")
        return self.run.read_table(*place) if self.run.exists(*place) else None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training to be judged at its rungs: a trial of the search, or a re-run of one."""

    trial: str
    params: Params
    rungs: tuple[int, ...]
    seed: int
    purpose: Purpose = "search"
    # What the ledger charges, and the training's name in the trial's folder.
    account: str
    training: str = "trial"


@dataclass
class TrialRecord:
    """`trial.json`: what is known of a trial."""

    trial: str
    params: Params
    status: str = "running"
    reason: str = ""
    # One for each rung: steps, win_rate, win_rate_low, win_rate_high, device_seconds so far, ...
    rungs: list[dict[str, Any]] = field(default_factory=list)
    pairs: int = 0
    encoded: int = 0
    began_at: float = field(default_factory=time.time)

    @property
    def last(self) -> dict[str, Any]:
        """The last rung."""
        return self.rungs[-1]


def record_place(job: SearchJob, task: Task) -> tuple[str, ...]:
    """Where the record of a task lies."""
    if task.purpose == "search":
        return job.folder, "trials", task.trial, "trial.json"
    return job.folder, "final", f"{task.account}.json"


def read_record(run: RunDir, *place: str) -> TrialRecord | None:
    """A record; None where there is none yet."""
    if not run.exists(*place):
        return None
    return TrialRecord(**json.loads(run.read_text(*place)))


def write_record(run: RunDir, record: TrialRecord, *place: str) -> None:
    """Keep a record; it appears whole."""
    run.write_text(json.dumps(asdict(record), indent=2), *place)


def run_task(job: SearchJob, task: Task, ledger: Any, report: Report) -> TrialRecord:
    """Do a task, or what is left of it; `report` is called at every rung, known ones first.

    It may not return: then whoever stopped the trial closes its account. What goes wrong in a
    trial is in its record; a trial that the budget or a crash cut short is not finished.
    """
    place = record_place(job, task)
    record = read_record(job.run, *place) or TrialRecord(task.trial, task.params)
    for rung in record.rungs:
        report(rung)
    if record.status in FINISHED:
        return record
    record.status, record.reason = "running", ""
    write_record(job.run, record, *place)
    devices: TrialDevices | None = None
    try:
        work = TaskRun(job, task, ledger, record, report)
        devices = work.devices
        work.run()
    except OutOfTime:
        record.status = "budget"
    except ray.exceptions.RayActorError as error:
        out_of_time = devices is not None and devices.is_out_of_time()
        record.status = "budget" if out_of_time else "crashed"
        record.reason = "" if out_of_time else first_line(error)
    except Exception as error:  # whatever is wrong with one trial, the others go on
        record.status, record.reason = "failed", first_line(error)
    finally:
        if devices is not None:
            devices.give_back()
    write_record(job.run, record, *place)
    if record.status in FINISHED and not job.config.tune.keep_models and task.purpose == "search":
        drop_model(job, task.trial)
    return record


def drop_model(job: SearchJob, trial: str) -> None:
    """Delete what a trial of the search has trained; its record and scores stay."""
    branch_of(job, trial).invalidate("training/trial")


def branch_of(job: SearchJob, trial: str) -> BranchDir:
    """The run of a trial: the search's tables and its own selection."""
    return BranchDir(f"{job.run.uri.rstrip('/')}/{job.folder}/trials/{trial}", job.run)


def first_line(error: BaseException) -> str:
    """What an error says, without what Ray puts around it."""
    while getattr(error, "cause", None) is not None:
        error = error.cause  # type: ignore[attr-defined]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


class TaskRun:
    """A task at work."""

    def __init__(
        self, job: SearchJob, task: Task, ledger: Any, record: TrialRecord, report: Report
    ) -> None:
        self.job, self.task, self.record, self.report = job, task, record, report
        self.ledger = ledger
        self.branch = branch_of(job, task.trial)
        self.config = task_config(job, task, self.branch.uri)
        self.devices = TrialDevices(
            ledger, self.config, task.account, task.purpose, use_gpu=job.use_gpu
        )
        self.prompts = job.prompts(task.purpose)

    def run(self) -> None:
        """All rungs that are left, as far as the budget goes."""
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
            self._judge(manifest, steps, last=last)
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

    def _judge(self, manifest: Manifest, steps: int, *, last: bool) -> None:
        """Draw with the model as it is, count its wins over the base, and report.

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
        write_record(self.job.run, self.record, *record_place(self.job, self.task))
        self.report(rung)


def task_config(job: SearchJob, task: Task, uri: str) -> FifaConfig:
    """The settings of a task: the search's with its parameters, its seed and nothing to spare."""
    config = with_params(job.config, task.params)
    select = {"images": False, "compare": ()}
    train = {
        "name": task.training,
        "seed": task.seed,
        "use_gpu": job.use_gpu,
        "loggers": (),
        "sample_prompts": (),
    }
    return config.model_copy(
        update={
            "run_dir": uri,
            "select": config.select.model_copy(update=select),
            "train": config.train.model_copy(update=train),
            "report": config.report.model_copy(update={"enabled": False}),
        }
    )


def draw_base(job: SearchJob, purpose: Purpose, ledger: Any) -> None:
    """Draw and score the prompts of a purpose with the model as it was before any training.

    Raises OutOfTime where the budget does not reach so far.
    """
    account = f"{BASE}-{purpose}"
    if job.scores(account, BASE) is not None:
        return
    task = Task(trial=BASE, params={}, rungs=(), seed=0, purpose=purpose, account=account)
    devices = TrialDevices(ledger, job.config, account, purpose, use_gpu=job.use_gpu)
    settings = job.config.train
    try:
        if not devices.take({"start": 1, "drawing": 1, "image": len(job.prompts(purpose))}):
            raise OutOfTime("the budget has no room for the base's images")
        weights = GeneratorWeights(settings.model, settings.revision, settings.variant)
        draw_and_keep(job, devices, task, weights, BASE)
    except ray.exceptions.RayActorError as error:
        if devices.is_out_of_time():
            raise OutOfTime("the budget ended while the base drew its images") from error
        raise RuntimeError(f"tuning: the base's images: {first_line(error)}") from error
    finally:
        devices.give_back()


def draw_and_keep(
    job: SearchJob, devices: TrialDevices, task: Task, weights: GeneratorWeights, name: str
) -> Drawn:
    """Draw, score, and keep the scores. Raises RuntimeError where more images fail than allowed."""
    prompts = job.prompts(task.purpose)
    drawn: Drawn = ray.get(
        devices.worker().draw.remote(weights, devices.config, prompts, job.scorer)
    )
    devices.measure(drawing=(1, drawn.loading_seconds), image=(len(prompts), drawn.drawing_seconds))
    failed = len(prompts) - len(drawn.rewards)
    allowed = job.config.max_quarantine_fraction
    if failed > allowed * len(prompts) or not len(drawn.rewards):
        raise RuntimeError(
            f"{failed} of {len(prompts)} images failed ({drawn.failed}), allowed are "
            f"{allowed:.0%} (max_quarantine_fraction)"
        )
    job.run.write_table(drawn.rewards, job.folder, "scores", task.account, f"{name}.parquet")
    return drawn


def trained_weights(config: FifaConfig, branch: RunDir, training: str) -> GeneratorWeights:
    """What draws after a training."""
    folder = f"{branch.uri}/training/{training}/model"
    settings = config.train
    if settings.lora is None:
        return GeneratorWeights(folder)
    return GeneratorWeights(settings.model, settings.revision, settings.variant, folder)


def wins_over_base(job: SearchJob, purpose: Purpose, rewards: pa.Table) -> dict[str, Any]:
    """Win rate of a model's images over the base's of the same prompts and seeds."""
    base = job.scores(f"{BASE}-{purpose}", BASE)
    assert base is not None
    return compare_scores(rewards, base, job.config)


def compare_scores(rewards: pa.Table, base: pa.Table, config: FifaConfig) -> dict[str, Any]:
    """Win rate with its interval, and the mean scores, over the images that both tables have."""
    both, mine, theirs = np.intersect1d(
        rewards.column("image_id").to_numpy(),
        base.column("image_id").to_numpy(),
        return_indices=True,
    )
    if not len(both):
        raise RuntimeError("no image has a score of both models")
    ours = rewards.column("reward").to_numpy()[mine]
    others = base.column("reward").to_numpy()[theirs]
    settings = config.evaluate
    resampling = Resampling(settings.confidence, settings.num_resamples, config.seed)
    found = compare(ours, others, base.column(schema.PROMPT_ID).to_numpy()[theirs], resampling)
    return {
        "win_rate": found.win_rate,
        "win_rate_low": found.win_rate_low,
        "win_rate_high": found.win_rate_high,
        "mean_difference": found.mean_difference,
        "num_prompts": found.num_prompts,
    }


def step_name(steps: int) -> str:
    """Name of the scores after so many optimizer steps; names sort like steps."""
    return f"step-{steps:08d}"


def _items_of(pairs: pa.Table, empty_prompt: int) -> np.ndarray:
    """Sorted int64 item_ids that a training on these pairs reads."""
    names = ("chosen_item", "rejected_item", "prompt_item")
    found = [pairs.column(name).to_numpy() for name in names]
    return np.unique(np.concatenate([*found, np.array([empty_prompt])]))


def as_report(rung: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune is told of a rung."""
    return {"win_rate": rung["win_rate"], "optimizer_step": rung["steps"]}
