"""The section on a search: its table and chart against its results, and the same in a terminal."""

import json

from page_parser import parse
from test_model_sections import cells, chart

from fifa_ray.report.formatting import NO_VALUE
from fifa_ray.report.page import render_page
from fifa_ray.report.tables import RunTables
from fifa_ray.tuning import tuning_lines

HOSTILE = "<script>alert('x')</script> {{ 7 * 7 }}"


def trial(name, status="complete", win_rate=None, device_seconds=10.0, **params):
    known = win_rate is not None
    return {
        "trial": name,
        "params": {"select.quality_weight": 0.5, "select.min_quality": None} | params,
        "status": status,
        "reason": "" if status != "failed" else f"the training diverged {HOSTILE}",
        "steps": 75 if known else 0,
        "win_rate": win_rate,
        "win_rate_low": win_rate - 0.1 if known else None,
        "win_rate_high": win_rate + 0.1 if known else None,
        "device_seconds": device_seconds,
        "cost": device_seconds / 1000,
        "pairs": 600,
        "encoded": 12,
        "rungs": [{"steps": 75, "win_rate": win_rate}] if known else [],
    }


def results(**changed):
    compared = {
        "seeds": 2, "win_rate_of_seeds": [0.61, 0.65], "win_rate": 0.63, "win_rate_low": 0.58,
        "win_rate_high": 0.68, "mean_difference": 0.1, "num_prompts": 200,
    }  # fmt: skip
    return {
        "name": "search",
        "unit": "GPU",
        "budget": 7200.0,
        "spent": 1234.5,
        "price_per_hour": 3.6,
        "currency": "EUR",
        "objective": {"name": "truth", "took_part_in_filtering": False},
        "prompts": {"search": 64, "final": 200},
        "space": {},
        "trials": [
            trial("default", win_rate=0.55, device_seconds=20.0),
            trial("cheap", "stopped", win_rate=0.52, device_seconds=8.0),
            trial("best", win_rate=0.66, device_seconds=31.0, **{"select.min_quality": 5.0}),
            trial("dear", win_rate=0.6, device_seconds=40.0),
            trial("broken", "failed", device_seconds=3.0),
        ],
        "front": ["cheap", "default", "best"],
        "best": "best",
        "default": "default",
        "final": [
            {"model": "best", "baseline": "base"} | compared,
            {"model": "best", "baseline": "default"} | compared | {"win_rate": 0.54},
        ],
        "final_device_seconds": 300.0,
        "settings": {},
    } | changed


def page_of(run, found):
    run.write_text(json.dumps(found), "tuning", found["name"], "results.json")
    return parse(render_page(RunTables(run)))


def test_every_trial_is_a_row_and_every_judged_one_a_point(run_copy):
    page = page_of(run_copy, results())
    table = cells(page, "Trials")
    assert table[0][-2:] == ["select.min_quality", "select.quality_weight"]
    assert [row[0].split() for row in table[1:]] == [
        ["3", "winnerfront"], ["4"], ["1", "configuredfront"], ["2", "front"], ["5"],
    ]  # fmt: skip
    assert [row[1] for row in table[1:]] == ["66.0%", "60.0%", "55.0%", "52.0%", NO_VALUE]
    assert [row[-2] for row in table[1:]] == ["5", "none", "none", "none", "none"]
    assert table[-1][6] == f"failed: the training diverged {HOSTILE}"
    assert "1,23" in page.text
    assert "(1.23 EUR)" in page.text  # 1,234.5 s at 3.6 an hour
    final = cells(page, "Re-run of the winner")
    assert final[1] == [
        "the winner over the base", "63.0%", "58.0% to 68.0%", "61.0%, 65.0%", "200",
    ]  # fmt: skip
    assert final[2][:2] == ["the winner over the configured settings", "54.0%"]
    line, points = chart(page, "tuning-search")["layer"]
    assert [row["trial"] for row in line["data"]["values"]] == ["cheap", "default", "best"]
    drawn = {row["trial"]: (row["cost"], row["win_rate"]) for row in points["data"]["values"]}
    assert drawn == {
        "cheap": (8, 0.52), "default": (20, 0.55), "best": (31, 0.66), "dear": (40, 0.6),
    }  # fmt: skip


def test_what_is_missing_is_said(run_copy):
    objective = {"name": "pick", "took_part_in_filtering": True}
    found = results(final=[], best="default", objective=objective, price_per_hour=None)
    page = page_of(run_copy, found)
    assert "no room for a re-run" in page.text
    assert "no neutral judge" in page.text
    assert "EUR" not in page.text
    text = "\n".join(tuning_lines(run_copy, found))
    assert "No re-run: the budget had no room" in text


def test_the_terminal_says_the_same(run_copy):
    lines = list(tuning_lines(run_copy, results()))
    assert lines[0] == (
        "5 trials (3 trained to the end, 1 failed, 1 stopped early); 1,234 of 7,200 GPU-seconds "
        "spent, 300 of them by the re-run"
    )
    rows = [line.split() for line in lines[2:7]]
    assert rows[1] == [
        "best",
        "66.0%",
        "56.0%",
        "to",
        "76.0%",
        "31",
        "75",
        "600",
        "winner,",
        "front",
    ]
    assert [row[0] for row in rows] == ["trial", "best", "dear", "default", "cheap"]
    assert "The winner: select.quality_weight=0.5 select.min_quality=5" in lines
    assert any("winner over configured settings" in line and "54.0%" in line for line in lines)
    assert lines[-1].endswith("tuning/search/best.yaml")


def test_a_run_without_a_search_has_no_such_section(page):
    assert "What the search has found" not in page.text
