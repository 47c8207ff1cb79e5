"""The page as a whole: one file, nothing loaded, nothing of the data active, nothing hidden."""

import base64
import hashlib
import json

import pytest
from page_parser import parse
from synthetic_run import HARMFUL_PROMPT, HOSTILE_PROMPTS

from fifa_ray.config import ReportConfig
from fifa_ray.report.formatting import MINUS, NO_VALUE, format_number, format_seconds
from fifa_ray.report.page import (
    SECTIONS,
    json_for_html,
    render_page,
    write_report,
)
from fifa_ray.report.stages import without_secrets
from fifa_ray.report.tables import RunTables
from fifa_ray.run_dir import RunDir

NO_MAP = ReportConfig(map_points=0)
LOADING = ("src", "href", "srcset", "action", "poster", "data", "xlink:href", "background")


def test_every_section_is_on_the_page_of_a_complete_run(page):
    titles = {e.attributes["id"] for e in page.find("section")}
    # A search is no part of a run: test_tuning_section.py.
    assert titles == {anchor for anchor, *_ in SECTIONS} - {"tuning"}
    assert not [e for e in page.elements if e.attributes.get("class") == "absent"][1:]


def test_nothing_is_loaded_from_anywhere(page):
    for element in page.elements:
        for name in LOADING:
            value = element.attributes.get(name)
            if value is not None:
                assert value.startswith(("#", "data:image/webp;base64,")), (element.tag, value)
    assert not {e.tag for e in page.elements} & {
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    styles = "".join(e.text for e in page.find("style"))
    assert "url(" not in styles
    assert "@import" not in styles


def test_the_policy_allows_exactly_the_scripts_of_the_page(page):
    (policy,) = (
        e.attributes["content"]
        for e in page.find("meta")
        if e.attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    for element in page.find("style") + [e for e in page.find("script") if not e.attributes]:
        digest = hashlib.sha256(element.text.encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert len([e for e in page.find("script") if not e.attributes]) == 2


def test_links_lead_to_elements_of_the_page(page):
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for link in page.find("a"):
        assert link.attributes["href"].removeprefix("#") in ids


def test_hostile_prompts_are_text_and_nothing_else(run, page):
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")]
        if element.tag in ("img", "a", "svg"):
            assert element.attributes.get("src") != "x"
            assert "javascript:" not in (element.attributes.get("href") or "")
    scripts = page.find("script")
    assert {e.attributes.get("type") for e in scripts} == {None, "application/json"}
    shown = set(run.read_table("gallery", columns=["prompt"]).column(0).to_pylist())
    hostile = shown.intersection(HOSTILE_PROMPTS)
    assert len(hostile) >= 7
    missing = [prompt for prompt in hostile if prompt not in page.text]
    assert not missing


def test_charts_hold_prompts_as_json_that_cannot_end_its_element(page):
    specs = page.find("script", type="application/json")
    assert len(specs) == 12
    for element in specs:
        assert "<" not in element.text
        json.loads(element.text)
    assert HOSTILE_PROMPTS[0] in json.dumps([json.loads(e.text) for e in specs], ensure_ascii=False)
    assert json.loads(json_for_html({"a": "</script><!--"})) == {"a": "</script><!--"}
    with pytest.raises(ValueError):
        json_for_html({"a": float("nan")})


def test_flagged_prompts_show_only_behind_the_click(page):
    shown = [e for e in page.elements if HARMFUL_PROMPT in e.text]
    assert len(shown) == 6
    assert all(e.inside("sensitive") for e in shown)


def test_tables_and_images_are_accessible(page):
    for element in page.find("table"):
        heads = [e for e in page.find("th") if element in e.around]
        assert heads
        assert all("scope" in e.attributes for e in heads)
    assert all(e.attributes.get("alt") for e in page.find("img"))
    for element in page.elements:
        if "data-chart" in element.attributes:
            assert element.attributes["role"] == "img"
            assert element.attributes["aria-label"]


def test_the_page_stays_small(page):
    without_images = len(page.source) - sum(len(e.attributes["src"]) for e in page.find("img"))
    assert without_images < 2_000_000
    assert len(page.source) < 3_000_000


def test_the_same_run_gives_the_same_bytes(run, page):
    assert render_page(RunTables(RunDir(run.uri))) == page.source


def test_the_headline_counts_the_tables_rows(run, page):
    (heading,) = page.find("h1")
    manifest = run.manifest("pairs")
    kept = [e.text for e in page.find("b", **{"class": "kept"}) if heading in e.around]
    assert kept == [f"{run.num_rows('selected'):,}"]
    assert f"{manifest.rows_in:,}" in heading.text
    assert "94.7%" in page.text


@pytest.mark.parametrize(
    ("table", "section", "said"),
    [
        ("pairs", "funnel", "pairs/ is not in this run"),
        ("scored_sample", "distributions", "scored_sample/ is not in this run"),
        ("scored_sample", "agreement", "the stage select writes it"),
        ("gallery", "galleries", "gallery/ is not in this run"),
        ("quality", "flagged", "quality/ is not in this run"),
        ("selected", "funnel", "selected/ is not in this run yet"),
        ("baselines", "distributions", "no baseline was asked for"),
        ("neighbors", "extremes", "neighbors/ is not in this run"),
    ],
)
def test_a_missing_table_is_said_in_its_place(run_copy, table, section, said):
    run_copy.remove(table)
    page = parse(render_page(RunTables(run_copy, NO_MAP)))
    (place,) = page.find("section", id=section)
    notes = [
        e.text
        for e in page.find("p")
        if place in e.around and e.attributes.get("class") in ("absent", "note")
    ]
    assert any(said in note for note in notes), notes


def test_the_page_of_an_empty_run_says_what_is_missing_everywhere(tmp_path):
    page = parse(render_page(RunTables(RunDir(str(tmp_path)))))
    absent = [e for e in page.find("p", **{"class": "absent"}) if e.text.startswith("Not in this")]
    # Nothing was trained, evaluated or searched, and nothing says that it should have been.
    assert len(absent) == len(SECTIONS) - 3
    assert all(len(e.text) > 40 for e in absent)


def test_every_prefix_of_the_stages_has_a_page(run_copy):
    order = ["selected", "neighbors", "embeddings", "quality", "rewards", "prompts"]
    for stage in order:
        for name in list(run_copy.manifests()):
            if name.split("/")[0] == stage:
                run_copy.invalidate(name)
        for extra in ("gallery", "scored_sample", "baselines"):
            run_copy.remove(extra)
        page = parse(render_page(RunTables(run_copy, NO_MAP)))
        assert f"Not complete: {', '.join(reversed(order[: order.index(stage) + 1]))}" in page.text


def test_settings_given_win_over_those_of_the_run(run_copy):
    path = write_report(run_copy, ReportConfig(gallery_size=2, map_points=0))
    with open(path, encoding="utf-8") as stream:
        page = parse(stream.read())
    # Two pairs in four groups, and one image of them is unreadable.
    assert len([e for e in page.find("img") if e.inside("pair")]) == 2 * 2 * 4 - 1
    assert "image cannot be shown" in page.text
    assert "report.map_points is 0" in page.text


def test_secrets_of_a_configuration_are_masked():
    config = {
        "judge": {"endpoint": "https://me:hunter2@host/v1", "api_key_env": "KEY"},
        "ray": {"runtime_env": {"env_vars": {"TOKEN": "hunter2"}, "pip": ["a"]}},
    }
    masked = without_secrets(config)
    assert "hunter2" not in str(masked)
    assert masked["judge"] == {"endpoint": "https://***@host/v1", "api_key_env": "KEY"}
    assert masked["ray"]["runtime_env"]["env_vars"] == {"TOKEN": "***"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"),
        (-2, f"{MINUS}2"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (None, NO_VALUE),
    ],
)
def test_numbers_are_shown_for_reading(value, shown):
    assert format_number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.25, "1.2 s"), (61, "1 min 01 s"), (3720, "1 h 02 min")]
)
def test_durations_are_shown_for_reading(seconds, shown):
    assert format_seconds(seconds) == shown
