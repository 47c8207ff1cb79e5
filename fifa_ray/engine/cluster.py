"""The Ray cluster: connecting to it, and how many actors a stage gets there."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray._private import ray_constants

from fifa_ray.config import ActorsConfig, RayConfig

logger = logging.getLogger(__name__)


def connect(config: RayConfig) -> None:
    """Join the configured cluster, or start a local one that listens on this machine alone.

    Does nothing when this process is connected already, so that a notebook keeps its cluster.
    """
    quiet_ray()
    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        ray.init(address=address, runtime_env=config.runtime_env, log_to_driver=False)
    else:
        _listen_on_loopback_only()
        # Ray's core warns on the terminal, as an error, of each actor pool that Ray Data makes.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_memory,
            runtime_env=config.runtime_env,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    resources = ray.cluster_resources()
    logger.info(
        "Ray %s: %g CPUs, %g GPUs, %.1f GB of object store",
        ray.__version__,
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        resources.get("object_store_memory", 0) / 1e9,
    )


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


def gpus_per_actor(actors: ActorsConfig) -> float:
    """The configured share, or 1 where the cluster has a GPU now, else 0."""
    if actors.num_gpus is not None:
        return actors.num_gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def actor_pool(actors: ActorsConfig) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` for a stage's actor pool.

    Without `max_actors` the pool may take what the cluster has now; on a cluster that grows from
    nothing, set it.
    """
    from ray.data import ActorPoolStrategy

    gpus = gpus_per_actor(actors)
    resources = ray.cluster_resources()
    room = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 0) / actors.num_cpus
    largest = actors.max_actors or max(actors.min_actors, int(room))
    arguments: dict[str, Any] = {
        "compute": ActorPoolStrategy(min_size=actors.min_actors, max_size=largest),
        "num_cpus": actors.num_cpus,
    }
    if gpus:
        arguments["num_gpus"] = gpus
    if actors.runtime_env:
        arguments["runtime_env"] = actors.runtime_env
    return arguments


def reserved_seconds(pool: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Core and GPU seconds that a pool of `actor_pool` holds at its largest: what it may cost."""
    if not pool:
        return {}
    actors = pool["compute"].max_size
    return {
        "cpu_seconds": seconds * actors * pool["num_cpus"],
        "gpu_seconds": seconds * actors * pool.get("num_gpus", 0.0),
    }
