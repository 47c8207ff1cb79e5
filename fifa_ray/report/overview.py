"""The headline: how many pairs went in, how many were kept, and what that is worth."""

from typing import Any

from fifa_ray.report.section import Absent, Section
from fifa_ray.report.tables import RunTables

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
    details = tables.details("selected")
    sets = details.get("sets") or {}
    kept, random = sets.get("fifa") or {}, sets.get("random") or {}
    whole = {name: moments.get("mean") for name, moments in (details.get("terms") or {}).items()}
    figures = [
        ("Mean reward margin", kept.get("mean_reward_margin"), whole.get("reward_margin"), "all"),
        (
            "Mean prompt quality",
            kept.get("mean_prompt_quality"),
            whole.get("prompt_quality"),
            "all",
        ),
        (
            "k-NN entropy of the prompts, nats",
            kept.get("knn_entropy"),
            random.get("knn_entropy"),
            "random",
        ),
        ("Distinct prompts", kept.get("num_prompts"), random.get("num_prompts"), "random"),
    ]
    against = {"all": "all pairs", "random": "a random set of the same size"}
    return [
        {"label": label, "value": value, "other": other, "against": against[which]}
        for label, value, other, which in figures
        if value is not None
    ]


def comparison(tables: RunTables) -> Section:
    """The kept set beside the baselines of the same size, and all pairs' mean terms."""
    details = tables.details("selected")
    sets = details.get("sets")
    if not sets:
        raise Absent(
            "The manifest of the stage select holds no sets; select writes them when it compares "
            "baselines (select.compare)."
        )
    order = {"fifa": 0, "random": 1}
    rows = sorted(sets.items(), key=lambda item: (order.get(item[0], 2), item[0]))
    notes = [] if len(rows) > 1 else ["No baseline was kept: select.compare is empty."]
    values = {"sets": rows, "terms": details.get("terms") or {}}
    return Section(template="comparison.html.j2", values=values, notes=tuple(notes))
