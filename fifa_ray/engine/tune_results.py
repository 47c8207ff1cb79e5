"""Results of a search: every trial with its cost, those worth it, the winner and its re-run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from fifa_ray.engine.tune_budget import Money
from fifa_ray.engine.tune_judging import BASE, compare_scores
from fifa_ray.engine.tune_records import SearchJob, TrialRecord, read_record
from fifa_ray.engine.tune_space import Space
from fifa_ray.scoring.pareto import pareto_front

RESULTS = "results.json"
# Names in the ledger of what the re-run costs.
FINAL_ACCOUNTS = ("final-", f"{BASE}-final")


def read_trials(job: SearchJob) -> list[TrialRecord]:
    """Records of all trials, in the order in which they began."""
    run, folder = job.run, f"{job.folder}/trials"
    selector = pafs.FileSelector(run.path(folder), allow_not_found=True)
    names = [i.base_name for i in run.filesystem.get_file_info(selector)]
    found = [read_record(run, folder, name, "trial.json") for name in names]
    return sorted((r for r in found if r is not None), key=lambda r: (r.began_at, r.trial))


def best_record(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The trial of the highest win rate among those that were trained to their end.

    Where the budget let none, among those that got furthest; of equals, the cheapest.
    """
    judged = [trial for trial in trials if trial.rungs]
    complete = [trial for trial in judged if trial.status == "complete"]
    furthest = max(trial.last["steps"] for trial in judged)
    among = complete or [trial for trial in judged if trial.last["steps"] == furthest]
    return max(among, key=lambda t: (t.last["win_rate"], -t.last["device_seconds"]))


def write_results(
    job: SearchJob,
    space: Space,
    money: Money,
    default: TrialRecord,
    final: Mapping[str, Sequence[str]],
    charges: Mapping[str, float],
) -> dict[str, Any]:
    """Compute and write results.json. `charges`: device-seconds by account of the ledger."""
    trials = read_trials(job)
    best = best_record(trials)
    judged = [trial for trial in trials if trial.rungs]
    front = pareto_front(
        [charges[trial.trial] for trial in judged],
        [trial.last["win_rate"] for trial in judged],
    )
    results = {
        "name": job.config.tune.name,
        "unit": money.unit,
        "budget": money.device_seconds,
        "spent": sum(charges.values()),
        "price_per_hour": money.price_per_hour,
        "currency": money.currency,
        "objective": {"name": job.scorer.name, "took_part_in_filtering": job.scorer.took_part},
        "prompts": {p: len(job.prompts(p)) for p in ("search", "final")},
        "space": {key: dimension.model_dump(exclude_none=True) for key, dimension in space.items()},
        "trials": [_entry(trial, charges, money) for trial in trials],
        "front": [judged[i].trial for i in front],
        "best": best.trial,
        "default": default.trial,
        "final": final_results(job, final),
        "final_device_seconds": sum(
            charge for account, charge in charges.items() if account.startswith(FINAL_ACCOUNTS)
        ),
        "settings": job.config.tune.model_dump(mode="json"),
    }
    text = json.dumps(results, indent=2, allow_nan=False)
    job.run.write_text(text, job.folder, RESULTS)
    return dict(json.loads(text))


def _entry(trial: TrialRecord, charges: Mapping[str, float], money: Money) -> dict[str, Any]:
    """A row of the table of trials; the win rate is that of its last rung, null without one."""
    last = trial.last if trial.rungs else {}
    device_seconds = charges.get(trial.trial, 0.0)
    return {
        "trial": trial.trial,
        "params": trial.params,
        "status": trial.status,
        "reason": trial.reason,
        "steps": last.get("steps", 0),
        "win_rate": last.get("win_rate"),
        "win_rate_low": last.get("win_rate_low"),
        "win_rate_high": last.get("win_rate_high"),
        "device_seconds": device_seconds,
        "cost": money.cost(device_seconds),
        "pairs": trial.pairs,
        "encoded": trial.encoded,
        "rungs": [{"steps": rung["steps"], "win_rate": rung["win_rate"]} for rung in trial.rungs],
    }


def final_results(job: SearchJob, final: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Win rates of the re-run: each model over the base, and the winner over the configured one.

    Images of all seeds together; intervals draw whole prompts, each with the images of every seed.
    """
    base = job.scores(f"{BASE}-final", BASE)
    if base is None:
        return []
    found = {label: [_scores_of(job, a) for a in accounts] for label, accounts in final.items()}
    found = {label: tables for label, tables in found.items() if tables}
    rows = [
        _compared(job, label, BASE, tables, [base] * len(tables)) for label, tables in found.items()
    ]
    if len(found) == 2:
        rows.append(_compared(job, "best", "default", found["best"], found["default"]))
    return rows


def _scores_of(job: SearchJob, account: str) -> pa.Table:
    folder = (job.folder, "scores", account)
    (name,) = job.run.list(*folder)
    return job.run.read_table(*folder, name)


def _compared(
    job: SearchJob, model: str, baseline: str, ours: Sequence[pa.Table], theirs: Sequence[pa.Table]
) -> dict[str, Any]:
    pooled = compare_scores(_pool(ours), _pool(theirs), job.config)
    each = [compare_scores(a, b, job.config)["win_rate"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "model": model,
        "baseline": baseline,
        "seeds": len(ours),
        "win_rate_of_seeds": each,
    } | pooled


def _pool(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables of several seeds as one; the image_ids of each seed are told apart."""
    parts = []
    for number, table in enumerate(tables):
        ids = pc.add(table.column("image_id"), number << 40)
        parts.append(table.set_column(0, "image_id", ids))
    return pa.concat_tables(parts)
