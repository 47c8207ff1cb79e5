"""One chaos round: a filter on three nodes loses an actor, then a node, while its judge is flaky.

All other faults, and longer rounds: `python -m tests.chaos.rounds --all`. The cluster is its own,
since its nodes are killed.
"""

import contextlib
from collections.abc import Iterator

import pytest

from tests.chaos.faults import JUDGE, QUALITY, REWARDS, SCORER
from tests.chaos.rounds import Arena, arena
from tests.chaos.scene import Fault, Scene
from tests.chaos.strikes import kill_node, kill_worker


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("chaos"), num_pairs=400, num_prompts=60) as made:
        yield made


@contextlib.contextmanager
def flaky_judge(scene: Scene) -> Iterator[None]:
    scene.judge.set("flaky")
    yield


def lose_an_actor_then_a_node(scene: Scene) -> bool | None:
    judging = any(scene.run_dir.glob(QUALITY))
    strike = kill_node(JUDGE, replaced=False) if judging else kill_worker(SCORER)
    return strike(scene)


@pytest.mark.timeout(600)  # two runs, each with actors that load their models
def test_the_result_is_the_same_and_every_row_is_accounted_for(small):
    fault = Fault(
        name="an actor, a node and a flaky judge",
        workload="filter",
        redo=("rewards/tiny", "quality", "selected"),
        when=lambda scene: [(REWARDS, 1), (QUALITY, 1)],
        strike=lose_an_actor_then_a_node,
        prepare=flaky_judge,
    )
    played = small.play(fault, seed=0)
    assert not played.problems, (played.problems, played.attempts[-1].said)
    assert played.attempts[0].strikes == 2
    assert small.judge.failed > 0
