"""The protocol that every dataset format speaks, and its tables."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

# One row per pair, or per source row that gives none; `reason` says why (null: a usable pair).
# `chosen_uid` and `rejected_uid` name the images: equal names, equal images. They are the dataset's
# own names, else the path or URL; null where the dataset does not say which images are the same.
METADATA = pa.schema(
    [
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("pair_in_row", pa.int32(), nullable=False),
        pa.field("source_group", pa.int32(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("chosen_ref", pa.string()),
        pa.field("rejected_ref", pa.string()),
        pa.field("chosen_uid", pa.string()),
        pa.field("rejected_uid", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("model_chosen", pa.string()),
        pa.field("model_rejected", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)

# What `read_images` is asked and what it answers. `request` is the index of a row of REQUESTS.
REQUESTS = pa.schema([pa.field("source_row", pa.int64()), pa.field("ref", pa.string())])
IMAGES = pa.schema(
    [
        pa.field("request", pa.int64(), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("error", pa.string()),
    ]
)

# Reasons that may be the store's rather than the image's: a later run asks again.
PASSING_REASONS = ("unreadable_source", "url_failed")

# An answer batch ends at whichever comes first.
BATCH_IMAGES = 64
BATCH_BYTES = 64_000_000

# Rows of a `source_group` where the format has no groups of its own: what one pass over images
# takes at a time.
ROWS_PER_GROUP = 512


@dataclass(frozen=True, kw_only=True)
class SourceChunk:
    """Rows `row_start` to `row_stop` (None: to the end) of one file: one task of metadata reading.

    `start` and `stop` are the byte range or the row groups of those rows, as the format needs.
    """

    file_index: int
    file: str
    row_start: int
    row_stop: int | None
    start: int = 0
    stop: int | None = None


class Source(Protocol):
    """A preference dataset of one format. Picklable; opens files where it is used."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    def chunks(self) -> list[SourceChunk]:
        """All chunks in the order of the dataset, each of one file; none if it has no rows."""
        ...

    def read_metadata(self, chunk: SourceChunk) -> pa.Table:
        """METADATA of a chunk, sorted by source_row and pair_in_row; no image is read.

        Raises ValueError naming the file where it does not have this format.
        """
        ...

    def read_images(
        self, source_file: str, source_group: int, requests: pa.Table
    ) -> Iterator[pa.RecordBatch]:
        """IMAGES of the distinct REQUESTS of one file and group, sorted by source_row.

        Each request is answered once, in any order: encoded bytes, or null and the reason in
        `error`. Memory is bounded by a batch of at most 64 images and about 64 MB. Reasons:
        missing_image, image_too_large (bytes), unreadable_source, path_outside_root,
        url_not_allowed, url_private_address, url_failed.
        """
        ...

    def identity(self) -> list[Any]:
        """JSON-like value that changes when the dataset's files do: for fingerprints."""
        ...


def metadata_table(num_rows: int, **columns: Any) -> pa.Table:
    """A METADATA table from arrays or lists; columns left out are null, `pair_in_row` is 0."""
    given = {"pair_in_row": np.zeros(num_rows, np.int32)} | columns
    unknown = set(given) - set(METADATA.names)
    if unknown:
        raise TypeError(f"not columns of METADATA: {sorted(unknown)}")
    return pa.table(
        [
            pa.nulls(num_rows, field.type)
            if given.get(field.name) is None
            else _as_array(given[field.name], field.type)
            for field in METADATA
        ],
        schema=METADATA,
    )


def image_batches(
    answers: Iterable[tuple[int, bytes | None, str | None]],
) -> Iterator[pa.RecordBatch]:
    """Group (request, image, error) answers into IMAGES batches of bounded size."""
    rows: list[tuple[int, bytes | None, str | None]] = []
    size = 0
    for answer in answers:
        rows.append(answer)
        size += len(answer[1] or b"")
        if len(rows) >= BATCH_IMAGES or size >= BATCH_BYTES:
            yield _image_batch(rows)
            rows, size = [], 0
    if rows:
        yield _image_batch(rows)


def limit_rows(chunks: Sequence[SourceChunk], max_rows: int | None) -> list[SourceChunk]:
    """The first chunks with together at most `max_rows` rows, the last one cut short."""
    if max_rows is None:
        return list(chunks)
    kept: list[SourceChunk] = []
    for chunk in chunks:
        if max_rows <= 0:
            break
        if chunk.row_stop is None:
            raise ValueError(f"{chunk.file}: its number of rows must be known to apply max_pairs")
        stop = min(chunk.row_stop, chunk.row_start + max_rows)
        max_rows -= stop - chunk.row_start
        kept.append(replace(chunk, row_stop=stop))
    return kept


def _image_batch(rows: list[tuple[int, bytes | None, str | None]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, IMAGES, strict=True)]
    return pa.record_batch(arrays, schema=IMAGES)


def _as_array(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.cast(kind)
    return pa.array(values, kind)
