"""The sections on training and evaluation: their numbers against the files."""

import json

import numpy as np
import pytest
from page_parser import parse
from scipy import stats
from synthetic_models import EVALUATED, TRAININGS
from synthetic_run import HARMFUL_PROMPT, HOSTILE_PROMPTS

from fifa_ray import schema
from fifa_ray.report import evaluation, training
from fifa_ray.report.model_charts import binned
from fifa_ray.report.page import render_page
from fifa_ray.report.section import NotPlanned
from fifa_ray.report.tables import RunTables
from fifa_ray.run_dir import RunDir, part_name


def chart(page, name):
    (element,) = (e for e in page.find("script") if e.attributes.get("id") == f"spec-{name}")
    return json.loads(element.text)


def cells(page, label: str) -> list[list[str]]:
    """Texts of a table's rows, by the label of the region around it."""
    region = next(e for e in page.elements if e.attributes.get("aria-label") == label)
    inside = [e for e in page.elements if _is_in(e, region)]
    return [
        [
            "".join(e.text for e in inside if e is cell or _is_in(e, cell)).strip()
            for cell in inside
            if cell.tag in ("td", "th") and _is_in(cell, row)
        ]
        for row in inside
        if row.tag == "tr"
    ]


def _is_in(element, outer) -> bool:
    # By identity: rows of equal attributes and text are equal.
    return any(e is outer for e in element.around)


def test_win_rates_on_the_page_equal_a_recount_from_the_tables(run, page):
    table = cells(page, "Win rates")
    assert table[0][:3] == ["Comparison", "Reward", "Win rate"]
    rewards = {
        (model, reward): run.read_table("evaluation", "rewards", model, reward).to_pandas()
        for model in (*TRAININGS, "base")
        for reward in ("pickscore", "hpsv2")
    }
    assert [row[0] for row in table[1:]] == [
        *["fifa over base"] * 2, *["random over base"] * 2, *["fifa over random"] * 2,
    ]  # fmt: skip
    for comparison, reward, rate, _, won, p, _, images in table[1:]:
        model, other = comparison.split(" over ")
        a, b = rewards[model, reward.split()[0]], rewards[other, reward.split()[0]]
        assert ("filtering" in reward) == (reward.startswith("pickscore"))
        assert rate == f"{np.mean(a.reward > b.reward):.1%}"
        signs = np.sign(a.reward - b.reward).groupby(a.prompt_id).sum()
        counts = [int((signs > 0).sum()), int((signs < 0).sum()), int((signs == 0).sum())]
        assert won == ", ".join(map(str, counts))
        expected = stats.binomtest(counts[0], sum(counts[:2])).pvalue
        assert float(p) == pytest.approx(expected, rel=0.06)
        assert images == str(2 * len(EVALUATED))


def test_the_forest_has_a_row_for_each_comparison_and_marks_independent_rewards(page):
    spec = chart(page, "win-rates")
    rows = spec["layer"][1]["data"]["values"]
    assert len(rows) == len({row["label"] for row in rows}) == 6
    assert {row["reward"]: row["independent"] for row in rows} == {
        "pickscore": False, "hpsv2": True,
    }  # fmt: skip
    assert all(row["low"] <= row["win_rate"] <= row["high"] for row in rows)


def test_categories_have_their_own_prompts(page):
    table = cells(page, "Win rates by category, fifa over base")
    assert [row[:2] for row in table[1:]] == [
        ["animals", "6"], ["hostile", "3"], ["objects", "6"], ["text", "6"],
    ]  # fmt: skip


def test_images_stand_side_by_side_base_first_with_hostile_prompts_as_text(page):
    shown = [e for e in page.find("img") if (e.attributes["alt"] or "").startswith("Image by")]
    assert len(shown) == 8 * 3
    assert [e.attributes["alt"].removeprefix("Image by ") for e in shown[:3]] == [
        "base",
        *TRAININGS,
    ]
    captions = [e.text for e in page.find("span") if e.inside("strip")]
    assert HOSTILE_PROMPTS[0] in captions
    assert any("(empty prompt)" in text for text in captions)
    # One of each category in turn, not the first eight of the list.
    tags = [e.text for e in page.find("span", **{"class": "tag"}) if e.inside("strip")]
    assert tags == ["hostile", "animals", "objects", "text", "hostile", "animals", "objects"]


