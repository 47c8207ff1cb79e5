"""Ray Train's part of a training: which workers, and running them to the end."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch as train_torch

from fifa_ray.config import TrainConfig
from fifa_ray.engine.nodes import Need, check_possible, gpus_to_be_had, need_of
from fifa_ray.engine.train_inputs import TrainJob
from fifa_ray.engine.train_loop import train_worker
from fifa_ray.engine.train_progress import TrainProgress
from fifa_ray.engine.train_storage import CHECKPOINTS, mend_snapshot, newest_checkpoint

# Its names are those of Train V2 at run time, of V1 to a type checker.
_train: Any = ray.train


def trains_on_gpu(settings: TrainConfig, wait_seconds: float) -> bool:
    """`train.use_gpu`, or whether the cluster has GPUs or can add them."""
    if settings.use_gpu is not None:
        return settings.use_gpu
    return gpus_to_be_had(
        num_cpus=settings.num_cpus_per_worker,
        label_selector=settings.label_selector,
        wait_seconds=wait_seconds,
    )


def workers_need(settings: TrainConfig, use_gpu: bool) -> Need:
    """What training cannot begin without."""
    return need_of(
        num_cpus=settings.num_cpus_per_worker,
        num_gpus=1.0 if use_gpu else 0.0,
        label_selector=settings.label_selector,
        count=settings.min_workers or settings.num_workers,
    )


def no_workers() -> Any:
    """The calling process trains alone: what no workers at all mean to Ray Train."""
    return _train.ScalingConfig(num_workers=0)


def scaling_of(settings: TrainConfig, use_gpu: bool) -> Any:
    """Workers and their resources. Raises ConfigError where there can never be room for them."""
    need = workers_need(settings, use_gpu)
    check_possible(f"training/{settings.name}", need)
    workers: int | tuple[int, int] = settings.num_workers
    if settings.min_workers is not None and settings.min_workers < settings.num_workers:
        workers = (settings.min_workers, settings.num_workers)
    return _train.ScalingConfig(
        num_workers=workers,
        use_gpu=use_gpu,
        resources_per_worker=dict(need.resources),
        label_selector=dict(need.label_selector) or None,
    )


def fit(job: TrainJob, scaling: Any, use_gpu: bool) -> dict[str, Any]:
    """Run the workers to the end, restarting them as often as allowed; rank 0's summary."""
    settings, run = job.settings, job.run
    resume_from = (
        newest_checkpoint(run, job.stage)
        if job.keeps_own_checkpoints
        else mend_snapshot(run, job.stage)
    )
    job = replace(job, resume_from=resume_from)
    worker: Any = train_worker
    trainer = train_torch.TorchTrainer(
        worker,
        train_loop_config={"job": job},
        scaling_config=scaling,
        torch_config=train_torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=_train.RunConfig(
            name=CHECKPOINTS,
            storage_path=run.path(job.stage),
            storage_filesystem=run.filesystem,
            failure_config=_train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=_train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            worker_runtime_env=_worker_environment(),
        ),
    )
    progress = TrainProgress(run, job.stage, settings.max_steps)
    try:
        with progress, _interrupts_as_before():
            result: Any = trainer.fit()
    except _train.TrainingFailedError as error:
        raise RuntimeError(
            f"{job.stage} failed: {_cause(error)}. Its checkpoints are kept: the same command "
            "goes on from the newest"
        ) from error
    summary: dict[str, Any] = result.return_value
    return summary


def _worker_environment() -> dict[str, Any]:
    """On a cluster of this machine alone, workers talk over the loopback interface."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if addresses == {"127.0.0.1"}:
        return {"env_vars": {"GLOO_SOCKET_IFNAME": "lo"}}
    return {}


@contextlib.contextmanager
def _interrupts_as_before() -> Iterator[None]:
    """Ray Train takes over Ctrl-C, ends the process by SystemExit, and never gives it back."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread: nothing was taken over
            signal.signal(signal.SIGINT, before)


def _cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None)
    inner: Any = next(iter(failures.values())) if failures else error
    while getattr(inner, "cause", None) is not None:
        inner = inner.cause
    return f"{type(inner).__name__}: {inner}"
