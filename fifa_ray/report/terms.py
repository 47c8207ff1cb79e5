"""How the terms of the score are distributed, and how the reward margin goes with the quality."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa_ray.report import charts
from fifa_ray.report.section import Absent, Section
from fifa_ray.report.tables import TERMS, RunTables, finite_values, shorten
from fifa_ray.schema import PAIR_ID, PROMPT_ID

SCATTER_POINTS = 2000


def distributions(tables: RunTables) -> Section:
    """A histogram of each term over the sample of all pairs, with the kept set and baselines."""
    sample = tables.sample
    sets = {"all": sample}
    notes = []
    try:
        sets["kept"] = tables.selected
    except Absent as absent:
        notes.append(str(absent))
    sets |= tables.baselines
    if not tables.baselines:
        notes.append("baselines/ is not in this run: no baseline was asked for (select.compare).")
    specs, panels = {}, []
    for column, title in TERMS.items():
        values = {name: finite_values(table, column) for name, table in sets.items()}
        values = {name: v for name, v in values.items() if len(v)}
        if "all" not in values:
            notes.append(f"No pair has a value of {column}.")
            continue
        name = f"distribution-{column}"
        specs[name], outside = charts.histograms(values, title=title)
        quantiles = [
            (which, len(v), *np.quantile(v, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist())
            for which, v in values.items()
        ]
        panels.append({"chart": name, "title": title, "outside": outside, "quantiles": quantiles})
    threshold = tables.details("selected").get("threshold")
    shown = {
        "panels": panels,
        "sets": [name for name in sets if name != "all"],
        "num_sampled": len(sample),
        "threshold": threshold,
    }
    return Section(template="distributions.html.j2", values=shown, charts=specs, notes=tuple(notes))


def margin_against_quality(tables: RunTables) -> Section:
    """Reward margin over prompt quality for a sample of pairs, kept ones lit."""
    sample = tables.sample
    columns = [PAIR_ID, PROMPT_ID, "reward_margin", "prompt_quality"]
    for column in columns:
        if column not in sample.column_names or not pc.count(sample.column(column)).as_py():
            raise Absent(f"scored_sample/ has no value of {column}: its stage has not run.")
    others = sample.filter(pc.invert(pc.fill_null(sample.column("selected"), False)))
    try:
        kept = tables.selected
    except Absent:
        kept = sample.filter(pc.fill_null(sample.column("selected"), False))
    parts = [
        (False, _thin(others.select(columns).drop_null(), SCATTER_POINTS)),
        (True, _thin(kept.select(columns).drop_null(), SCATTER_POINTS)),
    ]
    texts = tables.prompt_texts(
        i for _, table in parts for i in table.column(PROMPT_ID).to_pylist()
    )
    rows = [
        {
            "x": round(row["prompt_quality"], 3),
            "y": float(f"{row['reward_margin']:.5g}"),
            "kept": is_kept,
            "prompt": shorten(texts.get(row[PROMPT_ID], "")),
        }
        for is_kept, table in parts
        for row in table.to_pylist()
    ]
    chart = charts.scatter(
        rows,
        x_title=TERMS["prompt_quality"],
        y_title=TERMS["reward_margin"],
        tooltips={"prompt:N": "prompt", "x:Q": "prompt quality", "y:Q": "reward margin"},
    )
    values = {"num_others": len(parts[0][1]), "num_kept": len(parts[1][1])}
    return Section(template="scatter.html.j2", values=values, charts={"margin-quality": chart})


def _thin(table: pa.Table, count: int) -> pa.Table:
    """At most `count` rows at even steps in the order of pair_id: the same in every report."""
    table = table.sort_by(PAIR_ID)
    if len(table) <= count:
        return table
    return table.take(np.linspace(0, len(table) - 1, count).astype(np.int64))
