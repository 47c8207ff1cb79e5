"""Datasets in parquet files: metadata by columns, images by row group."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa_ray.sources.files import THREADS, Answer, DataFile, Folder, ImageFiles, identity_of
from fifa_ray.sources.source import ROWS_PER_GROUP, SourceChunk, image_batches, limit_rows

# Rows of images decoded from parquet pages at a time, and bytes of a page read ahead.
IMAGE_ROWS = 16
READ_BYTES = 4 << 20


class TableLayout(Protocol):
    """What the columns of a parquet dataset mean. Picklable."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Columns that hold image bytes: `ref` is the column's name there, else a path or URL."""
        ...

    @property
    def whole_files(self) -> bool:
        """Whether the pairs of a file can only be made from all of its rows together."""
        ...

    def read_columns(self, found: Sequence[str], where: str) -> list[str]:
        """The metadata columns to read. Raises ValueError where one is missing."""
        ...

    def pairs(self, table: pa.Table, first_row: int) -> pa.Table:
        """METADATA of these rows (source_group left 0), the first being row `first_row`."""
        ...


class ParquetSource:
    """Parquet files of one layout below a folder."""

    def __init__(
        self,
        folder: Folder,
        files: list[DataFile],
        layout: TableLayout,
        image_files: ImageFiles,
        *,
        rows_per_chunk: int,
        max_rows: int | None = None,
    ) -> None:
        self.folder, self.files, self.layout = folder, files, layout
        self.files_identity = identity_of(folder, files)
        self.image_files = image_files
        self.rows_per_chunk, self.max_rows = rows_per_chunk, max_rows
        self.format = layout.format

    def identity(self) -> list[Any]:
        """Format and what identifies the files."""
        return [self.format, *self.files_identity]

    def chunks(self) -> list[SourceChunk]:
        """Whole row groups of a file, together at most `rows_per_chunk` rows; a larger row group
        is cut into even pieces."""
        with ThreadPoolExecutor(THREADS) as pool:
            groups = list(pool.map(self._row_groups, [file.name for file in self.files]))
        chunks = [
            replace(chunk, file_index=index, file=file.name)
            for index, (file, sizes) in enumerate(zip(self.files, groups, strict=True))
            for chunk in self._cut(sizes)
        ]
        return limit_rows(chunks, self.max_rows)

    def _cut(self, sizes: list[int]) -> Iterator[SourceChunk]:
        limit = sum(sizes) if self.layout.whole_files else self.rows_per_chunk
        row = first_row = first_group = 0
        for group, size in enumerate(sizes):
            if first_row < row and row + size - first_row > limit:
                yield _chunk(first_row, row, first_group, group)
                first_row, first_group = row, group
            if size > limit:
                pieces = -(-size // limit)
                cuts = [row + size * piece // pieces for piece in range(pieces + 1)]
                for start, stop in pairwise(cuts):
                    yield _chunk(start, stop, group, group + 1)
                first_row, first_group = row + size, group + 1
            row += size
        if first_row < row:
            yield _chunk(first_row, row, first_group, len(sizes))

    def read_metadata(self, chunk: SourceChunk) -> pa.Table:
        """METADATA of a chunk; reads the layout's metadata columns alone."""
        with self._open(chunk.file) as file:
            where = f"{self.folder.join(chunk.file)}"
            columns = self.layout.read_columns(file.schema_arrow.names, where)
            starts = _group_starts(file)
            groups = list(range(chunk.start, chunk.stop or file.num_row_groups))
            try:
                table = file.read_row_groups(groups, columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(
                    f"{where} is damaged, or its store failed: {error}; replace the file or take "
                    "it out, then run the same command again"
                ) from None
        assert chunk.row_stop is not None
        offset = chunk.row_start - int(starts[chunk.start])
        table = table.slice(offset, chunk.row_stop - chunk.row_start)
        try:
            pairs = self.layout.pairs(table, chunk.row_start)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ValueError(f"{where} does not have the {self.format} layout: {error}") from None
        rows = pairs.column("source_row").to_numpy()
        if self.layout.image_columns:
            group = np.searchsorted(starts, rows, side="right") - 1
        else:
            group = rows // ROWS_PER_GROUP
        at = pairs.schema.get_field_index("source_group")
        return pairs.set_column(at, pairs.schema.field(at), pa.array(group, pa.int32()))

    def read_images(
        self, source_file: str, source_group: int, requests: pa.Table
    ) -> Iterator[pa.RecordBatch]:
        """IMAGES of requests of one row group; see `Source.read_images`."""
        return image_batches(self._answers(source_file, source_group, requests))

    def _answers(self, file: str, group: int, requests: pa.Table) -> Iterator[Answer]:
        rows = requests.column("source_row").to_numpy()
        refs = requests.column("ref").to_pylist()
        in_table = np.array([ref in self.layout.image_columns for ref in refs], bool)
        yield from self.image_files.read_all((int(i), refs[i]) for i in np.flatnonzero(~in_table))
        wanted = np.flatnonzero(in_table)
        answered = 0
        try:
            for answer in self._stored_images(file, group, rows, refs, wanted):
                yield answer
                answered += 1
        except (OSError, ValueError, pa.ArrowException, IndexError):
            # The file is gone, cut short (a ValueError) or damaged from here on.
            for i in wanted[answered:]:
                yield int(i), None, "unreadable_source"

    def _stored_images(
        self, name: str, group: int, rows: np.ndarray, refs: list[str], wanted: np.ndarray
    ) -> Iterator[Answer]:
        """Answers of the requests `wanted`, in their order, from image columns of a row group."""
        if not len(wanted):
            return
        with self._open(name) as file:
            first = int(_group_starts(file)[group])
            columns = sorted({refs[i] for i in wanted})
            batches = file.iter_batches(IMAGE_ROWS, row_groups=[group], columns=columns)
            next_wanted = 0
            for batch in batches:
                while next_wanted < len(wanted) and rows[wanted[next_wanted]] < first + len(batch):
                    i = int(wanted[next_wanted])
                    yield i, *self._image(batch.column(refs[i]), int(rows[i]) - first)
                    next_wanted += 1
                if next_wanted == len(wanted):
                    return
                first += len(batch)
        raise IndexError(f"row {rows[wanted[next_wanted]]} is not in row group {group}")

    def _image(self, column: pa.Array, at: int) -> tuple[bytes | None, str | None]:
        path = None
        if pa.types.is_struct(column.type):
            # How the `datasets` library stores images: {bytes, path}.
            path = column.field("path")[at].as_py() if column[at].is_valid else None
            column = column.field("bytes")
        value = column[at]
        if not value.is_valid:
            return self.image_files.read(path) if path else (None, "missing_image")
        if len(value.as_buffer()) > self.image_files.images.max_bytes:
            return None, "image_too_large"
        return value.as_py(), None

    def _row_groups(self, name: str) -> list[int]:
        with self._open(name) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def _open(self, name: str) -> pq.ParquetFile:
        return open_parquet(self.folder, name)


def open_parquet(folder: Folder, name: str) -> pq.ParquetFile:
    """A parquet file that streams its pages. Raises ValueError where it is none."""
    path = folder.join(name)
    stream = folder.filesystem.open_input_file(path)
    try:
        return pq.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        stream.close()
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


def _group_starts(file: pq.ParquetFile) -> np.ndarray:
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[:-1]


def _chunk(row_start: int, row_stop: int, start: int, stop: int) -> SourceChunk:
    return SourceChunk(
        file_index=0, file="", row_start=row_start, row_stop=row_stop, start=start, stop=stop
    )
