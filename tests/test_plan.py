"""`fifa plan`: a plan from a sample, the run that it was for, and both in one report."""

import json

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_filter import write_config

from fifa_ray.cli import main
from fifa_ray.demo.world import generate_world
from fifa_ray.report.cost import build
from fifa_ray.report.tables import RunTables
from fifa_ray.run_dir import RunDir

NUM_PAIRS = 700
GROUP = "{name: local, cpus: 2, price_per_hour: 7.2}"
PRICES = f"cost.prices={{currency: XXX, storage_per_gb_month: 2.0, groups: [{GROUP}]}}"
GIVEN = "cost.rates={rewards/tiny: 10, embeddings: 40}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    generate_world(
        folder, num_pairs=NUM_PAIRS, num_prompts=90, seed=11, num_files=1, num_processes=1
    )
    file = next((folder / "data").glob("*.parquet"))
    pq.write_table(pq.read_table(file), file, row_group_size=64)
    return folder


@pytest.fixture
def config(world, tmp_path):
    return write_config(
        tmp_path,
        world,
        embed={"actors": {"max_actors": 1}},
        select={"selection_size": 40, "compare": []},
        cost={"sample_pairs": 256, "sample_prompts": 32},
    )


def fifa(*arguments):
    return CliRunner().invoke(main, ["-q", *map(str, arguments)])


def stages_of(plan: dict) -> dict[str, dict]:
    return {stage["stage"]: stage for stage in plan["stages"]}


def test_a_plan_its_run_and_both_in_the_report(ray_session, config, world, tmp_path):
    result = fifa("plan", config, PRICES)
    assert result.exit_code == 0, result.output
    run = RunDir(str(tmp_path / "run"))
    plan = json.loads(run.read_text("plan.json"))
    planned = stages_of(plan)
    assert list(planned) == ["pairs", "rewards/tiny", "embeddings", "neighbors", "selected"]
    assert planned["rewards/tiny"]["rate_source"] == "measured"
    assert planned["neighbors"]["rate_source"] == "assumed"
    # The metadata of so few rows is read whole: nothing about the dataset is estimated.
    rows = pq.read_metadata(next((world / "data").glob("*.parquet"))).num_rows
    assert plan["dataset"]["rows"] == planned["pairs"]["rows"]["value"] == rows
    # Nothing but the sample was worked on.
    assert run.manifests() == {}
    sample = RunDir(plan["sample"]["folder"])
    assert sample.manifest("pairs").rows_in == 256
    work = sample.manifest("rewards/tiny").details["work"]
    (scorer,) = [w for w in work if "LoadAndScore" in w["operator"]]
    # Four pieces of 64 pairs, each a task; one warms up.
    assert (scorer["tasks"], scorer["tasks_warming_up"]) == (4, 1)
    assert planned["rewards/tiny"]["rows_per_second_of_a_worker"] == pytest.approx(
        1 / scorer["seconds_per_row"]["value"]
    )
    pairs = sample.read_table("pairs").column("pair_id").to_numpy()
    assert (pairs >> 10).max() > rows * 0.7

    again = fifa("plan", config, PRICES, "--json")
    # What was measured once is not measured again.
    assert stages_of(json.loads(again.output)) == planned

    result = fifa("filter", config, PRICES)
    assert result.exit_code == 0, result.output
    manifests = run.manifests()
    assert plan["dataset"]["pairs"]["value"] == manifests["pairs"].rows_out
    assert plan["dataset"]["prompts"]["value"] == manifests["prompts"].rows_out
    assert "Actual / predicted" in run.read_text("report.html")
    section = build(RunTables(run))
    rows = {row["stage"]: row for row in section.values["stages"]}
    for stage, entry in planned.items():
        seconds = rows[stage]["seconds"]
        assert rows[stage]["ratio"] == pytest.approx(seconds / entry["seconds"]["value"])
        nodes = manifests[stage].details["node_seconds"]["local"]
        assert rows[stage]["cost"] == pytest.approx(nodes / 3600 * 7.2)
    assert section.notes == ()
    for table in ("embeddings", "selected"):
        files = [run.path(table, name) for name in run.list(table)]
        written = sum(run.filesystem.get_file_info(file).size for file in files)
        assert planned[table]["bytes"]["value"] == pytest.approx(written, rel=0.35), table


