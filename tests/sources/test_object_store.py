"""Datasets on S3 (a real client against a local server) and on an fsspec filesystem."""

import io
import json
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa_ray.sources.files import Folder


@pytest.fixture
def bucket(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Any:
    """A function that names a place in the bucket, and the filesystem to write there."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    query = f"endpoint_override={s3_endpoint}&scheme=http&region=us-east-1"

    def uri(path: str) -> str:
        return f"s3://data/{request.node.name}/{path}?{query}"

    return uri


def put(uri: str, data: bytes) -> None:
    place = Folder.at(uri)
    with place.filesystem.open_output_stream(place.path) as stream:
        stream.write(data)


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=2)
    return out.getvalue()


def test_parquet_with_bytes(
    bucket: Any, opened: Any, metadata: Any, answers: Any, png: Any
) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "chosen": [png(i) for i in range(3)],
            "rejected": [png(i + 10) for i in range(3)],
        }
    )
    put(bucket("data/train-0.parquet"), parquet(table))
    put(bucket("data/test-0.parquet"), parquet(table))
    source = opened(bucket("data/train-*.parquet"))
    assert [file.name for file in source.files] == ["train-0.parquet"]
    assert metadata(source).column("source_group").to_pylist() == [0, 0, 1]
    assert answers(source, "train-0.parquet", 1, [(2, "chosen"), (2, "rejected")]) == {
        0: (png(2), None),
        1: (png(12), None),
    }
    assert len(opened(bucket("")).chunks()) == 2
    assert opened(bucket("data/test-0.parquet")).files[0].name == "test-0.parquet"


def test_json_with_paths(bucket: Any, opened: Any, metadata: Any, answers: Any, png: Any) -> None:
    put(
        bucket("hpd/train.json"), json.dumps([{"prompt": "p", "path1": "1", "path2": "2"}]).encode()
    )
    put(bucket("hpd/images/1.png"), png(1))
    put(bucket("secret"), b"secret")
    source = opened(bucket("hpd"), images={"max_bytes": 500})
    assert len(metadata(source)) == 1
    put(bucket("hpd/images/large.png"), b"x" * 501)
    requests = [
        (0, ref) for ref in ("images/1.png", "none", "../secret", "/data", "images/large.png")
    ]
    assert [found for _, found in sorted(answers(source, "train.json", 0, requests).items())] == [
        (png(1), None),
        (None, "missing_image"),
        (None, "path_outside_root"),
        (None, "path_outside_root"),
        (None, "image_too_large"),
    ]


def test_webdataset(bucket: Any, opened: Any, metadata: Any, answers: Any, png: Any) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(20):
            for name, data in (
                (f"{i}.chosen.png", png(i)),
                (f"{i}.rejected.png", png(i + 100)),
                (f"{i}.txt", f"prompt {i}".encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    put(bucket("shards/0.tar"), out.getvalue())
    source = opened(bucket("shards"))
    rows = metadata(source).to_pylist()
    assert [row["prompt"] for row in rows] == [f"prompt {i}" for i in range(20)]
    requests = [(row["source_row"], row["rejected_ref"]) for row in rows]
    found = answers(source, "0.tar", 0, requests)
    assert [found[i] for i in range(20)] == [(png(i + 100), None) for i in range(20)]


def test_a_wrong_path_names_what_is_there(bucket: Any, opened: Any) -> None:
    put(bucket("data/train.parquet"), b"")
    with pytest.raises(ValueError, match=r"does not exist.*nearest folder that exists.*data/"):
        opened(bucket("dta/train.parquet"))


def test_a_filesystem_that_only_fsspec_knows(
    opened: Any, metadata: Any, answers: Any, png: Any
) -> None:
    """The way to hf://, shown with fsspec's own memory filesystem."""
    table = pa.table({"prompt": ["a"], "chosen": [png(1)], "rejected": ["images/2.png"]})
    put("memory://corpus/data/train-0.parquet", parquet(table))
    put("memory://corpus/images/2.png", png(2))
    source = opened("memory://corpus")
    assert source.files[0].name == "data/train-0.parquet"
    assert len(metadata(source)) == 1
    assert answers(source, "data/train-0.parquet", 0, [(0, "chosen"), (0, "images/2.png")]) == {
        0: (png(1), None),
        1: (png(2), None),
    }
    assert len(opened("memory://corpus/*/train-*.parquet").files) == 1
    with pytest.raises(ValueError, match=r"nearest folder that exists.*holds data/, images/"):
        opened("memory://corpus/dta")
