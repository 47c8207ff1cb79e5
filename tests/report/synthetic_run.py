"""A run directory as the stages leave one, with realistic numbers and hostile prompts.

Everything is drawn from one seed: the same arguments give the same tables. Used by the tests of the
report; `python tests/report/synthetic_run.py FOLDER` writes one to look at.
"""

import sys

import numpy as np
import pyarrow as pa
from synthetic_models import write_models
from synthetic_plan import write_plan
from synthetic_selection import HOSTILE_PROMPTS, manifest, quarantine, score, write_selection

from fifa_ray import schema
from fifa_ray.config import dump_config, load_config
from fifa_ray.run_dir import RunDir, part_name

HARMFUL_PROMPT = "a flagged and unpleasant sentence"
ADJECTIVES = ("small", "red", "old", "glowing", "quiet", "striped", "golden", "broken", "tall")
SUBJECTS = ("cat", "house", "ship", "tree", "robot", "castle", "river", "fox", "lamp", "bridge")
PLACES = ("in a garden", "under a full moon", "by the sea", "on a hill", "in the snow", "at dawn")
STYLES = ("watercolor", "oil painting", "flat vector", "photo", "pencil sketch")
REASONS = {"tie": 31, "empty_prompt": 12, "duplicate": 57, "prompt_too_long": 3}


