"""The plan of a synthetic run: what `fifa plan` would have said, by the same functions."""

import json

from fifa_ray.config import FifaConfig
from fifa_ray.plan import PLANNED
from fifa_ray.planning.estimates import Estimate, Rate, given_rate
from fifa_ray.planning.record import group_records, stage_record, totals_record
from fifa_ray.planning.stages import Group, StageWork, Worker, predict_stage, total
from fifa_ray.run_dir import RunDir

GROUPS = (
    Group(name="gpu", max_nodes=1, cpus=8, gpus=1, price_per_hour=36.0, spot=True,
          stages=("rewards", "quality")),
    Group(name="cpu", max_nodes=2, cpus=4, price_per_hour=3.6),
)  # fmt: skip


def write_plan(run: RunDir, config: FifaConfig) -> None:
    """Write plan.json: three stages, one of them never run."""
    works = [
        _work("quality", 400, Rate(Estimate(0.4, 0.3, 0.6), "measured", 5), gpus=1.0),
        _work("embeddings", 400, given_rate(50.0)),
        _work("training", 4000, given_rate(2.0)),
    ]
    predictions = [predict_stage(work, GROUPS) for work in works]
    plan = {
        "version": "0",
        "planned_at": "2026-11-26T12:00:00Z",
        "settings": config.model_dump(mode="json", include=set(PLANNED)),
        "training": "fifa",
        "dataset": {},
        "sample": {"folder": "runs/synthetic/plan/0/sample", "rows": 512, "seconds": 60.0},
        "currency": "XXX",
        "groups": group_records(GROUPS),
        "stages": [stage_record(prediction) for prediction in predictions],
        "totals": totals_record(total(predictions, GROUPS)),
        "storage_cost": None,
        "storage_months": 1.0,
        "warnings": ["quality: <b>not</b> markup"],
    }
    run.write_text(json.dumps(plan), "plan.json")


def _work(stage: str, rows: float, rate: Rate, gpus: float = 0.0) -> StageWork:
    return StageWork(
        stage=stage,
        unit="prompts",
        rows=Estimate.sure(rows),
        rate=rate,
        start=Estimate.sure(10.0),
        start_source="measured",
        worker=Worker(cpus=4, gpus=gpus),
        pieces=1,
    )
