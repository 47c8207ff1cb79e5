"""The headline: how many pairs went in, how many were kept, and what that is worth."""

from typing import Any

from fifa_ray.report.section import Absent, Section
from fifa_ray.report.tables import RunTables, finite_values

MEANS = ("reward_margin", "prompt_quality")
PROOF_ENTRY = {"value": None, "low": None, "high": None, "note": None, "unit": None}


def headline(tables: RunTables) -> Section:
    """Pairs in and kept in one sentence, the figures beside it, and the proof where there is one.

    The proof is `proof.json`: label -> {value, low, high, note, unit}; unit "share" shows percents.
    """
    if not tables.has("pairs"):
        raise Absent("pairs/ is not in this run; the stage ingest writes it.")
    manifest = tables.manifests.get("pairs")
    num_pairs = manifest.rows_in if manifest else tables.run.num_rows("pairs")
    kept = tables.run.num_rows("selected") if tables.has("selected") else None
    notes = [] if kept is not None else ["Nothing is selected yet: the stage select has not run."]
    if not tables.proof:
        notes.append(
            "No proof against a known truth: proof.json is not in this run. Only a dataset whose "
            "truth is known, such as the demo's, has one."
        )
    values = {
        "num_pairs": num_pairs,
        "kept": kept,
        "figures": _figures(tables) if kept is not None else [],
        "proof": [PROOF_ENTRY | entry | {"label": label} for label, entry in tables.proof.items()],
    }
    return Section(template="headline.html.j2", values=values, notes=tuple(notes))


def _figures(tables: RunTables) -> list[dict[str, Any]]:
    sets = tables.details("selected").get("sets") or {}
    kept, random = sets.get(tables.strategy) or {}, sets.get("random") or {}
    whole = _sampled_means(tables)
    if tables.strategy == "random":
        random = {}
    figures = [
        ("Mean reward margin", "mean_reward_margin", whole.get("reward_margin"), "all pairs"),
        ("Mean prompt quality", "mean_prompt_quality", whole.get("prompt_quality"), "all pairs"),
        ("k-NN entropy of the prompts, nats", "knn_entropy", random.get("knn_entropy"), ""),
        ("Distinct prompts", "num_prompts", random.get("num_prompts"), ""),
    ]
    return [
        {
            "label": label,
            "value": kept[name],
            "other": other,
            "against": against or "a random set of the same size",
        }
        for label, name, other, against in figures
        if kept.get(name) is not None
    ]


def _sampled_means(tables: RunTables) -> dict[str, float]:
    """Mean margin and quality of the sample of all scored pairs; empty where there is none."""
    if not tables.has("scored_sample"):
        return {}
    columns = {name: finite_values(tables.sample, name) for name in MEANS}
    return {name: float(values.mean()) for name, values in columns.items() if len(values)}


def comparison(tables: RunTables) -> Section:
    """The kept set beside the baselines of the same size, and the mean terms of all pairs."""
    sets = tables.details("selected").get("sets")
    if not sets:
        raise Absent(
            "The manifest of the stage select holds no sets; select writes them when it compares "
            "baselines (select.compare)."
        )
    order = {tables.strategy: 0, "random": 1}
    rows = sorted(sets.items(), key=lambda item: (order.get(item[0], 2), item[0]))
    notes = [] if len(rows) > 1 else ["No baseline was kept: select.compare is empty."]
    values = {"sets": rows, "strategy": tables.strategy, "whole": _sampled_means(tables)}
    return Section(template="comparison.html.j2", values=values, notes=tuple(notes))
