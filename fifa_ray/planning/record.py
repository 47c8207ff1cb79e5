"""A plan as plain values, for plan.json, and as lines for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fifa_ray.planning.estimates import Estimate
from fifa_ray.planning.stages import GB, HOUR, Group, StagePrediction, Totals

NO_VALUE = "-"
RANGE_EXPLAINED = (
    "Ranges: of a measured rate the 95% interval over the sample's blocks, of what is assumed, or "
    "was measured once such as a start-up, half to double; of a given rate none. Sums add them as "
    "if all erred in the same direction."
)
NODES_EXPLAINED = (
    "Nodes are taken to join when a stage asks for them and to leave before the next one that does "
    "not; stages run one after another."
)


def stage_record(prediction: StagePrediction) -> dict[str, Any]:
    """One stage of plan.json."""
    work = prediction.work
    per_row = work.rate.seconds_per_row
    return {
        "stage": work.stage,
        "unit": work.unit,
        "rows": asdict(work.rows),
        "rows_per_second_of_a_worker": 1 / per_row.value if per_row.value else None,
        "rate_source": work.rate.source,
        "measured_blocks": work.rate.blocks,
        "start_seconds": asdict(work.start),
        "start_source": work.start_source,
        "workers": prediction.workers,
        "worker": asdict(work.worker),
        "nodes": prediction.nodes,
        "seconds": asdict(prediction.seconds),
        "gpu_seconds": asdict(prediction.gpu_seconds),
        "node_seconds": {name: asdict(s) for name, s in prediction.node_seconds.items()},
        "cost": _optional(prediction.cost),
        "bytes": _optional(work.bytes),
        "notes": list(work.notes),
        "warnings": list(prediction.warnings),
    }


def totals_record(totals: Totals) -> dict[str, Any]:
    """The sums of plan.json."""
    return {
        "seconds": asdict(totals.seconds),
        "gpu_seconds": asdict(totals.gpu_seconds),
        "node_seconds": {name: asdict(s) for name, s in totals.node_seconds.items()},
        "bytes": asdict(totals.bytes),
        "cost": _optional(totals.cost),
    }


def group_records(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The cluster's shape of plan.json."""
    return [asdict(group) for group in groups]


def _optional(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)


def plan_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The plan as a table with what it rests on, for a terminal."""
    dataset = plan["dataset"]
    for name in ("pairs", "prompts"):
        count = dataset[name]
        yield f"{name.capitalize()}: {_count(count)} ({dataset[f'{name}_from']})"
    if dataset["images"]:
        yield f"Images: {_count(dataset['images'])} (by the dataset's names, likewise)"
    sample = plan["sample"]
    if sample:
        yield (
            f"Sample: {sample['rows']:,} rows through every measured stage in "
            f"{duration(sample['seconds'])}: {sample['folder']}"
        )
    yield ""
    yield from _table(_rows(plan), left=(0, 3, 4, 6))
    yield ""
    yield from _total_lines(plan)
    yield from (RANGE_EXPLAINED, NODES_EXPLAINED)
    for stage in plan["stages"]:
        for note in stage["notes"]:
            yield f"{stage['stage']}: {note}"
    for warning in plan["warnings"]:
        yield f"WARNING: {warning}"


def _rows(plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    currency = plan["currency"] or ""
    header = (
        "stage", "rows", "rate of a worker", "", "workers on nodes", "time", "(range)",
        "GPU hours", f"cost {currency}".rstrip(), "storage",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for stage in plan["stages"]:
        rate = stage["rows_per_second_of_a_worker"]
        seconds = stage["seconds"]
        rows.append(
            (
                stage["stage"],
                f"{stage['rows']['value']:,.0f}",
                f"{figures(rate)} {stage['unit']}/s",
                stage["rate_source"],
                f"{stage['workers']} on {nodes_text(stage['nodes'])}",
                duration(seconds["value"]),
                f"({duration(seconds['low'])} to {duration(seconds['high'])})",
                figures(stage["gpu_seconds"]["value"] / HOUR),
                money_text(stage["cost"]),
                size(stage["bytes"]),
            )
        )
    return rows


def _total_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    totals, currency = plan["totals"], plan["currency"] or ""
    seconds, gpu_hours = totals["seconds"], totals["gpu_seconds"]["value"] / HOUR
    yield (
        f"Total: {duration(seconds['value'])} ({duration(seconds['low'])} to "
        f"{duration(seconds['high'])}), {figures(gpu_hours)} GPU hours, "
        f"{size(totals['bytes'])} written"
    )
    for name, of_group in totals["node_seconds"].items():
        spot = next((" (spot)" for g in plan["groups"] if g["name"] == name and g["spot"]), "")
        yield f"  {name}{spot}: {figures(of_group['value'] / HOUR)} node hours"
    cost = totals["cost"]
    if cost is not None:
        yield (
            f"Cost: {cost['value']:,.2f} {currency} ({cost['low']:,.2f} to {cost['high']:,.2f}) "
            "for nodes"
        )
    elif plan["currency"] is None:
        yield "Cost: no prices (set cost.prices_file or cost.prices): hours and node hours only"
    else:
        unpriced = [g["name"] for g in plan["groups"] if g["price_per_hour"] is None]
        yield f"Cost: not known, {', '.join(unpriced)} without a price_per_hour"
    if plan["storage_cost"] is not None:
        yield (
            f"Storage: {plan['storage_cost']:,.2f} {currency} for {plan['storage_months']:g} "
            "month(s)"
        )


def _table(rows: Sequence[tuple[str, ...]], left: Sequence[int]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.ljust(widths[i]) if i in left else text.rjust(widths[i])
            for i, text in enumerate(row)
        ]
        yield "  ".join(cells).rstrip()


def _count(count: Mapping[str, float]) -> str:
    text = f"{count['value']:,.0f}"
    if count["low"] == count["high"]:
        return text
    return f"{text} ({count['low']:,.0f} to {count['high']:,.0f})"


def nodes_text(nodes: Mapping[str, int]) -> str:
    """`4 gpu + 1 cpu`."""
    return " + ".join(f"{count} {name}" for name, count in nodes.items())


def money_text(cost: Mapping[str, float] | None) -> str:
    """Two decimals, or a dash."""
    return NO_VALUE if cost is None else f"{cost['value']:,.2f}"


def size(count: Mapping[str, float] | None) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    if count is None:
        return NO_VALUE
    value = count["value"]
    for unit, scale in (("TB", 1e12), ("GB", GB), ("MB", 1e6)):
        if value >= scale:
            return f"{figures(value / scale)} {unit}"
    return f"{figures(value / 1e3)} kB"


def duration(seconds: float) -> str:
    """`12 s`, `3.5 min`, `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / HOUR:,.1f} h"


def figures(value: float | None) -> str:
    """Three significant figures, without exponents."""
    if value is None:
        return NO_VALUE
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}" if abs(value) >= 1e-4 else f"{value:.1e}"
