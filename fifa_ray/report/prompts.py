"""The prompts: a map of their embeddings, the extremes of each term, and the flagged ones."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa_ray.report import charts
from fifa_ray.report.section import Absent, Section
from fifa_ray.report.tables import RunTables, shorten
from fifa_ray.schema import PROMPT_ID, embedding_matrix

TOP = 10
FLAGGED_SHOWN = 50
# Share of the map that other prompts keep when more prompts were selected than it has room for.
OTHERS_SHARE = 1 / 3


def prompt_map(tables: RunTables) -> Section:
    """A 2-D t-SNE map of prompt embeddings, the kept prompts lit.

    All kept prompts come first, then a sample of the others, `report.map_points` in all.
    """
    tables.require("embeddings", writer="embed")
    limit = tables.settings.map_points
    if limit < 2:
        raise Absent(f"The map is switched off: report.map_points is {limit}.")
    notes = []
    kept = np.empty(0, np.int64)
    try:
        kept = tables.selected_prompt_ids
    except Absent as absent:
        notes.append(f"No prompt is lit: {absent}")
    total = tables.run.num_rows("embeddings")
    room = min(limit, total)
    if len(kept) > room * (1 - OTHERS_SHARE) and len(kept) < total:
        shown = kept[: max(1, min(len(kept), int(room * (1 - OTHERS_SHARE))))]
    else:
        shown = kept[:room]
    others = _smallest_ids(tables, room - len(shown), without=kept)
    rows = tables.rows_of("embeddings", key=PROMPT_ID, ids=[*shown.tolist(), *others])
    if len(rows) < 2:
        raise Absent("A map needs at least two prompts; embeddings/ has fewer.")
    ids = rows.column(PROMPT_ID).to_pylist()
    places = project(embedding_matrix(rows))
    texts = tables.prompt_texts(ids)
    quality = _column_of(tables, "quality", "prompt_quality", ids)
    lit = set(shown.tolist())
    points = [
        {
            "x": round(float(x), 2),
            "y": round(float(y), 2),
            "kept": i in lit,
            "prompt": shorten(texts.get(i, "")),
            "quality": None if quality.get(i) is None else round(quality[i], 2),
        }
        for i, (x, y) in zip(ids, places, strict=True)
    ]
    chart = charts.point_map(points, tooltips={"prompt:N": "prompt", "quality:Q": "prompt quality"})
    values = {
        "num_kept_shown": len(lit & set(ids)),
        "num_kept": len(kept),
        "num_others_shown": len(ids) - len(lit & set(ids)),
        "num_others": total - len(kept),
    }
    return Section(
        template="map.html.j2", values=values, charts={"prompt-map": chart}, notes=tuple(notes)
    )


def project(embeddings: np.ndarray) -> np.ndarray:
    """t-SNE from a PCA start: float array (rows, 2). The same for the same input.

    `embeddings`: float32 (rows, dimension), at least 2 rows. One thread: with several, the order of
    additions and so the picture would differ from run to run.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows, dimension = embeddings.shape
    with threadpool_limits(limits=1):
        if rows > 50:
            embeddings = PCA(min(50, dimension, rows), random_state=0).fit_transform(embeddings)
        if min(embeddings.shape) < 2:
            return np.column_stack([embeddings[:, 0], np.zeros(rows)])
        tsne = TSNE(
            init="pca", perplexity=min(30.0, (rows - 1) / 3), max_iter=500, random_state=0, n_jobs=1
        )
        return np.asarray(tsne.fit_transform(embeddings))


def extremes(tables: RunTables) -> Section:
    """The prompts with the highest and the lowest quality and diversity; flagged ones left out."""
    kept: set[int] = set()
    notes = []
    if tables.has("selected"):
        kept = set(tables.selected_prompt_ids.tolist())
    lists = []
    for stage, column, name in (
        ("quality", "prompt_quality", "quality"),
        ("neighbors", "log_kth_neighbor_distance", "diversity"),
    ):
        if not tables.has(stage):
            notes.append(f"{stage}/ is not in this run: its stage has not run or is switched off.")
            continue
        low, high = tables.extremes(stage, column=column, count=TOP, exclude=tables.harmful_ids)
        texts = tables.prompt_texts(i for i, _ in low + high)
        for which, rows in ((f"Highest {name}", high), (f"Lowest {name}", low)):
            shown = [{"prompt": texts.get(i), "value": v, "kept": i in kept} for i, v in rows]
            lists.append({"title": which, "column": column, "rows": shown})
    if not lists:
        raise Absent(" ".join(notes))
    return Section(template="extremes.html.j2", values={"lists": lists}, notes=tuple(notes))


def flagged(tables: RunTables) -> Section:
    """Prompts that the judge flagged as harmful, by category; their text behind a click."""
    tables.require("quality", writer="judge")
    categories: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for batch in tables.batches("quality", columns=[PROMPT_ID, "harmful", "harm_category"]):
        hits = batch.filter(pc.fill_null(batch["harmful"], False)).to_pylist()
        categories.update(row["harm_category"] or "no category" for row in hits)
        rows += hits[: FLAGGED_SHOWN - len(rows)]
    texts = tables.prompt_texts((row[PROMPT_ID] for row in rows), reveal=True)
    kept = tables.selected_prompt_ids.tolist() if tables.has("selected") else []
    values = {
        "total": categories.total(),
        "num_kept": len(tables.harmful_ids.intersection(kept)) if tables.has("selected") else None,
        "categories": sorted(categories.items(), key=lambda item: (-item[1], item[0])),
        "rows": [row | {"prompt": texts.get(row[PROMPT_ID])} for row in rows],
    }
    return Section(template="flagged.html.j2", values=values)


def _smallest_ids(tables: RunTables, count: int, without: np.ndarray) -> list[int]:
    """The smallest `count` ids of embeddings/ that are not in `without`: a uniform sample."""
    found: list[int] = []
    for batch in tables.batches("embeddings", columns=[PROMPT_ID]):
        if len(found) >= count:
            break
        ids = batch[PROMPT_ID].to_numpy()
        found += ids[~np.isin(ids, without)][: count - len(found)].tolist()
    return found


def _column_of(tables: RunTables, table: str, column: str, ids: list[int]) -> dict[int, Any]:
    if not tables.has(table):
        return {}
    rows: pa.Table = tables.rows_of(table, key=PROMPT_ID, ids=ids)
    keys, values = rows.column(PROMPT_ID).to_pylist(), rows.column(column).to_pylist()
    return dict(zip(keys, values, strict=True))
