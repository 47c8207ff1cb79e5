"""What a sample's manifests say of a stage: its rate, its start-up, the bytes of its rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from fifa_ray.engine.plan_sample import Sample
from fifa_ray.planning.estimates import Estimate, Rate, measured_rate
from fifa_ray.run_dir import Manifest, RunDir

# Classes of the actors that do a stage's work; what decodes for them on other cores.
WORKERS = (
    "LoadAndScore", "ScoreColumns", "JudgePrompts", "vLLM", "_Embed", "EncodeItems", "DrawParts",
    "ScoreParts",
)  # fmt: skip
DECODER = "as_columns"
# Optimizer steps that warm up.
WARM_UP_STEPS = 2


def sampled_manifest(sample: Sample | None, stage: str) -> Manifest | None:
    """Of a stage by its name in a plan, which leaves out keys of data and names of models.

    One model's images or scores stand for those of all: they are drawn in one pass.
    """
    if sample is None:
        return None
    found = sample.manifests
    if stage in found:
        return found[stage]
    first, _, last = stage.rpartition("/")
    for name in sorted(found):
        of_images = stage == "evaluation/images" and name.startswith("evaluation/images/")
        of_scorer = first == "evaluation/rewards" and name.startswith(f"{first}/")
        if of_images or (of_scorer and name.endswith(f"/{last}")):
            return found[name]
        if stage in ("latents", "training", "training_data") and name.startswith(f"{stage}/"):
            return found[name]
    return None


def measured_work(manifest: Manifest) -> tuple[Rate, float, Mapping[str, Any], Rate | None]:
    """A stage's rate, its seconds beside its workers' work, their times, the rate of decoding."""
    work = manifest.details["work"]
    main = next(w for w in work if any(name in w["operator"] for name in WORKERS))
    rate = _rate(main)
    rows = manifest.rows_in - manifest.details.get("rows_reused", 0)
    if manifest.stage.startswith("evaluation/"):
        rows = main["rows"]  # of all models together
    steady = rate.seconds_per_row.value * rows / main["workers"]
    seconds = manifest.seconds * max(1.0, rows / max(1, manifest.rows_in))
    decoding = next((_rate(w) for w in work if DECODER in w["operator"]), None)
    return rate, max(0.0, seconds - steady), main, decoding


def measured_training(sample: Sample) -> tuple[Rate, float]:
    """Seconds of a worker for a pair's update, and of the start-up without the latents."""
    manifest = sampled_manifest(sample, "training")
    assert manifest is not None
    workers = manifest.details["num_workers"]
    lines = sample.train_lines[WARM_UP_STEPS:] or sample.train_lines
    seconds = [workers / line["pairs_per_second"] for line in lines]
    start = manifest.seconds - manifest.details["training_seconds"]
    latents = sampled_manifest(sample, "latents")
    start -= latents.seconds if latents is not None else 0.0
    return measured_rate(seconds, [1.0] * len(seconds)), max(0.0, start)


def _rate(times: Mapping[str, Any]) -> Rate:
    tasks: int = times["tasks"] - times["tasks_warming_up"]
    return Rate(Estimate(**times["seconds_per_row"]), "measured", tasks)


def bytes_per_row(run: RunDir, tables: Sequence[str]) -> float | None:
    """Bytes of tables' columns for each row of the first, without the files' own overhead."""
    size = 0
    rows: list[int] = []
    for table in tables:
        rows.append(0)
        for name in run.list(table):
            metadata = pq.read_metadata(run.path(table, name), filesystem=run.filesystem)
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            size += sum(
                g.column(c).total_compressed_size for g in groups for c in range(g.num_columns)
            )
            rows[-1] += metadata.num_rows
    return size / rows[0] if rows[0] else None


def folder_bytes(run: RunDir, *parts: str) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    selector = pafs.FileSelector(run.path(*parts), recursive=True, allow_not_found=True)
    infos = run.filesystem.get_file_info(selector)
    return sum(info.size or 0 for info in infos if info.is_file)