def test_curves_are_the_metrics_and_a_training_keeps_its_colour(run, page):
    spec = chart(page, "training-accuracy")
    thin, points = spec["layer"][1]["data"]["values"], spec["layer"][2]["data"]["values"]
    for name in TRAININGS:
        lines = [
            json.loads(line)
            for line in run.read_text("training", name, "metrics.jsonl").splitlines()
        ]
        measured = [(x["optimizer_step"], x["implicit_accuracy"]) for x in lines
                    if x["kind"] == "validation"]  # fmt: skip
        found = [(p["step"], p["value"]) for p in points if p["training"] == name]
        np.testing.assert_allclose(found, measured, rtol=1e-4)
        trained = [x["implicit_accuracy"] for x in lines if x["kind"] == "train"]
        curve = [p["value"] for p in thin if p["training"] == name]
        assert np.mean(curve) == pytest.approx(np.mean(trained), rel=1e-4)
        assert len(curve) <= 60
    scales = {
        json.dumps(layer["encoding"]["color"]["scale"])
        for which in ("loss", "accuracy", "error", "margin")
        for layer in chart(page, f"training-{which}")["layer"]
        if "color" in layer["encoding"]
    }
    assert len(scales) == 1


def test_the_summary_of_trainings(page):
    table = cells(page, "Trainings")
    fifa = dict(zip(table[0], table[1], strict=True))
    assert table[1][0] == "fifa"
    assert (fifa["Pairs from"], fifa["Weights"], fifa["Steps"]) == ("selected", "all", "2,000")
    assert fifa["GPU memory"] == "11.2 GB"
    assert dict(zip(table[0], table[2], strict=True))["Weights"] == "LoRA 8"


def test_samples_show_the_first_and_the_last_step(page):
    shown = [e.attributes["alt"] for e in page.find("img") if "steps" in e.attributes["alt"]]
    assert shown[:3] == [f"Drawn after {step} steps" for step in ("200", "1,000", "2,000")]
    assert len(shown) == 2 * 2 * 3


def test_a_run_without_models_has_no_such_sections(run_copy):
    run_copy.remove("training")
    run_copy.remove("evaluation")
    page = parse(render_page(RunTables(run_copy)))
    sections = {e.attributes["id"] for e in page.find("section")}
    assert "funnel" in sections
    assert not sections & {"training", "evaluation"}
    assert not [e for e in page.find("a") if e.attributes["href"] in ("#training", "#evaluation")]
    for build in (training.build, evaluation.build):
        with pytest.raises(NotPlanned):
            build(RunTables(run_copy))


def test_a_training_that_runs_has_its_curves_and_no_results(tmp_path):
    run = RunDir(str(tmp_path))
    line = {"kind": "train", "optimizer_step": 1, "loss": 0.69}
    run.write_text(json.dumps(line) + "\n", "training", "new", "metrics.jsonl")
    section = training.build(RunTables(run))
    assert section.notes == ("new has not finished; its curves end where it is.",)
    assert section.values["trainings"][0]["steps"] == 1
    assert section.values["samples"] == []
    page = parse(render_page(RunTables(run)))
    assert "new has not finished" in page.text


def test_flagged_prompts_and_unreadable_images_are_not_shown(run_copy):
    harmful = next(
        row for row in run_copy.read_table("prompts").to_pylist()
        if row["prompt"].startswith(HARMFUL_PROMPT)
    )  # fmt: skip
    prompts = run_copy.read_table("evaluation", "prompts").to_pylist()
    for row in prompts[:2]:
        row["prompt"], row["prompt_id"] = harmful["prompt"], harmful["prompt_id"]
    changed = schema.EVALUATION_PROMPTS.empty_table().from_pylist(
        prompts, schema=schema.EVALUATION_PROMPTS
    )
    run_copy.write_table(changed, "evaluation", "prompts", part_name(0))
    images = run_copy.read_table("evaluation", "images", "fifa").to_pylist()
    images[2]["image"] = b"no image"
    broken = schema.EVALUATION_IMAGES.empty_table().from_pylist(
        images, schema=schema.EVALUATION_IMAGES
    )
    run_copy.write_table(broken, "evaluation", "images", "fifa", part_name(0))
    gallery = evaluation.build(RunTables(run_copy)).values["gallery"]
    assert harmful["prompt"] not in [row["prompt"] for row in gallery]
    first = {image["model"]: image["image"] for image in gallery[0]["images"]}
    assert first["fifa"] is None
    assert first["base"].startswith("data:image/webp")


def test_bins_are_of_equal_size_and_lose_nothing():
    step = np.arange(1, 251, dtype=float)
    rows = binned(step, step**2, 60)
    assert len(rows) == 50
    assert rows[0] == {"step": 3.0, "value": 11.0}
    assert binned(step, np.full(250, np.nan)) == []
    assert len(binned(step[:7], step[:7])) == 7
