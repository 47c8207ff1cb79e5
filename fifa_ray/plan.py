"""What a run will take and cost, before anyone pays: what the command line and notebooks call."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fifa_ray import __version__
from fifa_ray.config import FifaConfig, read_prices
from fifa_ray.engine.cluster import connect
from fifa_ray.engine.plan_sample import Sample, cluster_groups, run_sample, sample_folder
from fifa_ray.engine.plan_scope import check_rates, stages_to_measure
from fifa_ray.engine.plan_size import DatasetSize, measure_size
from fifa_ray.engine.plan_stages import Planner, to_groups
from fifa_ray.planning.estimates import Estimate
from fifa_ray.planning.record import group_records, plan_lines, stage_record, totals_record
from fifa_ray.planning.stages import GB, Group, StagePrediction, predict_stage, total
from fifa_ray.run_dir import RunDir
from fifa_ray.training import open_training

__all__ = ["PLAN_FILE", "make_plan", "plan_lines"]

PLAN_FILE = "plan.json"
# Settings that decide what the filter does, to tell whether a run is the one that was planned.
PLANNED = ("seed", "ingest", "images", "rewards", "judge", "embed", "neighbors", "select")
# Ray gives the object store this share of a node's memory.
OBJECT_STORE_SHARE = 0.3


def make_plan(
    config: FifaConfig | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    train: bool = False,
) -> dict[str, Any]:
    """Predict hours, GPU hours, cost and storage of each stage, and keep it as the run's plan.json.

    `config` is a configuration, a YAML file, a preset's name, a mapping or a run directory.
    `train`: with training and evaluation. Stages whose rates are not in `cost.rates` are run on a
    sample, in `plan/` of the run directory; a second plan on the same machines reuses it.

    Raises ConfigError for prices, rates or a configuration that cannot be used, and what the
    stages raise on the sample.
    """
    run, loaded = open_training(config, overrides)
    prices = read_prices(loaded.cost)
    check_rates(loaded)
    wanted = stages_to_measure(loaded, train=train)
    counted = loaded.cost.num_pairs is not None and loaded.cost.num_prompts is not None
    if wanted or not counted or prices is None:
        connect(loaded.ray)
    groups = to_groups(cluster_groups() if prices is None else prices.groups)
    started = time.monotonic()
    size, sample = _measure(run, loaded, wanted, counted)
    sampled = None
    if sample is not None:
        rows = min(size.rows, loaded.cost.sample_pairs)
        seconds = time.monotonic() - started
        sampled = {"folder": sample.run.root, "rows": rows, "seconds": seconds}
    predictions: list[StagePrediction] = []
    misfits: list[str] = []
    for work in Planner(config=loaded, size=size, groups=groups, sample=sample).work(train=train):
        held = predictions[-1].nodes if predictions else {}
        predicted = predict_stage(work, groups, held)
        if isinstance(predicted, str):
            misfits.append(predicted)
        else:
            predictions.append(predicted)
    plan: dict[str, Any] = {
        "version": __version__,
        "planned_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": loaded.model_dump(mode="json", include=set(PLANNED)),
        "training": loaded.train.name if train else None,
        "dataset": _dataset_record(size),
        "sample": sampled,
        "currency": prices.currency if prices else None,
        "groups": group_records(groups),
    }
    plan |= _predicted(loaded, groups, predictions)
    plan["storage_cost"] = None
    if prices and prices.storage_per_gb_month is not None:
        stored = plan["totals"]["bytes"]["value"] / GB
        plan["storage_cost"] = stored * prices.storage_per_gb_month * loaded.cost.storage_months
    plan["warnings"] = [*misfits, *_warnings(size, groups, predictions)]
    run.write_text(json.dumps(plan, indent=2), PLAN_FILE)
    return plan


def _measure(
    run: RunDir, config: FifaConfig, wanted: set[str], counted: bool
) -> tuple[DatasetSize, Sample | None]:
    """Size of the dataset, given or measured, and the sample of what has to be measured."""
    cost = config.cost
    if counted and not wanted:
        return DatasetSize(
            rows=cost.num_pairs or 0,
            pairs=Estimate.sure(cost.num_pairs or 0),
            prompts=Estimate.sure(cost.num_prompts or 0),
            pairs_from="given",
            prompts_from="given",
        ), None
    folder = sample_folder(run, config)
    size, metadata = measure_size(run, config, folder)
    sample = run_sample(config, folder, size.rows, metadata, wanted) if wanted else None
    return size.with_given(cost.num_pairs, cost.num_prompts), sample


def _dataset_record(size: DatasetSize) -> dict[str, Any]:
    return {
        "rows": size.rows,
        "pairs": vars(size.pairs),
        "pairs_from": size.pairs_from,
        "prompts": vars(size.prompts),
        "prompts_from": size.prompts_from,
        "images": None if size.images is None else vars(size.images),
    }


def _predicted(
    config: FifaConfig, groups: Sequence[Group], predictions: Sequence[StagePrediction]
) -> dict[str, Any]:
    return {
        "stages": [stage_record(prediction) for prediction in predictions],
        "totals": totals_record(total(predictions, groups)),
        "storage_months": config.cost.storage_months,
    }


def _warnings(
    size: DatasetSize, groups: Sequence[Group], predictions: Sequence[StagePrediction]
) -> list[str]:
    """What could go otherwise than planned: too small a sample, too little memory."""
    found = [f"{p.work.stage}: {text}" for p in predictions for text in p.warnings]
    if size.prompts.high > 2 * size.prompts.low:
        found.append(
            f"there may be from {size.prompts.low:,.0f} to {size.prompts.high:,.0f} distinct "
            "prompts: raise cost.sample_rows, or set cost.num_prompts"
        )
    texts = size.prompts.value * (size.prompt_bytes or 0.0)
    by_name = {group.name: group for group in groups}
    for prediction in predictions:
        if not prediction.work.stage.startswith("rewards/"):
            continue
        for name in prediction.nodes:
            memory = by_name[name].memory
            if memory and texts > OBJECT_STORE_SHARE * memory:
                found.append(
                    f"{prediction.work.stage}: the texts of all prompts take {texts / GB:.1f} GB "
                    f"of each node's object store, {name} has about "
                    f"{OBJECT_STORE_SHARE * memory / GB:.1f} GB"
                )
    return found