def write_run(
    uri: str,
    *,
    num_prompts: int = 400,
    num_pairs: int = 1500,
    selection_size: int = 200,
    dimension: int = 16,
    gallery_size: int = 8,
    seed: int = 0,
) -> RunDir:
    """Write every table and manifest of a finished run, and a proof."""
    rng = np.random.default_rng(seed)
    run = RunDir(uri)
    config = load_config(
        {"run_dir": "runs/synthetic", "ingest": {"source": "hf://datasets/example/pairs"}},
        [
            f"select.selection_size={selection_size}",
            f"report.gallery_size={gallery_size}",
            "evaluate.images_per_prompt=2",
        ],
    )
    run.write_text(dump_config(config), "config.yaml")
    prompts, ids = _prompts(rng, num_prompts)
    centers = rng.normal(size=(12, dimension))
    clusters = rng.integers(0, 12, num_prompts)
    vectors = centers[clusters] + 0.35 * rng.normal(size=(num_prompts, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gaps = np.sqrt(np.maximum(2 - 2 * np.sort(vectors @ vectors.T, axis=1)[:, ::-1], 0))
    log_distance = np.log(np.maximum(gaps[:, min(5, num_prompts - 1)], 1e-3))
    quality = np.clip(rng.normal(6.2, 1.8, num_prompts), 0, 10)
    harmful = np.array([p.startswith(HARMFUL_PROMPT) for p in prompts])
    unrated = np.zeros(num_prompts, bool)
    unrated[rng.choice(num_prompts, 5, replace=False)] = True
    unrated &= ~harmful

    _write_pairs_and_prompts(run, rng, prompts, ids, num_pairs)
    pairs = run.read_table("pairs")
    _write_prompt_tables(run, ids, vectors, quality, harmful, unrated, log_distance)
    scored = score(run, rng, pairs, ids, quality, harmful, unrated, log_distance)
    write_selection(run, rng, scored, prompts, ids, quality, log_distance, selection_size, harmful)
    write_models(run, rng, config)
    write_plan(run, config)
    run.write_text(
        '{"correct labels among the kept pairs": {"value": 0.947, "low": 0.931, "high": 0.96, '
        '"note": "0.842 among all pairs, 0.839 among random ones", "unit": "share"}, '
        '"harmful prompts kept": {"value": 0, "low": null, "high": null, "note": "of 61"}, '
        '"k-NN entropy against random": {"value": 1.84, "low": 1.71, "high": 1.96, '
        '"note": "nats more than a random set", "unit": "nats"}}',
        "proof.json",
    )
    return run


def _prompts(rng: np.random.Generator, count: int) -> tuple[list[str], np.ndarray]:
    texts = list(HOSTILE_PROMPTS) + [f"{HARMFUL_PROMPT}, number {i}" for i in range(6)]
    while len(texts) < count:
        words = [rng.choice(w) for w in (ADJECTIVES, SUBJECTS, PLACES, STYLES)]
        texts.append(f"{words[3]} of a {words[0]} {words[1]} {words[2]}, take {len(texts)}")
    ids = np.array([schema.prompt_id(text) for text in texts], np.int64)
    order = np.argsort(ids)
    return [texts[i] for i in order], ids[order]


def _write_pairs_and_prompts(
    run: RunDir, rng: np.random.Generator, prompts: list[str], ids: np.ndarray, num_pairs: int
) -> None:
    # Every prompt has a pair, and a few have many.
    popular = (len(ids) * rng.random(num_pairs - len(ids)) ** 2).astype(np.int64)
    index = rng.permutation(np.concatenate([np.arange(len(ids)), popular]))
    pair_ids = schema.make_pair_id(0, np.arange(num_pairs))
    table = pa.table(
        {
            "pair_id": pair_ids,
            "prompt_id": ids[index],
            "source_file": pa.array(["train-00000.parquet"] * num_pairs).dictionary_encode(),
            "source_row": np.arange(num_pairs),
            "source_group": np.zeros(num_pairs, np.int32),
            "chosen_ref": ["jpg_0"] * num_pairs,
            "rejected_ref": ["jpg_1"] * num_pairs,
            "chosen_uid": [f"c{i}" for i in range(num_pairs)],
            "rejected_uid": [f"r{i}" for i in range(num_pairs)],
            "source_id": pa.nulls(num_pairs, pa.string()),
            "model_chosen": pa.nulls(num_pairs, pa.string()),
            "model_rejected": pa.nulls(num_pairs, pa.string()),
        }
    ).cast(schema.PAIRS)
    half = num_pairs // 2
    run.write_table(table.slice(0, half), "pairs", part_name(0))
    run.write_table(table.slice(half), "pairs", part_name(1))
    counts = np.bincount(index, minlength=len(ids))
    texts = pa.table({"prompt_id": ids, "prompt": prompts, "num_pairs": counts})
    middle = len(ids) // 2
    for part, rows in enumerate((texts.slice(0, middle), texts.slice(middle))):
        run.write_table(rows.cast(schema.PROMPTS), "prompts", part_name(part))
    rejects = [
        {
            "reason": reason,
            "detail": f"<b>{reason}</b> in row",
            "source_file": "train-00000.parquet",
            "source_row": num_pairs + i,
        }
        for reason, count in REASONS.items()
        for i in range(count)
    ]
    quarantine(run, "pairs", rejects)
    manifest(run, "pairs", num_pairs + len(rejects), dict(REASONS), 8.4)
    manifest(run, "prompts", len(ids), {}, 0.7)


def _write_prompt_tables(
    run: RunDir,
    ids: np.ndarray,
    vectors: np.ndarray,
    quality: np.ndarray,
    harmful: np.ndarray,
    unrated: np.ndarray,
    log_distance: np.ndarray,
) -> None:
    count = len(ids)
    rated = pa.table(
        {
            "prompt_id": ids,
            "prompt_quality": pa.array(quality.astype(np.float32), mask=unrated),
            "harmful": pa.array(harmful, mask=unrated),
            "harm_category": ["violence" if bad else None for bad in harmful],
            "judge_reply": [f'{{"quality": {q:.0f}}}' for q in quality],
            "quality_error": ["timeout" if bad else None for bad in unrated],
        }
    ).cast(schema.QUALITY)
    run.write_table(rated, "quality", part_name(0))
    manifest(
        run,
        "quality",
        count,
        {},
        184.0,
        judge={"model": "tiny-llm", "engine": "vllm"},
        tokens=81_234,
        cpu_seconds=361.0,
        gpu_seconds=180.0,
        node_seconds={"gpu": 184.0, "cpu": 20.0},
    )
    dimension = vectors.shape[1]
    flat = pa.array(vectors.astype(np.float32).ravel())
    embedded = pa.table(
        {"prompt_id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, dimension)}
    )
    run.write_table(embedded.cast(schema.embeddings_schema(dimension)), "embeddings", part_name(0))
    manifest(
        run,
        "embeddings",
        count,
        {},
        21.0,
        model="all-MiniLM-L6-v2",
        cpu_seconds=40.2,
        node_seconds={"cpu": 36.0},
    )
    near = pa.table(
        {
            "prompt_id": ids,
            "kth_neighbor_distance": np.exp(log_distance).astype(np.float32),
            "log_kth_neighbor_distance": log_distance.astype(np.float32),
        }
    )
    run.write_table(near.cast(schema.NEIGHBORS), "neighbors", part_name(0))
    manifest(
        run,
        "neighbors",
        count,
        {},
        2.1,
        method="approximate",
        num_lists=80,
        num_probes=12,
        reason="60,000 prompts are more than neighbors.exact_below = 50,000",
        recall=0.9934,
        kth_distance_error_p95=0.0021,
        knn_entropy=-4.31,
    )


if __name__ == "__main__":
    write_run(
        sys.argv[1],
        num_prompts=4000,
        num_pairs=15_000,
        selection_size=1500,
        gallery_size=12,
        dimension=384,
    )
