"""The second half of a synthetic run: rewards, the selection and what goes with it."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from fifa_ray import schema
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


def manifest(
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


def quarantine(run: RunDir, stage: str, rows: list[dict[str, object]]) -> None:
    table = pa.Table.from_pylist([{"stage": stage} | row for row in rows], schema.QUARANTINE)
    run.write_table(table, "quarantine", *stage.split("/"), part_name(0))


def score(
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
        quarantine(
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
        manifest(
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


def write_selection(
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
    unscored = run.num_rows("pairs") - len(scored.pair_id)
    manifest(
        run,
        "selected",
        run.num_rows("pairs"),
        dropped | {"unscored": unscored, "not_selected": len(eligible) - len(chosen)},
        1.2,
        num_scored=len(scored.pair_id),
        dropped=dropped | {"unscored": unscored},
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
            f"reward_margin_{name}": {"mean": float(v.mean()), "std": float(v.std())}
            for name, v in scored.margins.items()
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
