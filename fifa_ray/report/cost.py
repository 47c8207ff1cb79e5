"""What a run cost by stage and node group, and the plan that was made before beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from fifa_ray.config import ConfigError, CostConfig, read_prices
from fifa_ray.report.section import Absent, NotPlanned, Section
from fifa_ray.report.spent import Spent, spent_by_stage
from fifa_ray.report.stages import place_of_stage
from fifa_ray.report.tables import RunTables

PLAN_FILE = "plan.json"
HOUR = 3600.0


@dataclass(frozen=True)
class Prices:
    """Price of a node for an hour by group; None: not known. `currency` None: no price list."""

    currency: str | None
    per_hour: Mapping[str, float | None]
    spot: frozenset[str]

    def cost(self, node_seconds: Mapping[str, float]) -> float | None:
        """Of node-seconds by group; None where one of the groups has no price."""
        prices = [self.per_hour.get(group) for group in node_seconds]
        if not prices or any(price is None for price in prices):
            return None
        return sum(
            seconds / HOUR * (price or 0.0)
            for seconds, price in zip(node_seconds.values(), prices, strict=True)
        )


def build(tables: RunTables) -> Section:
    """The section of money and of predictions."""
    if not tables.manifests:
        raise Absent("manifests/ is not in this run: no stage is complete.")
    plan = read_plan(tables)
    spent = spent_by_stage(tables.manifests, plan)
    if plan is None and not any(entry.node_seconds for entry in spent.values()):
        raise NotPlanned("no stage counted its nodes, and the run was not planned.")
    prices, notes = _prices(tables, plan)
    predicted = {stage["stage"]: stage for stage in plan["stages"]} if plan else {}
    stages = [
        _stage_row(name, spent.get(name), predicted.get(name), prices)
        for name in sorted({*spent, *predicted}, key=place_of_stage)
    ]
    groups = _group_rows(spent, plan, prices)
    values = {
        "stages": stages,
        "groups": groups,
        "total": _total_row(stages),
        "currency": prices.currency,
        "has_gpus": any(row["gpu_seconds"] for row in stages),
        "plan": plan,
        "planned_at": plan["planned_at"] if plan else None,
    }
    notes += _notes(tables, spent, plan, prices, groups)
    return Section(template="cost.html.j2", values=values, notes=tuple(notes))


def read_plan(tables: RunTables) -> dict[str, Any] | None:
    """plan.json of the run, None where there is none."""
    if not tables.run.exists(PLAN_FILE):
        return None
    return dict(json.loads(tables.run.read_text(PLAN_FILE)))


def _prices(tables: RunTables, plan: Mapping[str, Any] | None) -> tuple[Prices, list[str]]:
    """Those of the run's configuration, else those that the plan was made with."""
    config = yaml.safe_load(tables.config_text) if tables.config_text else {}
    notes: list[str] = []
    try:
        found = read_prices(CostConfig.model_validate((config or {}).get("cost") or {}))
    except (ConfigError, ValueError) as error:
        found = None
        notes.append(f"The run's own prices cannot be read: {error}")
    if found is not None:
        priced = {group.name: group.price_per_hour for group in found.groups}
        spot = frozenset(group.name for group in found.groups if group.spot)
        return Prices(found.currency, priced, spot), notes
    groups = plan["groups"] if plan else []
    return (
        Prices(
            plan["currency"] if plan else None,
            {group["name"]: group["price_per_hour"] for group in groups},
            frozenset(group["name"] for group in groups if group["spot"]),
        ),
        notes,
    )


