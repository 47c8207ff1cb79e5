"""The devices of one trial: taken under a lease of the ledger, held by one process at a time."""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray

from fifa_ray.config import FifaConfig
from fifa_ray.engine.tune_ledger import Purpose
from fifa_ray.engine.tune_worker import TrialWorker


class TrialDevices:
    """What a trial holds, and the worker on it.

    With `train.num_workers` above 1 training is done by workers of Ray Train on all devices, and
    drawing by one process on one of them; all are charged as long as the trial lasts.
    """

    def __init__(
        self, ledger: Any, config: FifaConfig, account: str, purpose: Purpose, *, use_gpu: bool
    ) -> None:
        """`account`: the name that the ledger charges."""
        self.ledger, self.config, self.use_gpu = ledger, config, use_gpu
        self.account, self.purpose = account, purpose
        self.lease: str | None = None
        self._worker: tuple[bool, Any] | None = None

    @property
    def alone(self) -> bool:
        """Whether one process does everything."""
        return self.config.train.num_workers == 1

    @property
    def num_starts(self) -> int:
        """Processes that one rung starts."""
        return 1 if self.alone else 2

    @property
    def is_working(self) -> bool:
        """Whether a worker is there."""
        return self._worker is not None

    def take(self, units: Mapping[str, float]) -> bool:
        """Take them for so much work, or keep them for so much more; False: not in the budget."""
        if self.lease is not None:
            return bool(ray.get(self.ledger.renew.remote(self.lease, dict(units))))
        devices = num_devices(self.config, use_gpu=self.use_gpu)
        self.lease = ray.get(
            self.ledger.open.remote(self.account, self.purpose, devices, dict(units))
        )
        return self.lease is not None

    def begin(self) -> None:
        """Count from now on, before there is a worker."""
        ray.get(self.ledger.start.remote(self.lease, 0.0))

    def worker(self, *, training: bool = False) -> Any:
        """The worker, started where there is none; one that only leads others for `training`."""
        leads = training and not self.alone
        if self._worker is not None and self._worker[0] == leads:
            return self._worker[1]
        self._end()
        settings = self.config.train
        gpus = 1.0 if self.use_gpu else 0.0
        actor: Any = (
            ray.remote(TrialWorker)
            .options(
                num_cpus=0 if leads else settings.num_cpus_per_worker,
                num_gpus=0 if leads else gpus,
                label_selector=dict(settings.label_selector or {}) or None,
                max_restarts=0,
            )
            .remote(
                self.ledger,
                self.lease,
                "cuda" if self.use_gpu else "cpu",
                max(1, int(settings.num_cpus_per_worker)),
                time.time(),
            )
        )
        self._worker = (leads, actor)
        try:
            seconds = ray.get(actor.ready.remote(), timeout=self.config.ray.wait_seconds)
        except ray.exceptions.GetTimeoutError:
            self.give_back()
            raise RuntimeError(
                f"tuning: no device for a trial within ray.wait_seconds="
                f"{self.config.ray.wait_seconds:g}; look at `ray status`, or raise it"
            ) from None
        ray.get(self.ledger.measure.remote("start", 1, seconds))
        return actor

    def measure(self, **parts: tuple[float, float]) -> None:
        """Tell the ledger what units of parts of the work took: part=(units, seconds)."""
        for part, (units, seconds) in parts.items():
            ray.get(self.ledger.measure.remote(part, units, seconds))

    def is_out_of_time(self) -> bool:
        """Whether a worker that died may have ended itself for its lease."""
        if self.lease is None:
            return False
        return bool(ray.get(self.ledger.remaining.remote(self.lease)) < 2.0)

    def give_back(self) -> None:
        """End the worker and the lease."""
        self._end()
        if self.lease is not None:
            ray.get(self.ledger.close.remote(self.lease))
            self.lease = None

    def _end(self) -> None:
        if self._worker is None:
            return
        _, actor = self._worker
        self._worker = None
        ray.kill(actor)
        # Its devices are free, and no longer paid for, when it is known to be dead.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.ready.remote(), timeout=10)


def num_devices(config: FifaConfig, *, use_gpu: bool) -> float:
    """Devices of one trial: GPUs, or the cores of its workers."""
    settings = config.train
    return settings.num_workers * (1.0 if use_gpu else settings.num_cpus_per_worker)
