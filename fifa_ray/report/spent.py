"""What manifests say was spent: each second once, under the names that a plan uses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fifa_ray.run_dir import Manifest

# Made in the same pass as pairs/, with the same seconds in its manifest.
SAME_PASS = {"prompts": "pairs"}
# Stages that a training does first, and counts as its own, where they are not done before.
WITHIN_TRAINING = ("training_data/", "latents/")
# Manifests tell the second in which they were written.
CLOCK_SECONDS = 2.0


@dataclass
class Spent:
    """Of one stage, or of all of a kind: seconds, node-seconds by group, reserved seconds."""

    seconds: float = 0.0
    node_seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None
    counted: bool = True


def own_seconds(manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """Seconds of every stage without those of others that its manifest counts as well."""
    own = {name: manifest.seconds for name, manifest in manifests.items()}
    for name, other in SAME_PASS.items():
        if name in own and other in own:
            own[name] = 0.0
    for name, manifest in manifests.items():
        if not name.startswith("training/"):
            continue
        for inner, part in manifests.items():
            if inner.startswith(WITHIN_TRAINING) and _within(part, manifest):
                own[name] = max(0.0, own[name] - part.seconds)
    return own


def _within(part: Manifest, whole: Manifest) -> bool:
    try:
        ended, whole_ended = (datetime.fromisoformat(m.finished_at) for m in (part, whole))
    except ValueError:
        return False
    before = (whole_ended - ended).total_seconds()
    started_after = whole.seconds - before - part.seconds
    return before >= -CLOCK_SECONDS and started_after >= -CLOCK_SECONDS


def spent_by_stage(
    manifests: Mapping[str, Manifest], plan: Mapping[str, Any] | None
) -> dict[str, Spent]:
    """What was spent, under the names that a plan uses.

    The images of all models are one entry, and so are the scores of one reward model.
    """
    own = own_seconds(manifests)
    spent: dict[str, Spent] = {}
    for name, manifest in manifests.items():
        if name in SAME_PASS and SAME_PASS[name] in manifests:
            continue
        entry = spent.setdefault(planned_name(name, plan), Spent())
        share = own[name] / manifest.seconds if manifest.seconds else 1.0
        details = manifest.details
        entry.seconds += own[name]
        entry.counted &= bool(details.get("node_seconds"))
        for group, seconds in (details.get("node_seconds") or {}).items():
            entry.node_seconds[group] = entry.node_seconds.get(group, 0.0) + seconds * share
        for kind in ("cpu_seconds", "gpu_seconds"):
            if details.get(kind) is not None:
                setattr(entry, kind, (getattr(entry, kind) or 0.0) + details[kind] * share)
    return spent


def planned_name(stage: str, plan: Mapping[str, Any] | None) -> str:
    """The name of a manifest's stage in a plan."""
    first, _, rest = stage.partition("/")
    if first == "latents":
        return "latents"
    if plan is not None and stage == f"training/{plan.get('training')}":
        return "training"
    if first == "evaluation" and "/" in rest:
        kind = rest.partition("/")[0]
        return f"evaluation/{kind}" + ("" if kind == "images" else "/" + rest.rpartition("/")[2])
    return stage
