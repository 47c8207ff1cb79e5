"""The whole filter: resumed after any death, indifferent to how the work is cut, no row lost."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

import fifa_ray
from fifa_ray.config import load_config
from fifa_ray.demo.packaged import text_encoder_folder
from fifa_ray.demo.run import REWARD_WEIGHTS
from fifa_ray.demo.world import generate_world
from fifa_ray.run_dir import RunDir

NUM_PAIRS = 1400
ROW_GROUP = 200


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A small world in one file of seven row groups."""
    folder = tmp_path_factory.mktemp("world")
    generate_world(
        folder, num_pairs=NUM_PAIRS, num_prompts=140, seed=5, num_files=1, num_processes=1
    )
    file = next((folder / "data").glob("*.parquet"))
    pq.write_table(pq.read_table(file), file, row_group_size=ROW_GROUP)
    return folder


def config_of(world: Path, run_dir: Path, **settings) -> dict:
    values = {
        "run_dir": str(run_dir),
        "ingest": {"source": str(world / "data"), "rows_per_part": ROW_GROUP},
        "rewards": [{"name": "tiny", "kind": "pickscore", "weights": str(REWARD_WEIGHTS)}],
        "judge": {"enabled": False},
        "embed": {"model": str(text_encoder_folder()), "actors": {"max_actors": 1}},
        "select": {
            "selection_size": 80,
            "quality_weight": 0,
            "exclude_harmful": False,
            "compare": ["random"],
        },
        "report": {"enabled": False},
    }
    for name, value in settings.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return values


@pytest.fixture(scope="module")
def undisturbed(ray_session, world, tmp_path_factory) -> RunDir:
    return fifa_ray.run_filter(config_of(world, tmp_path_factory.mktemp("undisturbed")))


def selection(run: RunDir) -> pd.DataFrame:
    return run.read_table("selected").to_pandas()


def assert_same_selection(run: RunDir, other: RunDir) -> None:
    pd.testing.assert_frame_equal(selection(run), selection(other), check_exact=True)


def test_every_row_is_accounted_for(undisturbed, world):
    rows = pq.read_metadata(next((world / "data").glob("*.parquet"))).num_rows
    manifests = undisturbed.manifests()
    assert manifests["pairs"].rows_in == rows
    for stage, manifest in manifests.items():
        assert manifest.rows_in == manifest.rows_out + manifest.rows_quarantined, stage
    for stage in ("pairs", "rewards/tiny"):
        put_aside = undisturbed.read_table("quarantine", *stage.split("/")).to_pandas()
        assert put_aside.reason.value_counts().to_dict() == manifests[stage].quarantined
        assert (put_aside.source_file.notna() & put_aside.source_row.notna()).all()


def test_corrupt_images_are_quarantined_and_nothing_else_is(undisturbed, world):
    truth = pq.read_table(world / "truth" / "pairs.parquet").to_pandas()
    pairs = undisturbed.read_table("pairs").to_pandas()
    corrupt = set(
        truth.ranking_id[
            truth.defects_0.map(lambda d: "corrupted" in d)
            | truth.defects_1.map(lambda d: "corrupted" in d)
        ]
    )
    quarantined = undisturbed.read_table("quarantine", "rewards", "tiny").to_pandas()
    assert len(quarantined) > 0
    by_id = pairs.set_index("pair_id").source_id
    assert set(by_id[quarantined.pair_id].astype(int)) == corrupt & set(pairs.source_id.astype(int))


def test_the_selection_is_self_contained(undisturbed, world):
    table = undisturbed.read_table("selected")
    source = pq.read_table(next((world / "data").glob("*.parquet"))).to_pandas()
    for row in table.to_pylist():
        original = source.iloc[row["source_row"]]
        first_chosen = original.label_0 > original.label_1
        images = (original.jpg_0, original.jpg_1)
        assert row["chosen_image"] == images[0 if first_chosen else 1]
        assert row["rejected_image"] == images[1 if first_chosen else 0]
        assert row["source_id"] == str(original.ranking_id)


@pytest.mark.parametrize(
    "settings",
    [
        {"ingest": {"rows_per_part": 100_000}},
        {"embed": {"actors": {"max_actors": 2}}, "scorers": 1},
    ],
    ids=["one part instead of seven", "two encoders instead of one, one scorer instead of two"],
)
def test_the_same_pairs_are_kept_however_the_work_is_cut(undisturbed, world, tmp_path, settings):
    scorers = settings.get("scorers")
    values = config_of(world, tmp_path, **{k: v for k, v in settings.items() if k != "scorers"})
    if scorers:
        values["rewards"][0]["actors"] = {"min_actors": scorers, "max_actors": scorers}
    assert_same_selection(fifa_ray.run_filter(values), undisturbed)


def copied(undisturbed: RunDir, folder: Path) -> Path:
    """A copy to go on from: stages whose settings stay as they are need not run again."""
    shutil.copytree(undisturbed.root, folder)
    return folder


