"""Whether the reward models agree with the people, and with each other."""

from typing import Any

import numpy as np
import pyarrow as pa

from fifa_ray.report import charts
from fifa_ray.report.section import Absent, Section
from fifa_ray.report.tables import RunTables

NUM_BINS = 8
PREFIX = "reward_margin_"
Z_95 = 1.959964


def agreement(tables: RunTables) -> Section:
    """Share of pairs whose chosen image a reward model also prefers, overall and by margin."""
    margins = _margins(tables)
    exact = tables.details("selected").get("reward_models") or {}
    rows, bins = [], []
    for name, values in margins.items():
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        share = float(np.mean(values > 0))
        low, high = wilson_interval(share, len(values))
        overall = (exact.get(name) or {}).get("agreement")
        rows.append(
            {
                "model": name,
                "all": overall,
                "share": share,
                "low": low,
                "high": high,
                "pairs": len(values),
            }
        )
        bins += [{"model": name} | row for row in agreement_bins(values)]
    if not rows:
        raise Absent("scored_sample/ has no reward margin.")
    names = [str(row["model"]) for row in rows]
    chart = charts.agreement_by_margin(bins, names)
    values_ = {"rows": rows, "bins": bins, "names": names, "correlation": _correlation(margins)}
    return Section(template="agreement.html.j2", values=values_, charts={"agreement": chart})


def agreement_bins(margins: np.ndarray, num_bins: int = NUM_BINS) -> list[dict[str, Any]]:
    """Share of positive margins in bins of equal counts of their size, smallest size first.

    `margins`: finite floats of shape (pairs,). `margin` is the bin's mean size in standard
    deviations, `low` and `high` the 95% Wilson interval of the share.
    """
    order = np.argsort(np.abs(margins), kind="stable")
    spread = float(np.std(margins)) or 1.0
    rows = []
    for members in np.array_split(margins[order], num_bins):
        if not len(members):
            continue
        share = float(np.mean(members > 0))
        low, high = wilson_interval(share, len(members))
        rows.append(
            {
                "margin": float(np.mean(np.abs(members))) / spread,
                "agreement": share,
                "low": low,
                "high": high,
                "pairs": len(members),
            }
        )
    return rows


def wilson_interval(share: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson (1927) score interval of a share seen in `count` > 0 trials."""
    denominator = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / denominator
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / denominator
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def _margins(tables: RunTables) -> dict[str, np.ndarray]:
    sample = tables.sample
    columns = [name for name in sample.column_names if name.startswith(PREFIX)]
    if not columns and "reward_margin" in sample.column_names:
        return {"reward_margin": _floats(sample, "reward_margin")}
    return {name.removeprefix(PREFIX): _floats(sample, name) for name in columns}


def _floats(table: pa.Table, column: str) -> np.ndarray:
    values = table.column(column).cast(pa.float64())
    return np.asarray(values.fill_null(float("nan")).to_numpy())


def _correlation(margins: dict[str, np.ndarray]) -> list[tuple[str, list[float | None]]]:
    """Pearson correlation of every two models' margins over pairs that both scored."""
    if len(margins) < 2:
        return []
    return [
        (name, [_pearson(one, other) for other in margins.values()])
        for name, one in margins.items()
    ]


def _pearson(one: np.ndarray, other: np.ndarray) -> float | None:
    both = np.isfinite(one) & np.isfinite(other)
    if both.sum() < 3 or np.std(one[both]) == 0 or np.std(other[both]) == 0:
        return None
    return float(np.corrcoef(one[both], other[both])[0, 1])
