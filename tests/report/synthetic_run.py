"""A run directory as the stages leave one, with realistic numbers and hostile prompts.

Everything is drawn from one seed: the same arguments give the same tables. Used by the tests of the
report; `python -m tests.report.synthetic_run FOLDER` writes one to look at.
"""

import io
import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from fifa_ray import schema
from fifa_ray.config import dump_config, load_config
from fifa_ray.run_dir import Manifest, RunDir, fingerprint, part_name

HOSTILE_PROMPTS = (
    "</script><img src=x onerror=alert(1)>",
    "<svg onload=alert(2)><script>document.title='owned'</script>",
    "{{ 7 * 7 }} {% raw %} ${alert(3)} `alert(4)`",
    "\"'><a href=javascript:alert(5)>click</a> & &amp; <!-- <script>",
    "قطة صغيرة تجلس على كرسي أحمر في حديقة",
    "a cat \u202etxt.exe\u202c under a tree, shalom שלום",
    "👩🏽‍🚀🦄 riding through 🌌 at sunset 🎨🔥",
    "a very detailed castle " + "with many towers and banners " * 60,
    "unbroken" * 150,
)
HARMFUL_PROMPT = "a flagged and unpleasant sentence"
ADJECTIVES = ("small", "red", "old", "glowing", "quiet", "striped", "golden", "broken", "tall")
SUBJECTS = ("cat", "house", "ship", "tree", "robot", "castle", "river", "fox", "lamp", "bridge")
PLACES = ("in a garden", "under a full moon", "by the sea", "on a hill", "in the snow", "at dawn")
STYLES = ("watercolor", "oil painting", "flat vector", "photo", "pencil sketch")
REASONS = {"tie": 31, "empty_prompt": 12, "duplicate": 57, "prompt_too_long": 3}
REWARD_MODELS = ("pickscore", "hpsv2")


@dataclass(frozen=True)
class Scored:
    """All pairs in pair_id order with their terms: what select would have computed."""

    pair_id: np.ndarray
    prompt_index: np.ndarray
    margins: dict[str, np.ndarray]
    dropped_by: np.ndarray
    score: np.ndarray
    terms: np.ndarray


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
        [f"select.selection_size={selection_size}", f"report.gallery_size={gallery_size}"],
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
    scored = _score(run, rng, pairs, ids, quality, harmful, unrated, log_distance)
    _write_selection(run, rng, scored, prompts, ids, quality, log_distance, selection_size, harmful)
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


def _manifest(
    run: RunDir,
    stage: str,
    rows_in: int,
    quarantined: dict[str, int],
    seconds: float,
    **details: object,
) -> None:
    run.publish(
        Manifest(
            stage=stage,
            fingerprint=fingerprint(stage),
            rows_in=rows_in,
            rows_out=rows_in - sum(quarantined.values()),
            quarantined=quarantined,
            seconds=seconds,
            details=details,
        )
    )


