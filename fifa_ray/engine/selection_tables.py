"""A chosen set of pairs -> the tables that trainers and the report read.

`selected/` is self-contained: every term of every pair's score, its prompt and both images as the
source's own bytes. Only the row groups of the chosen pairs are read again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from fifa_ray import schema
from fifa_ray.config import FifaConfig, Strategy
from fifa_ray.engine.part_reader import frugal_memory, part_task, to_arrow
from fifa_ray.engine.row_lookup import Columns, Lookup, look_up_pairs, read_embeddings
from fifa_ray.engine.terms import DROP_REASONS
from fifa_ray.run_dir import RunDir, part_name
from fifa_ray.scoring.diversity import knn_entropy
from fifa_ray.sources import Source, open_source

# Pairs of one part of selected/: what one task reads the images of.
PAIRS_PER_PART = 250
# The entropy of larger sets is estimated on a sample of this many distinct prompts.
ENTROPY_PROMPTS = 20_000

TERM_COLUMNS = ("margin_term", "quality_term", "diversity_term")


@frugal_memory()
def write_selection(
    run: RunDir,
    config: FifaConfig,
    sets: Mapping[Strategy, Columns],
    extras: Mapping[str, Columns],
) -> dict[str, Any]:
    """Write selected/, selected_ids/, baselines/, gallery/ and scored_sample/.

    `sets` are the strategies' choices, `extras` the galleries and the sample, all as columns of the
    accumulators in `select`. Returns the sets' measures for the manifest.
    """
    kept = sets[config.select.strategy]
    groups = {
        name: columns
        for name, columns in extras.items()
        if name != "sample" and columns and len(columns["pair_id"])
    }
    lookup = look_up_pairs(run, [*sets.values(), *groups.values()])
    selected = describe_pairs(kept, lookup)
    rows = lookup.rows_of(kept["pair_id"])
    if config.select.images:
        source = ray.put(open_source(config.ingest, config.images))
        refs = [
            _write_selected_part.remote(
                run,
                config,
                source,
                selected.slice(start, PAIRS_PER_PART),
                rows.slice(start, PAIRS_PER_PART),
                part_name(start // PAIRS_PER_PART),
            )
            for start in range(0, len(selected), PAIRS_PER_PART)
        ]
        galleries = {
            name: (describe_pairs(columns, lookup), lookup.rows_of(columns["pair_id"]))
            for name, columns in groups.items()
        }
        if galleries:
            refs.append(_write_gallery.remote(run, source, galleries))
        ray.get(refs)
    else:
        _write_selected(run, config, selected, rows, part_name(0))
    for strategy, columns in sets.items():
        if strategy != config.select.strategy:
            table = describe_pairs(columns, lookup)
            run.write_table(table, "baselines", strategy, part_name(0))
    if "sample" in extras:
        run.write_table(_sample_table(extras["sample"], kept), "scored_sample", part_name(0))
    ids = ["rank", "pair_id", "source_id", "source_file", "source_row"]
    run.write_table(selected.select(ids), "selected_ids", part_name(0))
    return {"sets": {name: _measure(run, config, columns, kept) for name, columns in sets.items()}}


def describe_pairs(columns: Columns, lookup: Lookup) -> pa.Table:
    """Chosen pairs as a table of schema.SELECTED_TERMS, plus a margin column per reward model."""
    rows = lookup.rows_of(columns["pair_id"])
    found: dict[str, Any] = {
        "pair_id": columns["pair_id"],
        "prompt_id": columns["prompt_id"],
        "prompt": lookup.texts_of(columns["prompt_id"]),
        "rank": np.arange(1, len(rows) + 1),
        "importance_score": columns["score"],
        "reward_margin": columns["reward_margin"],
        "prompt_quality": _nan_as_null(columns["prompt_quality"]),
        "log_kth_neighbor_distance": columns["log_kth_neighbor_distance"],
        **{name: columns[name] for name in TERM_COLUMNS},
        "source_file": rows.column("source_file").cast(pa.string()),
        **{
            name: rows.column(name)
            for name in ("source_row", "source_id", "chosen_uid", "rejected_uid")
        },
    }
    models = sorted(name for name in columns if name.startswith("reward_margin_"))
    fields = [*schema.SELECTED_TERMS, *(pa.field(name, pa.float64()) for name in models)]
    found |= {name: columns[name] for name in models}
    arrays = [_as_type(found[field.name], field.type) for field in fields]
    return pa.table(arrays, schema=pa.schema(fields))


def _as_type(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else to_arrow(values)
    return array.cast(kind)


def _nan_as_null(values: np.ndarray) -> pa.Array:
    column = to_arrow(values)
    return pc.if_else(pc.is_nan(column), pa.nulls(len(column), column.type), column)


@part_task
def _write_selected_part(
    run: RunDir, config: FifaConfig, source: Source, table: pa.Table, rows: pa.Table, part: str
) -> None:
    _write_selected(run, config, _with_images(table, rows, source), rows, part)


def _write_selected(
    run: RunDir, config: FifaConfig, table: pa.Table, rows: pa.Table, part: str
) -> None:
    if config.select.column_names == "pickapic":
        table = with_pickapic_columns(table, rows)
    run.write_table(table, "selected", part, row_group_size=50 if config.select.images else None)


@part_task
def _write_gallery(
    run: RunDir, source: Source, galleries: Mapping[str, tuple[pa.Table, pa.Table]]
) -> None:
    tables = [
        _with_images(table, rows, source).add_column(0, "group", pa.array([name] * len(table)))
        for name, (table, rows) in galleries.items()
    ]
    run.write_table(pa.concat_tables(tables), "gallery", part_name(0))


def _with_images(table: pa.Table, rows: pa.Table, source: Source) -> pa.Table:
    for side in ("chosen", "rejected"):
        table = table.append_column(f"{side}_image", _images(source, rows, side))
    return table


def _images(source: Source, rows: pa.Table, side: str) -> pa.Array:
    """Encoded bytes of one side of each pair, as the source holds them.

    Raises RuntimeError where an image that was scored cannot be read any more.
    """
    images: list[bytes | None] = [None] * len(rows)
    table = rows.select(["source_file", "source_group", "source_row", f"{side}_ref"])
    places: dict[tuple[str, int], list[int]] = {}
    listed = table.to_pylist()
    for index, row in enumerate(listed):
        places.setdefault((row["source_file"], row["source_group"]), []).append(index)
    for (file, group), indices in places.items():
        indices.sort(key=lambda index: listed[index]["source_row"])
        requests = pa.table(
            {
                "source_row": pa.array([listed[i]["source_row"] for i in indices], pa.int64()),
                "ref": pa.array([listed[i][f"{side}_ref"] for i in indices], pa.string()),
            }
        )
        for batch in source.read_images(file, group, requests):
            for answer in batch.to_pylist():
                if answer["image"] is None:
                    row = listed[indices[answer["request"]]]
                    raise RuntimeError(
                        f"the {side} image of row {row['source_row']} of {file} was scored, but "
                        f"cannot be read any more ({answer['error']}); restore the dataset or set "
                        "select.images=false"
                    )
                images[indices[answer["request"]]] = answer["image"]
    return pa.array(images, pa.binary())


def with_pickapic_columns(table: pa.Table, rows: pa.Table) -> pa.Table:
    """The table with images and labels under Pick-a-Pic v2's names; image 0 is the chosen one."""
    count = len(table)
    names = {"chosen_image": "jpg_0", "rejected_image": "jpg_1"}
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    uid_0 = pc.coalesce(rows.column("chosen_uid"), rows.column("chosen_ref"))
    uid_1 = pc.coalesce(rows.column("rejected_uid"), rows.column("rejected_ref"))
    ranking = pc.cast(table.column("pair_id"), pa.int64())
    added: dict[str, Any] = {
        "caption": table.column("prompt"),
        "label_0": pa.array(np.ones(count)),
        "label_1": pa.array(np.zeros(count)),
        "image_0_uid": uid_0,
        "image_1_uid": uid_1,
        "best_image_uid": uid_0,
        "model_0": rows.column("model_chosen"),
        "model_1": rows.column("model_rejected"),
        "are_different": pa.array([True] * count),
        "has_label": pa.array([True] * count),
        "ranking_id": ranking,
    }
    for name, values in added.items():
        table = table.append_column(name, values)
    return table


