"""Progress of long work: rows, rows per second and time left, as log lines and as metrics."""

import logging
import sys
import time

from fifa_ray.engine import metrics
from fifa_ray.logs import context

logger = logging.getLogger("fifa_ray.progress")


class Progress:
    """Counts rows of one stage and says where it is every few seconds."""

    def __init__(self, stage: str, total: int, *, done: int = 0) -> None:
        self.stage, self.total, self.done = stage, total, done
        self.start_done = done
        self.started = self.last_said = time.monotonic()
        self.interval_seconds = 3.0 if sys.stderr.isatty() else 15.0
        self.tags = {"run": context().get("run", ""), "stage": context().get("stage", stage)}
        metrics.show("fifa_rows_expected", total, **self.tags)

    def advance(self, rows: int) -> None:
        """Count rows, and log a line if the last one is old enough."""
        self.done += rows
        now = time.monotonic()
        metrics.count("fifa_rows_done", rows, **self.tags)
        metrics.show("fifa_rows_per_second", self._rate(now), **self.tags)
        if now - self.last_said >= self.interval_seconds:
            self.last_said = now
            self._say(now)

    def close(self) -> None:
        """Say the final count and rate."""
        self._say(time.monotonic())
        metrics.show("fifa_rows_per_second", 0.0, **self.tags)

    def _rate(self, now: float) -> float:
        return (self.done - self.start_done) / max(now - self.started, 1e-9)

    def _say(self, now: float) -> None:
        rate = self._rate(now)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        until = f", {format_seconds(left)} left" if self.done < self.total else ""
        share = self.done / max(1, self.total)
        logger.info(
            "%s: %s of %s rows (%.0f%%), %.1f rows/s%s",
            self.stage,
            f"{self.done:,}",
            f"{self.total:,}",
            100 * share,
            rate,
            until,
        )


def format_seconds(seconds: float) -> str:
    """`1:02:03`, `2:03` or `unknown`."""
    if seconds == float("inf"):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
