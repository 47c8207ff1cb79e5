"""What every stage did and cost, how exact the neighbours are, and the settings of the run."""

import re
from typing import Any

import yaml

from fifa_ray.report.section import Absent, Section
from fifa_ray.report.spent import own_seconds
from fifa_ray.report.tables import RunTables
from fifa_ray.run_dir import Manifest

ORDER = ("pairs", "prompts", "rewards", "quality", "embeddings", "neighbors", "selected")
# Not every run sets out to do these.
LATER = ("training_data", "latents", "training", "evaluation", "tuning")
# Details that have a column or a section of their own.
SHOWN_ELSEWHERE = {
    "cpu_seconds", "gpu_seconds", "node_seconds", "work", "sets", "terms", "dropped",
    "reward_models",
}  # fmt: skip
USERINFO = re.compile(r"(?<=://)[^/\s@]+@")


def stages(tables: RunTables) -> Section:
    """Rows, seconds, rows per second and cost of every complete stage."""
    if not tables.manifests:
        raise Absent("manifests/ is not in this run: no stage is complete.")
    rows = [_stage_row(tables.manifests[n]) for n in sorted(tables.manifests, key=place_of_stage)]
    done = {row["stage"].split("/")[0] for row in rows}
    missing = [name for name in ORDER if name not in done]
    notes = (f"Not complete: {', '.join(missing)}.",) if missing else ()
    values = {
        "rows": rows,
        "seconds": sum(own_seconds(tables.manifests).values()),
        "longest": max(row["seconds"] for row in rows) or 1.0,
    }
    return Section(template="stages.html.j2", values=values, notes=notes)


def neighbors(tables: RunTables) -> Section:
    """Method, parameters, measured recall and entropy of the neighbour search."""
    details = tables.details("neighbors")
    if not details:
        raise Absent("The manifest of neighbors is not in this run: that stage has not run.")
    return Section(template="neighbors.html.j2", values={"details": details})


def settings(tables: RunTables) -> Section:
    """The full configuration and the versions; what could be a secret is masked."""
    text = tables.config_text
    source = "config.yaml of the run"
    if text is None:
        found = {name: m.config for name, m in sorted(tables.manifests.items()) if m.config}
        if not found:
            raise Absent("config.yaml is not in this run, and no manifest holds a configuration.")
        text, source = yaml.safe_dump(found, sort_keys=False, allow_unicode=True), "the manifests"
    versions: dict[str, set[str]] = {}
    for manifest in tables.manifests.values():
        for package, version in manifest.versions.items():
            versions.setdefault(package, set()).add(version)
    masked = yaml.safe_dump(
        without_secrets(yaml.safe_load(text)), sort_keys=False, allow_unicode=True
    )
    values = {
        "text": masked,
        "source": source,
        "versions": {package: ", ".join(sorted(v)) for package, v in sorted(versions.items())},
    }
    return Section(template="settings.html.j2", values=values)


def place_of_stage(stage: str) -> tuple[int, str]:
    """Sort key that puts names of stages in the order in which they run."""
    first = stage.split("/")[0]
    known = (*ORDER, *LATER)
    return known.index(first) if first in known else len(known), stage


def without_secrets(value: Any) -> Any:
    """A configuration with the values of env_vars and the userinfo of URLs masked."""
    if isinstance(value, dict):
        return {
            key: dict.fromkeys(inner, "***")
            if key == "env_vars" and isinstance(inner, dict)
            else without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    return USERINFO.sub("***@", value) if isinstance(value, str) else value


def _stage_row(manifest: Manifest) -> dict[str, Any]:
    details = {k: v for k, v in manifest.details.items() if k not in SHOWN_ELSEWHERE}
    return {
        "stage": manifest.stage,
        "rows_in": manifest.rows_in,
        "rows_out": manifest.rows_out,
        "rows_quarantined": manifest.rows_quarantined,
        "seconds": manifest.seconds,
        "rate": manifest.rows_in / manifest.seconds if manifest.seconds > 0 else None,
        "cpu_seconds": manifest.details.get("cpu_seconds"),
        "gpu_seconds": manifest.details.get("gpu_seconds"),
        "finished_at": manifest.finished_at,
        "fingerprint": manifest.fingerprint,
        "details": without_secrets(details),
    }
