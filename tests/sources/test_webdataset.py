"""WebDataset shards: samples from headers, images by offset."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def words(**values: Any) -> bytes:
    return json.dumps(values).encode()


@pytest.fixture
def shard(tmp_path: Path, png: Any) -> Path:
    path = tmp_path / "pairs-000.tar"
    write_shard(
        path,
        {
            "d/000.chosen.png": png(1),
            "d/000.rejected.jpg": png(2),
            "d/000.json": words(prompt="grüße", chosen_uid="u1", model_rejected="sd"),
            "001.jpg_0": png(3),
            "001.jpg_1": png(4),
            "001.json": words(
                caption="one", label_0=0, label_1=1, image_0_uid="x", image_1_uid="y"
            ),
            "002.0.webp": png(5),
            "002.1.webp": png(6),
            "002.txt": b"two",
            "002.json": words(label_0=0.5, label_1=0.5),
            "003.0.jpg": png(7),
            "003.json": words(caption="three", label_0=1, label_1=0),
            "004.0.jpg": png(7),
            "004.1.jpg": png(7),
            "004.json": b"{broken",
            "005.0.jpg": png(7),
            "005.1.jpg": png(8),
            "005.json": words(caption="five", label_0="left", label_1=0),
            "006.0.jpg": png(7),
            "006.1.jpg": png(8),
            "006.txt": b"six",
        },
    )
    return path


def test_samples_become_pairs(shard: Path, opened: Any, metadata: Any) -> None:
    source = opened(shard)
    assert source.format == "webdataset"
    rows = metadata(source).to_pylist()
    brief = [
        (r["source_row"], r["prompt"], r["source_id"], r["reason"], (r["chosen_ref"] or "")[:5])
        for r in rows
    ]
    assert brief == [
        (0, "grüße", "d/000", None, "d/000"),
        (1, "one", "001", None, "001.j"),
        (2, "two", "002", "tie", "002.1"),
        (3, "three", "003", None, "003.0"),
        (4, None, None, "unreadable_row", ""),
        (5, "five", None, "bad_label", ""),
        (6, "six", "006", "unlabelled", "006.1"),
    ]
    assert (rows[0]["chosen_uid"], rows[0]["model_rejected"]) == ("u1", "sd")
    assert (rows[1]["chosen_uid"], rows[1]["rejected_uid"]) == ("y", "x")
    assert rows[3]["rejected_ref"] is None


def test_images_are_fetched_by_offset(
    shard: Path, opened: Any, metadata: Any, answers: Any, png: Any
) -> None:
    source = opened(shard)
    rows = metadata(source).to_pylist()
    requests = [
        (0, rows[0]["chosen_ref"]),
        (0, rows[0]["rejected_ref"]),
        (1, rows[1]["chosen_ref"]),
    ]
    expected = {i: (png(shade), None) for i, shade in enumerate((1, 2, 4))}
    assert answers(source, "pairs-000.tar", 0, requests) == expected


def test_references_that_point_nowhere(shard: Path, opened: Any, answers: Any) -> None:
    source = opened(shard, images={"max_bytes": 1000})
    requests = [(0, "x@999999999+10"), (0, "x@0+5000"), (0, "x"), (1, "x@0+0")]
    assert answers(source, "pairs-000.tar", 0, requests) == {
        0: (None, "unreadable_source"),
        1: (None, "image_too_large"),
        2: (None, "missing_image"),
        3: (b"", None),
    }
    shard.unlink()
    assert answers(source, "pairs-000.tar", 0, [(0, "x@0+5")]) == {0: (None, "unreadable_source")}


def test_a_shard_cut_short_keeps_its_whole_samples(shard: Path, opened: Any, metadata: Any) -> None:
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2 - 300])
    rows = metadata(opened(shard)).to_pylist()
    assert rows[0]["reason"] is None
    assert rows[-1]["reason"] == "unreadable_row"
    assert "pairs-000.tar" in rows[-1]["detail"]


def test_max_pairs_counts_samples(tmp_path: Path, shard: Path, opened: Any, metadata: Any) -> None:
    (tmp_path / "pairs-001.tar").write_bytes(shard.read_bytes())
    (tmp_path / "pairs-002.tar").write_bytes(shard.read_bytes())
    source = opened(tmp_path, max_pairs=9)
    assert [(c.file, c.row_stop) for c in source.chunks()] == [
        ("pairs-000.tar", 7),
        ("pairs-001.tar", 2),
    ]
    assert len(metadata(source)) == 9


def test_compressed_shards_are_refused_with_advice(tmp_path: Path, opened: Any) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"holds no .*\.tar.*a\.tar\.gz"):
        opened(tmp_path)
