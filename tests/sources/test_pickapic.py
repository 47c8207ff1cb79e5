"""Pick-a-Pic: labels, row groups and image bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

LABELS = [
    # label_0, label_1, has_label, best -> which is chosen, reason
    (1.0, 0.0, True, "a", ("a", None)),
    (0.0, 1.0, True, "b", ("b", None)),
    (0.5, 0.5, True, "tie", (None, "tie")),
    (0.5, 0.5, False, "", (None, "unlabelled")),
    (1.0, 0.0, False, "a", (None, "unlabelled")),
    (None, None, None, None, (None, "unlabelled")),
    (1.0, 1.0, True, "a", (None, "bad_label")),
    (0.7, 0.3, True, "a", (None, "bad_label")),
    (1.0, None, True, "a", (None, "bad_label")),
    (float("nan"), 0.0, True, "a", (None, "bad_label")),
    (1.0, 0.0, True, "b", (None, "bad_label")),  # contradicts best_image_uid
    (1.0, 0.0, None, None, ("a", None)),
    (1.0, 0.0, True, "someone else", ("a", None)),
]


@pytest.fixture
def table(png: Callable[[int], bytes]) -> Callable[..., pa.Table]:
    """A table in Pick-a-Pic's columns; image k of row i has the shade 2 i + k."""

    def make(labels: list[tuple[Any, ...]], **columns: Any) -> pa.Table:
        count = len(labels)
        return pa.table(
            {
                "caption": [f"prompt {i}" for i in range(count)],
                "label_0": pa.array([label[0] for label in labels], pa.float64()),
                "label_1": pa.array([label[1] for label in labels], pa.float64()),
                "has_label": pa.array([label[2] for label in labels], pa.bool_()),
                "best_image_uid": [
                    f"{label[3]}{i}" if label[3] in ("a", "b") else label[3]
                    for i, label in enumerate(labels)
                ],
                "image_0_uid": [f"a{i}" for i in range(count)],
                "image_1_uid": [f"b{i}" for i in range(count)],
                "jpg_0": [png(2 * i) for i in range(count)],
                "jpg_1": [png(2 * i + 1) for i in range(count)],
                "model_0": ["left"] * count,
                "model_1": ["right"] * count,
                "ranking_id": list(range(count)),
            }
            | columns
        )

    return make


def test_labels_choose_or_give_their_reason(
    tmp_path: Path, table: Any, opened: Any, metadata: Any
) -> None:
    pq.write_table(table(LABELS), tmp_path / "train.parquet")
    rows = metadata(opened(tmp_path)).to_pylist()
    for i, (row, (*_, (chosen, reason))) in enumerate(zip(rows, LABELS, strict=True)):
        assert row["reason"] == reason, LABELS[i]
        assert (row["source_row"], row["source_id"], row["prompt"]) == (i, str(i), f"prompt {i}")
        if chosen:
            rejected = "b" if chosen == "a" else "a"
            assert row["chosen_uid"] == f"{chosen}{i}"
            assert row["rejected_uid"] == f"{rejected}{i}"
            assert row["chosen_ref"] == ("jpg_0" if chosen == "a" else "jpg_1")
            assert row["model_rejected"] == ("left" if rejected == "a" else "right")
        if reason == "bad_label":
            assert "label_0=" in row["detail"]


def test_chunks_follow_row_groups_and_cut_large_ones(
    tmp_path: Path, table: Any, opened: Any, metadata: Any
) -> None:
    labels = LABELS[:1] * 450
    pq.write_table(table(labels), tmp_path / "a.parquet", row_group_size=60)
    pq.write_table(table(labels), tmp_path / "b.parquet", row_group_size=250)
    source = opened(tmp_path, rows_per_part=100)
    chunks = source.chunks()
    assert [(c.file, c.row_start, c.row_stop) for c in chunks] == [
        *[("a.parquet", start, start + 60) for start in range(0, 360, 60)],
        ("a.parquet", 360, 450),
        ("b.parquet", 0, 83),
        ("b.parquet", 83, 166),
        ("b.parquet", 166, 250),
        ("b.parquet", 250, 350),
        ("b.parquet", 350, 450),
    ]
    rows = metadata(source)
    assert rows.column("source_row").to_pylist() == [*range(450), *range(450)]
    groups = rows.column("source_group").to_pylist()
    assert groups == [i // 60 for i in range(450)] + [i // 250 for i in range(450)]


def test_max_pairs_stops_after_that_many_rows(
    tmp_path: Path, table: Any, opened: Any, metadata: Any
) -> None:
    pq.write_table(table(LABELS[:1] * 300), tmp_path / "a.parquet", row_group_size=100)
    pq.write_table(table(LABELS[:1] * 300), tmp_path / "b.parquet", row_group_size=100)
    source = opened(tmp_path, rows_per_part=100, max_pairs=350)
    assert len(metadata(source)) == 350


def test_metadata_reads_no_image_bytes(tmp_path: Path, table: Any, opened: Any) -> None:
    """Overwriting the image pages of a file leaves its metadata readable."""
    path = tmp_path / "train.parquet"
    pq.write_table(table(LABELS), path)
    data = bytearray(path.read_bytes())
    meta = pq.read_metadata(path).row_group(0)
    for i in range(meta.num_columns):
        column = meta.column(i)
        if column.path_in_schema.startswith("jpg_"):
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + column.total_compressed_size] = b"\xff" * (
                column.total_compressed_size
            )
    path.write_bytes(data)
    source = opened(tmp_path)
    assert len(source.read_metadata(source.chunks()[0])) == len(LABELS)
    requests = pa.table({"source_row": [0, 1], "ref": ["jpg_0", "jpg_1"]})
    (batch,) = source.read_images("train.parquet", 0, requests)
    assert batch.column("error").to_pylist() == ["unreadable_source"] * 2


