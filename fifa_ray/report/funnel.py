"""The way of the pairs and of the prompts through the filter, and why those left out were."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa

from fifa_ray.report.section import Absent, Section
from fifa_ray.report.tables import RunTables
from fifa_ray.schema import PROMPT_ID, QUARANTINE

EXAMPLES = 3

Reason = dict[str, Any]


def build(tables: RunTables) -> Section:
    """Counts of pairs after every step, with each reason, its count and example rows."""
    if not tables.has("pairs"):
        raise Absent("pairs/ is not in this run; the stage ingest writes it.")
    counts, examples = quarantine_counts(tables)
    rewards_lost = pairs_lost_in_rewards(tables)
    notes = _mismatches(tables, counts)

    num_pairs = tables.run.num_rows("pairs")
    read_lost = _reasons("pairs", counts, examples)
    num_in = num_pairs + sum(reason["count"] for reason in read_lost)
    scored = num_pairs - sum(rewards_lost.values())
    found = tables.details("selected").get("num_scored", scored)
    if found < scored:
        rewards_lost["no score of every reward model"] = scored - found
        scored = found
    elif found > scored:
        notes.append(
            f"the selection saw {found:,} scored pairs, but the tables hold {scored:,}: "
            "select ran on other rewards than these; run it again."
        )
    steps = [
        {"label": "Pairs in the source", "count": num_in, "lost": read_lost},
        {
            "label": "Pairs read",
            "count": num_pairs,
            "lost": [
                {"reason": reason, "count": count, "examples": _examples_of(examples, reason)}
                for reason, count in rewards_lost.most_common()
            ],
        },
    ]
    if not tables.reward_names():
        notes.append("rewards/ is not in this run yet, so no pair is scored.")
    elif not tables.has("selected"):
        steps.append({"label": "Pairs scored", "count": scored, "lost": []})
        notes.append("selected/ is not in this run yet; the stage select writes it.")
    else:
        steps += _selection_steps(tables, scored)
    values = {
        "steps": steps,
        "most": max(1, num_in),
        "has_selection": tables.has("selected"),
        "prompts": _prompt_counts(tables),
    }
    values["elsewhere"] = [
        {"stage": stage} | reason
        for stage in sorted({s for s, _ in counts} - {"pairs"})
        if not stage.startswith("rewards/")
        for reason in _reasons(stage, counts, examples)
    ]
    return Section(template="funnel.html.j2", values=values, notes=tuple(notes))


def quarantine_counts(
    tables: RunTables,
) -> tuple[Counter[tuple[str, str]], dict[tuple[str, str], list[dict[str, Any]]]]:
    """Rows of quarantine/ by (stage, reason), and the first few of each with their prompt."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for batch in tables.batches("quarantine", columns=QUARANTINE.names):
        grouped = pa.Table.from_batches([batch]).group_by(["stage", "reason"])
        for row in grouped.aggregate([([], "count_all")]).to_pylist():
            counts[row["stage"], row["reason"]] += row["count_all"]
        missing = {key for key in counts if len(examples[key]) < EXAMPLES}
        if missing:
            for row in batch.to_pylist():
                key = row["stage"], row["reason"]
                if key in missing and len(examples[key]) < EXAMPLES:
                    examples[key].append(row)
    ids = {row[PROMPT_ID] for rows in examples.values() for row in rows} - {None}
    texts = tables.prompt_texts(ids)
    for rows in examples.values():
        for row in rows:
            row["prompt"] = texts.get(row[PROMPT_ID])
    return counts, dict(examples)


def pairs_lost_in_rewards(tables: RunTables) -> Counter[str]:
    """Pairs that some reward model could not score, by reason; each pair counts once."""
    ids, reasons = [np.empty(0, np.int64)], []
    for name in tables.reward_names():
        for batch in tables.batches("quarantine", "rewards", name, columns=["pair_id", "reason"]):
            ids.append(batch["pair_id"].fill_null(-1).to_numpy())
            reasons += batch["reason"].to_pylist()
    _, first = np.unique(np.concatenate(ids), return_index=True)
    return Counter(reasons[i] for i in first)


def _selection_steps(tables: RunTables, scored: int) -> list[dict[str, Any]]:
    manifest = tables.manifests.get("selected")
    quarantined = manifest.quarantined if manifest else {}
    dropped = {r: n for r, n in quarantined.items() if r not in ("unscored", "not_selected") and n}
    kept = tables.run.num_rows("selected")
    eligible = scored - sum(dropped.values())
    return [
        {
            "label": "Pairs scored",
            "count": scored,
            "lost": [
                {"reason": reason, "count": count, "examples": []}
                for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
            ],
        },
        {
            "label": "Pairs that pass every hard filter" if dropped else "Pairs to choose from",
            "count": eligible,
            "lost": [{"reason": _beyond(tables), "count": eligible - kept, "examples": []}]
            if eligible > kept
            else [],
        },
        {"label": "Pairs kept", "count": kept, "lost": []},
    ]


def _beyond(tables: RunTables) -> str:
    """Why pairs that could have been kept were not."""
    manifest = tables.manifests.get("selected")
    if tables.strategy != "fifa":
        return f"not chosen by the strategy {tables.strategy}"
    if manifest and manifest.config.get("selector") == "greedy":
        return "not chosen by the greedy selector"
    threshold = tables.details("selected").get("threshold")
    if threshold is None:
        return "beyond the selection size"
    reason = f"importance score below that of the last kept pair ({threshold:.3f})"
    limit = (manifest.config if manifest else {}).get("max_pairs_per_prompt")
    return reason if limit is None else f"{reason}, or more than {limit} pairs of one prompt"


def _prompt_counts(tables: RunTables) -> list[tuple[str, int]]:
    if not tables.has("prompts"):
        return []
    rows = [("Distinct prompts", tables.run.num_rows("prompts"))]
    if tables.has("quality"):
        errors = sum(
            len(batch) - batch["quality_error"].null_count
            for batch in tables.batches("quality", columns=["quality_error"])
        )
        rows += [
            ("Rated by the judge", tables.run.num_rows("quality") - errors),
            ("Without a usable rating", errors),
            ("Flagged as harmful", len(tables.harmful_ids)),
        ]
    if tables.has("selected"):
        rows.append(("Distinct prompts kept", len(tables.selected_prompt_ids)))
    return rows


def _reasons(
    stage: str,
    counts: Counter[tuple[str, str]],
    examples: dict[tuple[str, str], list[dict[str, Any]]],
) -> list[Reason]:
    found = [
        {"reason": reason, "count": count, "examples": examples.get((where, reason), [])}
        for (where, reason), count in counts.items()
        if where == stage
    ]
    return sorted(found, key=lambda row: (-row["count"], row["reason"]))


def _examples_of(
    examples: dict[tuple[str, str], list[dict[str, Any]]], reason: str
) -> list[dict[str, Any]]:
    rows = [
        row
        for (stage, found), some in sorted(examples.items())
        if stage.startswith("rewards/") and found == reason
        for row in some
    ]
    return rows[:EXAMPLES]


def _mismatches(tables: RunTables, counts: Counter[tuple[str, str]]) -> list[str]:
    notes = []
    for stage, manifest in sorted(tables.manifests.items()):
        found = {reason: n for (where, reason), n in counts.items() if where == stage}
        if stage != "selected" and found != manifest.quarantined:
            notes.append(
                f"the manifest of {stage} counts {manifest.quarantined} quarantined rows, the "
                f"table holds {found}; the table is shown."
            )
    return notes
