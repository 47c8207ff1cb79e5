"""What a judge's harmful flag catches, and what it flags wrongly, on prompts that people labelled.

    python -m jobs.judge_study DATA_FOLDER                          # the demo's judge
    python -m jobs.judge_study DATA_FOLDER judge.engine=openai judge.endpoint=URL

DATA_FOLDER holds prompts.parquet: `prompt`, `source`, `categories` (what the prompt is harmful for,
empty where it is ordinary) and, if known, `hard`. The judge runs as the stage of the filter, so the
study resumes and any engine can be studied. Prompts are never printed unless asked for: some of
them offend. Labels err in both directions: a harmful label may stand on what images came out, not
on what the words say, and a source without labels may hold harmful prompts all the same.
"""

import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pyarrow as pa

from fifa_ray import schema
from fifa_ray.config import load_config
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.judge import run_judge
from fifa_ray.run_dir import Manifest, RunDir, fingerprint, part_name
from fifa_ray.scoring.agreement import share_with_interval


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("data_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[judge.KEY=VALUE]...")
@click.option("--sample-size", default=1000, help="Harmful and ordinary prompts, so many of each.")
@click.option("--seed", default=0, help="Of the sample.")
@click.option("--run-dir", default="runs/judge_study", help="Where the answers are kept.")
@click.option("--show-prompts", default=0, help="Print so many missed and wrongly flagged ones.")
def main(
    data_folder: Path,
    overrides: tuple[str, ...],
    sample_size: int,
    seed: int,
    run_dir: str,
    show_prompts: int,
) -> None:
    """Judge a sample of labelled prompts and print a table."""
    sample = sample_prompts(data_folder / "prompts.parquet", sample_size, seed)
    judged = judge_prompts(sample, run_dir, overrides)
    click.echo(study_table(judged).to_string(index=False))
    for title, rows in (
        ("Missed", judged[judged.labelled & ~judged.flagged]),
        ("Wrongly flagged", judged[~judged.labelled & judged.flagged]),
    ):
        for prompt in rows.prompt.head(show_prompts):
            click.echo(f"{title}: {prompt[:160]}")


def sample_prompts(file: Path, sample_size: int, seed: int) -> pd.DataFrame:
    """Distinct normalised prompts: `sample_size` labelled harmful and as many ordinary ones.

    Columns prompt_id, prompt, source, categories, hard, labelled. Ordinary prompts are drawn in
    equal numbers from each source. Raises ValueError where a column is missing.
    """
    table = pd.read_parquet(file)
    schema.check_columns(table.columns, ("prompt", "source", "categories"), str(file))
    table["prompt"] = table.prompt.map(schema.normalize_prompt)
    table[schema.PROMPT_ID] = table.prompt.map(schema.prompt_id)
    table["labelled"] = table.categories.fillna("") != ""
    table["hard"] = table.hard.eq(True) if "hard" in table else False
    # A prompt that occurs with and without a label counts as labelled.
    table = table[table.prompt != ""].sort_values("labelled", ascending=False, kind="stable")
    table = table.drop_duplicates(schema.PROMPT_ID).sample(frac=1, random_state=seed)
    harmful, ordinary = table[table.labelled], table[~table.labelled]
    each = math.ceil(sample_size / max(1, ordinary.source.nunique()))
    return pd.concat([harmful.head(sample_size), ordinary.groupby("source").head(each)])


def judge_prompts(sample: pd.DataFrame, run_dir: str, overrides: tuple[str, ...]) -> pd.DataFrame:
    """The sample with the columns of `quality` and `flagged`, judged in a run of its own."""
    judge: dict[str, Any] = {}
    if not any(override.startswith("judge.model=") for override in overrides):
        from fifa_ray.demo.packaged import JUDGE_ADAPTER, judge_folder

        judge = {
            "engine": "transformers",
            "model": str(judge_folder()),
            "options": {"adapter": str(JUDGE_ADAPTER)},
        }
    values = {"run_dir": run_dir, "ingest": {"source": "prompts.parquet"}, "judge": judge}
    config = load_config(values, overrides)
    run = RunDir(run_dir)
    write_prompts(run, sample)
    connect(config.ray)
    run_judge(run, config)
    quality = run.read_table("quality").to_pandas()
    judged = sample.merge(quality, on=schema.PROMPT_ID, validate="one_to_one")
    return judged.assign(flagged=judged.harmful.eq(True))


def write_prompts(run: RunDir, sample: pd.DataFrame) -> None:
    """The sample as a complete table prompts/, as ingest would leave it."""
    ordered = sample.sort_values(schema.PROMPT_ID)
    table = pa.table(
        {
            schema.PROMPT_ID: ordered[schema.PROMPT_ID].to_numpy(np.int64),
            "prompt": ordered.prompt.to_numpy(object),
            "num_pairs": np.ones(len(ordered), np.int64),
        },
        schema=schema.PROMPTS,
    )
    identity = fingerprint("judge study", ordered[schema.PROMPT_ID].tolist())
    if run.is_complete("prompts", identity):
        return
    run.invalidate("prompts")
    run.write_table(table, "prompts", part_name(0))
    count = len(ordered)
    run.publish(Manifest(stage="prompts", fingerprint=identity, rows_in=count, rows_out=count))


def study_table(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a group: prompts, share flagged with its 95% interval, mean quality, no answer.

    For harmful groups the share flagged is what was caught, for ordinary ones what was wrong.
    A prompt that the judge did not answer counts as not flagged.
    """
    harmful, ordinary = judged[judged.labelled], judged[~judged.labelled]
    groups = [("harmful, all", harmful), ("harmful, hard", harmful[harmful.hard])]
    groups += [("harmful, not hard", harmful[~harmful.hard])]
    labels = harmful.categories.str.split(r"\s*,\s*")
    for category in sorted(set(labels.explode().dropna())):
        groups.append((f"harmful, {category}", harmful[labels.map(set).map({category}.issubset)]))
    groups.append(("ordinary, all", ordinary))
    groups += [(f"ordinary, {source}", rows) for source, rows in ordinary.groupby("source")]
    rows = []
    for name, group in groups:
        if not len(group):
            continue
        share, low, high = share_with_interval(group.flagged, group[schema.PROMPT_ID])
        rows.append(
            {
                "group": name,
                "prompts": len(group),
                "flagged": f"{share:.1%}",
                "95% interval": f"{low:.1%} to {high:.1%}",
                "quality": f"{group.prompt_quality.mean():.2f}",
                "no answer": int(group.quality_error.notna().sum()),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
