"""Charts of models: curves of trainings over each other, and win rates with their intervals."""

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np

from fifa_ray.report.charts import SERIES, Row, Spec, finish, rounded

MAX_POINTS = 60
COLORS = ("var(--kept)", *SERIES, "var(--series-5)")
SIDES = ("chosen", "rejected")


def binned(step: np.ndarray, value: np.ndarray, num_bins: int = MAX_POINTS) -> list[Row]:
    """Means over runs of neighbouring steps, at most `num_bins` of equal size.

    step, value: (points,), in order of step. Values that are not finite are left out.
    """
    good = np.isfinite(value)
    step, value = step[good], value[good]
    size = max(1, -(-len(step) // num_bins))
    return [
        {
            "step": rounded(float(step[start : start + size].mean())),
            "value": rounded(float(value[start : start + size].mean())),
        }
        for start in range(0, len(step), size)
    ]


def curves(
    lines: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    *,
    title: str,
    level: float | None = None,
    points: Mapping[str, Sequence[Row]] | None = None,
    dashes: str | None = None,
    percent: bool = False,
) -> Spec:
    """A value over the optimizer steps, a line for each training.

    lines: rows with step and value by training; `points` are further values drawn as points that a
    line joins, such as validations. dashes: a field of the rows, chosen or rejected, that makes
    lines whole or dashed. level: where a dashed line crosses. names: all trainings of the page, so
    that one has the same colour in every chart.
    """
    color = alt.Color(
        "training:N",
        scale=alt.Scale(domain=list(names), range=[color_of(names, name) for name in names]),
        legend=None,
    )
    y_axis = alt.Axis(format="%") if percent else alt.Axis()
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(nice=False))
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False), axis=y_axis)
    format_ = ".1%" if percent else ".4g"
    tooltip = [
        alt.Tooltip("training:N"),
        alt.Tooltip("step:Q", title="step", format=",.0f"),
        alt.Tooltip("value:Q", title=title, format=format_),
    ]
    layers = []
    if level is not None:
        ruler = alt.Chart(alt.Data(values=[{"value": level}]))
        layers.append(ruler.mark_rule(color="var(--muted)", strokeDash=[4, 4]).encode(y=y))
    rows = [{"training": name} | dict(row) for name, of in lines.items() for row in of]
    line = alt.Chart(alt.Data(values=rows)).mark_line(
        strokeWidth=1.5, opacity=0.55 if points else 0.95, aria=False
    )
    encoding = {"x": x, "y": y, "color": color}
    if dashes:
        scale = alt.Scale(domain=list(SIDES), range=[[1, 0], [5, 4]])
        encoding["strokeDash"] = alt.StrokeDash(f"{dashes}:N", scale=scale, legend=None)
    layers.append(line.encode(**encoding))
    marked = [{"training": name} | dict(row) for name, of in (points or {}).items() for row in of]
    if marked:
        data = alt.Chart(alt.Data(values=marked))
        layers.append(data.mark_line(strokeWidth=2.5, aria=False).encode(x=x, y=y, color=color))
        layers.append(data.mark_point(size=55, filled=True, opacity=1).encode(
            x=x, y=y, color=color, tooltip=tooltip
        ))  # fmt: skip
    else:
        hover = alt.Chart(alt.Data(values=rows)).mark_point(size=60, opacity=0, aria=False)
        layers.append(hover.encode(x=x, y=y, tooltip=tooltip))
    return finish(alt.layer(*layers), height=210)


def color_of(names: Sequence[str], name: str) -> str:
    """CSS variable of a training's colour: its place among all trainings of the page."""
    return COLORS[list(names).index(name) % len(COLORS)]


def forest(rows: Sequence[Row]) -> Spec:
    """Win rates with intervals, one under the other; the dashed line is no difference.

    Rows in drawing order: comparison, reward, label (distinct), win_rate, low and high (None: no
    interval), independent, prompts. Rewards that took part in filtering are hollow.
    """
    known = [row for row in rows if row["low"] is not None]
    lowest = min([0.3, *(row["low"] - 0.02 for row in known), *(row["win_rate"] for row in rows)])
    highest = max([0.7, *(row["high"] + 0.02 for row in known), *(row["win_rate"] for row in rows)])
    x_scale = alt.Scale(domain=[max(0.0, lowest), min(1.0, highest)], nice=False)
    axis = alt.Axis(format=".0%", grid=True)
    x = alt.X("win_rate:Q", title="win rate", scale=x_scale, axis=axis)
    y = alt.Y(
        "label:N",
        title=None,
        sort=[row["label"] for row in rows],
        axis=alt.Axis(
            labelColor="var(--ink)", labelLimit=300, ticks=False, domain=False, labelPadding=8
        ),
    )
    data = alt.Chart(alt.Data(values=list(rows)))
    even = (
        alt.Chart(alt.Data(values=[{"win_rate": 0.5}]))
        .mark_rule(color="var(--muted)", strokeDash=[4, 4])
        .encode(x=x)
    )
    spread = data.mark_rule(strokeWidth=2.5, color="var(--kept)", opacity=0.6).encode(
        x=alt.X("low:Q", scale=x_scale, title="win rate"), x2="high:Q", y=y
    )
    marks = data.mark_point(size=90, opacity=1, stroke="var(--kept)", strokeWidth=2).encode(
        x=x,
        y=y,
        fill=alt.condition(
            alt.datum.independent, alt.value("var(--kept)"), alt.value("var(--paper)")
        ),
        tooltip=[
            alt.Tooltip("comparison:N"),
            alt.Tooltip("reward:N"),
            alt.Tooltip("win_rate:Q", title="win rate", format=".1%"),
            alt.Tooltip("low:Q", format=".1%"),
            alt.Tooltip("high:Q", format=".1%"),
            alt.Tooltip("prompts:Q", format=","),
        ],
    )
    return finish(alt.layer(even, spread, marks), height=40 + 28 * len(rows))
