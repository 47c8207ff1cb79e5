"""Datasets in JSON: a top-level array of objects, or one object a line (whatever the suffix).

A file is cut into byte ranges of whole records in one scan, so that reading a chunk neither parses
nor holds the rest of the file.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa

from fifa_ray.sources.files import DataFile, Folder, ImageFiles, identity_of
from fifa_ray.sources.source import (
    METADATA,
    ROWS_PER_GROUP,
    SourceChunk,
    image_batches,
    limit_rows,
    metadata_table,
)

SCAN_BYTES = 16 << 20
LINE_SUFFIXES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"
_OPENING = re.compile(r"(?:\u00ef\u00bb\u00bf)?[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")


class RecordLayout(Protocol):
    """What the keys of a JSON dataset mean. Picklable."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    def check(self, keys: list[str], where: str) -> None:
        """Raise ValueError where the first record of a file does not have this layout."""
        ...

    def expand(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """METADATA fields of each pair of a record, or of the one bad row that it gives."""
        ...


class RecordSource:
    """JSON files of one layout below a folder; images are files of their own.

    `prefixes` maps a file's name to the folder that its image paths are relative to.
    """

    def __init__(
        self,
        folder: Folder,
        files: list[DataFile],
        layout: RecordLayout,
        image_files: ImageFiles,
        *,
        rows_per_chunk: int,
        max_rows: int | None = None,
        prefixes: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.files, self.layout = folder, files, layout
        self.files_identity = identity_of(folder, files)
        self.image_files, self.prefixes = image_files, prefixes or {}
        self.rows_per_chunk, self.max_rows = rows_per_chunk, max_rows
        self.format = layout.format

    def identity(self) -> list[Any]:
        """Format and what identifies the files."""
        return [self.format, *self.files_identity]

    def chunks(self) -> list[SourceChunk]:
        """`rows_per_chunk` records each, found by scanning the files once."""
        chunks = []
        for index, file in enumerate(self.files):
            first = read_first_record(self.folder, file.name)
            if first is not None:
                self.layout.check(list(first), self.folder.join(file.name))
            for row, start, row_stop, stop in self._cut(file.name):
                chunks.append(
                    SourceChunk(
                        file_index=index,
                        file=file.name,
                        row_start=row,
                        row_stop=row_stop,
                        start=start,
                        stop=stop,
                    )
                )
        return limit_rows(chunks, self.max_rows)

    def _cut(self, name: str) -> Iterator[tuple[int, int, int, int]]:
        row = row_start = start = stop = 0
        with self.folder.filesystem.open_input_stream(self.folder.join(name)) as stream:
            scan = _scan_lines if _has_lines(self.folder, name) else _scan_array
            for begin, stop in scan(stream, self.folder.join(name)):
                if row == row_start:
                    start = begin
                row += 1
                if row - row_start == self.rows_per_chunk:
                    yield row_start, start, row, stop
                    row_start = row
        if row > row_start:
            yield row_start, start, row, stop

    def read_metadata(self, chunk: SourceChunk) -> pa.Table:
        """METADATA of the chunk's records; one that is not JSON becomes an unreadable_row."""
        assert chunk.row_stop is not None
        assert chunk.stop is not None
        with self.folder.filesystem.open_input_file(self.folder.join(chunk.file)) as file:
            data = file.read_at(chunk.stop - chunk.start, chunk.start)
        prefix = self.prefixes.get(chunk.file, "")
        columns: dict[str, list[Any]] = {name: [] for name in METADATA.names}
        split = _split_lines if _has_lines(self.folder, chunk.file) else _split_array
        for row, record in enumerate(split(data), chunk.row_start):
            if row == chunk.row_stop:
                break
            for index, pair in enumerate(self._pairs(record, prefix)):
                pair |= {
                    "source_row": row,
                    "pair_in_row": index,
                    "source_group": row // ROWS_PER_GROUP,
                }
                for name, values in columns.items():
                    values.append(pair.get(name))
        return metadata_table(len(columns["source_row"]), **columns)

    def _pairs(self, record: Any, prefix: str) -> list[dict[str, Any]]:
        if not isinstance(record, dict):
            detail = record if isinstance(record, str) else type(record).__name__
            return [bad_row("unreadable_row", f"not a JSON object: {detail}"[:200])]
        pairs = self.layout.expand(record)
        for pair in pairs:
            for name, value in pair.items():
                if isinstance(value, str):
                    pair[name] = well_formed(value)
            if prefix:
                for name in ("chosen_ref", "rejected_ref", "chosen_uid", "rejected_uid"):
                    pair[name] = prefix + pair[name] if pair.get(name) else None
        return pairs

    def read_images(
        self, source_file: str, source_group: int, requests: pa.Table
    ) -> Iterator[pa.RecordBatch]:
        """IMAGES of requests by path or URL; see `Source.read_images`."""
        refs = requests.column("ref").to_pylist()
        return image_batches(self.image_files.read_all(enumerate(refs)))


def bad_row(reason: str, detail: str, **fields: Any) -> dict[str, Any]:
    """METADATA fields of a row that gives no pair."""
    return {"reason": reason, "detail": detail} | fields


def well_formed(text: str) -> str:
    """Text that UTF-8 can hold: JSON may escape half a surrogate pair, which becomes `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def read_first_record(folder: Folder, name: str) -> dict[str, Any] | None:
    """The first object of a JSON file, None if it has none.

    Raises ValueError where the file is neither an array of objects nor one object a line.
    """
    path = folder.join(name)
    is_lines = _has_lines(folder, name)
    with folder.filesystem.open_input_stream(path) as stream:
        place = next(_scan_lines(stream, path) if is_lines else _scan_array(stream, path), None)
    if place is None:
        return None
    with folder.filesystem.open_input_file(path) as file:
        data = file.read_at(place[1] - place[0], place[0])
    record = next((_split_lines if is_lines else _split_array)(data))
    if not isinstance(record, dict):
        found = str(record)[:100]
        raise ValueError(f"{path}: expected JSON objects, its first record is {found!r}")
    return record


def _has_lines(folder: Folder, name: str) -> bool:
    """Whether a file has one object a line; .json files do as often as not."""
    if name.endswith(LINE_SUFFIXES):
        return True
    with folder.filesystem.open_input_stream(folder.join(name)) as stream:
        return bool(stream.read(64).removeprefix(_BOM).lstrip()[:1] == b"{")


def _scan_lines(stream: pa.NativeFile, path: str) -> Iterator[tuple[int, int]]:
    """Byte range of each line that is not blank."""
    position, rest = 0, b""
    while True:
        data = stream.read(SCAN_BYTES)
        lines = (rest + data).splitlines(keepends=True) if data else [rest]
        rest = lines.pop() if data else b""
        for line in lines:
            if line.strip():
                yield position, position + len(line)
            position += len(line)
        if not data:
            return


def _scan_array(stream: pa.NativeFile, path: str) -> Iterator[tuple[int, int]]:
    """Byte range of each element of a top-level JSON array.

    Bytes are decoded as Latin-1, one character a byte: JSON's own signs are ASCII, so the decoder
    finds the same ends, and they are byte offsets.
    """
    decoder = json.JSONDecoder()
    # The part of the file not done with, where it begins, and how far in it we are.
    text, base, at, is_open = "", 0, 0, False
    while True:
        data = stream.read(SCAN_BYTES)
        text, base, at = text[at:] + data.decode("latin-1"), base + at, 0
        if not is_open:
            if data and len(text) < 64:
                continue  # Enough to see past a byte order mark and blanks.
            at = _OPENING.match(text).end()  # type: ignore[union-attr]
            if text[at : at + 1] != "[":
                raise ValueError(
                    f"{path}: expected a JSON array of objects or one object a line, found "
                    f"{text[at : at + 20]!r}"
                )
            at, is_open = at + 1, True
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            if text[at : at + 1] in ("", "]"):
                break
            try:
                _, stop = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                if data:
                    break  # The element goes on in the next piece.
                raise ValueError(f"{path}: not valid JSON after byte {base + at:,}") from error
            if stop == len(text) and data:
                break  # A number could go on; anything else is found again.
            yield base + at, base + stop
            at = stop
        if text[at : at + 1] == "]":
            return
        if not data:
            raise ValueError(f"{path}: the JSON array is cut short at byte {base + at:,}")


def _split_lines(data: bytes) -> Iterator[Any]:
    for line in data.removeprefix(_BOM).splitlines():
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                yield line[:80].decode("utf-8", "replace")


def _split_array(data: bytes) -> Iterator[Any]:
    yield from json.loads(b"[" + data + b"]")
