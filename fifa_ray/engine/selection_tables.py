"""A chosen set of pairs -> the tables that trainers and the report read.

`selected/` is self-contained: every term of every pair's score, its prompt and both images as the
source's own bytes. Only the row groups of the chosen pairs are read again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import ray

from fifa_ray import schema
from fifa_ray.config import FifaConfig, Strategy
from fifa_ray.engine.terms import DROP_REASONS
from fifa_ray.run_dir import RunDir, part_name
from fifa_ray.scoring.diversity import knn_entropy
from fifa_ray.sources import Source, open_source

Columns = Mapping[str, np.ndarray]

# Pairs of one part of selected/: what one task reads the images of.
PAIRS_PER_PART = 250
# The entropy of larger sets is estimated on a sample of this many distinct prompts.
ENTROPY_PROMPTS = 20_000

TERM_COLUMNS = ("margin_term", "quality_term", "diversity_term")


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
    source = open_source(config.ingest, config.images) if config.select.images else None
    refs = [
        _write_selected_part.remote(
            run,
            config,
            source,
            {name: values[start : start + PAIRS_PER_PART] for name, values in kept.items()},
            start,
        )
        for start in range(0, len(kept["pair_id"]), PAIRS_PER_PART)
    ]
    groups = {name: columns for name, columns in extras.items() if name != "sample"}
    if source is not None:
        refs.append(_write_gallery.remote(run, config, source, groups))
    for strategy, columns in sets.items():
        if strategy != config.select.strategy:
            run.write_table(describe_pairs(run, columns), "baselines", strategy, part_name(0))
    run.write_table(_sample_table(extras["sample"], kept), "scored_sample", part_name(0))
    ray.get(refs)
    ids = run.read_table(
        "selected", columns=["rank", "pair_id", "source_id", "source_file", "source_row"]
    )
    run.write_table(ids, "selected_ids", part_name(0))
    return {"sets": {name: _measure(run, config, columns, kept) for name, columns in sets.items()}}


def describe_pairs(run: RunDir, columns: Columns, first_rank: int = 1) -> pa.Table:
    """Chosen pairs as a table of schema.SELECTED_TERMS, plus a margin column per reward model."""
    rows = _pair_rows(run, columns)
    prompts = _prompt_texts(run, columns["prompt_id"])
    found: dict[str, Any] = {
        "pair_id": columns["pair_id"],
        "prompt_id": columns["prompt_id"],
        "prompt": prompts,
        "rank": np.arange(first_rank, first_rank + len(columns["pair_id"])),
        "importance_score": columns["score"],
        "reward_margin": columns["reward_margin"],
        "prompt_quality": pa.array(columns["prompt_quality"], from_pandas=True),
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
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    return array.cast(kind)


def _pair_rows(run: RunDir, columns: Columns) -> pa.Table:
    """Rows of pairs/ in the order of the columns `part` and `row`."""
    tables, places = [], []
    for part in np.unique(columns["part"]):
        mine = np.flatnonzero(columns["part"] == part)
        table = run.read_table("pairs", part_name(int(part)))
        tables.append(table.take(columns["row"][mine]))
        places.append(mine)
    if not tables:
        return schema.PAIRS.empty_table()
    order = np.argsort(np.concatenate(places), kind="stable")
    return pa.concat_tables(tables).unify_dictionaries().take(order)


def _prompt_texts(run: RunDir, prompt_ids: np.ndarray) -> pa.Array:
    """Texts of these prompts, reading only the parts and row groups that may hold them."""
    wanted = pa.array(np.unique(prompt_ids))
    dataset = pads.dataset(
        [run.path("prompts", name) for name in run.list("prompts")],
        filesystem=run.filesystem,
        format="parquet",
    )
    table = dataset.to_table(
        columns=["prompt_id", "prompt"], filter=pads.field("prompt_id").isin(wanted)
    ).sort_by("prompt_id")
    at = np.searchsorted(table.column("prompt_id").to_numpy(), prompt_ids)
    return table.column("prompt").take(at).combine_chunks()


@ray.remote(num_cpus=1)
def _write_selected_part(
    run: RunDir, config: FifaConfig, source: Source | None, columns: Columns, start: int
) -> None:
    table = describe_pairs(run, columns, first_rank=start + 1)
    rows = _pair_rows(run, columns)
    if source is not None:
        for side in ("chosen", "rejected"):
            table = table.append_column(f"{side}_image", _images(source, rows, side))
    if config.select.column_names == "pickapic":
        table = with_pickapic_columns(table, rows)
    run.write_table(table, "selected", part_name(start // PAIRS_PER_PART), row_group_size=50)


@ray.remote(num_cpus=1)
def _write_gallery(
    run: RunDir, config: FifaConfig, source: Source, groups: Mapping[str, Columns]
) -> None:
    tables = []
    for name, columns in groups.items():
        if not columns or not len(columns["pair_id"]):
            continue
        table = describe_pairs(run, columns)
        rows = _pair_rows(run, columns)
        for side in ("chosen", "rejected"):
            table = table.append_column(f"{side}_image", _images(source, rows, side))
        tables.append(table.add_column(0, "group", pa.array([name] * len(table))))
    if tables:
        run.write_table(pa.concat_tables(tables), "gallery", part_name(0))


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
        "importance_score": pa.array(score, from_pandas=True),
        "dropped_by": pa.array([reason or None for reason in reasons], pa.string()),
        "reward_margin": pa.array(columns["reward_margin"], from_pandas=True),
        "prompt_quality": pa.array(columns["prompt_quality"], from_pandas=True),
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


def read_embeddings(run: RunDir, prompt_ids: np.ndarray) -> np.ndarray:
    """float32 (N, D) embeddings of these distinct prompts, in their order."""
    dataset = pads.dataset(
        [run.path("embeddings", name) for name in run.list("embeddings")],
        filesystem=run.filesystem,
        format="parquet",
    )
    wanted = pads.field("prompt_id").isin(pa.array(np.sort(prompt_ids)))
    table = dataset.to_table(filter=wanted).sort_by("prompt_id")
    at = np.searchsorted(table.column("prompt_id").to_numpy(), prompt_ids)
    return schema.embedding_matrix(table)[at]
