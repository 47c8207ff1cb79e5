"""Metrics of a training: metrics.jsonl in the run, TensorBoard's view of it, and other trackers.

metrics.jsonl has a line for each logged step (`kind` train) and each validation (`kind`
validation). It is written whole every few seconds, so it is never cut in the middle of a line and
works on object stores; after a restart the lines of steps that are done again are dropped, and
TensorBoard's files are made anew from the rest.
"""

import io
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.fs as pafs
from PIL import Image

from fifa_ray.run_dir import RunDir

FILE = "metrics.jsonl"
# A longer file is written less often, so that writing stays a small share of the time.
SECONDS_PER_LINE = 0.002
MIN_SECONDS = 3.0

Line = dict[str, Any]


class Tracker(Protocol):
    """Another place that metrics go to."""

    def log(self, line: Line) -> None:
        """Take one line of metrics."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


def read_metrics(run: RunDir, stage: str) -> list[Line]:
    """All lines of a training's metrics so far; none where there is no file yet."""
    if not run.exists(stage, FILE):
        return []
    return [json.loads(line) for line in run.read_text(stage, FILE).splitlines()]


class MetricLog:
    """Writes the metrics of one training; the worker of rank 0 has it."""

    def __init__(self, run: RunDir, stage: str, step: int, trackers: "list[Tracker]") -> None:
        """`step`: optimizer steps done; lines of later ones are from an attempt that died."""
        self.run, self.stage, self.trackers = run, stage, trackers
        self.lines = [line for line in read_metrics(run, stage) if line["optimizer_step"] <= step]
        self.written = time.monotonic()
        self.tensorboard = TensorBoard(run, stage)
        for line in self.lines:
            self.tensorboard.log(line)
        self.log_samples(0, step)
        self.write()

    def log(self, line: Line) -> None:
        """Take one line, and write the file if the last time is long enough ago.

        Numbers that are not finite, which JSON does not have, become null.
        """
        line = {name: _finite(value) for name, value in line.items()}
        self.lines.append(line)
        for tracker in (self.tensorboard, *self.trackers):
            tracker.log(line)
        wait = max(MIN_SECONDS, SECONDS_PER_LINE * len(self.lines))
        if time.monotonic() - self.written > wait:
            self.write()

    def log_samples(self, first: int, last: int) -> None:
        """Show the sample images of these steps, which lie in samples/, on TensorBoard as well."""
        for name in self.run.list(self.stage, "samples", suffix=".png"):
            step, index = (int(part) for part in name.removesuffix(".png").split("-")[1::2])
            if not first <= step <= last:
                continue
            path = self.run.path(self.stage, "samples", name)
            with self.run.filesystem.open_input_stream(path) as stream:
                image = np.asarray(Image.open(io.BytesIO(stream.read()), formats=["PNG"]))
            self.tensorboard.add_image(f"samples/{index:03d}", image, step)

    def write(self) -> None:
        """Write everything that was logged."""
        self.run.write_text(
            "".join(json.dumps(line) + "\n" for line in self.lines), self.stage, FILE
        )
        self.tensorboard.flush()
        self.written = time.monotonic()

    def close(self) -> None:
        """Write the rest and end the trackers."""
        self.write()
        for tracker in (self.tensorboard, *self.trackers):
            tracker.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """TensorBoard event files under tensorboard/, written anew by each attempt."""

    def __init__(self, run: RunDir, stage: str) -> None:
        from tensorboardX import SummaryWriter

        self.run, self.folder = run, run.path(stage, "tensorboard")
        run.remove(stage, "tensorboard")
        self.is_local = isinstance(run.filesystem, pafs.LocalFileSystem)
        self.local = self.folder if self.is_local else tempfile.mkdtemp(prefix="tensorboard-")
        self.writer = SummaryWriter(self.local, max_queue=100, flush_secs=60)

    def log(self, line: Line) -> None:
        """Every number of a line becomes a scalar."""
        kind, step = line["kind"], line["optimizer_step"]
        for name, value in line.items():
            if name not in ("kind", "optimizer_step") and isinstance(value, int | float):
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def add_image(self, name: str, image: Any, step: int) -> None:
        """A uint8 (height, width, 3) image."""
        self.writer.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Make what was logged visible."""
        self.writer.flush()
        if not self.is_local:
            pafs.copy_files(self.local, self.folder, pafs.LocalFileSystem(), self.run.filesystem)

    def close(self) -> None:
        """End the files."""
        self.flush()
        self.writer.close()
        if not self.is_local:
            shutil.rmtree(self.local, ignore_errors=True)


def sample_name(step: int, index: int) -> str:
    """File name of the image of a sample prompt, by its index, after an optimizer step."""
    return f"step-{step:08d}-prompt-{index:03d}.png"


def check_loggers(loggers: tuple[str, ...]) -> None:
    """Raise RuntimeError naming the package to install for a logger that is not there."""
    from importlib.util import find_spec

    for name in loggers:
        if find_spec(name) is None:
            raise RuntimeError(
                f"train.loggers names {name}, but the package {name} is not installed: "
                f"pip install {name}, or leave it out (TensorBoard files are always written)"
            )


def build_trackers(
    loggers: tuple[str, ...], run: RunDir, stage: str, identity: str, config: dict[str, Any]
) -> "list[Tracker]":
    """The configured trackers; `identity` lets a resumed training go on in the same run there."""
    makers: dict[str, Callable[..., Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}
    return [makers[name](run, stage, identity, config) for name in loggers]


class _Wandb:
    def __init__(self, run: RunDir, stage: str, identity: str, config: dict[str, Any]) -> None:
        import wandb

        folder = Path(tempfile.mkdtemp(prefix="wandb-"))
        self.run = wandb.init(
            project="fifa-ray", name=stage, id=identity, resume="allow", config=config, dir=folder
        )

    def log(self, line: Line) -> None:
        values = {f"{line['kind']}/{k}": v for k, v in line.items() if isinstance(v, int | float)}
        self.run.log(values, step=line["optimizer_step"])

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    FILE = "mlflow_run.txt"

    def __init__(self, run: RunDir, stage: str, identity: str, config: dict[str, Any]) -> None:
        import mlflow

        self.client = mlflow.tracking.MlflowClient()
        if run.exists(stage, self.FILE):
            self.run_id = run.read_text(stage, self.FILE).strip()
        else:
            experiment = mlflow.set_experiment("fifa-ray")
            created = self.client.create_run(experiment.experiment_id, run_name=stage)
            self.run_id = created.info.run_id
            run.write_text(self.run_id, stage, self.FILE)
            for name, value in config.items():
                self.client.log_param(self.run_id, name, str(value)[:500])

    def log(self, line: Line) -> None:
        for name, value in line.items():
            if name != "optimizer_step" and isinstance(value, int | float):
                key = f"{line['kind']}/{name}"
                self.client.log_metric(self.run_id, key, value, step=line["optimizer_step"])

    def close(self) -> None:
        self.client.set_terminated(self.run_id)
