"""Every speed and memory claim of this project, one command each.

    python -m jobs.benchmark select           # (c) 10M pairs against polars in memory
    python -m jobs.benchmark score            # (a) the scoring pass against a bare loop
    python -m jobs.benchmark memory           # (d) peak memory while streaming images
    python -m jobs.benchmark neighbors        # (b) the k-NN self-join against FAISS
    python -m jobs.benchmark train            # (e) training against the plain loop, caching, DDP
    python -m jobs.benchmark scale            # (f) growth of every stage, efficiency on many nodes

Each prints the machine, the versions, medians with their spread, and ratios from the same run:
absolute figures of a shared machine say little.
"""

import sys
from pathlib import Path

import click

GROUP_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(context_settings=GROUP_SETTINGS)
def main() -> None:
    """Measure one part of fifa-ray."""


if __name__ == "__main__":
    # Started by its path, Python looks for modules beside this file, not beside `jobs`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Here, so that the processes a benchmark spawns do not import torch for the others' sake.
    from jobs.benchmarks.memory import memory
    from jobs.benchmarks.neighbors import neighbors
    from jobs.benchmarks.scale import scale
    from jobs.benchmarks.score import score
    from jobs.benchmarks.select import select
    from jobs.benchmarks.train import train

    for command in (score, neighbors, select, memory, train, scale):
        main.add_command(command)
    main()
