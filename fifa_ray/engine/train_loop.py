"""The loop that each worker of a training runs: steps, metrics, validations, checkpoints.

Workers meet once a step, in the last backward pass. Rank 0 alone writes; decisions (early stop) are
taken by all from the same reduced numbers.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fifa_ray.dpo.loss import Metrics
from fifa_ray.engine.prefetch import Prefetcher
from fifa_ray.engine.train_batch import PairBatch
from fifa_ray.engine.train_checkpoint import (
    TrainState,
    load_checkpoint,
    save_checkpoint,
)
from fifa_ray.engine.train_inputs import (
    PairStream,
    StepInputs,
    TrainJob,
    open_reader,
    weightless_batch,
)
from fifa_ray.engine.train_metrics import Line, MetricLog, build_trackers
from fifa_ray.engine.train_model import load_model
from fifa_ray.engine.train_optimizer import (
    AveragedWeights,
    base_learning_rate,
    build_optimizer,
    build_schedule,
)
from fifa_ray.engine.train_output import BestWeights, draw_samples, upload_folder
from fifa_ray.engine.train_pairs import TRAIN, VALIDATION, read_trained_pairs
from fifa_ray.engine.train_step import GradientStep, PairLoss, add_metrics
from fifa_ray.engine.train_storage import checkpoint_name, keep_checkpoint
from fifa_ray.engine.train_validation import Validation

# Steps whose inputs are made ahead of their use.
PREFETCHED_STEPS = 2
# Steps after a start that are rehearsed on a GPU: the optimiser takes its memory after the first.
REHEARSED_STEPS = 2
PARTIAL_MODEL = "model.partial"

METRIC_NAMES = (
    "loss",
    "implicit_accuracy",
    "implicit_reward_margin",
    "policy_error_chosen",
    "policy_error_rejected",
    "reference_error_chosen",
    "reference_error_rejected",
)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker; `config["job"]` is a TrainJob. Returns a summary."""
    return Training(config["job"]).run()


