"""The generic layout: bytes, structs and paths, in parquet and JSON."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def test_parquet_with_bytes(
    tmp_path: Path, opened: Any, metadata: Any, answers: Any, png: Any
) -> None:
    pq.write_table(
        pa.table(
            {
                "text": ["a", "b"],
                "good": [png(0), png(1)],
                "bad": pa.array([png(2), None], pa.large_binary()),
                "id": [11, 12],
            }
        ),
        tmp_path / "pairs.parquet",
    )
    columns = {"prompt": "text", "chosen": "good", "rejected": "bad", "source_id": "id"}
    source = opened(tmp_path, columns=columns)
    assert source.format == "generic"
    rows = metadata(source).to_pylist()
    assert [(r["prompt"], r["chosen_ref"], r["rejected_ref"], r["source_id"]) for r in rows] == [
        ("a", "good", "bad", "11"),
        ("b", "good", "bad", "12"),
    ]
    # Bytes without names: the dataset does not say which images are the same.
    assert {row["chosen_uid"] for row in rows} == {None}
    requests = [(0, "good"), (0, "bad"), (1, "good"), (1, "bad")]
    assert answers(source, "pairs.parquet", 0, requests) == {
        0: (png(0), None),
        1: (png(2), None),
        2: (png(1), None),
        3: (None, "missing_image"),
    }


def test_parquet_with_structs_of_the_datasets_library(
    tmp_path: Path, opened: Any, answers: Any, metadata: Any, png: Any
) -> None:
    (tmp_path / "2.png").write_bytes(png(2))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table(
            {
                "prompt": ["a", "b"],
                "chosen": pa.array(
                    [{"bytes": png(1), "path": "x.png"}, {"bytes": None, "path": "2.png"}], kind
                ),
                "rejected": pa.array([None, {"bytes": None, "path": "../2.png"}], kind),
            }
        ),
        tmp_path / "train.parquet",
    )
    source = opened(tmp_path)
    assert metadata(source).column("chosen_ref").to_pylist() == ["chosen", "chosen"]
    requests = [(0, "chosen"), (0, "rejected"), (1, "chosen"), (1, "rejected")]
    assert answers(source, "train.parquet", 0, requests) == {
        0: (png(1), None),
        1: (None, "missing_image"),
        2: (png(2), None),
        3: (None, "path_outside_root"),
    }


def test_parquet_written_by_the_datasets_library(
    tmp_path: Path, opened: Any, answers: Any, metadata: Any, png: Any
) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": datasets.Image(),
            "rejected": datasets.Image(),
        }
    )
    rows = {
        "prompt": ["a", "b"],
        "chosen": [{"bytes": png(i), "path": None} for i in (1, 2)],
        "rejected": [{"bytes": png(i), "path": None} for i in (3, 4)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "t.parquet"))
    source = opened(tmp_path)
    assert len(metadata(source)) == 2
    assert answers(source, "t.parquet", 0, [(1, "rejected")]) == {0: (png(4), None)}


def test_parquet_with_bytes_on_one_side_and_paths_on_the_other(
    tmp_path: Path, opened: Any, answers: Any, metadata: Any, png: Any
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "r.png").write_bytes(png(9))
    table = pa.table({"prompt": ["a"], "chosen": [png(1)], "rejected": ["r.png"]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = opened(tmp_path, image_root=str(tmp_path / "images"))
    row = metadata(source).to_pylist()[0]
    assert (row["chosen_ref"], row["rejected_ref"]) == ("chosen", "r.png")
    assert (row["chosen_uid"], row["rejected_uid"]) == (None, "r.png")
    assert answers(source, "t.parquet", 0, [(0, "chosen"), (0, "r.png")]) == {
        0: (png(1), None),
        1: (png(9), None),
    }


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_with_paths(
    tmp_path: Path, opened: Any, answers: Any, metadata: Any, png: Any, suffix: str
) -> None:
    records = [
        {"prompt": "a", "chosen": "1.png", "rejected": "2.png", "source_id": 7},
        {"prompt": None, "chosen": "1.png", "rejected": "", "chosen_uid": "u"},
    ]
    text = json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records))
    (tmp_path / f"pairs.{suffix}").write_text(text)
    (tmp_path / "1.png").write_bytes(png(1))
    source = opened(tmp_path)
    first, second = metadata(source).to_pylist()
    assert (first["chosen_uid"], first["rejected_uid"], first["source_id"]) == (
        "1.png",
        "2.png",
        "7",
    )
    assert (second["prompt"], second["rejected_ref"], second["chosen_uid"]) == (None, "", "u")
    found = answers(source, f"pairs.{suffix}", 0, [(0, "1.png"), (0, "2.png")])
    assert found == {0: (png(1), None), 1: (None, "missing_image")}


def test_groups_of_rows_where_images_are_files(tmp_path: Path, opened: Any, metadata: Any) -> None:
    """A pass over images is cut into pieces even where the format has no row groups."""
    table = pa.table({"prompt": ["a"] * 1100, "chosen": ["1"] * 1100, "rejected": ["2"] * 1100})
    pq.write_table(table, tmp_path / "t.parquet")
    groups = metadata(opened(tmp_path)).column("source_group").to_pylist()
    assert groups == [i // 512 for i in range(1100)]


def test_mistakes_in_columns_say_what_there_is(tmp_path: Path, opened: Any) -> None:
    table = pa.table({"prompt": ["a"], "chosen": [1], "rejected": ["r.png"]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"column 'chosen' has the type int64; expected image"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the columns \['winner'\]; it has \['chosen', "):
        opened(tmp_path, columns={"chosen": "winner"})
    with pytest.raises(ValueError, match=r"ingest.columns names \['picture'\]; its keys are"):
        opened(tmp_path, columns={"picture": "chosen"})
