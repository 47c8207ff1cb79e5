"""What a search has found: win rate against cost, every trial, and the winner's re-run."""

import json
from typing import Any

import altair as alt
import pyarrow.fs as pafs

from fifa_ray.report.charts import Row, Spec, finish, rounded
from fifa_ray.report.formatting import TRIAL_ENDS
from fifa_ray.report.section import NotPlanned, Section
from fifa_ray.report.tables import RunTables

RESULTS = "results.json"
MODELS = {"best": "the winner", "default": "the configured settings", "base": "the base"}


def build(tables: RunTables) -> Section:
    """The section of all searches of the run that have come to an end."""
    searches = [_search(tables, name) for name in search_names(tables)]
    if not searches:
        raise NotPlanned("tuning/ has no results.json: nothing was searched.")
    charts = {f"tuning-{search['name']}": front_chart(search) for search in searches}
    return Section(template="tuning.html.j2", values={"searches": searches}, charts=charts)


def search_names(tables: RunTables) -> list[str]:
    """Names of the folders of tuning/ that have results, sorted."""
    run = tables.run
    infos = run.filesystem.get_file_info(
        pafs.FileSelector(run.path("tuning"), allow_not_found=True)
    )
    names = sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)
    return [name for name in names if run.exists("tuning", name, RESULTS)]


def _search(tables: RunTables, name: str) -> dict[str, Any]:
    results = json.loads(tables.run.read_text("tuning", name, RESULTS))
    keys = sorted({key for entry in results["trials"] for key in entry["params"]})
    rows = [
        entry
        | {
            "number": number,
            "status": TRIAL_ENDS[entry["status"]],
            "is_best": entry["trial"] == results["best"],
            "is_default": entry["trial"] == results["default"],
            "on_front": entry["trial"] in results["front"],
            "values": [entry["params"].get(key) for key in keys],
        }
        for number, entry in enumerate(results["trials"], 1)
    ]
    rows.sort(key=lambda row: -1 if row["win_rate"] is None else row["win_rate"], reverse=True)
    final = [
        row | {"title": f"{MODELS[row['model']]} over {MODELS[row['baseline']]}"}
        for row in results["final"]
    ]
    return results | {
        "rows": rows,
        "keys": keys,
        "final": final,
        "best_row": next(row for row in rows if row["is_best"]),
        "trial_seconds": sum(row["device_seconds"] for row in rows),
    }


def front_chart(search: dict[str, Any]) -> Spec:
    """Win rate of each trial against what it cost; a line joins those that are worth it.

    search: results with `rows`; trials without a win rate are left out.
    """
    rows: list[Row] = [
        {
            "trial": row["trial"],
            "cost": rounded(row["device_seconds"]),
            "win_rate": rounded(row["win_rate"]),
            "low": rounded(row["win_rate_low"]),
            "high": rounded(row["win_rate_high"]),
            "steps": row["steps"],
            "status": row["status"],
            "front": row["on_front"],
            "kind": "the winner"
            if row["is_best"]
            else "configured settings"
            if row["is_default"]
            else "trials",
        }
        for row in search["rows"]
        if row["win_rate"] is not None
    ]
    kinds = {"the winner": "var(--kept)", "configured settings": "var(--series-1)"}
    color = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=[*kinds, "trials"], range=[*kinds.values(), "var(--all)"]),
        legend=alt.Legend(),
    )
    x = alt.X("cost:Q", title=f"{search['unit']}-seconds of the trial", scale=alt.Scale(zero=False))
    y = alt.Y(
        "win_rate:Q",
        title="win rate over the base",
        scale=alt.Scale(zero=False, padding=8),
        axis=alt.Axis(format=".0%"),
    )
    front = sorted((row for row in rows if row["front"]), key=lambda row: row["cost"])
    line = (
        alt.Chart(alt.Data(values=front))
        .mark_line(strokeWidth=1.5, color="var(--muted)", interpolate="step-after", aria=False)
        .encode(x=x, y=y)
    )
    points = (
        alt.Chart(alt.Data(values=sorted(rows, key=lambda row: row["kind"] != "trials")))
        .mark_point(filled=True, size=75, opacity=0.9)
        .encode(
            x=x,
            y=y,
            color=color,
            tooltip=[
                alt.Tooltip("trial:N"),
                alt.Tooltip("status:N"),
                alt.Tooltip("win_rate:Q", title="win rate", format=".1%"),
                alt.Tooltip("low:Q", format=".1%"),
                alt.Tooltip("high:Q", format=".1%"),
                alt.Tooltip("steps:Q", title="optimizer steps", format=","),
                alt.Tooltip("cost:Q", title=f"{search['unit']}-seconds", format=",.0f"),
            ],
        )
    )
    return finish(alt.layer(line, points), height=300)
