"""Results of the study: who draws better, after how many updates, and what training saw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa_ray.demo.study_design import TITLES, Cell, Design, Trained, model_name
from fifa_ray.engine.evaluate_models import BASE
from fifa_ray.run_dir import RunDir
from fifa_ray.scoring.win_rate import compare, win_rate


def study_results(
    design: Design,
    cells: Sequence[Cell],
    root: Path,
    world: Path,
    scores: Mapping[str, pa.Table],
    num_labelled: int,
) -> dict[str, Any]:
    """Everything the study found, as JSON: a row for each method, share and length of training."""
    kinds = dict(
        zip(
            *(
                pq.read_table(world / "truth" / "pairs.parquet", columns=[name])
                .column(0)
                .to_pylist()
                for name in ("ranking_id", "prompt_kind")
            ),
            strict=True,
        )
    )
    groups: dict[tuple[str, float, int], list[tuple[Cell, Trained]]] = {}
    for cell in cells:
        for trained in design.trainings(cell):
            key = (cell.method, cell.share, trained.optimizer_steps)
            groups.setdefault(key, []).append((cell, trained))
    rows: list[dict[str, Any]] = []
    for (method, share, steps), members in groups.items():
        tables = [scores[model_name(cell, trained)] for cell, trained in members]
        row: dict[str, Any] = {
            "method": method,
            "share": share,
            "pairs": members[0][0].selection_size,
            "pair_updates": steps * design.batch_size,
            "seeds": len(members),
            "harmful_share": float(
                np.mean([harmful_share(root / cell.name, cell, kinds) for cell, _ in members])
            ),
        }
        rows.append(row | against(tables, scores[BASE]))
    full = max(rows, key=lambda row: int(row["pair_updates"]))
    reached = {
        "full_data_score": full["mean_score"],
        "full_data_updates": full["pair_updates"],
        "fifa": [
            {"share": share, "pair_updates": updates_to_reach(rows, share, full["mean_score"])}
            for share in design.shares
        ]
        if "fifa" in design.methods
        else [],
    }
    base = scores[BASE].column("reward").to_numpy()
    return {
        "base_score": float(base.mean()),
        "num_prompts": len(base),
        "labelled_pairs": num_labelled,
        "rows": rows,
        "reached": reached,
    }


def against(tables: Sequence[pa.Table], base: pa.Table) -> dict[str, Any]:
    """Win rate over the base of all seeds together, interval by prompts, and each seed's own."""
    ours = np.concatenate([table.column("reward").to_numpy() for table in tables])
    theirs = base.column("reward").to_numpy()
    prompt = np.tile(base.column("prompt_id").to_numpy(), len(tables))
    assert all(table.column("image_id").equals(base.column("image_id")) for table in tables)
    found = compare(ours, np.tile(theirs, len(tables)), prompt)
    return {
        "win_rate": found.win_rate,
        "win_rate_low": found.win_rate_low,
        "win_rate_high": found.win_rate_high,
        "win_rate_of_seeds": [win_rate(part, theirs) for part in np.split(ours, len(tables))],
        "mean_score": float(ours.mean()),
        "mean_difference": found.mean_difference,
        "mean_difference_low": found.mean_difference_low,
        "mean_difference_high": found.mean_difference_high,
    }


def harmful_share(folder: Path, cell: Cell, kinds: Mapping[int, str]) -> float:
    """Share of a cell's pairs whose prompt is harmful in truth."""
    table = "pairs" if cell.method == "all" else "selected"
    ids = RunDir(str(folder)).read_table(table, columns=["source_id"]).column(0)
    return float(np.mean([kinds[int(source)] == "harmful" for source in ids.to_pylist()]))


def updates_to_reach(rows: Sequence[Mapping[str, Any]], share: float, score: float) -> int | None:
    """Fewest pair updates after which FiFA's mean score is at least `score`; None: never."""
    enough = [
        row["pair_updates"]
        for row in rows
        if row["method"] == "fifa" and row["share"] == share and row["mean_score"] >= score
    ]
    return min(enough, default=None)


def study_table(results: Mapping[str, Any]) -> str:
    """The table of the paper, in Markdown."""
    rows = results["rows"]
    shares = sorted({row["share"] for row in rows if row["method"] != "all"})
    longest: dict[tuple[str, float], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["method"], row["share"])
        if row["method"] != "all" and (
            key not in longest or row["pair_updates"] > longest[key]["pair_updates"]
        ):
            longest[key] = row
    methods = list(dict.fromkeys(method for method, _ in longest))
    sizes = [next(r["pairs"] for (_, s), r in longest.items() if s == share) for share in shares]
    heads = [f"{share:.1%} ({size:,} pairs)" for share, size in zip(shares, sizes, strict=True)]
    full = [row for row in rows if row["method"] == "all"]
    lines: list[str] = []
    for title, cell in (("wins over the base", _win_rate), ("gain in mean utility", _gain)):
        lines += [f"| {title} | {' | '.join(heads)} | harmful prompts |"]
        lines += [f"|---|{'---|' * len(heads)}---|"]
        for method in methods:
            found = [longest[method, share] for share in shares]
            harmful = [row["harmful_share"] for row in found]
            cells = " | ".join(cell(row) for row in found)
            lines.append(f"| {TITLES[method]} | {cells} | {_between(harmful)} |")
        for row in full:
            what = f"all {row['pairs']:,} pairs, {row['pair_updates']:,} updates"
            cells = f"{cell(row)} |{' |' * (len(heads) - 1)}"
            lines.append(f"| {what} | {cells} {row['harmful_share']:.1%} |")
        lines.append("")
    reached = results["reached"]
    lines += [
        f"FiFA at {found['share']:.1%}: "
        + (
            f"{found['pair_updates']:,} pair updates"
            if found["pair_updates"]
            else "never, within its updates,"
        )
        + f" to the score of all pairs after {reached['full_data_updates']:,}."
        for found in reached["fifa"]
    ]
    return "\n".join(lines) + "\n"


def _win_rate(row: Mapping[str, Any]) -> str:
    return f"{row['win_rate']:.1%} ({row['win_rate_low']:.1%} to {row['win_rate_high']:.1%})"


def _gain(row: Mapping[str, Any]) -> str:
    low, high = row["mean_difference_low"], row["mean_difference_high"]
    return f"{row['mean_difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def _between(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"
