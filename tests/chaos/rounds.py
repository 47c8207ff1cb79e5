"""Chaos rounds: a fault strikes a filter or a training on a cluster of several nodes.

    python -m tests.chaos.rounds --all              every fault once, as a Markdown table
    python -m tests.chaos.rounds --fault driver     those whose name holds a word
    python -m tests.chaos.rounds --all --repeat 3   medians of three, with three seeds
    python -m tests.chaos.rounds --list

A round passes when the run ends as the fault says (at once, or after the same command was run
again), with the result of an undisturbed run to the last bit and every row accounted for. The same
seed strikes at the same places.
"""

import argparse
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fifa_ray.run_dir import RunDir
from tests.chaos.faults import FAULTS
from tests.chaos.judge_server import JudgeServer
from tests.chaos.nodes import Nodes
from tests.chaos.scene import NUM_NODES, Attempt, Fault, Scene, attempt, last_words
from tests.chaos.slow_store import CREDENTIALS
from tests.chaos.workloads import (
    differences,
    filter_config,
    filter_workload,
    train_config,
    train_workload,
    unaccounted_rows,
)

MAX_ATTEMPTS = 8
_TIMES = {1: "once", 2: "twice"}


@dataclass
class Round:
    """How one fault went; `problems` is empty where it went as it has to."""

    fault: Fault
    seed: int
    attempts: list[Attempt]
    seconds_lost: float
    problems: list[str]
    notes: list[str]
    # What attempts that stopped by themselves said.
    stops: list[str]


class Arena:
    """A cluster, a judge, and in `folder` the workloads and their undisturbed runs."""

    def __init__(self, folder: Path, *, num_pairs: int, num_prompts: int) -> None:
        self.folder = folder
        self.num_pairs, self.num_prompts = num_pairs, num_prompts
        # The same port again, since the judge's address is part of what its answers are kept by.
        port = folder / "judge-port"
        self.judge = JudgeServer(int(port.read_text()) if port.exists() else 0)
        port.write_text(str(self.judge.port))
        self.nodes = Nodes(NUM_NODES, folder / "spill", CREDENTIALS)
        self.rounds = 0

    def close(self) -> None:
        """End cluster and judge."""
        self.nodes.shutdown()
        self.judge.close()

    def play(self, fault: Fault, seed: int) -> Round:
        """One round on a whole cluster."""
        reference, undisturbed = self.reference(fault.workload)
        self.rounds += 1
        scene = self._scene(fault.workload, f"round-{self.rounds}", seed)
        _override(scene.config, fault.settings)
        with fault.prepare(scene):
            if fault.redo:
                undisturbed -= _take_back(reference, scene, fault.redo)
            if fault.when is None:
                fault.strike(scene)
            attempts, problems = _attempts(scene, fault)
            result = RunDir(scene.result or scene.config["run_dir"])
            if attempts[-1].code == 0:
                problems += unaccounted_rows(result)
                compare = fault.check or (lambda _, run, other: differences(run, other))
                problems += compare(scene, result, reference)
        self.judge.set("up")
        self.nodes.restore(NUM_NODES)
        lost = sum(a.seconds for a in attempts) - undisturbed
        stops = [last_words(a.said) for a in attempts[:-1] if a.code > 0]
        stops = [stop.replace(f"{scene.folder}/", "") for stop in stops]
        return Round(fault, seed, attempts, lost, problems, scene.notes, stops)

    def reference(self, workload: str) -> tuple[RunDir, float]:
        """The undisturbed run of a workload and its seconds; one that is there already is taken."""
        folder = self.folder / f"undisturbed-{workload}"
        seconds = folder / "seconds"
        if not seconds.exists():
            scene = self._scene(workload, folder.name, 0)
            done = attempt(scene, [], lambda scene: None)
            if done.code:
                raise RuntimeError(f"the undisturbed {workload} failed:\n{done.said}")
            seconds.write_text(f"{done.seconds:.1f}")
        return RunDir(str(folder / "run")), float(seconds.read_text())

    def _scene(self, workload: str, name: str, seed: int) -> Scene:
        data = self.folder / f"{workload}-data"
        made = (
            filter_workload(data, num_pairs=self.num_pairs, num_prompts=self.num_prompts)
            if workload == "filter"
            else train_workload(data, num_pairs=24)
        )
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = (
            filter_config(made, str(folder / "run"), self.judge.url)
            if workload == "filter"
            else train_config(made, str(folder / "run"))
        )
        return Scene(self.nodes, self.judge, made, folder, config, random.Random(seed))


