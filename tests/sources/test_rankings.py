"""HPDv2, HPDv3 and ImageRewardDB: rankings become pairs, the better image chosen."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fifa_ray.sources.rankings import expand_ranking


def write_json(path: Path, records: Any) -> None:
    path.write_text(json.dumps(records))


def brief(rows: pa.Table) -> list[tuple[Any, ...]]:
    """(row, pair in row, prompt, chosen, rejected, reason) of each row."""
    return [
        (
            r["source_row"],
            r["pair_in_row"],
            r["prompt"],
            r["chosen_ref"],
            r["rejected_ref"],
            r["reason"],
        )
        for r in rows.to_pylist()
    ]


def test_hpdv2_train_and_test(tmp_path: Path, opened: Any, metadata: Any) -> None:
    write_json(
        tmp_path / "train.json",
        [
            {"prompt": "one", "human_preference": [0, 1], "file_path": ["a.jpg", "b.jpg"]},
            {"prompt": "two", "human_preference": [1, 1], "file_path": ["c.jpg", "d.jpg"]},
            {"prompt": "three", "human_preference": [1], "file_path": ["e.jpg", "f.jpg"]},
            {"prompt": "four", "human_preference": "left", "file_path": ["e.jpg", "f.jpg"]},
        ],
    )
    write_json(
        tmp_path / "test.json",
        [{"prompt": "rank", "image_path": ["x", "y", "z"], "rank": [2.5, 1, 2.5]}],
    )
    source = opened(tmp_path)
    assert source.format == "hpdv2"
    assert brief(metadata(source)) == [
        (0, 0, "rank", "y", "x", None),
        (0, 1, "rank", "x", "z", "tie"),
        (0, 2, "rank", "y", "z", None),
        (0, 0, "one", "b.jpg", "a.jpg", None),
        (1, 0, "two", "c.jpg", "d.jpg", "tie"),
        (2, 0, "three", None, None, "bad_label"),
        (3, 0, None, None, None, "bad_label"),
    ]


def test_hpdv2_images_lie_in_the_folder_of_their_split(
    tmp_path: Path, opened: Any, metadata: Any, answers: Any, png: Any
) -> None:
    record = {"prompt": "p", "human_preference": [1, 0], "file_path": ["1.png", "2.png"]}
    write_json(tmp_path / "train.json", [record])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(png(1))
    source = opened(tmp_path)
    row = metadata(source).to_pylist()[0]
    assert row["chosen_ref"] == row["chosen_uid"] == "train/1.png"
    found = answers(source, "train.json", 0, [(0, row["chosen_ref"]), (0, row["rejected_ref"])])
    assert found == {0: (png(1), None), 1: (None, "missing_image")}


def test_hpdv3_prefers_the_first_path(tmp_path: Path, opened: Any, metadata: Any) -> None:
    write_json(
        tmp_path / "train.json",
        [
            {
                "prompt": "p",
                "path1": "images/a.jpg",
                "path2": "images/b.jpg",
                "model1": "flux",
                "model2": "sdxl",
                "confidence": 0.9,
                "choice_dist": [9, 1],
            },
            {"prompt": "q", "path1": "images/a.jpg", "path2": None},
        ],
    )
    source = opened(tmp_path)
    assert source.format == "hpdv3"
    rows = metadata(source)
    assert brief(rows)[0] == (0, 0, "p", "images/a.jpg", "images/b.jpg", None)
    assert rows.to_pylist()[0]["model_chosen"] == "flux"
    assert rows.to_pylist()[1]["rejected_ref"] is None


def test_imagereward_groups_the_images_of_a_prompt(
    tmp_path: Path, opened: Any, metadata: Any, answers: Any, png: Any
) -> None:
    pq.write_table(
        pa.table(
            {
                "prompt_id": ["p1", "p1", "p2", "p1", "p2", "p3"],
                "prompt": ["one", "one", "two", "one", "two", "three"],
                "image_path": ["a", "b", "c", "d", "e", "f"],
                "rank": [2, 1, 1, 2, 1, 1],
                "overall_rating": [1, 2, 3, 4, 5, 6],
            }
        ),
        tmp_path / "metadata-train.parquet",
        row_group_size=2,
    )
    source = opened(tmp_path, rows_per_part=100)
    assert source.format == "imagereward"
    # One chunk a file, whatever the row groups: a prompt's images must come together.
    assert len(source.chunks()) == 1
    rows = metadata(source)
    assert brief(rows) == [
        (0, 0, "one", "b", "a", None),
        (0, 1, "one", "a", "d", "tie"),
        (0, 2, "one", "b", "d", None),
        (2, 0, "two", "c", "e", "tie"),
        (5, 0, "three", None, None, "too_few_images"),
    ]
    assert rows.to_pylist()[0]["source_id"] == "p1"
    (tmp_path / "a").write_bytes(png(7))
    assert answers(source, "metadata-train.parquet", 0, [(0, "a")]) == {0: (png(7), None)}


def test_a_ranking_has_a_limit_of_images() -> None:
    paths = [str(i) for i in range(46)]
    assert len(expand_ranking("p", paths[:45], list(range(45)))) == 990
    (row,) = expand_ranking("p", paths, list(range(46)))
    assert row["reason"] == "too_many_images"


def test_ranks_that_are_no_numbers_are_bad_labels() -> None:
    for ranks in (None, [1], ["1", "2"], [1, float("nan")], [True, False]):
        (row,) = expand_ranking("p", ["a", "b"], ranks)
        assert row["reason"] == "bad_label", ranks
