"""What a run exports to Prometheus through Ray: one series for each tag, `ray_` in front.

Every node's agent, part of `ray[default]`, offers the series of the node's processes at its
`--metrics-export-port` (8080 in KubeRay; elsewhere see `MetricsExportPort` in `ray.nodes()`), with
or without a dashboard. They reach it every 10 seconds, so what the last stage of a run says as it
ends may be missed: manifests are the record. Where nobody scrapes, counting costs microseconds.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge

from fifa_ray.run_dir import Manifest

_STAGE_TAGS = ("run", "stage")

# name -> (kind, description, tags); Ray exports counters as ray_<name>_total, gauges as ray_<name>.
SERIES: dict[str, tuple[Literal["counter", "gauge"], str, tuple[str, ...]]] = {
    "fifa_rows_done": ("counter", "Rows that a stage finished.", _STAGE_TAGS),
    "fifa_rows_per_second": ("gauge", "Rows a second since the stage began.", _STAGE_TAGS),
    "fifa_rows_expected": ("gauge", "Rows that the stage has in all.", _STAGE_TAGS),
    "fifa_rows_quarantined": (
        "counter",
        "Rows that a finished stage put aside, by reason.",
        (*_STAGE_TAGS, "reason"),
    ),
    "fifa_judge_tokens": (
        "counter",
        "Tokens that the judge read (input) and wrote (output), where its engine says.",
        (*_STAGE_TAGS, "direction"),
    ),
    "fifa_cpu_seconds": ("counter", "Core-seconds that a finished stage reserved.", _STAGE_TAGS),
    "fifa_gpu_seconds": ("counter", "GPU-seconds that a finished stage reserved.", _STAGE_TAGS),
    "fifa_node_seconds": (
        "counter",
        "Seconds of alive nodes while a finished stage ran, by group of nodes.",
        (*_STAGE_TAGS, "group"),
    ),
    "fifa_stage_seconds": ("counter", "Seconds that a finished stage took.", _STAGE_TAGS),
}


def exported_name(name: str) -> str:
    """The name of a series as Prometheus sees it."""
    return f"ray_{name}_total" if SERIES[name][0] == "counter" else f"ray_{name}"


@cache
def _metric(name: str) -> Any:
    kind, description, tags = SERIES[name]
    return {"counter": Counter, "gauge": Gauge}[kind](name, description=description, tag_keys=tags)


def count(name: str, amount: float, **tags: str) -> None:
    """Add to a counter; nothing happens for 0, or without Ray."""
    if amount > 0 and ray.is_initialized():
        _metric(name).inc(amount, tags=tags)


def show(name: str, value: float, **tags: str) -> None:
    """Set a gauge; nothing happens without Ray."""
    if ray.is_initialized():
        _metric(name).set(value, tags=tags)


def count_stage(run: str, manifest: Manifest) -> None:
    """What a finished stage's manifest says: quarantine, core, GPU and node seconds."""
    tags = {"run": run, "stage": manifest.stage}
    details: Mapping[str, Any] = manifest.details
    for reason, rows in manifest.quarantined.items():
        count("fifa_rows_quarantined", rows, reason=reason, **tags)
    for name in ("cpu_seconds", "gpu_seconds"):
        count(f"fifa_{name}", details.get(name, 0.0), **tags)
    for group, seconds in details.get("node_seconds", {}).items():
        count("fifa_node_seconds", seconds, group=group, **tags)
    count("fifa_stage_seconds", manifest.seconds, **tags)