def test_given_rates_need_no_sample(config, tmp_path):
    result = fifa(
        "plan", config, PRICES, GIVEN, "cost.num_pairs=36000", "cost.num_prompts=4000",
        "cost.start_seconds=30", "ingest.source=/nowhere", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    stages = stages_of(plan)
    rewards = stages["rewards/tiny"]
    # Two workers on the two cores: of 36,000 / 512 = 70.3125 pieces one of them takes 35.3125.
    seconds = 30 + 36000 / 10 * 35.3125 / 70.3125
    assert rewards["seconds"]["value"] == pytest.approx(seconds)
    assert rewards["seconds"]["low"] == rewards["seconds"]["high"]
    assert rewards["cost"]["value"] == pytest.approx(seconds / 3600 * 7.2)
    assert stages["embeddings"]["seconds"]["value"] == pytest.approx(30 + 4000 / 40)
    assert {s["rate_source"] for s in plan["stages"]} == {"given", "assumed"}
    total = sum(stage["cost"]["value"] for stage in plan["stages"])
    assert plan["totals"]["cost"]["value"] == pytest.approx(total)
    assert plan["storage_cost"] == pytest.approx(plan["totals"]["bytes"]["value"] / 1e9 * 2.0)
    assert not (tmp_path / "run" / "plan").exists()


def test_a_dataset_too_large_to_read_is_estimated(ray_session, config, world):
    result = fifa("plan", config, PRICES, GIVEN, "cost.sample_rows=192", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    rows = pq.read_table(next((world / "data").glob("*.parquet"))).to_pandas()
    labelled = rows[(rows.label_0 != 0.5) & rows.has_label]
    size = plan["dataset"]
    assert size["rows"] == len(rows)
    assert size["pairs"]["value"] == pytest.approx(len(labelled), rel=0.2)
    distinct = labelled.caption.str.split().str.join(" ").nunique()
    assert size["prompts"]["low"] <= distinct <= size["prompts"]["high"]
    images = len({*labelled.image_0_uid, *labelled.image_1_uid})
    assert size["images"]["low"] <= images <= 1.2 * size["images"]["high"]
    assert "estimated from 192 of" in size["prompts_from"]
    assert plan["sample"] is None


def test_training_by_pair_updates_and_evaluation_by_images(config):
    rates = (
        "cost.rates={rewards/tiny: 10, embeddings: 40, latents: 5, training: 2, "
        "evaluation/images: 0.5, evaluation/rewards/tiny: 20}"
    )
    result = fifa(
        "plan", config, PRICES, rates, "cost.num_pairs=36000", "cost.num_prompts=4000",
        "cost.start_seconds=0", "train.max_steps=100", "train.global_batch_size=16",
        "train.num_workers=2", "evaluate.num_prompts=50", "--train", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    stages = stages_of(json.loads(result.output))
    assert stages["training"]["seconds"]["value"] == pytest.approx(100 * 16 / 2 / 2)
    # The base and one training draw 50 prompts: 100 images, in 6.25 parts of 16 on two workers.
    assert stages["evaluation/images"]["rows"]["value"] == 100
    assert stages["evaluation/images"]["seconds"]["value"] == pytest.approx(200 * 3.25 / 6.25)
    assert stages["evaluation/rewards/tiny"]["rows"]["value"] == 100
    # Two images and a prompt for each of the 40 pairs that are kept.
    assert stages["latents"]["rows"]["value"] == 120


def test_without_prices_there_are_hours_and_no_money(ray_session, config):
    result = fifa("plan", config, GIVEN, "cost.num_pairs=1000", "cost.num_prompts=100")
    assert result.exit_code == 0, result.output
    assert "no prices (set cost.prices_file or cost.prices)" in result.output
    assert "local: " in result.output
    assert "node hours" in result.output
    assert "given" in result.output


def test_a_stage_that_fits_nowhere_is_warned_of_and_left_out(config):
    result = fifa(
        "plan", config, PRICES, GIVEN, "cost.num_pairs=1000", "cost.num_prompts=100",
        "rewards.0.actors.num_gpus=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "WARNING: rewards/tiny does not fit: a worker asks for 1 CPU and 1 GPU" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("- 1", "must hold a mapping with groups, got list"),
        ("groups: [{name: a, cpu: 2}]", "unknown key groups.0.cpu; did you mean groups.0.cpus?"),
        ("groups: [{name: a, cpus: 2, price_per_hour: -1}]", "greater than or equal to 0, got -1"),
        ("currency: XXX", "groups is required"),
        ("groups: [", "not valid YAML"),
    ],
)
def test_bad_price_lists_are_explained(config, tmp_path, text, message):
    file = tmp_path / "prices.yaml"
    if text is not None:
        file.write_text(text)
    result = fifa("plan", config, f"cost.prices_file={file}")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "prices.yaml" in result.output


def test_rates_of_stages_that_are_not_there_are_refused(config):
    result = fifa("plan", config, "cost.rates={rewards/tini: 3}")
    assert result.exit_code == 2
    assert "did you mean rewards/tiny?" in result.output


def test_the_example_is_a_price_list_and_says_that_it_is_invented(config, tmp_path):
    example = fifa("plan", "--example-prices").output
    assert "EVERY NUMBER HERE IS INVENTED" in example
    (tmp_path / "prices.yaml").write_text(example)
    result = fifa(
        "plan", config, f"cost.prices_file={tmp_path / 'prices.yaml'}", GIVEN, "--json",
        "cost.num_pairs=1000000", "cost.num_prompts=60000",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert stages_of(plan)["rewards/tiny"]["nodes"].keys() == {"gpu-spot"}
    assert "head" in plan["totals"]["node_seconds"]
    assert plan["totals"]["cost"]["value"] > 0
