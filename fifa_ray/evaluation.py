"""Evaluation from a configuration or a run: what the command line and notebooks call."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fifa_ray.config import FifaConfig
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.evaluate import run_evaluate
from fifa_ray.engine.evaluate_results import read_results
from fifa_ray.engine.evaluate_scorers import ImageScorer
from fifa_ray.report import write_report
from fifa_ray.run_dir import RunDir
from fifa_ray.training import open_training, save_config

__all__ = ["ImageScorer", "evaluate", "read_results", "result_lines"]


def evaluate(
    config: FifaConfig | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    extra_scorers: Mapping[str, ImageScorer] | None = None,
    write_page: bool = True,
) -> RunDir:
    """Draw with base and tuned models, score, compare; skips what is complete and unchanged.

    `config` is a configuration, a YAML file, a preset's name, a mapping, or a run directory, whose
    saved configuration then holds. `extra_scorers`: objects by name with a method
    `score(images, prompts)`, see `ImageScorer`, that score beside the configured reward models.
    `read_results` gives the results of the returned run; `write_page` off leaves the report alone.

    Raises ConfigError before any image is drawn where a training, reward or prompt is missing,
    RuntimeError when more images fail than allowed.
    """
    run, loaded = open_training(config, overrides)
    connect(loaded.ray)
    run_evaluate(run, loaded, extra_scorers)
    save_config(run, loaded)
    if loaded.report.enabled and write_page:
        write_report(run)
    return run


def result_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The win rates as a table for a terminal."""
    percent = f"{results['settings']['confidence']:.0%} interval"
    rows = [("", "reward", "win rate", percent, "p", "prompts", "mean difference")]
    took_part = False
    for entry in results["comparisons"]:
        took_part |= entry["took_part_in_filtering"]
        interval = "-"
        if entry["win_rate_low"] is not None:
            interval = f"{entry['win_rate_low']:.1%} to {entry['win_rate_high']:.1%}"
        rows.append(
            (
                f"{entry['model']} over {entry['baseline']}",
                entry["reward"] + ("*" if entry["took_part_in_filtering"] else ""),
                f"{entry['win_rate']:.1%}",
                interval,
                format_p(entry["p_value"]),
                f"{entry['num_prompts']:,}",
                f"{entry['mean_difference']:+.4g}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [text.ljust(widths[i]) if i < 2 else text.rjust(widths[i]) for i, text in
                 enumerate(row)]  # fmt: skip
        yield "  ".join(cells).rstrip()
    if took_part:
        yield "* took part in filtering: what it likes was selected for, so it is no neutral judge"
    for model in results["models"]:
        failed = sum(model["failed_images"].values())
        if failed:
            yield f"{model['name']}: {failed:,} images could not be drawn {model['failed_images']}"


def format_p(value: float) -> str:
    """A p-value for reading: two significant digits, or that it is very small."""
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"
