"""`fifa inspect`: a run in a terminal. Stages, quarantine, quantiles of the terms, prompts.

Text of the run never reaches the terminal raw: control characters, and with them escape sequences,
and marks that change the writing direction are taken out first.
"""

import io
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fifa_ray.report.formatting import NO_VALUE
from fifa_ray.report.funnel import quarantine_counts
from fifa_ray.report.section import Absent
from fifa_ray.report.stages import ORDER, place_of_stage
from fifa_ray.report.tables import HIDDEN_PROMPT, TERMS, RunTables, finite_values, shorten
from fifa_ray.run_dir import RunDir
from fifa_ray.schema import PROMPT_ID, normalize_prompt

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
NUM_PROMPTS = 10
PROMPT_CHARS = 120
MIN_WIDTH = 80


def summarize_run(run: RunDir, *, width: int = 100, color: bool = False) -> str:
    """A summary of a run, complete or not, as text with ANSI colours or without.

    `width` in characters, at least 80. What is missing is said. Needs no terminal.
    """
    tables = RunTables(run)
    console = Console(
        file=io.StringIO(),
        width=max(width, MIN_WIDTH),
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        emoji=False,
    )
    console.print(Text(f"Run {plain(run.uri)}", style="bold"))
    for part in (_stages, _quarantine, _quantiles, _best, _just_missed):
        console.print()
        try:
            console.print(part(tables))
        except Absent as absent:
            console.print(Text(plain(str(absent)), style="dim"))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def plain(text: str) -> str:
    """Text that a terminal shows as it is: one line, no control and no direction characters."""
    return "".join(c for c in normalize_prompt(text) if not _changes_direction(c))


def _changes_direction(character: str) -> bool:
    return unicodedata.bidirectional(character) in {
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
    }  # fmt: skip


def _stages(tables: RunTables) -> Table:
    table = _table("Stages", ["stage"], ["rows in", "rows out", "quarantined", "seconds", "rows/s"])
    done = set()
    for name in sorted(tables.manifests, key=place_of_stage):
        manifest = tables.manifests[name]
        done.add(manifest.stage.split("/")[0])
        rate = f"{manifest.rows_in / manifest.seconds:,.0f}" if manifest.seconds else NO_VALUE
        counts = (manifest.rows_in, manifest.rows_out, manifest.rows_quarantined)
        _add(table, manifest.stage, *(f"{n:,}" for n in counts), f"{manifest.seconds:,.1f}", rate)
    if missing := [name for name in ORDER if name not in done]:
        table.caption = Text(f"not complete: {', '.join(missing)}", style="dim")
        table.caption_justify = "left"
    return table


def _quarantine(tables: RunTables) -> Table:
    counts, _ = quarantine_counts(tables)
    if not counts:
        raise Absent("Quarantine: empty, no row was put aside.")
    table = _table("Quarantine", ["stage", "reason"], ["rows"])
    for (stage, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        _add(table, stage, reason, f"{count:,}")
    return table


def _quantiles(tables: RunTables) -> Table:
    try:
        sets = {"sample of all": tables.sample}
    except Absent as absent:
        raise Absent(f"Terms: {absent}") from None
    if tables.has("selected"):
        sets["kept"] = tables.selected
    heads = ["min", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "max"]
    table = _table("Terms", ["term"], heads)
    for column in TERMS:
        _add(table, column)
        for name, rows in sets.items():
            values = finite_values(rows, column)
            if len(values):
                _add(table, f"· {name}", *(f"{q:.3g}" for q in np.quantile(values, QUANTILES)))
    return table


def _best(tables: RunTables) -> Table:
    try:
        rows = tables.selected.slice(0, NUM_PROMPTS)
    except Absent as absent:
        raise Absent(f"Best pairs: {absent}") from None
    return _pairs_table("Best pairs", rows, tables)


def _just_missed(tables: RunTables) -> Table:
    if not tables.has("gallery"):
        raise Absent("Just missed: gallery/ is not in this run; the stage select writes it.")
    columns = ["group", PROMPT_ID, "prompt", "importance_score", *list(TERMS)[:3]]
    rows = tables.run.read_table("gallery", columns=columns)
    missed = rows.filter(pa.array([g == "just_missed" for g in rows.column("group").to_pylist()]))
    if not len(missed):
        raise Absent("Just missed: no pair, everything that passed the filters was kept.")
    return _pairs_table("Just missed", missed.slice(0, NUM_PROMPTS), tables)


def _pairs_table(title: str, rows: pa.Table, tables: RunTables) -> Table:
    table = _table(title, ["prompt"], ["score", "margin", "quality", "log distance"])
    for row in rows.to_pylist():
        hidden = row[PROMPT_ID] in tables.harmful_ids
        text = HIDDEN_PROMPT if hidden else shorten(plain(row["prompt"]), PROMPT_CHARS)
        numbers = (row["importance_score"], *(row[column] for column in list(TERMS)[:3]))
        _add(table, text, *(NO_VALUE if value is None else f"{value:.3g}" for value in numbers))
    return table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in words:
        table.add_column(Text(name), overflow="fold", no_wrap=name != "prompt")
    for name in numbers:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table


def _add(table: Table, *cells: str, style: str = "") -> None:
    table.add_row(*_texts(cells), style=style)


def _texts(cells: Iterable[str]) -> list[Text]:
    return [Text(plain(cell)) for cell in cells]