def _sample_table(sample: Columns, kept: Columns) -> pa.Table:
    """A uniform sample of the scored pairs with their raw terms, for the report's distributions."""
    order = np.argsort(sample["pair_id"])
    columns = {name: values[order] for name, values in sample.items()}
    reasons = np.array([*DROP_REASONS], object)[columns["dropped"]]
    score = np.where(columns["dropped"] == 0, columns["score"], np.nan)
    table: dict[str, Any] = {
        "pair_id": columns["pair_id"],
        "prompt_id": columns["prompt_id"],
        "importance_score": _nan_as_null(score),
        "dropped_by": pa.array([reason or None for reason in reasons], pa.string()),
        "reward_margin": _nan_as_null(columns["reward_margin"]),
        "prompt_quality": _nan_as_null(columns["prompt_quality"]),
        "log_kth_neighbor_distance": columns["log_kth_neighbor_distance"],
        "selected": np.isin(columns["pair_id"], kept["pair_id"]),
    }
    models = sorted(name for name in columns if name.startswith("reward_margin_"))
    return pa.table(table | {name: columns[name] for name in models})


def _measure(run: RunDir, config: FifaConfig, columns: Columns, kept: Columns) -> dict[str, Any]:
    """What the report compares sets by."""
    prompts = np.unique(columns["prompt_id"])
    quality = columns["prompt_quality"]
    return {
        "num_pairs": len(columns["pair_id"]),
        "num_prompts": len(prompts),
        "mean_reward_margin": float(np.mean(columns["reward_margin"])),
        "mean_prompt_quality": float(np.nanmean(quality)) if np.isfinite(quality).any() else None,
        "knn_entropy": set_entropy(run, prompts, config.neighbors.num_neighbors, config.seed),
        "overlap": float(np.isin(columns["pair_id"], kept["pair_id"]).mean()),
    }


def set_entropy(run: RunDir, prompt_ids: np.ndarray, num_neighbors: int, seed: int) -> float | None:
    """knn_entropy (nats) of distinct prompts; None for a set of too few."""
    if len(prompt_ids) > ENTROPY_PROMPTS:
        sample = np.random.default_rng(seed).choice(len(prompt_ids), ENTROPY_PROMPTS, replace=False)
        prompt_ids = prompt_ids[np.sort(sample)]
    if len(prompt_ids) <= num_neighbors:
        return None
    return float(knn_entropy(read_embeddings(run, prompt_ids), num_neighbors))
