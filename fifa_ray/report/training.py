"""How trainings went: their curves laid over each other, and what they drew on the way."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from fifa_ray.report.charts import Row, Spec
from fifa_ray.report.gallery import thumbnail
from fifa_ray.report.model_charts import SIDES, binned, color_of, curves
from fifa_ray.report.section import NotPlanned, Section
from fifa_ray.report.tables import RunTables

METRICS = "metrics.jsonl"
LOG_2 = 0.6931471805599453
MAX_SAMPLE_STEPS = 4
MAX_SAMPLE_PROMPTS = 8
MAX_VALIDATIONS = 40
# One image of a training's own making; a larger file is not one.
MAX_SAMPLE_BYTES = 32_000_000
_SAMPLE = re.compile(r"step-(\d+)-prompt-(\d+)\.png")

Lines = dict[str, list[dict[str, Any]]]


def build(tables: RunTables) -> Section:
    """The section of all trainings of the run, complete or not."""
    found = {name: _read_metrics(tables, name) for name in training_names(tables)}
    lines = {name: rows for name, rows in found.items() if rows}
    if not lines:
        raise NotPlanned("training/ has no metrics.jsonl: nothing was trained.")
    names = list(lines)
    unfinished = [name for name in names if f"training/{name}" not in tables.manifests]
    notes = [f"{name} has not finished; its curves end where it is." for name in unfinished]
    charts, panels = _charts(lines, tables)
    values = {
        "trainings": [_summary(tables, name, lines[name], names) for name in names],
        "panels": panels,
        "validations": _validations(lines),
        "samples": [block for name in names if (block := _samples(tables, name))],
    }
    return Section(template="training.html.j2", values=values, charts=charts, notes=tuple(notes))


def training_names(tables: RunTables) -> list[str]:
    """Names of the folders of training/ that have metrics, sorted."""
    run = tables.run
    selector = pafs.FileSelector(run.path("training"), allow_not_found=True)
    infos = run.filesystem.get_file_info(selector)
    names = sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)
    return [name for name in names if run.exists("training", name, METRICS)]


def _read_metrics(tables: RunTables, name: str) -> list[dict[str, Any]]:
    text = tables.run.read_text("training", name, METRICS)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _of_kind(lines: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("kind", "train") == kind]


def _column(lines: Sequence[dict[str, Any]], value: str | Callable[[dict[str, Any]], Any]) -> Any:
    get = value if callable(value) else lambda line: line.get(value)
    return np.array([np.nan if (v := get(line)) is None else v for line in lines], np.float64)


def _curve(lines: Sequence[dict[str, Any]], value: Any, kind: str = "train") -> list[Row]:
    chosen = _of_kind(lines, kind)
    return binned(_column(chosen, "optimizer_step"), _column(chosen, value))


def _growth(side: str) -> Callable[[dict[str, Any]], float | None]:
    """How far the policy's error is above the reference's, in shares of the latter."""

    def of(line: dict[str, Any]) -> float | None:
        policy, reference = line.get(f"policy_error_{side}"), line.get(f"reference_error_{side}")
        return policy / reference - 1 if policy is not None and reference else None

    return of


def _charts(lines: Lines, tables: RunTables) -> tuple[dict[str, Spec], list[dict[str, str]]]:
    names = list(lines)
    kinds = {_config(tables, name).get("loss", {}).get("kind", "dpo") for name in names}
    validated = {name: _curve(of, "implicit_accuracy", "validation") for name, of in lines.items()}
    growth = {
        name: [row | {"side": side} for side in SIDES for row in _curve(of, _growth(side))]
        for name, of in lines.items()
    }
    has_validation = any(validated.values())
    charts = {
        "training-loss": curves(
            {name: _curve(of, "loss") for name, of in lines.items()},
            names,
            title="loss",
            level=LOG_2 if kinds <= {"dpo", "margin_weighted"} else None,
        ),
        "training-accuracy": curves(
            {name: _curve(of, "implicit_accuracy") for name, of in lines.items()},
            names,
            title="implicit accuracy",
            level=0.5,
            points=validated if has_validation else None,
            percent=True,
        ),
        "training-error": curves(
            growth, names, title="error against the reference", level=0.0, dashes="side",
            percent=True,
        ),
        "training-margin": curves(
            {name: _curve(of, "implicit_reward_margin") for name, of in lines.items()},
            names,
            title="implicit reward margin",
            level=0.0,
        ),
    }  # fmt: skip
    panels = [
        (
            "training-loss",
            "Loss per pair; the dashed line is ln 2, where every training begins."
            if kinds <= {"dpo", "margin_weighted"}
            else "Loss per pair.",
        ),
        (
            "training-accuracy",
            "Share of pairs whose chosen image the implicit reward prefers. "
            + (
                "Points are held-out pairs, thin lines those being trained on."
                if has_validation
                else "Of the pairs being trained on; none were held out (train.validation_pairs)."
            ),
        ),
        (
            "training-error",
            "Denoising error of the policy against the reference's: whole lines for chosen images, "
            "dashed ones for rejected. Both rising means that the model forgets how to draw.",
        ),
        (
            "training-margin",
            "Mean logit of the preference: how far the chosen images have pulled ahead.",
        ),
    ]
    return charts, [{"chart": name, "caption": caption} for name, caption in panels]


def _config(tables: RunTables, name: str) -> dict[str, Any]:
    manifest = tables.manifests.get(f"training/{name}")
    return manifest.config if manifest else {}


def _summary(
    tables: RunTables, name: str, lines: list[dict[str, Any]], names: list[str]
) -> dict[str, Any]:
    config, details = _config(tables, name), tables.details(f"training/{name}")
    trained = _of_kind(lines, "train")
    last: dict[str, Any] = trained[-1] if trained else {}
    validations = _of_kind(lines, "validation")
    best = max(validations, key=lambda v: v.get("implicit_accuracy") or 0.0, default={})
    speed = _column(trained, "pairs_per_second")
    memory = _column(trained, "gpu_memory_bytes")
    lora = config.get("lora")
    manifest = tables.manifests.get(f"training/{name}")
    return {
        "name": name,
        "swatch": color_of(names, name).removeprefix("var(--").removesuffix(")"),
        "data": config.get("data"),
        "pairs": details.get("pairs"),
        "weights": None if not config else f"LoRA {lora['rank']}" if lora else "all",
        "loss_kind": (config.get("loss") or {}).get("kind"),
        "steps": last.get("optimizer_step"),
        "pairs_seen": last.get("pairs_seen"),
        "best_accuracy": best.get("implicit_accuracy"),
        "best_step": best.get("optimizer_step"),
        "pairs_per_second": _median(speed),
        "gpu_gigabytes": float(memory.max()) / 1e9 if len(memory) and memory.max() > 0 else None,
        "seconds": manifest.seconds if manifest else None,
    }


def _median(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _validations(lines: Lines) -> list[dict[str, Any]]:
    rows = []
    for name, of in lines.items():
        found = _of_kind(of, "validation")
        chosen = np.linspace(0, len(found) - 1, min(len(found), MAX_VALIDATIONS)).astype(int)
        rows += [{"name": name} | found[i] for i in chosen]
    return rows


def _samples(tables: RunTables, name: str) -> dict[str, Any] | None:
    """Images of fixed prompts at a few steps, the first and the last among them."""
    run = tables.run
    found: dict[tuple[int, int], str] = {}
    for file in run.list("training", name, "samples", suffix=".png"):
        if match := _SAMPLE.fullmatch(file):
            found[int(match[1]), int(match[2])] = file
    if not found:
        return None
    all_steps = sorted({step for step, _ in found})
    places = np.linspace(0, len(all_steps) - 1, min(len(all_steps), MAX_SAMPLE_STEPS))
    steps = [all_steps[i] for i in np.unique(places.round().astype(int))]
    texts = _config(tables, name).get("sample_prompts") or []
    rows = []
    for index in sorted({index for _, index in found})[:MAX_SAMPLE_PROMPTS]:
        images = [
            _sample(tables, name, found[step, index]) if (step, index) in found else None
            for step in steps
        ]
        text = texts[index] if index < len(texts) else f"prompt {index}"
        rows.append({"prompt": text, "images": list(zip(steps, images, strict=True))})
    return {"name": name, "rows": rows}


def _sample(tables: RunTables, name: str, file: str) -> str | None:
    run = tables.run
    info = run.filesystem.get_file_info(run.path("training", name, "samples", file))
    if info.size is None or info.size > MAX_SAMPLE_BYTES:
        return None
    with run.filesystem.open_input_stream(info.path) as stream:
        return thumbnail(stream.read())
