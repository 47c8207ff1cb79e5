"""The demo world on disk: layout, determinism, proportions, the noise in its labels."""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa_ray.demo.drawing import render
from fifa_ray.demo.pictures import GENERATORS, corrupt, to_jpeg
from fifa_ray.demo.scenes import random_image_scene
from fifa_ray.demo.world import (
    PICK_A_PIC_V2,
    TRUTH_PAIRS,
    TRUTH_PROMPTS,
    generate_world,
    wrong_label_probability,
)

NUM_PAIRS, NUM_PROMPTS, NUM_FILES = 3_000, 300, 3


@dataclass(frozen=True)
class World:
    """A generated world, read back."""

    folder: Path
    rows: pa.Table
    pairs: pa.Table
    prompts: pa.Table


def read_world(folder: Path) -> World:
    truth = folder / "truth"
    rows = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "data").iterdir()))
    pairs, prompts = (pq.read_table(truth / f"{name}.parquet") for name in ("pairs", "prompts"))
    return World(folder, rows, pairs, prompts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    generate_world(
        folder, num_pairs=NUM_PAIRS, num_prompts=NUM_PROMPTS, num_files=NUM_FILES, num_processes=1
    )
    return read_world(folder)


def image_bytes(world: World) -> dict[str, bytes]:
    """Bytes of every distinct image by uid; fails where one uid has two contents."""
    images: dict[str, bytes] = {}
    for side in "01":
        uids, jpegs = (
            world.rows[name].to_pylist() for name in (f"image_{side}_uid", f"jpg_{side}")
        )
        for uid, jpeg in zip(uids, jpegs, strict=True):
            assert images.setdefault(uid, jpeg) == jpeg
    return images


def decodes(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).convert("RGB")
    except OSError:
        return False
    return True


def test_files_have_the_layout_of_pick_a_pic_v2(world: World) -> None:
    paths = sorted((world.folder / "data").iterdir())
    assert [path.name for path in paths] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert PICK_A_PIC_V2.names == [
        "are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid",
        "image_0_url", "image_1_uid", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1",
        "model_0", "model_1", "ranking_id", "user_id", "num_example_per_prompt",
        "__index_level_0__",
    ]  # fmt: skip
    for path in paths:
        file = pq.ParquetFile(path)
        assert file.schema_arrow.equals(PICK_A_PIC_V2)
        assert file.metadata.row_group(0).num_rows == 500
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert len(world.rows) == NUM_PAIRS
    assert world.pairs.schema.equals(TRUTH_PAIRS)
    assert world.prompts.schema.equals(TRUTH_PROMPTS)


def test_the_same_seed_gives_the_same_bytes_in_one_process_and_in_two(tmp_path: Path) -> None:
    def digests(folder: Path) -> list[str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files]

    for name, num_processes in (("one", 1), ("two", 2)):
        generate_world(
            tmp_path / name, num_pairs=120, num_prompts=50, num_files=2, seed=7,
            num_processes=num_processes,
        )  # fmt: skip
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_worlds_of_an_odd_and_an_even_seed_share_neither_prompts_nor_images(
    world: World, tmp_path: Path
) -> None:
    generate_world(tmp_path, num_pairs=400, num_prompts=150, seed=1, num_files=1, num_processes=1)
    held_out = read_world(tmp_path)
    ours, theirs = image_bytes(world), image_bytes(held_out)
    assert not set(ours) & set(theirs)
    assert not {v for v in ours.values() if decodes(v)} & {v for v in theirs.values() if decodes(v)}
    prompts = {text.strip() for text in world.prompts["prompt"].to_pylist()} - {""}
    assert not prompts & {text.strip() for text in held_out.prompts["prompt"].to_pylist()}
    assert not set(world.rows["ranking_id"].to_pylist()) & set(
        held_out.rows["ranking_id"].to_pylist()
    )


def test_truth_has_each_ranking_once_and_each_prompt_once(world: World) -> None:
    rankings = world.pairs["ranking_id"].to_pylist()
    assert sorted(set(world.rows["ranking_id"].to_pylist())) == rankings
    prompts = world.prompts["prompt"].to_pylist()
    assert len(set(prompts)) == len(prompts)
    assert set(world.rows["caption"].to_pylist()) == set(prompts)


def test_duplicated_rows_are_exact_and_as_many_as_stated(world: World) -> None:
    counts = Counter(world.rows["ranking_id"].to_pylist())
    repeated = {ranking for ranking, count in counts.items() if count > 1}
    assert len(repeated) == round(0.004 * NUM_PAIRS)
    seen: dict[int, dict[str, object]] = {}
    for row in world.rows.to_pylist():
        if row["ranking_id"] in repeated:
            assert seen.setdefault(row["ranking_id"], row) == row


def test_labels_agree_with_their_columns_and_with_the_truth(world: World) -> None:
    truth = {row["ranking_id"]: row for row in world.pairs.to_pylist()}
    for row in world.rows.drop_columns(["jpg_0", "jpg_1"]).to_pylist():
        known = truth[row["ranking_id"]]
        if not row["has_label"]:
            assert (row["label_0"], row["label_1"], row["best_image_uid"]) == (0.0, 0.0, "")
            assert known["label_correct"] is None
            continue
        assert row["label_0"] + row["label_1"] == 1.0
        if row["label_0"] == 0.5:
            assert (row["best_image_uid"], known["label_correct"]) == ("tie", None)
            continue
        better_first = known["utility_0"] > known["utility_1"]
        assert known["label_correct"] == (better_first == (row["label_0"] == 1.0))
        assert row["best_image_uid"] == row[f"image_{'0' if row['label_0'] else '1'}_uid"]


def test_proportions_lie_within_their_stated_bounds(world: World) -> None:
    correct = [value for value in world.pairs["label_correct"].to_pylist() if value is not None]
    assert 0.74 < np.mean(correct) < 0.82
    labels = np.array(world.rows["label_0"].to_pylist())
    assert 0.05 < (labels == 0.5).mean() < 0.11
    assert 0 < 1 - np.mean(world.rows["has_label"].to_pylist()) < 0.02
    captions = world.rows["caption"].to_pylist()
    assert 0 < sum(not caption.strip() for caption in captions) < 0.005 * NUM_PAIRS
    assert 0 < sum(len(caption) > 5_000 for caption in captions) < 0.005 * NUM_PAIRS
    defects = Counter(name for names in world.pairs["defects_0"].to_pylist() for name in names)
    assert 0.01 < defects["off_prompt"] / NUM_PAIRS < 0.06
    assert min(defects[name] for name in ("blur", "noise", "occlusion", "colour_cast")) > 100
    images = image_bytes(world)
    assert NUM_PAIRS < 2 * len(images) < 2 * NUM_PAIRS  # images are shared, as in the real set


def test_corrupted_images_do_not_decode_and_all_others_do(world: World) -> None:
    corrupted = {
        known["ranking_id"]
        for known in world.pairs.to_pylist()
        if "corrupted" in known["defects_0"] + known["defects_1"]
    }
    assert 0 < len(corrupted) < 0.015 * NUM_PAIRS
    for row in world.rows.select(["ranking_id", "jpg_0", "jpg_1"]).to_pylist():
        whole = decodes(row["jpg_0"]) and decodes(row["jpg_1"])
        assert whole == (row["ranking_id"] not in corrupted)


def test_no_way_of_corrupting_an_image_leaves_one_that_decodes() -> None:
    picture = render(random_image_scene(np.random.default_rng(0)), np.random.default_rng(0))
    jpeg = to_jpeg(picture)
    assert decodes(jpeg)
    corrupted = {corrupt(jpeg, np.random.default_rng(seed)) for seed in range(60)}
    assert len(corrupted) > 10
    assert not any(decodes(data) for data in corrupted)


def test_labels_go_wrong_less_often_the_larger_the_gap(world: World) -> None:
    table = world.pairs.filter(pc.is_valid(world.pairs["label_correct"]))
    gap = np.abs(table["utility_0"].to_numpy() - table["utility_1"].to_numpy())
    wrong = ~table["label_correct"].to_numpy(zero_copy_only=False).astype(bool)
    bins = np.digitize(gap, [0.5, 1.25, 2.5])
    rates = [wrong[bins == i].mean() for i in range(4)]
    assert rates == sorted(rates, reverse=True)
    for i, rate in enumerate(rates):
        expected = np.mean([wrong_label_probability(g) for g in gap[bins == i]])
        error = np.sqrt(expected * (1 - expected) / (bins == i).sum())
        assert rate == pytest.approx(expected, abs=4 * error)


def test_a_label_is_a_coin_flip_at_no_gap_and_careless_at_a_large_one() -> None:
    assert wrong_label_probability(0.0) == pytest.approx(0.5)
    assert wrong_label_probability(50.0) == pytest.approx(0.03)
    assert wrong_label_probability(-1.0) == wrong_label_probability(1.0)


def test_a_few_prompts_take_many_of_the_pairs(world: World) -> None:
    counts = sorted(Counter(world.rows["caption"].to_pylist()).values(), reverse=True)
    assert sum(counts[: len(counts) // 20]) > 0.2 * NUM_PAIRS
    assert np.median(counts) < 8
    stated = world.rows["num_example_per_prompt"].to_pylist()
    assert max(stated) <= counts[0] + 5  # a row may be duplicated, a prompt's pairs are all there


def test_better_generators_draw_more_useful_pictures(world: World) -> None:
    rows = {
        row["ranking_id"]: row for row in world.rows.select(["ranking_id", "model_0"]).to_pylist()
    }
    utilities: dict[str, list[float]] = {}
    for known in world.pairs.to_pylist():
        name = rows[known["ranking_id"]]["model_0"]
        utilities.setdefault(name, []).append(known["utility_0"])
    assert np.mean(utilities[GENERATORS[-1][0]]) > np.mean(utilities[GENERATORS[0][0]]) + 0.5


def test_a_world_that_was_interrupted_is_made_anew(tmp_path: Path, world: World) -> None:
    half = tmp_path / "unfinished" / "data"
    half.mkdir(parents=True)
    (half / "train-00000-of-00009.parquet").write_bytes(b"half")
    (tmp_path / "truth").mkdir()
    generate_world(tmp_path, num_pairs=120, num_prompts=50, num_files=1, num_processes=1)
    assert len(read_world(tmp_path).rows) == 120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "truth"]


def test_an_existing_world_is_not_overwritten(world: World) -> None:
    with pytest.raises(FileExistsError, match="delete it or name another"):
        generate_world(world.folder, num_pairs=120, num_prompts=50, num_processes=1)
    with pytest.raises(ValueError, match="at least two pairs"):
        generate_world(world.folder / "other", num_pairs=80, num_prompts=50)
