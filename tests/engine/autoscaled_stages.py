"""Stages on a cluster that grows from nothing, in a process of their own; prints what happened.

python autoscaled_stages.py ADDRESS SOURCE RUN_DIR
"""

import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable

import ray

from fifa_ray.config import ConfigError, load_config
from fifa_ray.engine import nodes
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.ingest import run_ingest
from fifa_ray.engine.node_seconds import group_of
from fifa_ray.engine.rewards import run_rewards
from fifa_ray.logs import set_up_logging
from fifa_ray.run_dir import RunDir

LONGEST_SECONDS = 60.0


def groups() -> list[str]:
    return sorted(group_of(node) for node in nodes.alive_nodes())


def until(happened: Callable[[], bool]) -> bool:
    """Whether it happens soon enough."""
    started = time.monotonic()
    while time.monotonic() - started < LONGEST_SECONDS:
        if happened():
            return True
        time.sleep(0.25)
    return False


def groups_seen_by(work: Callable[[], object]) -> list[str]:
    """Groups with a node at any time while work runs."""
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            seen.update(groups())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return sorted(seen)


def refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except ConfigError as error:
        return str(error)
    return ""


def exported() -> list[str]:
    """Our lines of what the node of this process offers to Prometheus."""
    (head,) = [n for n in nodes.alive_nodes() if "node:__internal_head__" in n["Resources"]]
    url = f"http://{head['NodeManagerAddress']}:{head['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url, timeout=5).read().decode()
    return [line for line in text.splitlines() if line.startswith("ray_fifa_")]


def main(address: str, source: str, run_dir: str) -> None:
    # The fake provider's nodes go within a second: no need to be as patient as with a cloud's.
    nodes.PATIENCE_SECONDS = 3.0
    set_up_logging("json")
    actors = {"max_actors": 1, "label_selector": {"fifa-ray/work": "reward"}}
    values = {
        "run_dir": run_dir,
        "ingest": {"source": source, "format": "generic"},
        "rewards": [{"kind": "fitted", "options": {"l2": 30.0}, "actors": actors}],
        "ray": {"address": address, "wait_seconds": LONGEST_SECONDS},
    }
    config = load_config(values)
    run = RunDir(run_dir)
    connect(config.ray)
    happened: dict[str, object] = {"before": groups()}
    happened["during_ingest"] = groups_seen_by(lambda: run_ingest(run, config))
    happened["during_rewards"] = groups_seen_by(lambda: run_rewards(run, config))
    happened["reward_node_went"] = until(lambda: "reward" not in groups())
    too_much = load_config(values, ["rewards.0.name=other", "rewards.0.actors.num_gpus=4"])
    happened["refusal"] = refusal(lambda: run_rewards(run, too_much))
    until(lambda: any(line.startswith("ray_fifa_stage_seconds_total") for line in exported()))
    happened["metrics"] = exported()
    ray.shutdown()
    print(json.dumps(happened))


if __name__ == "__main__":
    main(*sys.argv[1:])
