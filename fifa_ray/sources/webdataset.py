"""WebDataset shards: plain tar files whose members share a key up to their first dot.

A sample has two images and the words about them:

    KEY.chosen.jpg  KEY.rejected.jpg      or   KEY.0.jpg  KEY.1.jpg   or   KEY.jpg_0  KEY.jpg_1
    KEY.json   prompt or caption; for 0 and 1 Pick-a-Pic's label_0, label_1, has_label, ...; for
               chosen and rejected optionally chosen_uid, rejected_uid, source_id, model_chosen, ...
    KEY.txt    the prompt, where the JSON has none

Only headers and these words are read at first. An image's reference is `MEMBER@OFFSET+SIZE`, so
that it is fetched later without walking through the shard again.
"""

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from fifa_ray.sources.files import Answer, DataFile, Folder, ImageFiles, identity_of
from fifa_ray.sources.pickapic import labelled_pairs
from fifa_ray.sources.records import bad_row, well_formed
from fifa_ray.sources.source import (
    METADATA,
    ROWS_PER_GROUP,
    SourceChunk,
    image_batches,
    metadata_table,
)

_IMAGE = r"(?:jpe?g|png|webp|gif|bmp)"
_SLOT = re.compile(rf"(?:(chosen|rejected|0|1)\.{_IMAGE}|{_IMAGE}_(0|1))", re.IGNORECASE)
_REF = re.compile(r".*@(\d+)\+(\d+)", re.DOTALL)
_LABEL_COLUMNS = {
    "caption": pa.string(),
    "has_label": pa.bool_(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "best_image_uid": pa.string(),
    "image_0_uid": pa.string(),
    "image_1_uid": pa.string(),
    "model_0": pa.string(),
    "model_1": pa.string(),
    "ranking_id": pa.string(),
}
_OPTIONAL = ("chosen_uid", "rejected_uid", "source_id", "model_chosen", "model_rejected")
# Words longer than this are no caption.
MAX_TEXT_BYTES = 4 << 20
# A remote shard is read in pieces of this size: few requests, and large images are skipped.
REMOTE_BUFFER_BYTES = 4 << 20


class WebDatasetSource:
    """Tar shards below a folder; a chunk is a shard."""

    format = "webdataset"

    def __init__(
        self,
        folder: Folder,
        files: list[DataFile],
        image_files: ImageFiles,
        *,
        max_rows: int | None = None,
    ) -> None:
        self.folder, self.files, self.image_files = folder, files, image_files
        self.files_identity = identity_of(folder, files)
        self.max_rows = max_rows

    def identity(self) -> list[Any]:
        """Format and what identifies the shards."""
        return [self.format, *self.files_identity]

    def chunks(self) -> list[SourceChunk]:
        """One chunk a shard. Only `max_rows` makes this look into shards, to count samples."""
        chunks = []
        left = self.max_rows
        for index, file in enumerate(self.files):
            stop = None
            if left is not None:
                if left <= 0:
                    break
                stop = min(left, sum(1 for _ in self._samples(file.name)))
                left -= stop
            chunks.append(SourceChunk(file_index=index, file=file.name, row_start=0, row_stop=stop))
        return chunks

    def read_metadata(self, chunk: SourceChunk) -> pa.Table:
        """METADATA of a shard: a row per sample."""
        rows = []
        for row, sample in enumerate(self._samples(chunk.file)):
            if row == chunk.row_stop:
                break
            fields = {"source_row": row, "source_group": row // ROWS_PER_GROUP, "pair_in_row": 0}
            rows.append(_pair(sample) | fields)
        return metadata_table(
            len(rows), **{name: [row.get(name) for row in rows] for name in METADATA.names}
        )

    def read_images(
        self, source_file: str, source_group: int, requests: pa.Table
    ) -> Iterator[pa.RecordBatch]:
        """IMAGES of requests from one shard; see `Source.read_images`."""
        return image_batches(self._answers(source_file, requests.column("ref").to_pylist()))

    def _answers(self, file: str, refs: list[str]) -> Iterator[Answer]:
        places = [_REF.fullmatch(ref) for ref in refs]
        try:
            with self._open(file) as stream:
                for request, place in enumerate(places):
                    yield request, *self._read(stream, place)
        except FileNotFoundError:
            for request in range(len(refs)):
                yield request, None, "unreadable_source"

    def _read(
        self, stream: io.BufferedIOBase, place: re.Match[str] | None
    ) -> tuple[bytes | None, str | None]:
        if place is None:
            return None, "missing_image"
        offset, size = (int(number) for number in place.groups())
        if size > self.image_files.images.max_bytes:
            return None, "image_too_large"
        try:
            stream.seek(offset)
            data = stream.read(size)
        except OSError:
            return None, "unreadable_source"
        return (data, None) if len(data) == size else (None, "unreadable_source")

    def _samples(self, file: str) -> Iterator[dict[str, Any]]:
        """Per sample its `key`, `images` (slot -> reference), `json` and `txt`, or an `error`."""
        sample: dict[str, Any] = {}
        try:
            with self._open(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it remembers them all
                    if not member.isfile():
                        continue
                    folder, name = posixpath.split(member.name)
                    stem, _, extension = name.partition(".")
                    key = posixpath.join(folder, stem)
                    if key != sample.get("key"):
                        if sample:
                            yield sample
                        sample = {"key": key, "images": {}}
                    _add_member(sample, extension, member, tar)
        except (tarfile.TarError, OSError, EOFError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            detail = f"shard {file} cannot be read on: {type(error).__name__}: {error}"[:200]
            sample = sample or {"key": "", "images": {}}
            sample["error"] = detail
        if sample:
            yield sample

    def _open(self, file: str) -> io.BufferedReader:
        raw = self.folder.filesystem.open_input_file(self.folder.join(file))
        size = io.DEFAULT_BUFFER_SIZE if self.folder.is_local else REMOTE_BUFFER_BYTES
        return io.BufferedReader(raw, size)


def _add_member(
    sample: dict[str, Any], extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile
) -> None:
    slot = _SLOT.fullmatch(extension)
    if slot:
        name = (slot.group(1) or slot.group(2)).lower()
        sample["images"][name] = f"{member.name}@{member.offset_data}+{member.size}"
    elif extension.lower() in ("json", "txt") and member.size <= MAX_TEXT_BYTES:
        content = tar.extractfile(member)
        assert content is not None
        sample[extension.lower()] = content.read()


def _pair(sample: dict[str, Any]) -> dict[str, Any]:
    """METADATA fields of a sample."""
    if "error" in sample:
        return bad_row("unreadable_row", sample["error"])
    try:
        words = json.loads(sample.get("json", b"{}"))
        text = sample.get("txt", b"").decode()
    except (ValueError, RecursionError) as error:
        return bad_row("unreadable_row", f"{sample['key']}: {error}"[:200])
    if not isinstance(words, dict):
        return bad_row("unreadable_row", f"{sample['key']}.json is not an object")
    prompt = words.get("prompt", words.get("caption", text))
    prompt = well_formed(prompt) if isinstance(prompt, str) else None
    images = {slot: well_formed(ref) for slot, ref in sample["images"].items()}
    source_id = _text(words.get("source_id")) or well_formed(sample["key"])
    if "chosen" in images or "rejected" in images:
        return {name: _text(words.get(name)) for name in _OPTIONAL} | {
            "prompt": prompt,
            "chosen_ref": images.get("chosen"),
            "rejected_ref": images.get("rejected"),
            "source_id": source_id,
        }
    words = words | {"caption": prompt, "ranking_id": words.get("ranking_id", source_id)}
    refs = [pa.array([images.get(slot)], pa.string()) for slot in ("0", "1")]
    try:
        table = pa.table(
            {n: [_as(words.get(n), t)] for n, t in _LABEL_COLUMNS.items()},
            schema=pa.schema(list(_LABEL_COLUMNS.items())),
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, TypeError) as error:
        return bad_row("bad_label", f"{sample['key']}.json: {error}"[:200], prompt=prompt)
    pair: dict[str, Any] = labelled_pairs(table, refs, 0).to_pylist()[0]
    return pair


def _as(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_string(kind):
        return _text(value)
    return float(value) if pa.types.is_floating(kind) else bool(value)


def _text(value: Any) -> str | None:
    return value if value is None else well_formed(str(value))
