"""The numbers of the sections against the tables, computed another way."""

import base64
import io
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy import stats

from fifa_ray import schema
from fifa_ray.config import ReportConfig
from fifa_ray.report import charts, funnel, gallery, overview
from fifa_ray.report.agreement import agreement, agreement_bins, wilson_interval
from fifa_ray.report.formatting import MINUS
from fifa_ray.report.prompts import project, prompt_map
from fifa_ray.report.tables import RunTables


def test_funnel_counts_equal_the_tables(run, page):
    quarantine = [
        row
        for stage in ("pairs", "rewards/pickscore", "rewards/hpsv2")
        for row in run.read_table("quarantine", *stage.split("/")).to_pylist()
    ]
    at_ingest = Counter(row["reason"] for row in quarantine if row["stage"] == "pairs")
    unscored = {row["pair_id"] for row in quarantine if row["stage"].startswith("rewards/")}
    num_pairs = run.num_rows("pairs")
    sample = run.read_table("scored_sample").column("dropped_by").to_pylist()
    dropped = Counter(reason for reason in sample if reason)
    eligible = num_pairs - len(unscored) - sum(dropped.values())

    counts = [
        int(e.attributes["data-count"]) for e in page.find("span") if "data-count" in e.attributes
    ]
    assert counts == [
        num_pairs + at_ingest.total(),
        num_pairs,
        num_pairs - len(unscored),
        eligible,
        run.num_rows("selected"),
    ]
    lost = [
        (e.attributes["data-lost"], -int(e.text.replace(MINUS, "-").replace(",", "")))
        for e in page.find("span")
        if "data-lost" in e.attributes
    ]
    assert Counter(dict(lost[: len(at_ingest)])) == at_ingest
    assert lost[len(at_ingest)] == ("corrupt_image", len(unscored))
    assert dict(lost[len(at_ingest) + 1 : -1]) == dict(dropped)
    assert lost[-1][1] == eligible - run.num_rows("selected")
    # Every step is the one before less what was lost there.
    assert counts[0] - sum(n for _, n in lost) == counts[-1]


def test_a_manifest_that_disagrees_with_its_quarantine_is_said(run_copy):

    run_copy.remove("quarantine", "rewards", "hpsv2")
    notes = funnel.build(RunTables(run_copy)).notes
    assert any("manifest of rewards/hpsv2" in note for note in notes)


@pytest.mark.parametrize("column", ["prompt_quality"])
def test_extremes_are_those_of_a_sort(run, column):
    tables = RunTables(run)
    low, high = tables.extremes("quality", column=column, count=7, exclude=tables.harmful_ids)
    rows = run.read_table("quality").to_pylist()
    usable = [r for r in rows if r[column] is not None and not r["harmful"]]
    ordered = sorted(usable, key=lambda r: (r[column], r[schema.PROMPT_ID]))
    assert low == [(r[schema.PROMPT_ID], r[column]) for r in ordered[:7]]
    ordered = sorted(usable, key=lambda r: (-r[column], r[schema.PROMPT_ID]))
    assert high == [(r[schema.PROMPT_ID], r[column]) for r in ordered[:7]]


def test_harmful_ids_are_the_flagged_rows(run):
    rows = run.read_table("quality").to_pylist()
    assert RunTables(run).harmful_ids == {r["prompt_id"] for r in rows if r["harmful"]}
    assert len(RunTables(run).harmful_ids) == 6


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (37, 50), (512, 1000)])
def test_wilson_interval_equals_scipys(hits, count):
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / count, count) == pytest.approx(tuple(expected), abs=1e-6)


def test_agreement_bins_hold_every_pair_once_and_order_by_size():
    margins = np.random.default_rng(0).normal(0.5, 1.0, 1003)
    rows = agreement_bins(margins, num_bins=8)
    assert sum(row["pairs"] for row in rows) == 1003
    assert [r["margin"] for r in rows] == sorted(r["margin"] for r in rows)
    mean = sum(row["agreement"] * row["pairs"] for row in rows) / 1003
    assert mean == pytest.approx(np.mean(margins > 0))
    quarter = np.abs(margins) <= np.sort(np.abs(margins))[rows[0]["pairs"] - 1]
    assert rows[0]["agreement"] == pytest.approx(np.mean(margins[quarter] > 0))


def test_histogram_shares_add_up_to_one_and_count_what_is_outside():
    values = np.concatenate([np.random.default_rng(1).normal(size=5000), [50.0] * 3, [-50.0] * 3])
    spec, outside = charts.histograms({"all": values, "fifa": values[:100]}, title="x", num_bins=20)
    rows = spec["layer"][0]["data"]["values"]
    for name in ("all", "fifa"):
        assert sum(row[name] for row in rows) == pytest.approx(1.0, abs=1e-4)
    low, high = np.quantile(values, [0.001, 0.999])
    assert outside == np.sum((values < low) | (values > high)) >= 6


