"""One chaos round: a filter on three nodes loses an actor, then a node, while its judge is flaky.

In a process of its own, since its nodes are killed and a Ray session lives in this one. All other
faults, and longer rounds: `python -m tests.chaos.rounds --all`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)  # two runs, each with actors that load their models
def test_the_result_is_the_same_and_every_row_is_accounted_for():
    command = [sys.executable, "-m", "tests.chaos.rounds", "--pairs=400", "--prompts=60"]
    done = subprocess.run(
        [*command, "--fault", "an actor, then a node lost"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "struck 2 times; same result" in done.stdout