def test_pickapic_columns_load_as_that_dataset(undisturbed, world, tmp_path):
    values = config_of(world, copied(undisturbed, tmp_path / "run"))
    values["select"] |= {"column_names": "pickapic"}
    run = fifa_ray.run_filter(values)
    again = fifa_ray.run_filter(
        config_of(world, tmp_path / "again")
        | {"ingest": {"source": run.path("selected"), "format": "pickapic"}}
    )
    assert again.manifest("pairs").rows_in == 80
    assert set(again.read_table("selected")["prompt"].to_pylist()) == set(
        selection(undisturbed).prompt
    )


def start_driver(ray_session, values: dict, folder: Path) -> subprocess.Popen:
    """`fifa filter` in a process of its own, on the cluster of this test session."""
    address = ray_session.get_runtime_context().gcs_address
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values | {"ray": {"address": address}}))
    command = [sys.executable, "-m", "fifa_ray.cli", "filter", str(config)]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def kill_when(process: subprocess.Popen, there: Path, pattern: str) -> bool:
    """SIGKILL the driver as soon as files match; False if it finished first."""
    while process.poll() is None:
        if any(there.glob(pattern)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.01)
    return False


@pytest.mark.timeout(600)  # five runs, each with actors that load their models
def test_a_killed_driver_goes_on_where_it_was(ray_session, undisturbed, world, tmp_path):
    run_dir = tmp_path / "run"
    values = config_of(world, run_dir)
    for moment in (
        "partial/ingest/rows/*.parquet",
        "partial/rewards.tiny-*/*.parquet",
        "partial/embeddings-*/*.parquet",
        "neighbors/*.parquet",
    ):
        process = start_driver(ray_session, values, tmp_path)
        assert kill_when(process, run_dir, moment), (moment, (tmp_path / "log.txt").read_text())
    final = start_driver(ray_session, values, tmp_path)
    log = tmp_path / "log.txt"
    assert final.wait() == 0, log.read_text()
    run = RunDir(str(run_dir))
    assert_same_selection(run, undisturbed)
    assert run.manifest("rewards/tiny").details["rows_reused"] > 0
    assert not run.list("partial")


def test_a_killed_scorer_loses_no_row(ray_session, undisturbed, world, tmp_path):
    killed = threading.Event()

    def kill_a_scorer() -> None:
        while not killed.is_set():
            for entry in Path("/proc").iterdir():
                is_scorer = entry.name.isdigit() and b"LoadAndScore" in _command_of(entry)
                if is_scorer and any(tmp_path.glob("partial/rewards.tiny-*/*.parquet")):
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.set()
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_a_scorer, daemon=True)
    killer.start()
    run = fifa_ray.run_filter(config_of(world, tmp_path))
    was_killed = killed.is_set()
    killed.set()
    killer.join()
    assert was_killed
    assert_same_selection(run, undisturbed)
    assert run.manifest("rewards/tiny").quarantined == (
        undisturbed.manifest("rewards/tiny").quarantined
    )


def _command_of(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_the_same_command_twice_does_nothing_the_second_time(undisturbed, world):
    def changes() -> dict[Path, int]:
        found = Path(undisturbed.root).rglob("*.parquet")
        return {path: path.stat().st_mtime_ns for path in found}

    before = changes()
    fifa_ray.run_filter(config_of(world, Path(undisturbed.root)))
    assert changes() == before


def test_choosing_again_runs_no_model(undisturbed):
    first = selection(undisturbed)
    run = fifa_ray.reselect(undisturbed.uri, ["select.selection_size=10"])
    assert selection(run).pair_id.tolist() == first.pair_id.head(10).tolist()
    fifa_ray.reselect(undisturbed.uri, ["select.selection_size=80"])
    with pytest.raises(fifa_ray.ConfigError, match="changes more than the selection"):
        fifa_ray.reselect(undisturbed.uri, ["embed.model=another"])


def test_a_notebook_filters_its_own_table(ray_session, world, tmp_path):
    source = pq.read_table(next((world / "data").glob("*.parquet"))).to_pandas()
    labelled = source[source.label_0 != 0.5].head(150)
    first = labelled.label_0 > labelled.label_1
    frame = pd.DataFrame(
        {
            "prompt": labelled.caption,
            "chosen": labelled.jpg_0.where(first, labelled.jpg_1),
            "rejected": labelled.jpg_1.where(first, labelled.jpg_0),
        }
    )
    values = config_of(world, tmp_path) | {"max_quarantine_fraction": 0.5}
    del values["ingest"]
    run = fifa_ray.run_filter(values, ["select.selection_size=20"], data=frame)
    kept = selection(run)
    assert len(kept) == 20
    assert set(kept.prompt) <= {" ".join(text.split()) for text in frame.prompt}


def test_two_reward_models_each_leave_their_columns(ray_session, undisturbed, world, tmp_path):
    values = config_of(world, copied(undisturbed, tmp_path / "run"))
    statistics = {"name": "statistics", "kind": "fitted", "options": {"folds": 3}}
    values["rewards"].append(statistics)
    run = fifa_ray.run_filter(load_config(values))
    columns = set(run.read_table("selected").column_names)
    assert {"reward_margin_tiny", "reward_margin_statistics"} <= columns
