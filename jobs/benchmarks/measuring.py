"""Time and memory of process trees, and how results are printed."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from fifa_ray.run_dir import package_versions

MEGABYTE = 1e6


def say_machine() -> None:
    """Print what the figures below were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    click.echo(f"{os.cpu_count()} cores of {model}; {versions}")


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """`median (minimum to maximum)` of repeated measurements."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall clock that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass
class Peak:
    """Largest proportional set size seen, in bytes: shared pages count once over all processes."""

    total: int = 0
    by_name: dict[str, int] = field(default_factory=dict)


@contextmanager
def peak_memory(
    is_mine: Callable[[int, str], bool], *, each: bool = False, every_seconds: float = 0.5
) -> Iterator[Peak]:
    """Sample the memory of the processes that `is_mine(pid, command line)` accepts.

    Their sum, or with `each` the largest single one.
    """
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(every_seconds):
            sample: dict[str, int] = {}
            for pid, command in _processes():
                if is_mine(pid, command):
                    name = _short_name(pid, command)
                    size = _proportional_bytes(pid)
                    sample[name] = (
                        max(sample.get(name, 0), size) if each else sample.get(name, 0) + size
                    )
                    largest = peak.by_name.get(name, 0)
                    peak.by_name[name] = max(largest, sample[name])
            peak.total = max(peak.total, sum(sample.values()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if command:
                yield int(entry.name), command


def _short_name(pid: int, command: str) -> str:
    if pid == os.getpid():
        return "driver"
    return command.split()[0].rpartition("/")[2].split("(")[0]


def _proportional_bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def descendants(root: int) -> set[int]:
    """Process ids of a process and all its children, now."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue
    found, grew = {root}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        grew = bool(more)
        found |= more
    return found


def is_own_process() -> Callable[[int, str], bool]:
    """For `peak_memory`: this process and its descendants, looked up once a second."""
    mine: set[int] = set()
    looked = 0.0

    def is_mine(pid: int, _: str) -> bool:
        nonlocal mine, looked
        if time.monotonic() - looked > 1:
            mine, looked = descendants(os.getpid()), time.monotonic()
        return pid in mine

    return is_mine


def cpu_seconds() -> float:
    """CPU time of this process and its living descendants."""
    ticks = 0
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