def test_a_constant_term_still_has_a_histogram():
    spec, outside = charts.histograms({"all": np.full(10, 3.0)}, title="x")
    assert outside == 0
    assert sum(row["all"] for row in spec["layer"][0]["data"]["values"]) == pytest.approx(1.0)


def test_the_map_keeps_clusters_together():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 120)
    vectors = (rng.normal(size=(4, 32))[labels] + 0.05 * rng.normal(size=(120, 32))).astype("f4")
    places = project(vectors)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    nearest = np.argsort(distances, axis=1)[:, 1]
    assert np.mean(labels[nearest] == labels) > 0.97
    np.testing.assert_array_equal(places, project(vectors))


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_the_map_of_very_few_prompts_is_finite(rows):
    places = project(np.eye(rows, 4, dtype=np.float32))
    assert places.shape == (rows, 2)
    assert np.isfinite(places).all()


def test_map_shows_all_kept_prompts_before_others(run):

    tables = RunTables(run, ReportConfig(map_points=350))
    section = prompt_map(tables)
    points = section.charts["prompt-map"]["data"]["values"]
    assert len(points) == 350
    assert sum(p["kept"] for p in points) == len(tables.selected_prompt_ids)
    # With less room than kept prompts, a third is left for the others.
    small = prompt_map(RunTables(run, ReportConfig(map_points=60))).values
    assert (small["num_kept_shown"], small["num_others_shown"]) == (40, 20)


def test_thumbnails_are_small_upright_and_without_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn to show it upright
    exif[0x010E] = "secret place"
    stream = io.BytesIO()
    Image.new("RGB", (800, 400), (200, 10, 10)).save(stream, "JPEG", exif=exif)

    uri = gallery.thumbnail(stream.getvalue())
    encoded = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(encoded)) as small:
        assert small.size == (128, 256)
        assert not small.getexif()
    assert b"secret" not in encoded


def test_images_that_cannot_be_decoded_have_no_thumbnail(monkeypatch):
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    whole = stream.getvalue()
    assert gallery.thumbnail(whole) is not None
    assert gallery.thumbnail(None) is None
    assert gallery.thumbnail(b"") is None
    assert gallery.thumbnail(b"not an image") is None
    assert gallery.thumbnail(whole[: len(whole) // 2]) is None
    monkeypatch.setattr(gallery, "MAX_PIXELS", 64 * 64 - 1)
    assert gallery.thumbnail(whole) is None


def test_correlation_of_the_models_is_pearsons(run):

    section = agreement(RunTables(run))
    sample = run.read_table("scored_sample")
    one, other = (sample.column(f"reward_margin_{n}").to_numpy() for n in ("hpsv2", "pickscore"))
    matrix = dict(section.values["correlation"])
    position = section.values["names"].index("pickscore")
    assert matrix["hpsv2"][position] == pytest.approx(stats.pearsonr(one, other)[0], abs=1e-6)
    share = next(r for r in section.values["rows"] if r["model"] == "hpsv2")["share"]
    assert share == pytest.approx(np.mean(one > 0))


def test_a_model_that_scored_nothing_is_left_out(run_copy):

    sample = run_copy.read_table("scored_sample")
    empty = pa.nulls(len(sample), pa.float32())
    run_copy.write_table(
        sample.append_column("reward_margin_silent", empty), "scored_sample", "part-000000.parquet"
    )
    section = agreement(RunTables(run_copy))
    assert section.values["names"] == ["pickscore", "hpsv2"]


def test_a_baseline_as_the_selection_is_named_as_such(run_copy):
    manifest = json.loads(run_copy.read_text("manifests", "selected.json"))
    manifest["config"] = {"strategy": "random"}
    num_pairs = run_copy.num_rows("pairs")
    manifest["quarantined"] = {"not_selected": num_pairs - run_copy.num_rows("selected")}
    run_copy.write_text(json.dumps(manifest), "manifests", "selected.json")
    tables = RunTables(run_copy)
    steps = funnel.build(tables).values["steps"]
    assert steps[-2]["lost"][0]["reason"] == "not chosen by the strategy random"
    assert steps[-2]["count"] == tables.details("selected")["num_scored"]
    assert overview.comparison(tables).values["sets"][0][0] == "random"


def test_pairs_that_select_found_without_a_score_are_counted_too(run_copy):
    manifest = json.loads(run_copy.read_text("manifests", "selected.json"))
    manifest["details"]["num_scored"] -= 7
    run_copy.write_text(json.dumps(manifest), "manifests", "selected.json")
    steps = funnel.build(RunTables(run_copy)).values["steps"]
    assert ("no score of every reward model", 7) in [
        (r["reason"], r["count"]) for r in steps[1]["lost"]
    ]
    for one, following in pairwise(steps):
        assert one["count"] - sum(r["count"] for r in one["lost"]) == following["count"]
