"""Data from Python becomes a dataset on disk."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from fifa_ray.run_dir import RunDir
from fifa_ray.sources import stage_table, staging

ROWS = 700


@pytest.fixture
def rows(png: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "chosen": png(i), "rejected": png(i + 1), "source_id": str(i)}
        for i in range(ROWS)
    ]


@pytest.mark.parametrize("kind", ["list", "table", "frame", "ray"])
def test_every_kind_of_data_gives_the_same_dataset(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    opened: Any,
    metadata: Any,
    answers: Any,
    png: Any,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    data: Any = rows
    if kind == "table":
        data = pa.Table.from_pylist(rows)
    elif kind == "frame":
        data = pd.DataFrame(rows)
    elif kind == "ray":
        request.getfixturevalue("ray_session")
        import ray.data

        data = ray.data.from_arrow(pa.Table.from_pylist(rows))
    uri = stage_table(RunDir(str(tmp_path)), data)
    assert uri == f"{tmp_path}/source"
    source = opened(uri)
    table = metadata(source)
    assert table.column("prompt").to_pylist() == [row["prompt"] for row in rows]
    assert table.column("source_id").to_pylist() == [row["source_id"] for row in rows]
    found = answers(source, "part-000000.parquet", 1, [(300, "chosen"), (301, "rejected")])
    assert found == {0: (png(300), None), 1: (png(302), None)}


def test_files_are_split_and_staging_again_keeps_the_identity(
    tmp_path: Path, rows: list[dict[str, Any]], opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "GROUPS_PER_FILE", 2)
    run = RunDir(str(tmp_path))
    first = opened(stage_table(run, rows))
    assert len(first.chunks()) == 2
    assert len(run.list("source")) == 2
    assert opened(stage_table(run, rows)).identity() == first.identity()
    assert opened(stage_table(run, rows[:-1])).identity() != first.identity()


def test_a_column_that_starts_with_nulls(tmp_path: Path, opened: Any, metadata: Any) -> None:
    late = [
        {"prompt": "p", "chosen": "1", "rejected": "2", "source_id": None if i < 600 else "late"}
        for i in range(700)
    ]
    table = metadata(opened(stage_table(RunDir(str(tmp_path)), late)))
    assert table.column("source_id").to_pylist()[599:601] == [None, "late"]


def test_data_that_is_no_table_is_refused(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a Ray Dataset.*got builtins.int"):
        stage_table(run, 3)
    with pytest.raises(ValueError, match="has no rows"):
        stage_table(run, [])
    with pytest.raises(ValueError, match="images must be encoded bytes"):
        stage_table(run, [{"prompt": "p", "chosen": b"x"}, {"prompt": "p", "chosen": object()}])


def test_the_uri_of_a_run_keeps_its_query() -> None:
    assert staging.child_uri("s3://b/run?region=x", "source") == "s3://b/run/source?region=x"
