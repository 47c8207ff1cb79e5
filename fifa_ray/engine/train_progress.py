"""Progress of a training as log lines of the driver, read from the metrics that rank 0 writes."""

import logging
import sys
import threading
from types import TracebackType

from fifa_ray.engine import metrics
from fifa_ray.engine.observed import run_name
from fifa_ray.engine.progress import format_seconds
from fifa_ray.engine.train_metrics import Line, read_metrics
from fifa_ray.run_dir import RunDir

logger = logging.getLogger("fifa_ray.progress")


class TrainProgress:
    """Says every few seconds where a training is, while the block runs."""

    def __init__(self, run: RunDir, stage: str, max_steps: int) -> None:
        self.run, self.stage, self.max_steps = run, stage, max_steps
        self.tags = {"run": run_name(run), "stage": stage}
        self.interval_seconds = 3.0 if sys.stderr.isatty() else 15.0
        self.said: dict[str, int] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "TrainProgress":
        self.said = {line["kind"]: line["optimizer_step"] for line in self._lines()}
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ended.set()
        self.thread.join(30)

    def _watch(self) -> None:
        while not self.ended.wait(self.interval_seconds):
            self._say()
        self._say()

    def _say(self) -> None:
        newest: dict[str, Line] = {line["kind"]: line for line in self._lines()}
        for kind, line in newest.items():
            if self.said.get(kind) != line["optimizer_step"]:
                self.said[kind] = line["optimizer_step"]
                # A thread has no log context of its own.
                logger.info("%s: %s", self.stage, describe(line, self.max_steps), extra=self.tags)
                if "pairs_per_second" in line:
                    metrics.show("fifa_rows_per_second", line["pairs_per_second"], **self.tags)

    def _lines(self) -> list[Line]:
        try:
            return read_metrics(self.run, self.stage)
        except (OSError, ValueError):  # an object store between two versions; the next look sees it
            return []


def describe(line: Line, max_steps: int) -> str:
    """One line of metrics as text."""
    step = line["optimizer_step"]
    text = f"step {step:,} of {max_steps:,}"
    if line["kind"] == "validation":
        return (
            f"{text}, held out: implicit accuracy {line['implicit_accuracy']:.3f}, "
            f"loss {line['loss']:.4f} on {line['pairs']:,} pairs"
        )
    text += (
        f", loss {line['loss']:.4f}, implicit accuracy {line['implicit_accuracy']:.3f}, "
        f"{line['pairs_per_second']:.1f} pairs/s"
    )
    if step < max_steps and line["seconds"] > 0:
        text += f", {format_seconds(line['seconds'] / step * (max_steps - step))} left"
    return text
