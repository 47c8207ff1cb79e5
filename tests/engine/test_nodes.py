"""Waiting for nodes and counting them: the rules alone, then on Ray's fake autoscaling cluster.

That cluster is one of its own, since the shared session's cannot grow. Ray's AutoscalingCluster
would stop every Ray on this machine, and it and the provider "fake_multinode" need a file that the
wheel lacks: so it is `ray start`, and the provider as an external one.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG
from ray.core.generated import autoscaler_pb2 as messages
from test_fit_reward import write_dataset

from fifa_ray.config import ConfigError
from fifa_ray.engine.cluster import reserved_seconds
from fifa_ray.engine.node_seconds import GROUP_LABEL, integrated
from fifa_ray.engine.nodes import (
    Need,
    is_infeasible,
    launching,
    matches,
    need_of,
    room,
    wait_for_nodes,
)
from fifa_ray.run_dir import Manifest, RunDir

HERE = Path(__file__).parent


def node(labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {"Labels": labels or {}, "Resources": resources}


# The rules


def test_room_counts_whole_workers_on_each_node():
    small, gpu = node(CPU=3.0), node({"group": "gpu"}, CPU=8.0, GPU=2.0)
    assert room([small, gpu], need_of(num_cpus=2.0)) == 1 + 4
    assert room([small, gpu], need_of(num_cpus=2.0, num_gpus=0.5)) == 4
    assert room([small, gpu], need_of(num_cpus=2.0, num_gpus=0.25)) == 4  # cores run out first
    assert room([small, gpu], need_of(num_cpus=0.1)) == 30 + 80
    only = need_of(num_cpus=1.0, label_selector={"group": "gpu"})
    assert room([small, gpu], only) == 8
    assert room([], only) == 0


@pytest.mark.parametrize(
    ("selector", "matching"),
    [
        ({}, ["a", "b", None]),
        ({"group": "a"}, ["a"]),
        ({"group": "!a"}, ["b", None]),
        ({"group": "in(a, b)"}, ["a", "b"]),
        ({"group": "!in(a, b)"}, [None]),
        ({"group": "a", "zone": "1"}, []),
    ],
)
def test_labels_match_as_ray_says(selector, matching):
    found = [g for g in ("a", "b", None) if matches({"group": g} if g else {}, selector)]
    assert found == matching


def test_node_seconds_are_the_area_under_the_counts():
    samples = [(10.0, {"cpu": 1}), (12.5, {"cpu": 2, "gpu": 1}), (20.0, {"cpu": 2})]
    assert integrated(samples, until=21.0) == {"cpu": 2.5 + 15 + 2, "gpu": 7.5}
    assert integrated(samples[:1], until=10.0) == {"cpu": 0.0}
    assert integrated([], until=5.0) == {}


def test_a_pool_reserves_its_largest_size_or_what_the_cluster_had():
    need = need_of(num_cpus=2.0, num_gpus=0.5)
    had = {"CPU": 1_000.0, "GPU": 100.0}  # room for 200 actor-seconds, by its GPUs
    assert reserved_seconds(need, 3, 10.0, had) == {"cpu_seconds": 60.0, "gpu_seconds": 15.0}
    assert reserved_seconds(need, 30, 10.0, had) == {"cpu_seconds": 400.0, "gpu_seconds": 100.0}
    assert reserved_seconds(need, None, 10.0, had) == {"cpu_seconds": 400.0, "gpu_seconds": 100.0}


def test_what_cannot_be_served_now_is_refused_only_when_nothing_is_starting():
    state = messages.AutoscalingState()
    state.infeasible_gang_resource_requests.add(details="abc123:PACK|PENDING")
    assert is_infeasible(state, "abc123")
    assert not is_infeasible(state, "def456")
    state.pending_instance_requests.add(ray_node_type_name="gpu", count=2)
    state.pending_instances.add(ray_node_type_name="gpu")
    assert launching(state) == 3
    assert not is_infeasible(state, "abc123")


def test_a_need_says_what_it_is():
    need = need_of(num_cpus=0.5, num_gpus=1, label_selector={"market": "spot"}, count=2)
    assert str(need) == "2 times 0.5 CPU and 1 GPU (labels market=spot)"


def test_a_cluster_without_autoscaler_says_at_once_what_it_lacks(ray_session):
    wait_for_nodes("stage", need_of(num_cpus=2.0), wait_seconds=60)
    with pytest.raises(ConfigError, match="embed needs 1 CPU and 1 GPU, there is room for 0 of 1"):
        wait_for_nodes("embed", need_of(num_cpus=1.0, num_gpus=1.0), wait_seconds=60)
    with pytest.raises(ConfigError, match="Its nodes now: 1 of 2 CPU"):
        wait_for_nodes("embed", Need({"CPU": 1.0}, {"ray.io/node-group": "gpus"}), wait_seconds=60)


def test_work_of_others_is_waited_for_as_long_as_allowed(ray_session):
    @ray_session.remote(num_cpus=2)
    class Holder:
        def here(self) -> None:
            pass

    holder = Holder.remote()
    ray_session.get(holder.here.remote())
    with pytest.raises(RuntimeError, match=r"waited 0:0\d for 1 CPU"):
        wait_for_nodes("embed", need_of(num_cpus=1.0), wait_seconds=0)
    ray_session.kill(holder)
    wait_for_nodes("embed", need_of(num_cpus=1.0), wait_seconds=60)


# A cluster that grows from nothing


class Happened(NamedTuple):
    """What `autoscaled_stages.py` saw, its log lines and those of its workers."""

    seen: dict[str, Any]
    lines: list[dict[str, Any]]
    worker_lines: list[dict[str, Any]]
    manifests: dict[str, Manifest]


@pytest.fixture(scope="module")
def autoscaled(tmp_path_factory) -> Iterator[Happened]:
    folder = tmp_path_factory.mktemp("autoscaled")
    source = write_dataset(folder / "data", corrupt={3, 5})
    # Short, since Ray keeps Unix sockets there.
    session = tempfile.mkdtemp(prefix="as", dir="/tmp")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    head = start_head(Path(session), port)
    try:
        arguments = [f"127.0.0.1:{port}", source, str(folder / "run")]
        script = [sys.executable, str(HERE / "autoscaled_stages.py"), *arguments]
        ran = subprocess.run(
            script, env=environment(), capture_output=True, text=True, timeout=200, check=False
        )
        assert ran.returncode == 0, ran.stderr
        logs = Path(session).glob("session_latest/logs/worker-*.err")
        yield Happened(
            json.loads(ran.stdout.splitlines()[-1]),
            json_lines(ran.stderr),
            [line for log in logs for line in json_lines(log.read_text())],
            RunDir(str(folder / "run")).manifests(),
        )
    finally:
        leader = psutil.Process(head.pid)
        family = [*leader.children(recursive=True), leader]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        shutil.rmtree(session, ignore_errors=True)


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def environment() -> dict[str, str]:
    return os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_enable_metrics_collection": "1",
        "RAY_metrics_report_interval_ms": "1000",
        # Of this machine alone, see `fifa_ray.engine.cluster`.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def start_head(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    """A head that runs no work; groups `cpu` and `reward` of one node each, none at first."""
    # Elsewhere the group is a label of its own accord; these nodes would all take the head's.
    groups = {
        name: {
            "resources": {"CPU": 1, "object_store_memory": 80_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
            "labels": {"fifa-ray/work": name, GROUP_LABEL: name},
        }
        for name in ("cpu", "reward")
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = BASE_READONLY_CONFIG | {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {"ray.head.default": head} | groups,
    }
    path = folder / "autoscaler.yaml"
    path.write_text(json.dumps(config))
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}",
        "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--num-cpus=0",
        "--object-store-memory=80000000", "--include-dashboard=false", "--disable-usage-stats",
        f"--autoscaling-config={path}",
    ]  # fmt: skip
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }
    with open(folder / "head.log", "wb") as log:
        return subprocess.Popen(command, env=environment() | fake, stdout=log, stderr=log)


def test_nodes_come_for_a_stage_and_go_after_it(autoscaled):
    seen = autoscaled.seen
    assert seen["before"] == ["ray.head.default"]
    assert "cpu" in seen["during_ingest"]
    assert "reward" not in seen["during_ingest"]
    assert "reward" in seen["during_rewards"]
    assert seen["reward_node_went"]
    rewards = autoscaled.manifests["rewards/pickscore"].details
    assert 0 < rewards["node_seconds"]["reward"] <= rewards["node_seconds"]["ray.head.default"]
    assert rewards["gpu_seconds"] == 0.0
    assert "reward" not in autoscaled.manifests["pairs"].details["node_seconds"]


def test_waiting_is_said_and_what_can_never_be_is_refused(autoscaled):
    messages_of = [line["message"] for line in autoscaled.lines]
    wanted = r"rewards/pickscore: waiting for a node with 1 CPU \(labels fifa-ray/work=reward\)"
    assert any(re.match(wanted, text) for text in messages_of), messages_of
    # num_gpus was left open: the cluster was asked, and has no such group.
    assert any("has no GPU and can add none" in text for text in messages_of)
    assert re.match(
        r"rewards/other needs 1 CPU and 4 GPU .*autoscaler has no group of nodes for it",
        autoscaled.seen["refusal"],
    )
    of_rewards = [line for line in autoscaled.lines if line.get("stage") == "rewards/pickscore"]
    assert {line["run"] for line in of_rewards} == {"run"}


def test_a_worker_says_which_part_lost_rows(autoscaled):
    put_aside = [line for line in autoscaled.worker_lines if "put aside" in line["message"]]
    (line,) = [line for line in put_aside if line["stage"] == "rewards/pickscore"]
    assert (line["run"], line["part"]) == ("run", "part-000000.parquet")
    assert line["level"] == "warning"
    assert "2 rows of part-000000.parquet are put aside: " in line["message"]


def test_prometheus_finds_what_the_manifests_say(autoscaled):
    values: dict[tuple[str, str, str], float] = {}
    for line in autoscaled.seen["metrics"]:
        name, tags, value = re.match(r"(\w+){(.*)} (\S+)", line).groups()
        tag = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if tag.get("run") == "run":
            rest = tag.get("reason") or tag.get("group") or ""
            values[name, tag["stage"], rest] = float(value)
    pairs, rewards = (autoscaled.manifests[s] for s in ("pairs", "rewards/pickscore"))
    stage = rewards.stage
    assert values["ray_fifa_rows_done_total", "pairs", ""] == pairs.rows_in
    assert values["ray_fifa_rows_done_total", stage, ""] == rewards.rows_in
    for reason, count in rewards.quarantined.items():
        assert values["ray_fifa_rows_quarantined_total", stage, reason] == count
    assert rewards.rows_quarantined == 2
    reserved = rewards.details["cpu_seconds"]
    assert values["ray_fifa_cpu_seconds_total", stage, ""] == pytest.approx(reserved)
    held = rewards.details["node_seconds"]["reward"]
    assert values["ray_fifa_node_seconds_total", stage, "reward"] == pytest.approx(held)