def _stage_row(
    name: str, spent: Spent | None, predicted: Mapping[str, Any] | None, prices: Prices
) -> dict[str, Any]:
    seconds = spent.seconds if spent else None
    expected = predicted["seconds"] if predicted else None
    cost = prices.cost(spent.node_seconds) if spent and spent.counted else None
    expected_cost = predicted["cost"]["value"] if predicted and predicted["cost"] else None
    return {
        "stage": name,
        "seconds": seconds,
        "predicted": expected,
        "ratio": _ratio(seconds, expected["value"] if expected else None),
        "inside": None
        if seconds is None or expected is None
        else expected["low"] <= seconds <= expected["high"],
        "source": predicted["rate_source"] if predicted else None,
        "node_seconds": spent.node_seconds if spent else {},
        "cpu_seconds": spent.cpu_seconds if spent else None,
        "gpu_seconds": spent.gpu_seconds if spent else None,
        "cost": cost,
        "predicted_cost": expected_cost,
    }


def _total_row(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums; ratios and predicted sums over what was both predicted and done."""
    both = [row for row in stages if row["ratio"] is not None]
    costs = [row["cost"] for row in stages if row["seconds"] is not None]
    return {
        "seconds": sum(row["seconds"] or 0.0 for row in stages),
        "compared": len(both),
        "predicted": sum(row["predicted"]["value"] for row in both) if both else None,
        "ratio": _ratio(
            sum(row["seconds"] for row in both), sum(row["predicted"]["value"] for row in both)
        ),
        "cost": None if None in costs or not costs else sum(costs),
        "predicted_cost": _sum([row["predicted_cost"] for row in both]),
    }


def _group_rows(
    spent: Mapping[str, Spent], plan: Mapping[str, Any] | None, prices: Prices
) -> list[dict[str, Any]]:
    actual: dict[str, float] = {}
    for entry in spent.values():
        for group, seconds in entry.node_seconds.items():
            actual[group] = actual.get(group, 0.0) + seconds
    # Of stages whose nodes were counted, so that both columns speak of the same work.
    planned: dict[str, float] = {}
    for stage in plan["stages"] if plan else []:
        done = spent.get(stage["stage"])
        for name, seconds in stage["node_seconds"].items() if done and done.counted else ():
            planned[name] = planned.get(name, 0.0) + seconds["value"]
    rows = []
    for name in [*actual, *(n for n in planned if n not in actual)]:
        expected = planned.get(name)
        price = prices.per_hour.get(name)
        rows.append(
            {
                "group": name,
                "spot": name in prices.spot,
                "node_seconds": actual.get(name),
                "predicted": expected,
                "ratio": _ratio(actual.get(name), expected),
                "price": price,
                "cost": prices.cost({name: actual[name]}) if name in actual else None,
            }
        )
    return rows


def _notes(
    tables: RunTables,
    spent: Mapping[str, Spent],
    plan: Mapping[str, Any] | None,
    prices: Prices,
    groups: list[dict[str, Any]],
) -> list[str]:
    notes = []
    uncounted = [name for name, entry in spent.items() if not entry.counted]
    if uncounted:
        notes.append(
            f"No node counts in the manifests of {', '.join(uncounted)}: for these only the cores "
            "and GPUs that their actors reserved are known, and no cost."
        )
    if prices.currency is None:
        notes.append("No prices: set cost.prices_file or cost.prices, and write the report again.")
    else:
        unpriced = [r["group"] for r in groups if r["price"] is None and r["node_seconds"]]
        if unpriced:
            notes.append(
                f"No price for nodes of {', '.join(unpriced)}: costs with them are left out."
            )
    resumed = [n for n, m in tables.manifests.items() if m.details.get("rows_reused")]
    if resumed:
        notes.append(
            f"{', '.join(sorted(resumed))} went on from an earlier attempt: what that took is not "
            "in these numbers."
        )
    changed = _changed(tables, plan)
    if changed:
        notes.append(f"The plan was made with other settings of {', '.join(changed)}.")
    return notes


def _changed(tables: RunTables, plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None or not tables.config_text:
        return []
    config = yaml.safe_load(tables.config_text)
    return [name for name, value in plan["settings"].items() if config.get(name) != value]


def _ratio(actual: float | None, predicted: float | None) -> float | None:
    return actual / predicted if actual is not None and predicted else None


def _sum(values: list[float | None]) -> float | None:
    return None if not values or None in values else sum(value or 0.0 for value in values)
