"""A run to search in: a real dataset of small pictures, and scores of its pairs that are drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from engine.training_run import picture

from fifa_ray import schema
from fifa_ray.config import FifaConfig, load_config
from fifa_ray.engine.ingest import run_ingest
from fifa_ray.run_dir import Manifest, RunDir, part_name

NUM_PROMPTS = 30
DIMENSION = 8
# What a trial may change here: two terms of the score, K, and two settings of training.
SPACE = {
    "select.quality_weight": {"uniform": [0, 2]},
    "select.selection_size": {"choice": [8, 16]},
    "select.selector": {"choice": ["top_k", "greedy"]},
    "train.loss.dpo_beta": {"loguniform": [10, 100]},
    "train.max_steps": {"integer": [4, 6]},
}


def tune_config(folder: Path, model: Path, *overrides: str, **tune: Any) -> FifaConfig:
    """Tiny trials: images of 16 pixels, at most six optimizer steps, eight pictures to judge."""
    values = {
        "run_dir": str(folder / "run"),
        "ingest": {"source": str(folder / "data")},
        "rewards": [{"name": "drawn"}],
        "select": {"selection_size": 16, "images": False},
        "evaluate": {"num_inference_steps": 2, "guidance_scale": 2.0, "num_resamples": 100},
        "train": {
            "model": str(model),
            "resolution": 16,
            "precision": "float32",
            "global_batch_size": 4,
            "per_device_batch_size": 2,
            "max_steps": 4,
            "log_every": 1,
            "optimizer": {"learning_rate": 1e-3},
            "loss": {"dpo_beta": 50.0},
        },
        "tune": {
            "space": SPACE,
            "budget": {"cpu_seconds": 60},
            "num_trials": 50,
            "max_concurrent": 1,
            "objective": "brightness",
            "search_prompts": 4,
            "final_prompts": 4,
            "final_seeds": 1,
            "asha": {"grace_steps": 2, "reduction_factor": 2},
            **tune,
        },
    }
    return load_config(values, overrides)


def prepare_tuning(folder: Path, config: FifaConfig, *, num_pairs: int = 60) -> RunDir:
    """The dataset, ingested, and drawn tables of everything that selection reads."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"a picture of the number {index % NUM_PROMPTS}",
            "chosen": picture(rng, 120),
            "rejected": picture(rng, 0),
        }
        for index in range(num_pairs)
    ]
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "pairs.parquet", row_group_size=8)
    run = RunDir(config.run_dir)
    run_ingest(run, config)
    _write_scores(run, rng)
    return run


def _write_scores(run: RunDir, rng: np.random.Generator) -> None:
    pair_id = run.read_table("pairs", columns=[schema.PAIR_ID]).column(0).to_numpy()
    prompt_id = run.read_table("prompts", columns=[schema.PROMPT_ID]).column(0).to_numpy()
    margin = rng.normal(0.3, 1, len(pair_id)).astype(np.float32)
    vectors = rng.normal(size=(len(prompt_id), DIMENSION))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    log_distance = rng.normal(-1, 0.3, len(prompt_id)).astype(np.float32)
    blank = pa.nulls(len(prompt_id), pa.string())
    tables = {
        "rewards/drawn": pa.table(
            [pair_id, margin, np.zeros_like(margin), margin], schema=schema.REWARDS
        ),
        "quality": pa.table(
            [
                prompt_id,
                rng.uniform(2, 10, len(prompt_id)).astype(np.float32),
                np.zeros(len(prompt_id), bool),
                blank,
                blank,
                blank,
            ],
            schema=schema.QUALITY,
        ),
        "embeddings": pa.table(
            [
                prompt_id,
                pa.FixedSizeListArray.from_arrays(vectors.astype(np.float32).ravel(), DIMENSION),
            ],
            schema=schema.embeddings_schema(DIMENSION),
        ),
        "neighbors": pa.table(
            [prompt_id, np.exp(log_distance), log_distance], schema=schema.NEIGHBORS
        ),
    }
    for stage, table in tables.items():
        run.write_table(table, *stage.split("/"), part_name(0))
        run.publish(
            Manifest(stage=stage, fingerprint="drawn", rows_in=len(table), rows_out=len(table))
        )
