"""Recognising a format, and what is said where none fits."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def test_an_unknown_layout_lists_its_columns(tmp_path: Path, opened: Any) -> None:
    pq.write_table(pa.table({"a": [1], "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"no layout that is known; it has \['a', 'caption'\]"):
        opened(tmp_path)
    (tmp_path / "t.parquet").unlink()
    (tmp_path / "t.json").write_text(json.dumps([{"a": 1}]))
    with pytest.raises(ValueError, match=r"no layout that is known; it has \['a'\]"):
        opened(tmp_path)


def test_a_format_without_its_files_says_what_was_found(tmp_path: Path, opened: Any) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"format hpdv2 needs .json .* found 1 x .parquet"):
        opened(tmp_path, format="hpdv2")


def test_a_format_that_does_not_fit_says_why(tmp_path: Path, opened: Any) -> None:
    (tmp_path / "t.json").write_text(json.dumps([{"prompt": "p", "path1": "a", "path2": "b"}]))
    with pytest.raises(ValueError, match=r"does not have the hpdv2 layout.*\['path1', "):
        opened(tmp_path, format="hpdv2")
    assert opened(tmp_path).format == "hpdv3"


def test_an_image_root_must_exist(tmp_path: Path, opened: Any) -> None:
    (tmp_path / "t.json").write_text(json.dumps([{"prompt": "p", "path1": "a", "path2": "b"}]))
    with pytest.raises(ValueError, match=r"image_root .* is not an existing folder"):
        opened(tmp_path, image_root=str(tmp_path / "images"))


def test_an_image_root_bounds_the_paths(
    tmp_path: Path, opened: Any, answers: Any, png: Any
) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(1))
    path = tmp_path / "meta" / "t.json"
    path.write_text(json.dumps([{"prompt": "p", "path1": "a.png", "path2": "../meta/t.json"}]))
    source = opened(path, image_root=str(tmp_path / "images"))
    assert answers(source, "t.json", 0, [(0, "a.png"), (0, "../meta/t.json")]) == {
        0: (png(1), None),
        1: (None, "path_outside_root"),
    }


def test_identity_changes_with_the_files_and_survives_pickling(tmp_path: Path, opened: Any) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["1"], "rejected": ["2"]}), path)
    source = opened(tmp_path)
    assert pickle.loads(pickle.dumps(source)).identity() == source.identity()
    assert opened(tmp_path).identity() == source.identity()
    pq.write_table(pa.table({"prompt": ["b"], "chosen": ["1"], "rejected": ["2"]}), path)
    assert opened(tmp_path).identity() != source.identity()
