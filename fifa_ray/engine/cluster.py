"""The Ray cluster: connecting to it, and how many actors a stage gets there."""

import logging
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray._private import ray_constants

from fifa_ray.config import ActorsConfig, RayConfig
from fifa_ray.engine.nodes import (
    Need,
    alive_nodes,
    gpus_to_be_had,
    may_grow,
    need_of,
    room,
    wait_for_nodes,
)
from fifa_ray.logs import FORMAT_VARIABLE, writes_json

logger = logging.getLogger(__name__)


def connect(config: RayConfig) -> None:
    """Join the configured cluster, or start a local one that listens on this machine alone.

    Does nothing when this process is connected already, so that a notebook keeps its cluster.
    """
    quiet_ray()
    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    runtime_env = _with_logging(config.runtime_env)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address and address != "local":
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False)
    else:
        _listen_on_loopback_only()
        # Ray's core warns on the terminal, as an error, of each actor pool that Ray Data makes.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_memory,
            runtime_env=runtime_env,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in its place
    resources = ray.cluster_resources()
    logger.info(
        "Ray %s: %g CPUs, %g GPUs, %.1f GB of object store",
        ray.__version__,
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        resources.get("object_store_memory", 0) / 1e9,
    )


def _with_logging(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """Workers write JSON lines to their log files where this process does."""
    if not writes_json():
        return runtime_env
    given = runtime_env or {}
    return given | {
        "env_vars": {FORMAT_VARIABLE: "json"} | given.get("env_vars", {}),
        "worker_process_setup_hook": "fifa_ray.logs.set_up_logging",
    }


def _listen_on_loopback_only() -> None:
    """Bind a local cluster to 127.0.0.1, as Ray itself does on macOS and Windows.

    Ray offers no argument for it on Linux, where it would open its ports on every interface. Its
    worker processes read the variable; this process, which imported Ray long ago, the constant.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def quiet_ray() -> None:
    """Ray's notices and warnings of what it is doing go nowhere; its errors stay."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def quiet_ray_data() -> None:
    """Our own progress lines replace Ray Data's bars, our own messages its tracebacks.

    Apart from `quiet_ray`, since ray.data brings pandas: 40 MB in each process that imports it.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What a transform raises reaches the driver as it was, which says it, not as a
    # UserCodeException without its cause.
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def gpus_per_actor(actors: ActorsConfig, *, wait_seconds: float) -> float:
    """GPUs of one actor: as configured, else 1 where the cluster has or can add one, else 0."""
    if actors.num_gpus is not None:
        return actors.num_gpus
    there = gpus_to_be_had(
        num_cpus=actors.num_cpus,
        label_selector=actors.label_selector,
        wait_seconds=wait_seconds,
    )
    return 1.0 if there else 0.0


def actor_pool(stage: str, actors: ActorsConfig, *, wait_seconds: float) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` for a stage's actor pool, once there is room for one.

    Without `max_actors` the pool may take what the cluster has now, or, where an autoscaler adds
    nodes, grow with it. Raises ConfigError where the cluster can never hold one of the actors,
    RuntimeError after `wait_seconds`.
    """
    from ray.data import ActorPoolStrategy

    need = actor_need(actors, wait_seconds=wait_seconds)
    wait_for_nodes(stage, need, wait_seconds=wait_seconds)
    largest = actors.max_actors
    if largest is None and not may_grow():
        largest = max(actors.min_actors, room(alive_nodes(), need))
    arguments: dict[str, Any] = {
        "compute": ActorPoolStrategy(min_size=actors.min_actors, max_size=largest),
        "num_cpus": actors.num_cpus,
    }
    if gpus := need.resources.get("GPU"):
        arguments["num_gpus"] = gpus
    if actors.label_selector:
        arguments["label_selector"] = dict(actors.label_selector)
    if actors.runtime_env:
        arguments["runtime_env"] = actors.runtime_env
    return arguments


def actor_need(actors: ActorsConfig, *, wait_seconds: float) -> Need:
    """What one actor of a pool asks of its node."""
    return need_of(
        num_cpus=actors.num_cpus,
        num_gpus=gpus_per_actor(actors, wait_seconds=wait_seconds),
        label_selector=actors.label_selector,
    )


def device_of(pool: Mapping[str, Any]) -> str:
    """ "cuda" for the actors of a pool that has GPUs, else "cpu"."""
    return "cuda" if pool.get("num_gpus") else "cpu"


def require_device(device: str) -> None:
    """Raise RuntimeError in an actor that was given a GPU which its torch cannot use."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"Ray gave this actor GPU {ray.get_gpu_ids()}, but torch {torch.__version__} on node "
            f"{ray.util.get_node_ip_address()} sees none; install a CUDA build of torch and the "
            "driver there, or set num_gpus=0 in this stage's actors"
        )


def tasks_in_flight() -> int:
    """How many one-core tasks to have submitted: more than there are cores, so that an autoscaler
    sees what is left to do and this number grows with the cluster.
    """
    return max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))


def small_tasks() -> int:
    """How many tasks that ask for no core may read and write the rows of a stage at a time."""
    return max(8 if may_grow() else 1, int(ray.cluster_resources().get("CPU", 1)) // 2)


def pool_need(pool: Mapping[str, Any]) -> Need:
    """What each actor of a pool of `actor_pool` asks for."""
    return need_of(
        num_cpus=pool["num_cpus"],
        num_gpus=pool.get("num_gpus", 0.0),
        label_selector=pool.get("label_selector"),
    )


def pool_size(pool: Mapping[str, Any]) -> int | None:
    """The most actors that a pool of `actor_pool` may have; None: as many as the cluster holds."""
    largest = pool["compute"].max_size
    return None if largest == float("inf") else int(largest)


def reserved_seconds(
    need: Need, largest: int | None, seconds: float, resource_seconds: Mapping[str, float]
) -> dict[str, float]:
    """`cpu_seconds` and `gpu_seconds` that `largest` actors hold, or as many of them as fit.

    What they may cost at most. resource_seconds: the core-seconds ("CPU") and GPU-seconds ("GPU")
    that the cluster had in those seconds.
    """
    fit = [resource_seconds.get(name, 0.0) / n for name, n in need.resources.items()]
    most = fit if largest is None else [*fit, seconds * largest]
    return {
        f"{name.lower()}_seconds": min(most, default=0.0) * need.resources.get(name, 0.0)
        for name in ("CPU", "GPU")
    }
