"""Small real datasets for the tests of sources."""

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from fifa_ray.config import ImagesConfig, IngestConfig
from fifa_ray.sources import REQUESTS, Source, open_source

Open = Callable[..., Source]
Read = Callable[..., dict[int, tuple[bytes | None, str | None]]]


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """A small PNG whose pixels tell which one it is."""

    def encode(shade: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (4, 3), (shade % 256, shade // 256, 0)).save(out, "PNG")
        return out.getvalue()

    return encode


@pytest.fixture
def opened() -> Open:
    """Open a source by ingest settings; `images` holds settings of images."""

    def open_with(source: Any, images: dict[str, Any] | None = None, **settings: Any) -> Source:
        config = IngestConfig.model_validate({"source": str(source)} | settings)
        return open_source(config, ImagesConfig.model_validate(images or {}))

    return open_with


@pytest.fixture
def metadata() -> Callable[[Source], pa.Table]:
    """All metadata of a source."""

    def read(source: Source) -> pa.Table:
        return pa.concat_tables([source.read_metadata(chunk) for chunk in source.chunks()])

    return read


@pytest.fixture
def answers() -> Read:
    """Answers of read_images by request; a request answered twice or not at all fails."""

    def read(
        source: Source, file: str, group: int, requests: list[tuple[int, str]]
    ) -> dict[int, tuple[bytes | None, str | None]]:
        rows, refs = zip(*requests, strict=True)
        table = pa.table([list(rows), list(refs)], schema=REQUESTS)
        found: dict[int, tuple[bytes | None, str | None]] = {}
        for batch in source.read_images(file, group, table):
            assert len(batch) <= 64
            for row in batch.to_pylist():
                assert row["request"] not in found
                found[row["request"]] = (row["image"], row["error"])
        assert sorted(found) == list(range(len(requests)))
        return found

    return read
