"""Vega-Lite charts, drawn with Altair. Colours are CSS variables, so one chart fits every theme.

The renderer in the browser is SVG: it hands `var(--kept)` to the browser as it is, and light, dark
and print need no redrawing. Specifications hold plain data; nothing is fetched.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import altair as alt
import numpy as np
import vl_convert

Spec = dict[str, Any]
Row = dict[str, Any]

# Set of pairs -> the CSS variable of its colour. `all` is the background that others stand on.
SET_COLORS = {
    "all": "var(--all)",
    "kept": "var(--kept)",
    "random": "var(--series-1)",
    "margin_only": "var(--series-2)",
    "quality_only": "var(--series-3)",
    "diversity_only": "var(--series-4)",
    "fifa": "var(--series-5)",
}
# Lines and marks of several models, in this order.
SERIES = ("var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-4)")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
_CONFIG = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "gridColor": "var(--grid)",
        "labelOverlap": True,
        "tickCount": 5,
    },
    "legend": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "orient": "top",
        "direction": "horizontal",
        "title": None,
        "symbolStrokeWidth": 0,
    },
}


@cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed with everything they need, as one script; no network."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # The script stands inside an HTML element, which this would end.
    return bundle.replace("</script", "<\\/script")


def histograms(
    values: Mapping[str, np.ndarray], *, title: str, num_bins: int = 40
) -> tuple[Spec, int]:
    """Share of each set in equal bins: `all` as bars, the others as steps shown on demand.

    `values` maps a set's name to float values of shape (rows,), finite; the first set is drawn as
    bars. Bins span the central 99.8% of the first set; what lies beyond is counted in the outermost
    bins. Returns the chart and how many values of the first set lie beyond.
    """
    names = list(values)
    first = values[names[0]]
    low, high = (float(q) for q in np.quantile(first, [0.001, 0.999]))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, num_bins + 1)
    shares = {
        name: np.histogram(np.clip(v, low, high), edges)[0] / max(1, len(v))
        for name, v in values.items()
    }
    rows: list[Row] = [
        {
            "low": rounded(edges[i]),
            "high": rounded(edges[i + 1]),
            "bin": f"{edges[i]:.3g} to {edges[i + 1]:.3g}",
        }
        | {name: rounded(share[i]) for name, share in shares.items()}
        for i in range(num_bins)
    ]
    # A step line needs a point at the right edge of the last bin.
    closing = {"low": rounded(edges[-1])} | {name: rows[-1][name] for name in names}

    data = alt.Data(values=rows)
    x = alt.X("low:Q", title=title, scale=alt.Scale(domain=[edges[0], edges[-1]], nice=False))
    y_axis = alt.Axis(format="%", tickCount=4)
    bars = (
        alt.Chart(data)
        .mark_rect(color=SET_COLORS["all"], aria=False)
        .encode(
            x=x, x2="high:Q", y=alt.Y(f"{names[0]}:Q", title=None, axis=y_axis), y2=alt.datum(0)
        )
    )
    shown = alt.param(name="shown", value=names[1:2])
    colors = alt.Scale(
        domain=names[1:], range=[SET_COLORS.get(n, "var(--series-1)") for n in names[1:]]
    )
    lines = (
        alt.Chart(alt.Data(values=[*rows, closing]))
        .transform_fold([*names[1:]], as_=["set", "share"])
        .transform_filter("indexof(shown, datum.set) >= 0")
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x="low:Q",
            y="share:Q",
            color=alt.Color("set:N", scale=colors, legend=None),
        )
        .add_params(shown)
    )
    pointed = alt.selection_point(name="pointed", on="pointerover", clear="pointerout", empty=False)
    hover = (
        alt.Chart(data)
        .mark_rect(color="var(--ink)", aria=False)
        .encode(
            x="low:Q",
            x2="high:Q",
            opacity=alt.condition(pointed, alt.value(0.08), alt.value(0)),
            tooltip=[alt.Tooltip("bin:N", title=title)]
            + [alt.Tooltip(f"{n}:Q", title=n.replace("_", " "), format=".1%") for n in names],
        )
        .add_params(pointed)
    )
    outside = int(np.sum((first < low) | (first > high)))
    return finish(alt.layer(bars, lines, hover), height=190), outside


def scatter(
    rows: Sequence[Row], *, x_title: str, y_title: str, tooltips: Mapping[str, str]
) -> Spec:
    """Points with `x`, `y` and `kept`; kept ones lit and on top. `tooltips`: field -> title."""
    chart = _points(rows, tooltips, size=26).encode(
        x=alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, padding=8)),
        y=alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False, padding=8)),
    )
    return finish(chart, height=380)


def point_map(rows: Sequence[Row], *, tooltips: Mapping[str, str]) -> Spec:
    """A map without axes of points with `x`, `y` and `kept`; kept ones lit and on top."""
    scale = alt.Scale(zero=False, nice=False, padding=10)
    chart = _points(rows, tooltips, size=22).encode(
        x=alt.X("x:Q", axis=None, scale=scale), y=alt.Y("y:Q", axis=None, scale=scale)
    )
    return finish(chart, height=560)


def agreement_by_margin(rows: Sequence[Row], names: Sequence[str]) -> Spec:
    """Share of pairs on which a model agrees with the people, by size of its margin.

    Rows: model, margin (standard deviations), agreement, low, high (95% interval), pairs.
    """
    color = alt.Color(
        "model:N",
        scale=alt.Scale(domain=list(names), range=[SERIES[i % 4] for i in range(len(names))]),
        legend=alt.Legend() if len(names) > 1 else None,
    )
    x = alt.X("margin:Q", title="size of the reward margin (standard deviations of it)")
    data = alt.Chart(alt.Data(values=list(rows)))
    scale = alt.Scale(domain=[min(0.4, *(row["low"] for row in rows)), 1])
    share = alt.Y("agreement:Q", title=None, scale=scale, axis=alt.Axis(format="%"))
    chance = (
        alt.Chart(alt.Data(values=[{"agreement": 0.5}]))
        .mark_rule(color="var(--muted)", strokeDash=[4, 4])
        .encode(y=share)
    )
    spread = data.mark_rule(strokeWidth=2, opacity=0.6).encode(
        x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=color
    )
    line = data.mark_line(strokeWidth=2).encode(x=x, y=share, color=color)
    points = data.mark_point(size=70, filled=True, opacity=1).encode(
        x=x,
        y=share,
        color=color,
        tooltip=[
            alt.Tooltip("model:N"),
            alt.Tooltip("margin:Q", title="mean size of margin", format=".2f"),
            alt.Tooltip("agreement:Q", title="agree with the people", format=".1%"),
            alt.Tooltip("pairs:Q", format=","),
        ],
    )
    return finish(alt.layer(chance, spread, line, points), height=300)


def _points(rows: Sequence[Row], tooltips: Mapping[str, str], size: int) -> alt.Chart:
    # Later rows are drawn over earlier ones.
    ordered = sorted(rows, key=lambda row: bool(row["kept"]))
    condition = alt.datum.kept
    return (
        alt.Chart(alt.Data(values=ordered))
        .mark_circle(size=size, aria=False)
        .encode(
            color=alt.condition(condition, alt.value("var(--kept)"), alt.value("var(--all)")),
            opacity=alt.condition(condition, alt.value(0.85), alt.value(0.55)),
            tooltip=[alt.Tooltip(field, title=title) for field, title in tooltips.items()],
        )
    )


def finish(chart: Any, *, height: int) -> Spec:
    """The specification of a chart as wide as its place, in the look of the page."""
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    spec.pop("$schema")
    spec["config"] = _CONFIG
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def rounded(value: float) -> float:
    """Six significant digits: what a chart can show, at less weight."""
    return float(f"{value:.6g}")
