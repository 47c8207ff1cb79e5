"""A Ray cluster of several nodes on this machine, and the processes on them that can be killed.

Each node has a loopback address of its own, so that a driver always joins the head, which runs no
work, and Ray takes the nodes for different machines.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from ray._common.utils import reset_ray_address
from ray._private import ray_constants
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 150_000_000
# A dead raylet is noticed after three seconds instead of half a minute.
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}
ENVIRONMENT = {
    # Bind to the addresses below alone, as `fifa_ray.engine.cluster` does for a local cluster.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}


class Nodes:
    """A head and `num_workers` worker nodes of one core each.

    Processes inherit `environment`; objects spill to the folder `spill`.
    """

    def __init__(
        self, num_workers: int, spill: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.spill = spill
        self.spill.mkdir(exist_ok=True)
        self.environment = ENVIRONMENT | dict(environment or {})
        self.added = 1
        with self._prepared():
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "node_ip_address": "127.0.0.1",
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": OBJECT_STORE_BYTES,
                    "object_spilling_directory": str(spill),
                    "_system_config": QUICK_TO_NOTICE,
                },
            )
            # Else a plain `ray.init()` of any other process on this machine would join it.
            reset_ray_address()
        self.restore(num_workers)

    @property
    def address(self) -> str:
        """What a driver joins."""
        return str(self.cluster.address)

    def add(self) -> None:
        """One more worker node."""
        self.added += 1
        with self._prepared():
            self.cluster.add_node(node_ip_address=f"127.0.0.{self.added}", num_cpus=1)

    def restore(self, num_workers: int) -> None:
        """Add nodes until so many are alive."""
        for node in list(self.cluster.worker_nodes):
            if not _is_alive(node):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < num_workers:
            self.add()

    def workers(self, *names: str, node: Any = None) -> list[psutil.Process]:
        """Processes that do a job's work, on any worker node or on one, oldest first.

        `names`: only those whose title holds one of them, such as the class of an actor.
        """
        found = []
        for of_node in [node] if node is not None else self.cluster.worker_nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [p for p in _raylet(of_node).children() if _is_worker(p, names)]
        return sorted(found, key=psutil.Process.create_time)

    def busiest(self, *names: str) -> Any:
        """A worker node with such a process, or None."""
        for node in self.cluster.worker_nodes:
            if self.workers(*names, node=node):
                return node
        return None

    def kill(self, node: Any) -> None:
        """The machine is gone: its raylet and all it ran, at once."""
        raylet = _raylet(node)
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        """End all nodes."""
        # Cluster.shutdown would also cut this process off from another Ray that it has joined.
        for node in [*self.cluster.worker_nodes, self.cluster.head_node]:
            self.cluster.remove_node(node, allow_graceful=False)

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
        os.environ.update(self.environment)
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before[0])
            ray_constants.ENABLE_RAY_CLUSTER = before[1]


def _raylet(node: Any) -> psutil.Process:
    (info,) = node.all_processes[ray_constants.PROCESS_TYPE_RAYLET]
    return psutil.Process(info.process.pid)


def _is_alive(node: Any) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return _raylet(node).status() != psutil.STATUS_ZOMBIE
    return False


def _is_worker(process: psutil.Process, names: tuple[str, ...]) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    if "Agent" in title:  # a raylet does not outlive its agents
        return False
    return any(name in title for name in names) if names else "ray::" in title