def _quarantine(run: RunDir, stage: str, rows: list[dict[str, object]]) -> None:
    table = pa.Table.from_pylist([{"stage": stage} | row for row in rows], schema.QUARANTINE)
    run.write_table(table, "quarantine", *stage.split("/"), part_name(0))


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
    _quarantine(run, "pairs", rejects)
    _manifest(run, "pairs", num_pairs + len(rejects), dict(REASONS), 8.4)
    _manifest(run, "prompts", len(ids), {}, 0.7)


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
    _manifest(
        run,
        "quality",
        count,
        {},
        184.0,
        judge={"model": "tiny-llm", "engine": "vllm"},
        tokens=81_234,
        cpu_seconds=361.0,
    )
    dimension = vectors.shape[1]
    flat = pa.array(vectors.astype(np.float32).ravel())
    embedded = pa.table(
        {"prompt_id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, dimension)}
    )
    run.write_table(embedded.cast(schema.embeddings_schema(dimension)), "embeddings", part_name(0))
    _manifest(run, "embeddings", count, {}, 21.0, model="all-MiniLM-L6-v2", cpu_seconds=40.2)
    near = pa.table(
        {
            "prompt_id": ids,
            "kth_neighbor_distance": np.exp(log_distance).astype(np.float32),
            "log_kth_neighbor_distance": log_distance.astype(np.float32),
        }
    )
    run.write_table(near.cast(schema.NEIGHBORS), "neighbors", part_name(0))
    _manifest(
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


def _score(
    run: RunDir,
    rng: np.random.Generator,
    pairs: pa.Table,
    ids: np.ndarray,
    quality: np.ndarray,
    harmful: np.ndarray,
    unrated: np.ndarray,
    log_distance: np.ndarray,
) -> Scored:
    pair_id = pairs.column("pair_id").to_numpy()
    index = np.searchsorted(ids, pairs.column("prompt_id").to_numpy())
    truth = rng.normal(0.6, 1.2, len(pair_id))
    margins = {}
    lost = rng.choice(len(pair_id), 14, replace=False)
    for number, name in enumerate(REWARD_MODELS):
        margin = (truth + 0.7 * rng.normal(size=len(truth))).astype(np.float32)
        bad = lost[: 10 + 4 * number]
        good = np.setdiff1d(np.arange(len(pair_id)), bad)
        rows = pa.table(
            {
                "pair_id": pair_id[good],
                "reward_chosen": 20 + margin[good],
                "reward_rejected": np.full(len(good), 20.0),
                "reward_margin": margin[good],
            }
        )
        run.write_table(rows.cast(schema.REWARDS), "rewards", name, part_name(0))
        _quarantine(
            run,
            f"rewards/{name}",
            [
                {
                    "reason": "corrupt_image",
                    "detail": "truncated JPEG",
                    "pair_id": int(pair_id[i]),
                    "prompt_id": int(ids[index[i]]),
                }
                for i in bad
            ],
        )
        _manifest(
            run,
            f"rewards/{name}",
            len(pair_id),
            {"corrupt_image": len(bad)},
            96.0 + number,
            model={"name": name, "version": "v1", "dtype": "float32"},
            cpu_seconds=190.1,
            gpu_seconds=0.0,
            images=2 * len(good),
            distinct_images=1900,
        )
        margins[name] = margin
    good = np.setdiff1d(np.arange(len(pair_id)), lost)
    pair_id, index = pair_id[good], index[good]
    margins = {name: margin[good] for name, margin in margins.items()}
    mean_margin = np.mean(list(margins.values()), axis=0)
    dropped_by = np.full(len(good), "", object)
    dropped_by[unrated[index]] = "quality_error"
    dropped_by[harmful[index]] = "harmful"
    columns = (mean_margin, quality[index], log_distance[index])
    terms = np.column_stack(
        [w * (c - c.mean()) / c.std() for w, c in zip((1.0, 0.5, 0.5), columns, strict=True)]
    )
    return Scored(pair_id, index, margins, dropped_by, terms.sum(axis=1), terms)


def _write_selection(
    run: RunDir,
    rng: np.random.Generator,
    scored: Scored,
    prompts: list[str],
    ids: np.ndarray,
    quality: np.ndarray,
    log_distance: np.ndarray,
    selection_size: int,
    harmful: np.ndarray,
) -> None:
    index = scored.prompt_index
    margin = np.mean(list(scored.margins.values()), axis=0).astype(np.float64)
    eligible = np.flatnonzero(scored.dropped_by == "")
    best = eligible[np.lexsort((scored.pair_id[eligible], -scored.score[eligible]))]
    # Few hostile prompts would make it by their score: the very first ones do.
    hostile = [i for i in best if prompts[index[i]] in HOSTILE_PROMPTS]
    _, first = np.unique(index[hostile], return_index=True)
    front = [hostile[i] for i in sorted(first)]
    best = np.array(front + [i for i in best if i not in set(front)])
    chosen = best[:selection_size]

    def terms_table(rows: np.ndarray) -> pa.Table:
        return pa.table(
            {
                "pair_id": scored.pair_id[rows],
                "prompt_id": ids[index[rows]],
                "prompt": [prompts[i] for i in index[rows]],
                "rank": np.arange(1, len(rows) + 1),
                "importance_score": scored.score[rows],
                "reward_margin": margin[rows],
                "prompt_quality": quality[index[rows]],
                "log_kth_neighbor_distance": log_distance[index[rows]],
                "margin_term": scored.terms[rows, 0],
                "quality_term": scored.terms[rows, 1],
                "diversity_term": scored.terms[rows, 2],
                "source_file": ["train-00000.parquet"] * len(rows),
                "source_row": scored.pair_id[rows] >> schema.ROW_SHIFT,
                "source_id": pa.nulls(len(rows), pa.string()),
                "chosen_uid": [f"c{i}" for i in rows],
                "rejected_uid": [f"r{i}" for i in rows],
            }
        ).cast(pa.schema(schema.SELECTED_TERMS))

    def with_images(table: pa.Table) -> pa.Table:
        for side in ("chosen_image", "rejected_image"):
            images = [picture(rng) for _ in range(len(table))]
            table = table.append_column(side, pa.array(images, pa.binary()))
        return table

    run.write_table(with_images(terms_table(chosen)), "selected", part_name(0))
    sets = {"fifa": chosen}
    orders = {
        "random": rng.permutation(eligible),
        "margin_only": eligible[np.argsort(-margin[eligible])],
        "quality_only": eligible[np.argsort(-quality[index[eligible]])],
        "diversity_only": eligible[np.argsort(-log_distance[index[eligible]])],
    }
    for name, order in orders.items():
        sets[name] = order[:selection_size]
        run.write_table(terms_table(sets[name]), "baselines", name, part_name(0))
    contradicted = eligible[np.argsort(margin[eligible])]
    groups = {
        "best": chosen,
        "just_missed": best[selection_size:],
        "worst": best[::-1],
        "disagrees": contradicted,
    }
    gallery = []
    for name, rows in groups.items():
        table = with_images(terms_table(rows[:8]))
        gallery.append(table.add_column(0, "group", pa.array([name] * len(table))))
    table = pa.concat_tables(gallery).to_pylist()
    table[1]["chosen_image"] = b"not an image"
    run.write_table(pa.Table.from_pylist(table, gallery[0].schema), "gallery", part_name(0))
    is_dropped = scored.dropped_by != ""
    run.write_table(
        pa.table(
            {
                "pair_id": scored.pair_id,
                "prompt_id": ids[index],
                "importance_score": pa.array(scored.score, mask=is_dropped),
                "dropped_by": pa.array([d or None for d in scored.dropped_by], pa.string()),
                "reward_margin": margin,
                "prompt_quality": pa.array(
                    quality[index], mask=scored.dropped_by == "quality_error"
                ),
                "log_kth_neighbor_distance": log_distance[index],
                "selected": np.isin(scored.pair_id, scored.pair_id[chosen]),
            }
            | {f"reward_margin_{name}": values for name, values in scored.margins.items()}
        ),
        "scored_sample",
        part_name(0),
    )
    dropped = {
        name: int(np.sum(scored.dropped_by == name)) for name in ("harmful", "quality_error")
    }
    _manifest(
        run,
        "selected",
        len(scored.pair_id),
        dropped | {"below_threshold": len(eligible) - len(chosen)},
        1.2,
        num_scored=len(scored.pair_id),
        dropped=dropped,
        threshold=float(scored.score[chosen[-1]]),
        sets={
            name: {
                "num_pairs": len(rows),
                "num_prompts": len(np.unique(index[rows])),
                "mean_reward_margin": float(margin[rows].mean()),
                "mean_prompt_quality": float(quality[index[rows]].mean()),
                "knn_entropy": float(-4 + log_distance[np.unique(index[rows])].mean()),
                "overlap": float(np.isin(rows, chosen).mean()),
            }
            for name, rows in sets.items()
        },
        terms={
            "reward_margin": {"mean": float(margin.mean()), "std": float(margin.std())},
            "prompt_quality": {"mean": float(quality[index].mean()), "std": 1.8},
        },
        reward_models={
            name: {"agreement": float(np.mean(values > 0))}
            for name, values in scored.margins.items()
        },
    )


def picture(rng: np.random.Generator, side: int = 192) -> bytes:
    """A small drawn scene as JPEG bytes."""
    sky = tuple(int(c) for c in rng.integers(90, 255, 3))
    image = Image.new("RGB", (side, side), sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle(
        (0, side * 0.65, side, side), fill=tuple(int(c) for c in rng.integers(20, 160, 3))
    )
    for _ in range(4):
        x, y, r = (int(v) for v in rng.integers(20, side - 40, 3))
        color = tuple(int(c) for c in rng.integers(0, 255, 3))
        draw.ellipse((x, y, x + r // 3 + 8, y + r // 3 + 8), fill=color)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


if __name__ == "__main__":
    write_run(
        sys.argv[1],
        num_prompts=4000,
        num_pairs=15_000,
        selection_size=1500,
        gallery_size=12,
        dimension=384,
    )
