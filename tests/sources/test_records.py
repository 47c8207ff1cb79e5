"""JSON files cut into byte ranges: whole records, whatever the cut and the text in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fifa_ray.sources import records

TEXTS = ["plain", "grüße 東京 🎨", 'quote " and \\ slash', "]},{[", "line\nbreak\u2028", ""]


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, **options), encoding="utf-8")
    else:
        lines = [json.dumps(row, **options) for row in rows]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("scan_bytes", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_record_comes_once_in_order(
    tmp_path: Path,
    opened: Any,
    metadata: Any,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    scan_bytes: int,
    ascii_only: bool,
) -> None:
    monkeypatch.setattr(records, "SCAN_BYTES", scan_bytes)
    rows = [
        {"prompt": TEXTS[i % len(TEXTS)], "chosen": f"{i}", "rejected": "r", "extra": {"n": [i]}}
        for i in range(230)
    ]
    indent = 1 if suffix == "json" else None
    write(tmp_path / f"t.{suffix}", rows, ensure_ascii=ascii_only, indent=indent)
    source = opened(tmp_path, rows_per_part=100)
    chunks = source.chunks()
    assert [(c.row_start, c.row_stop) for c in chunks] == [(0, 100), (100, 200), (200, 230)]
    table = metadata(source)
    assert table.column("source_row").to_pylist() == list(range(230))
    assert table.column("prompt").to_pylist() == [row["prompt"] for row in rows]
    assert table.column("chosen_ref").to_pylist() == [row["chosen"] for row in rows]


def test_max_pairs_cuts_a_chunk_short(tmp_path: Path, opened: Any, metadata: Any) -> None:
    for suffix in ("json", "jsonl"):
        write(tmp_path / f"t.{suffix}", [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 250)
        assert len(metadata(opened(tmp_path / f"t.{suffix}", max_pairs=140))) == 140


def test_a_line_that_is_not_json_is_a_bad_row(tmp_path: Path, opened: Any, metadata: Any) -> None:
    good = '{"prompt": "p", "chosen": "c", "rejected": "r"}'
    lines = [good, '{"prompt": ', "[1, 2]", good]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    table = metadata(opened(tmp_path))
    assert table.column("reason").to_pylist() == [None, "unreadable_row", "unreadable_row", None]
    assert table.column("source_row").to_pylist() == [0, 1, 2, 3]


def test_half_a_surrogate_pair_does_not_stop_anything(
    tmp_path: Path, opened: Any, metadata: Any
) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "a \\ud800 b", "chosen": "c", "rejected": "r"}')
    assert metadata(opened(tmp_path)).column("prompt").to_pylist() == ["a ? b"]


def test_lines_in_a_json_file(tmp_path: Path, opened: Any, metadata: Any) -> None:
    write(tmp_path / "t.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 3)
    (tmp_path / "t.jsonl").rename(tmp_path / "t.json")
    assert len(metadata(opened(tmp_path))) == 3


def test_a_byte_order_mark_is_skipped(tmp_path: Path, opened: Any, metadata: Any) -> None:
    record = '{"prompt": "p", "chosen": "c", "rejected": "r"}'
    for name, text in (("t.json", f"[{record}]"), ("t.jsonl", record)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert metadata(opened(tmp_path / name)).column("prompt").to_pylist() == ["p"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"prompt"', r"expected a JSON array of objects or one object a line, found"),
        ('{\n"prompt": "p"\n}', r"expected JSON objects, its first record is '{"),
        ('[{"prompt": "p", "chosen": "c", "rejected": "r"}, {"pro', r"not valid JSON after byte"),
        ('[{"prompt": "p", "chosen": "c", "rejected": "r"}', r"cut short at byte"),
        ("[1, 2]", r"expected JSON objects, its first record is '1'"),
        ("[]", r"no record in t.json"),
        ("", r"expected a JSON array .* found ''"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, opened: Any, text: str, message: str
) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path).chunks()
    assert "t.json" in str(error.value)
