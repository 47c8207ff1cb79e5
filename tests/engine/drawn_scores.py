"""A run directory whose scores are drawn, not computed: what `select` starts from."""

import numpy as np
import pyarrow as pa

from fifa_ray import schema
from fifa_ray.config import FifaConfig, load_config
from fifa_ray.run_dir import Manifest, RunDir, part_name

DIMENSION = 8


def select_config(run_dir, overrides=(), rewards=("pick",), **sections) -> FifaConfig:
    values = {
        "run_dir": str(run_dir),
        "ingest": {"source": "unused"},
        "rewards": [{"name": name} for name in rewards],
        "select": {"selection_size": 50, "images": False},
    }
    return load_config(values | sections, list(overrides))


def write_scores(
    run: RunDir, *, num_pairs=2000, num_prompts=200, parts=3, rewards=("pick",), seed=0
) -> dict[str, np.ndarray]:
    """All tables up to `select`, cut into parts; returns the columns that were drawn."""
    rng = np.random.default_rng(seed)
    prompt_ids = np.sort(rng.integers(-(2**63), 2**63, num_prompts))
    drawn = {
        "pair_id": schema.make_pair_id(0, np.arange(num_pairs)),
        "prompt": rng.integers(0, num_prompts, num_pairs),
        "quality": rng.uniform(0, 10, num_prompts).astype(np.float32),
        "harmful": rng.random(num_prompts) < 0.1,
        "log_distance": rng.normal(-1, 0.5, num_prompts).astype(np.float32),
        "embeddings": rng.normal(size=(num_prompts, DIMENSION)),
    }
    drawn["embeddings"] /= np.linalg.norm(drawn["embeddings"], axis=1, keepdims=True)
    drawn["quality"][rng.random(num_prompts) < 0.05] = np.nan
    for name in rewards:
        # Coarse values: many equal scores, so that the tie rule matters.
        drawn[name] = np.round(rng.normal(0.2, 1, num_pairs), 1).astype(np.float32)
    drawn["prompt_id"] = prompt_ids[drawn["prompt"]]
    _write_pairs(run, drawn, parts, rewards)
    _write_prompts(run, drawn, prompt_ids)
    return drawn


def _write_pairs(run, drawn, parts, rewards):
    count = len(drawn["pair_id"])
    for index, rows in enumerate(np.array_split(np.arange(count), parts)):
        pairs = pa.table(
            {
                "pair_id": drawn["pair_id"][rows],
                "prompt_id": drawn["prompt_id"][rows],
                "source_file": pa.array(["a.parquet"] * len(rows)).dictionary_encode(),
                "source_row": rows,
                "source_group": np.zeros(len(rows), np.int32),
                "chosen_ref": ["jpg_0"] * len(rows),
                "rejected_ref": ["jpg_1"] * len(rows),
                "chosen_uid": [f"c{row}" for row in rows],
                "rejected_uid": [f"r{row}" for row in rows],
                "source_id": [str(row) for row in rows],
                "model_chosen": pa.nulls(len(rows), pa.string()),
                "model_rejected": pa.nulls(len(rows), pa.string()),
            }
        ).cast(schema.PAIRS)
        run.write_table(pairs, "pairs", part_name(index))
        for name in rewards:
            margin = drawn[name][rows]
            table = pa.table(
                [drawn["pair_id"][rows], margin, np.zeros_like(margin), margin],
                schema=schema.REWARDS,
            )
            # A pair whose image was broken has no row here.
            run.write_table(table.filter(rows % 97 != 5), "rewards", name, part_name(index))
    for stage in ("pairs", *(f"rewards/{name}" for name in rewards)):
        run.publish(Manifest(stage=stage, fingerprint="drawn", rows_in=count, rows_out=count))


def _write_prompts(run, drawn, prompt_ids):
    count = len(prompt_ids)
    quality = drawn["quality"]
    broken = np.isnan(quality)
    tables = {
        "prompts": pa.table(
            [prompt_ids, [f"prompt {i}" for i in range(count)], np.ones(count, np.int64)],
            schema=schema.PROMPTS,
        ),
        "quality": pa.table(
            [
                prompt_ids,
                pa.array(quality, from_pandas=True),
                pa.array(
                    [None if b else bool(h) for b, h in zip(broken, drawn["harmful"], strict=True)]
                ),
                pa.nulls(count, pa.string()),
                [""] * count,
                [("timeout" if b else None) for b in broken],
            ],
            schema=schema.QUALITY,
        ),
        "embeddings": pa.table(
            [
                prompt_ids,
                pa.FixedSizeListArray.from_arrays(
                    drawn["embeddings"].astype(np.float32).ravel(), DIMENSION
                ),
            ],
            schema=schema.embeddings_schema(DIMENSION),
        ),
        "neighbors": pa.table(
            [prompt_ids, np.exp(drawn["log_distance"]), drawn["log_distance"]],
            schema=schema.NEIGHBORS,
        ),
    }
    for stage, table in tables.items():
        run.write_table(table, stage, part_name(0))
        run.publish(Manifest(stage=stage, fingerprint="drawn", rows_in=count, rows_out=count))
