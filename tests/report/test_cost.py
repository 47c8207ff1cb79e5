"""The cost section against its manifests, prices and plan, by hand."""

import json

import pytest

from fifa_ray.report.cost import build
from fifa_ray.report.section import NotPlanned
from fifa_ray.report.spent import own_seconds, planned_name
from fifa_ray.report.tables import RunTables
from fifa_ray.run_dir import Manifest


def rows_of(run) -> dict[str, dict]:
    return {row["stage"]: row for row in build(RunTables(run)).values["stages"]}


def test_actual_beside_predicted(run):
    rows = rows_of(run)
    quality = rows["quality"]
    # 400 prompts at 0.4 s after 10 s; nodes of 36 and 3.6 an hour.
    assert quality["predicted"] == {"value": 170.0, "low": 130.0, "high": 250.0}
    assert quality["seconds"] == 184.0
    assert quality["ratio"] == pytest.approx(184 / 170)
    assert quality["inside"] is True
    assert quality["predicted_cost"] == pytest.approx(170 * 36 / 3600)
    assert quality["cost"] == pytest.approx((184 * 36 + 20 * 3.6) / 3600)
    embeddings = rows["embeddings"]
    assert embeddings["ratio"] == pytest.approx(21 / 18)
    assert embeddings["inside"] is False
    assert embeddings["cost"] == pytest.approx(36 * 3.6 / 3600)
    # Nobody counted the nodes of this one: no cost is made up for it.
    assert rows["neighbors"]["cost"] is None
    assert rows["neighbors"]["predicted"] is None


def test_totals_compare_only_what_was_planned_and_done(run):
    section = build(RunTables(run))
    total = section.values["total"]
    assert total["compared"] == 3
    assert total["predicted"] == pytest.approx(170 + 18 + 2010)
    assert total["ratio"] == pytest.approx((184 + 21 + 4000) / 2198)
    assert total["cost"] is None
    assert any("No node counts" in note and "neighbors" in note for note in section.notes)
    groups = {row["group"]: row for row in section.values["groups"]}
    assert groups["gpu"]["node_seconds"] == 184.0
    assert groups["gpu"]["spot"]
    assert groups["cpu"]["node_seconds"] == 56.0
    # Training was planned on these nodes too, but nobody counted them.
    assert groups["cpu"]["predicted"] == pytest.approx(18.0)
    assert groups["cpu"]["cost"] == pytest.approx(56 * 3.6 / 3600)


def test_the_page_shows_the_numbers_and_escapes_the_plans_words(page):
    (section,) = page.find("section", id="cost")
    cells = [e.text for e in page.find("td") if section in e.around]
    assert any(cell.startswith("1.08") for cell in cells), cells
    tags = [e.text for e in page.find("span", **{"class": "tag"}) if section in e.around]
    assert tags == ["outside", "outside", "spot"]
    assert "quality: <b>not</b> markup" in page.text


def test_prices_of_the_run_win_over_those_of_the_plan(run_copy):
    config = run_copy.read_text("config.yaml")
    config = config[: config.index("cost:")] if "cost:" in config else config
    run_copy.write_text(
        config + "cost: {prices: {currency: ABC, groups: [{name: gpu, cpus: 8, price_per_hour: 1},"
        " {name: cpu, cpus: 4, price_per_hour: 2}]}}\n",
        "config.yaml",
    )
    assert rows_of(run_copy)["quality"]["cost"] == pytest.approx((184 + 2 * 20) / 3600)
    assert build(RunTables(run_copy)).values["currency"] == "ABC"


def test_a_plan_of_other_settings_is_said(run_copy):
    plan = json.loads(run_copy.read_text("plan.json"))
    plan["settings"]["seed"] = 17
    plan["settings"]["select"]["selection_size"] = 3
    run_copy.write_text(json.dumps(plan), "plan.json")
    notes = build(RunTables(run_copy)).notes
    assert "The plan was made with other settings of seed, select." in notes


def test_a_run_with_neither_plan_nor_node_counts_has_no_such_section(run_copy):
    run_copy.filesystem.delete_file(run_copy.path("plan.json"))
    # Results of the evaluation too, where a test before has left a Ray session whose nodes count.
    for name, of_stage in run_copy.manifests().items():
        if of_stage.details.get("node_seconds"):
            run_copy.invalidate(name)
    with pytest.raises(NotPlanned):
        build(RunTables(run_copy))


def manifest(stage: str, seconds: float, finished_at: str) -> Manifest:
    return Manifest(
        stage=stage,
        fingerprint="",
        rows_in=1,
        rows_out=1,
        seconds=seconds,
        finished_at=finished_at,
    )


def test_seconds_that_two_manifests_count_are_counted_once():
    own = own_seconds(
        {
            m.stage: m
            for m in (
                manifest("pairs", 9.0, "2026-01-01T00:00:10Z"),
                manifest("prompts", 9.0, "2026-01-01T00:00:10Z"),
                manifest("latents/a", 40.0, "2026-01-01T01:00:50Z"),
                manifest("training/first", 100.0, "2026-01-01T01:01:45Z"),
                manifest("training/second", 30.0, "2026-01-01T01:03:00Z"),
            )
        }
    )
    assert own == {
        "pairs": 9.0,
        "prompts": 0.0,
        "latents/a": 40.0,
        "training/first": 60.0,
        "training/second": 30.0,
    }


def test_names_of_a_plan():
    plan = {"training": "dpo"}
    assert planned_name("training/dpo", plan) == "training"
    assert planned_name("training/other", plan) == "training/other"
    assert planned_name("latents/selected-1", plan) == "latents"
    assert planned_name("evaluation/images/base", plan) == "evaluation/images"
    assert planned_name("evaluation/rewards/base/hps", plan) == "evaluation/rewards/hps"
    assert planned_name("evaluation/prompts", plan) == "evaluation/prompts"
    assert planned_name("rewards/hps", plan) == "rewards/hps"
