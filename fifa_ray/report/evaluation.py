"""Whether tuned models are better: win rates with intervals, by category, and the images."""

import json
from typing import Any

import pyarrow.compute as pc

from fifa_ray.report import model_charts
from fifa_ray.report.gallery import thumbnail
from fifa_ray.report.section import NotPlanned, Section
from fifa_ray.report.tables import RunTables
from fifa_ray.schema import PROMPT_ID

RESULTS = ("evaluation", "results.json")
BASE = "base"
# Beyond these the chart would be taller than a screen; the table has them all.
MAX_FOREST_ROWS = 24


def build(tables: RunTables) -> Section:
    """The section of the run's last evaluation."""
    if not tables.run.exists(*RESULTS):
        raise NotPlanned("evaluation/results.json is not in this run: nothing was evaluated.")
    results = json.loads(tables.run.read_text(*RESULTS))
    comparisons = [
        entry | {"comparison": f"{entry['model']} over {entry['baseline']}"}
        for entry in sorted(results["comparisons"], key=lambda entry: entry["baseline"] != BASE)
    ]
    notes = [
        f"{sum(model['failed_images'].values()):,} images of {model['name']} could not be drawn: "
        + ", ".join(f"{n:,} {reason}" for reason, n in model["failed_images"].items())
        for model in results["models"]
        if model["failed_images"]
    ]
    charts = {}
    if comparisons:
        charts["win-rates"] = model_charts.forest(_forest_rows(comparisons))
    else:
        notes.append("No image has a score of two models, so nothing can be compared.")
    values = {
        "results": results,
        "comparisons": comparisons,
        "not_drawn": max(0, len(comparisons) - MAX_FOREST_ROWS),
        "any_filtering": any(entry["took_part_in_filtering"] for entry in comparisons),
        "categories": _category_tables(comparisons),
        "gallery": _gallery(tables, results),
    }
    return Section(template="evaluation.html.j2", values=values, charts=charts, notes=tuple(notes))


def _forest_rows(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "label": f"{entry['comparison']} · {entry['reward']}",
            "comparison": entry["comparison"],
            "reward": entry["reward"],
            "win_rate": entry["win_rate"],
            "low": entry["win_rate_low"],
            "high": entry["win_rate_high"],
            "independent": not entry["took_part_in_filtering"],
            "prompts": entry["num_prompts"],
        }
        for entry in comparisons[:MAX_FOREST_ROWS]
    ]


def _category_tables(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each two models: a row a category with the win rate by every reward."""
    tables: dict[str, dict[str, Any]] = {}
    for entry in comparisons:
        if not entry["categories"]:
            continue
        table = tables.setdefault(
            entry["comparison"], {"title": entry["comparison"], "rewards": [], "rows": {}}
        )
        table["rewards"].append(entry["reward"])
        for row in entry["categories"]:
            found = table["rows"].setdefault(
                row["category"], {"prompts": row["num_prompts"], "cells": {}}
            )
            found["cells"][entry["reward"]] = row
    return list(tables.values())


def _gallery(tables: RunTables, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The first prompt of each category in turn, with the first image of every model."""
    run = tables.run
    count = results["settings"]["gallery_size"]
    prompts = run.read_table("evaluation", "prompts")
    first = prompts.filter(pc.equal(prompts.column("image_index"), 0)).to_pylist()
    shown = _in_turn([row for row in first if row[PROMPT_ID] not in tables.harmful_ids], count)
    if not shown:
        return []
    wanted = [row["image_id"] for row in shown]
    names = [model["name"] for model in results["models"]]
    # The base first: that is how one reads "before and after".
    names = [BASE, *(name for name in names if name != BASE)] if BASE in names else names
    images = {name: _images(tables, name, wanted) for name in names}
    rewards = {
        name: {
            reward["name"]: _rewards(tables, name, reward["name"], wanted)
            for reward in results["rewards"]
        }
        for name in names
    }
    return [
        {
            "prompt": row["prompt"],
            "category": row["category"],
            "images": [
                {
                    "model": name,
                    "image": images[name].get(row["image_id"]),
                    "rewards": [
                        (reward, of.get(row["image_id"])) for reward, of in rewards[name].items()
                    ],
                }
                for name in names
            ],
        }
        for row in shown
    ]


def _in_turn(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, one of each category in turn: nobody picks them."""
    by_category: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    rounds = max(map(len, by_category.values()), default=0)
    turns = [group[i] for i in range(rounds) for group in by_category.values() if i < len(group)]
    return turns[:count]


def _images(tables: RunTables, model: str, image_ids: list[int]) -> dict[int, str | None]:
    if not tables.has("evaluation", "images", model):
        return {}
    rows = tables.rows_of("evaluation", "images", model, key="image_id", ids=image_ids)
    return {row["image_id"]: thumbnail(row["image"]) for row in rows.to_pylist()}


def _rewards(tables: RunTables, model: str, reward: str, image_ids: list[int]) -> dict[int, float]:
    if not tables.has("evaluation", "rewards", model, reward):
        return {}
    rows = tables.rows_of("evaluation", "rewards", model, reward, key="image_id", ids=image_ids)
    return dict(
        zip(rows.column("image_id").to_pylist(), rows.column("reward").to_pylist(), strict=True)
    )
