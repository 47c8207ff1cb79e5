"""`fifa demo --study`: the paper's comparison, repeated in a world whose truth is known.

    STUDY/filter/            the demo's filter: every pair scored once
    STUDY/<cell>/            a run for each way to choose: the filter's tables, its own selection,
                             training/s0, s1, ... (and s0-75 ...: the same, stopped after 75 steps)
    STUDY/drawings/          every model's drawings of the same prompts, and their scores
    STUDY/study.json, study.md

Every part is skipped when it is complete, so a stopped study goes on where it was. Trainings are
small and many: each runs in one task of one core, all cores at once.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from fifa_ray.config import FifaConfig, Strategy
from fifa_ray.demo.align import TRUTH, write_evaluation_prompts
from fifa_ray.demo.run import demo_config, make_world
from fifa_ray.demo.study_design import Cell, Design, Trained, model_name
from fifa_ray.demo.study_results import study_results, study_table
from fifa_ray.demo.truth_reader import TruthReader
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.evaluate_images import run_images
from fifa_ray.engine.evaluate_models import resolve_models
from fifa_ray.engine.evaluate_prompts import run_prompts
from fifa_ray.engine.evaluate_rewards import rewards_stage, run_scorer
from fifa_ray.engine.evaluate_scorers import resolve_scorers
from fifa_ray.engine.latents import run_latents
from fifa_ray.engine.progress import Progress
from fifa_ray.engine.select import run_select
from fifa_ray.engine.train import run_train
from fifa_ray.engine.train_model import describe_model
from fifa_ray.engine.training_data import prepare_training_data
from fifa_ray.pipeline import run_filter
from fifa_ray.run_dir import RunDir, manifest_name

logger = logging.getLogger(__name__)

# What a cell's run takes from the filter's, unchanged.
SHARED_TABLES = ("pairs", "prompts", "rewards", "quality", "embeddings", "neighbors")


def run_study(
    folder: str, overrides: Sequence[str] = (), *, design: Design | None = None
) -> tuple[Path, str]:
    """Run the study in `folder`, or the rest of it; returns its results' file and its table."""
    design = design or Design()
    root = Path(folder).absolute()
    filtered = root / "filter"
    world = make_world(filtered / "world", design.num_pairs, design.num_prompts)
    config = demo_config(str(filtered), world, ["report.enabled=false", *overrides])
    run = run_filter(config, write_page=False)
    connect(config.ray)
    pairs = run.manifest("pairs")
    assert pairs is not None
    cells = design.cells(pairs.rows_out)
    jobs = [(cell, trained) for cell in cells for trained in design.trainings(cell)]
    weights = describe_model(config.train)
    for cell in cells:
        prepare_cell(root, run, config, cell, weights)
    train_all(root, config, jobs)
    scores = draw_and_score(root, run, config, jobs)
    results = study_results(design, cells, root, world, scores, pairs.rows_out)
    (root / "study.json").write_text(json.dumps(results, indent=2))
    table = study_table(results)
    (root / "study.md").write_text(table)
    return root / "study.json", table


def cell_config(root: Path, config: FifaConfig, cell: Cell) -> FifaConfig:
    """The settings of a cell's run: the demo's, but for how it chooses."""
    strategy: Strategy = "fifa" if cell.method in ("fifa", "greedy") else cell.method  # type: ignore[assignment]
    select: dict[str, Any] = {
        "selection_size": cell.selection_size,
        "strategy": strategy,
        "selector": "greedy" if cell.method == "greedy" else "top_k",
        "compare": (),
    }
    if strategy != "fifa":  # the caps and floors are the method's own
        select |= {"max_pairs_per_prompt": None, "min_quality": None}
    return config.model_copy(
        update={
            "run_dir": str(root / cell.name),
            "seed": cell.selection_seed,
            "select": config.select.model_copy(update=select),
        }
    )


def training_config(root: Path, config: FifaConfig, cell: Cell, trained: Trained) -> FifaConfig:
    """The settings of one training of a cell: one core, from the cell's own pairs."""
    settings = {
        "name": trained.name,
        "data": "pairs" if cell.method == "all" else "selected",
        "max_steps": trained.optimizer_steps,
        "seed": trained.seed,
        "num_workers": 1,
    }
    found = cell_config(root, config, cell)
    return found.model_copy(update={"train": config.train.model_copy(update=settings)})


def prepare_cell(
    root: Path, filtered: RunDir, config: FifaConfig, cell: Cell, weights: dict[str, Any]
) -> None:
    """A cell's run with its selection and the latents of its pairs."""
    run = RunDir(str(root / cell.name))
    borrow_tables(filtered, run)
    own = cell_config(root, config, cell)
    if cell.method != "all":
        run_select(run, own)
    learned = training_config(root, config, cell, Trained("", 0, 1))
    data = prepare_training_data(run, learned)
    run_latents(run, learned, data, weights)


def borrow_tables(filtered: RunDir, run: RunDir) -> None:
    """Link the filter's tables and manifests into a run on the same disk."""
    for table in SHARED_TABLES:
        link(Path(filtered.path(table)), Path(run.path(table)))
    for stage in filtered.manifests():
        if stage.partition("/")[0] in SHARED_TABLES:
            name = manifest_name(stage)
            link(Path(filtered.path("manifests", name)), Path(run.path("manifests", name)))


def link(source: Path, target: Path) -> None:
    """A relative symbolic link, so that the study's folder may be moved."""
    if not target.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent))


def train_all(root: Path, config: FifaConfig, jobs: Sequence[tuple[Cell, Trained]]) -> None:
    """Every training that is not complete, each in a task of one core."""
    todo = [
        (cell, trained)
        for cell, trained in jobs
        if RunDir(str(root / cell.name)).manifest(f"training/{trained.name}") is None
    ]
    # The longest first: none of them is left to run alone at the end.
    todo.sort(key=lambda job: -job[1].optimizer_steps)
    updates = sum(trained.optimizer_steps for _, trained in todo)
    progress = Progress("study, optimizer steps", updates)
    waiting = {
        _train.remote(training_config(root, config, cell, trained)): trained.optimizer_steps
        for cell, trained in todo
    }
    while waiting:
        (finished,), _ = ray.wait(list(waiting))
        ray.get(finished)
        progress.advance(waiting.pop(finished))
    progress.close()


@ray.remote(num_cpus=1)
def _train(config: FifaConfig) -> None:
    run_train(RunDir(config.run_dir), config, in_process=True)


def draw_and_score(
    root: Path, filtered: RunDir, config: FifaConfig, jobs: Sequence[tuple[Cell, Trained]]
) -> dict[str, Any]:
    """Tables of EVALUATION_REWARDS by the truth, by name of model; "base" among them."""
    run = RunDir(str(root / "drawings"))
    prompts = root / "drawings" / "prompts.jsonl"
    scenes = write_evaluation_prompts(prompts, config.evaluate.num_prompts or 200, filtered)
    trainings = tuple(
        f"{model_name(cell, trained)}={root / cell.name / 'training' / trained.name}"
        for cell, trained in jobs
    )
    settings = {"trainings": trainings, "prompts": str(prompts), "rewards": ()}
    config = config.model_copy(
        update={
            "run_dir": str(root / "drawings"),
            "evaluate": config.evaluate.model_copy(update=settings),
        }
    )
    models = resolve_models(run, config)
    run_prompts(run, config, models)
    run_images(run, config, models, config.train.resolution)
    (scorer,) = resolve_scorers(run, config, {TRUTH: TruthReader.load(scenes)})
    run_scorer(run, config, models, scorer)
    return {model.name: run.read_table(rewards_stage(model, scorer)) for model in models}