def _attempts(scene: Scene, fault: Fault) -> tuple[list[Attempt], list[str]]:
    """Run the command until it succeeds, or as often as the fault allows; what went wrong."""
    moments = list(fault.when(scene)) if fault.when is not None else []
    wanted, attempts, problems = len(moments), [], []
    for _ in range(MAX_ATTEMPTS if fault.expected == "resumes" else 1):
        done = attempt(scene, moments, fault.strike)
        attempts.append(done)
        moments = moments[done.strikes :]
        if done.code == 0:
            break
        if done.code > 0 and not (fault.says and re.search(fault.says, done.said)):
            problems.append(f"it said: {last_words(done.said)}")
        if done.code > 0 and "Traceback" in done.said:
            problems.append("it ended with a traceback")
        fault.mend(scene)
    if attempts[-1].code != 0:
        problems.append(f"it did not finish: exit {attempts[-1].code}")
    if moments:
        problems.append(f"struck {wanted - len(moments)} of {wanted} times")
    if fault.expected == "resumes" and len(attempts) == 1:
        problems.append("it was expected to stop")
    return attempts, problems


def _take_back(reference: RunDir, scene: Scene, stages: Sequence[str]) -> float:
    """Begin from a copy of the undisturbed run without these stages; seconds that this saves."""
    shutil.copytree(reference.root, scene.run_dir, dirs_exist_ok=True)
    for stage in stages:
        RunDir(str(scene.run_dir)).invalidate(stage)
    return sum(m.seconds for stage, m in reference.manifests().items() if stage not in stages)


def _override(config: dict[str, Any], settings: Any) -> None:
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[last] = value


def describe(rounds: Sequence[Round]) -> str:
    """A row of the table: the rounds of one fault."""
    first = rounds[0]
    struck = sum(a.strikes for a in first.attempts)
    again = len(first.attempts) - 1
    what = [f"struck {struck} times"] if struck > 1 else []
    what += [f"stopped: “{stop}”" for stop in dict.fromkeys(first.stops)]
    what += [f"the same command {_TIMES.get(again, f'{again} times')} more"] if again else []
    what += first.notes
    problems = dict.fromkeys(problem for played in rounds for problem in played.problems)
    what += [f"**{problem}**" for problem in problems]
    if not problems and first.fault.check is None:
        what.append("same result")
    lost = statistics.median(played.seconds_lost for played in rounds)
    seeds = ", ".join(str(played.seed) for played in rounds)
    text = "; ".join(what).replace("|", "\\|")
    return f"| {first.fault.workload} | {first.fault.name} | {text} | {lost:+.0f} s | {seeds} |"


@contextmanager
def arena(keep: Path | None = None, **sizes: int) -> Iterator[Arena]:
    """An arena in a folder of its own, which is removed unless it is to be kept."""
    folder = keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(exist_ok=True)
    made = Arena(folder, **sizes)
    try:
        yield made
    finally:
        made.close()
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a round went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every fault")
    parser.add_argument("--fault", action="append", default=[], help="part of a fault's name")
    parser.add_argument("--list", action="store_true", help="names of the faults")
    parser.add_argument("--repeat", type=int, default=1, help="rounds per fault, default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the first round, default 0")
    parser.add_argument("--pairs", type=int, default=720, help="of the filter's dataset")
    parser.add_argument("--prompts", type=int, default=100, help="of the filter's dataset")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder to keep everything in, and go on in: its undisturbed runs are taken again",
    )
    given = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if given.all or any(part in f.name for part in given.fault)]
    if given.list or not chosen:
        print("\n".join(f"{fault.workload:7} {fault.name}" for fault in FAULTS))
        return 0 if given.list else 2
    failed = False
    print("| run | fault | what happened | time lost | seed |\n|---|---|---|---|---|", flush=True)
    with arena(given.keep, num_pairs=given.pairs, num_prompts=given.prompts) as made:
        for fault in chosen:
            if fault.needs_root and os.geteuid() != 0:
                print(f"| {fault.workload} | {fault.name} | skipped: needs root | | |", flush=True)
                continue
            seeds = range(given.seed, given.seed + given.repeat)
            rounds = [made.play(fault, seed) for seed in seeds]
            failed |= any(r.problems for r in rounds)
            print(describe(rounds), flush=True)
        for workload in sorted({fault.workload for fault in chosen}):
            print(f"\nUndisturbed {workload}: {made.reference(workload)[1]:.0f} s.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