def test_images_of_one_row_group(
    tmp_path: Path, table: Any, opened: Any, answers: Any, png: Any
) -> None:
    data = table(LABELS[:1] * 200)
    jpg_1 = data.column("jpg_1").to_pylist()
    jpg_1[130], jpg_1[131] = None, b"x" * 5000
    data = data.set_column(data.schema.get_field_index("jpg_1"), "jpg_1", [jpg_1])
    pq.write_table(data, tmp_path / "train.parquet", row_group_size=120)
    source = opened(tmp_path, images={"max_bytes": 1000})
    requests = [(row, f"jpg_{k}") for row in range(120, 200) for k in (0, 1)]
    found = answers(source, "train.parquet", 1, requests)
    for i, (row, ref) in enumerate(requests):
        expected = (png(2 * row + int(ref[-1])), None)
        if (row, ref) == (130, "jpg_1"):
            expected = (None, "missing_image")
        elif (row, ref) == (131, "jpg_1"):
            expected = (None, "image_too_large")
        assert found[i] == expected, (row, ref)


def test_a_file_that_is_gone_answers_every_request(
    tmp_path: Path, table: Any, opened: Any, answers: Any
) -> None:
    pq.write_table(table(LABELS), tmp_path / "train.parquet")
    source = opened(tmp_path)
    (tmp_path / "train.parquet").unlink()
    assert answers(source, "train.parquet", 0, [(0, "jpg_0"), (1, "jpg_0")]) == {
        0: (None, "unreadable_source"),
        1: (None, "unreadable_source"),
    }


def test_the_variant_without_images_needs_urls_to_be_allowed(
    tmp_path: Path, table: Any, opened: Any, metadata: Any, answers: Any
) -> None:
    data = table(LABELS[:2]).drop_columns(["jpg_0", "jpg_1"])
    for k in (0, 1):
        # Loopback: refused even where URLs are allowed.
        urls = [f"http://127.0.0.1:9/{k}/{i}.png" for i in range(2)]
        data = data.append_column(f"image_{k}_url", [urls])
    pq.write_table(data, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"only URLs; set images.allow_urls=true"):
        opened(tmp_path)
    source = opened(tmp_path, images={"allow_urls": True})
    rows = metadata(source).to_pylist()
    assert [row["chosen_ref"] for row in rows] == [
        "http://127.0.0.1:9/0/0.png",
        "http://127.0.0.1:9/1/1.png",
    ]
    found = answers(source, "train.parquet", 0, [(0, rows[0]["chosen_ref"])])
    assert found == {0: (None, "url_private_address")}


def test_a_missing_column_and_a_broken_file_are_named(
    tmp_path: Path, table: Any, opened: Any
) -> None:
    pq.write_table(table(LABELS).drop_columns(["jpg_1"]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet lacks the columns \['jpg_1'\]; it has"):
        opened(tmp_path, format="pickapic")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"train.parquet is not a readable parquet file"):
        opened(tmp_path)


@pytest.mark.parametrize("left", [0, 100, -1000])
def test_a_file_that_was_cut_short_answers_every_request(
    tmp_path: Path, table: Any, opened: Any, answers: Any, left: int
) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(table(LABELS), path)
    source = opened(tmp_path)
    path.write_bytes(path.read_bytes()[:left])
    assert answers(source, "train.parquet", 0, [(0, "jpg_0")]) == {0: (None, "unreadable_source")}


def test_damaged_metadata_stops_with_the_name_of_the_file(
    tmp_path: Path, table: Any, opened: Any
) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(table(LABELS), path)
    source = opened(tmp_path)
    meta = pq.read_metadata(path).row_group(0)
    data = bytearray(path.read_bytes())
    for i in range(meta.num_columns):
        column = meta.column(i)
        if not column.path_in_schema.startswith("jpg_"):
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path} is damaged, or its store failed"):
        source.read_metadata(source.chunks()[0])