class Training:
    """One worker's share of a training."""

    def __init__(self, job: TrainJob) -> None:
        self.job, settings = job, job.settings
        self.best = BestWeights(job.run, job.stage)
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, int(settings.num_cpus_per_worker)))
        encodes = job.latents is None or bool(settings.sample_prompts)
        self.model = load_model(
            settings, str(self.device), parts="all" if encodes else "denoiser", seed=job.seed
        )
        named = {n: p for n, p in self.model.denoiser.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.optimizer = build_optimizer(
            self.parameters, settings.optimizer, base_learning_rate(settings)
        )
        self.averaged = AveragedWeights(named, settings.ema_decay) if settings.ema_decay else None
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.model.dtype == torch.float16
        )
        self.state = self._restore()
        self.schedule = build_schedule(self.optimizer, settings, self.state.step)
        self.policy = self._wrap()
        self.loss = PairLoss(self.model, settings.loss)
        self.gradients = GradientStep(
            self.loss, self.policy, self.scaler, settings.per_device_batch_size
        )
        pairs = read_trained_pairs(job.run, job.stage, TRAIN)
        self.stream = PairStream(
            job, pairs, open_reader(job, pairs, self.model), self.model, self.rank, self.num_workers
        )
        held_out = read_trained_pairs(job.run, job.stage, VALIDATION)
        self.validation = (
            Validation(job, held_out, self.model, self.rank, self.num_workers)
            if len(held_out)
            else None
        )
        self.sums: Metrics = {}
        self.bad_pairs = dict(self.state.bad_pairs)
        self.spare: PairBatch | None = None
        self.out_of_time = False
        self.log = self._open_log() if self.rank == 0 else None

    # Set-up

    def _restore(self) -> TrainState:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and self.job.resume_from is not None:
            checkpoint = ray.train.Checkpoint(
                self.job.resume_from, filesystem=self.job.run.filesystem
            )
        if checkpoint is None:
            return TrainState()
        with checkpoint.as_directory() as folder:
            state = load_checkpoint(Path(folder), self.model, self.optimizer, self.averaged)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        if state.best_step is not None and not self.best.exists(state.best_step):
            # This checkpoint is not the newest that was ever written: its best is gone.
            state.best_step = state.best_accuracy = None
        return state

    def _wrap(self) -> torch.nn.Module:
        if self.num_workers == 1:
            return self.model.denoiser
        return DistributedDataParallel(
            self.model.denoiser,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )

    def _open_log(self) -> MetricLog:
        job = self.job
        trackers = build_trackers(
            job.settings.loggers, job.run, job.stage, job.identity, job.settings.model_dump()
        )
        return MetricLog(job.run, job.stage, self.state.step, trackers)

    # The loop

    def run(self) -> dict[str, Any]:
        """Train to the last step, or to the early stop, and write the model."""
        settings, state = self.job.settings, self.state
        started, before = time.monotonic(), state.seconds
        resumed_at = state.step
        stop_at = self.job.pause_at or settings.max_steps
        inputs = Prefetcher(self.stream.steps(state.step, stop_at), PREFETCHED_STEPS)
        try:
            while state.step < stop_at and not state.stopped_early and self._may_go_on():
                self._step(next(inputs), rehearse=state.step < resumed_at + REHEARSED_STEPS)
                state.step += 1
                state.seconds = before + time.monotonic() - started
                last = state.step == stop_at
                if last or state.step % settings.log_every == 0:
                    self._log_step()
                if last or state.step % settings.validation_every == 0:
                    with self._averages():
                        self._validate()
                        self._draw_samples()
                if last or state.stopped_early or state.step % settings.checkpoint_every == 0:
                    self._checkpoint()
        finally:
            inputs.close()
        if not self.out_of_time:
            self._write_model()
        if self.log is not None:
            self.log.close()
        return self._summary()

    def _may_go_on(self) -> bool:
        """Whether there is time for one more step, which the first worker decides for all."""
        asked = self.job.may_go_on
        if asked is None:
            return True
        refused = float(self.rank == 0 and not asked())
        if self.num_workers > 1:
            refused = float(self._reduce(torch.tensor([refused], device=self.device))[0])
        self.out_of_time = refused > 0
        return not self.out_of_time

    def _step(self, inputs: StepInputs, *, rehearse: bool) -> None:
        started = time.monotonic()
        # Dropout inside adapters, if any, is all that draws from torch's own state.
        torch.manual_seed(hash((self.job.seed, self.state.step, self.rank)))
        self.bad_pairs |= {str(pair): reason for pair, reason in inputs.bad.items()}
        batches = inputs.batches
        num_pairs = self._count_pairs(inputs.num_pairs)
        weight = self.num_workers / num_pairs if num_pairs else 0.0
        if not batches:
            self.spare = self.spare or weightless_batch(self.model)
            batches, weight = [self.spare], 0.0
        if rehearse and self.device.type == "cuda":
            self.gradients.rehearse(batches[0])
        metrics = self.gradients.run(batches, weight)
        if num_pairs:
            metrics["gradient_norm"] = self._update()
        # Sums over workers of values weighted by W/G are W means: in every sum alike.
        metrics = {name: value.detach().float() for name, value in metrics.items()}
        metrics["steps"] = torch.ones((), device=self.device)
        metrics["pairs"] = torch.full((), num_pairs / self.num_workers, device=self.device)
        metrics["seconds"] = torch.full((), time.monotonic() - started, device=self.device)
        add_metrics(self.sums, metrics)
        self.state.pairs_seen += num_pairs

    def _count_pairs(self, mine: int) -> int:
        """Pairs of this step over all workers; known without asking where none can be bad."""
        if self.job.latents is not None:
            return self.job.settings.global_batch_size
        return round(float(self._reduce(torch.tensor([float(mine)], device=self.device))[0]))

    def _update(self) -> torch.Tensor:
        """Clip, step, schedule, average; the norm before clipping."""
        settings = self.job.settings.optimizer
        self.scaler.unscale_(self.optimizer)
        limit = settings.max_grad_norm if settings.max_grad_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.learning_rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        if self.averaged is not None:
            self.averaged.update()
        return norm

    # Numbers

    def _reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the workers."""
        if self.num_workers > 1:
            dist.all_reduce(values)
        return values

    def _take_sums(self) -> dict[str, float]:
        """Sums since the last line over all workers, with those of the checkpoint; start anew."""
        names = sorted(self.sums)
        totals = dict(self.state.totals)
        if names:
            reduced = self._reduce(torch.stack([self.sums[name].double() for name in names]))
            for name, value in zip(names, reduced.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
        self.sums, self.state.totals = {}, {}
        return totals

    def _log_step(self) -> None:
        totals = self._take_sums()
        weight = totals.get("pair_weight") or 0.0
        line: Line = {"kind": "train", "optimizer_step": self.state.step}
        if weight:
            line |= {name: totals[name] / weight for name in METRIC_NAMES}
            self._check_finite(line["loss"])
        if self.log is None:
            return
        line["gradient_norm"] = totals.get("gradient_norm", float("nan")) / totals["steps"]
        line["learning_rate"] = getattr(self, "learning_rate", 0.0)
        line["pairs_per_second"] = totals["pairs"] / (totals["seconds"] / self.num_workers)
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        line["gpu_memory_bytes"] = memory
        line["pairs_seen"] = self.state.pairs_seen
        line["seconds"] = self.state.seconds
        self.log.log(line)

    def _check_finite(self, loss: float) -> None:
        """All workers stop where the loss is lost; float16 skips such steps by itself."""
        if not math.isfinite(loss) and not self.scaler.is_enabled():
            raise RuntimeError(
                f"the loss is {loss} at optimizer step {self.state.step}: the training diverged; "
                "lower train.optimizer.learning_rate or train.loss.dpo_beta, or lengthen "
                "train.optimizer.warmup_steps"
            )

    def _averages(self) -> contextlib.AbstractContextManager[None]:
        return self.averaged.swapped_in() if self.averaged else contextlib.nullcontext()

    def _validate(self) -> None:
        """Measure the held-out pairs, keep the best weights, decide whether to stop."""
        if self.validation is None:
            return
        settings, state = self.job.settings, self.state
        measured = self.validation.measure(self.loss, self.gradients.batch_size)
        names = sorted(measured)
        sums = self._reduce(torch.stack([measured[n].double() for n in names]).to(self.device))
        values = dict(zip(names, sums.tolist(), strict=True))
        count = values["pair_weight"]
        if not count:
            raise RuntimeError(
                "no held-out pair can be used, see quarantine/ for the reasons: mend the "
                "images, raise train.validation_pairs, or set it to 0"
            )
        line: Line = {"kind": "validation", "optimizer_step": state.step, "pairs": int(count)}
        line |= {name: values[name] / count for name in METRIC_NAMES}
        accuracy = line["implicit_accuracy"]
        if state.best_accuracy is None or accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            state.validations_since_best = 0
            if self.rank == 0:
                self.best.save(state.step, self.model.trainable_state())
        else:
            state.validations_since_best += 1
        patience = settings.early_stop_patience
        state.stopped_early = patience is not None and state.validations_since_best >= patience
        if self.log is not None:
            self.log.log(line)

    def _draw_samples(self) -> None:
        prompts = self.job.settings.sample_prompts
        if not prompts:
            return
        mine = range(self.rank, len(prompts), self.num_workers)
        draw_samples(self.job, self.model, self.state.step, mine)
        self._reduce(torch.zeros(1, device=self.device))  # until everyone has drawn
        if self.log is not None:
            self.log.log_samples(self.state.step, self.state.step)

    # Files

    def _checkpoint(self) -> None:
        state = self.state
        state.totals = self._take_sums()
        state.scaler = self.scaler.state_dict()
        state.bad_pairs = self._all_bad_pairs()
        metrics = {"optimizer_step": state.step}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        if not self.job.keeps_own_checkpoints or state.step == self.job.pause_at:
            self._save_checkpoint(metrics)
        # Only now: an older checkpoint may need the old best.
        self.best.drop_all_but(state.best_step)

    def _save_checkpoint(self, metrics: dict[str, Any]) -> None:
        state = self.state
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            save_checkpoint(Path(folder), state, self.model, self.optimizer, self.averaged)
            assert self.log is not None
            self.log.write()
            if self.job.keeps_own_checkpoints:
                keep_checkpoint(self.job.run, self.job.stage, state.step, Path(folder))
            else:
                ray.train.report(
                    metrics,
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                    checkpoint_dir_name=checkpoint_name(state.step),
                )

    def _all_bad_pairs(self) -> dict[str, str]:
        if self.job.latents is not None or self.num_workers == 1:
            return dict(self.bad_pairs)
        gathered: list[Any] = [None] * self.num_workers
        dist.all_gather_object(gathered, self.bad_pairs)
        return {pair: reason for of_worker in gathered for pair, reason in of_worker.items()}

    def _write_model(self) -> None:
        """Rank 0 writes the best weights, where some were held out, else the last (averaged)."""
        if self.rank != 0:
            return
        weights: Mapping[str, torch.Tensor] | None = None
        if self.state.best_step is not None:
            weights = self.best.load(self.state.best_step)
        elif self.averaged is not None:
            weights = self.averaged.averages
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            self.model.save(Path(folder), weights)
            upload_folder(Path(folder), self.job.run, self.job.stage, PARTIAL_MODEL)

    def _summary(self) -> dict[str, Any]:
        state = self.state
        best = {"implicit_accuracy": state.best_accuracy, "optimizer_step": state.best_step}
        return {
            "family": self.model.family,
            "optimizer_steps": state.step,
            "pairs_seen": state.pairs_seen,
            "best_validation": best if state.best_step is not None else None,
            "stopped_early": state.stopped_early,
            "out_of_time": self.out_of_time,
            "training_seconds": state.seconds,
            "num_workers": self.num_workers,
            "device": self.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "per_device_batch_size": self.gradients.batch_size,
            "trained_parameters": sum(p.numel() for p in self.parameters),
            "bad_pairs": state.bad_pairs,
            "last": [line for line in self.log.lines if line["kind"] == "train"][-1:]
            if self.log is not None
            else [],
        }
