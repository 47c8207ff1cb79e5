"""From `ingest.source` and `ingest.format` to the source that reads it."""

import logging
import posixpath
from collections import Counter

from fifa_ray.config import ImagesConfig, IngestConfig
from fifa_ray.sources.files import DataFile, Folder, ImageFiles, find_files
from fifa_ray.sources.generic import NEEDED, Columns, GenericRecords, GenericTable
from fifa_ray.sources.parquet import ParquetSource, TableLayout, open_parquet
from fifa_ray.sources.pickapic import BYTES, URLS, PickAPic
from fifa_ray.sources.rankings import HpdV2, HpdV3, ImageReward, is_hpdv2
from fifa_ray.sources.records import RecordLayout, RecordSource, read_first_record
from fifa_ray.sources.source import Source
from fifa_ray.sources.webdataset import WebDatasetSource

logger = logging.getLogger(__name__)

KINDS = {
    "parquet": (".parquet",),
    "json": (".json", ".jsonl", ".ndjson"),
    "tar": (".tar",),
}
KINDS_OF_FORMAT = {
    "auto": ("parquet", "json", "tar"),
    "pickapic": ("parquet",),
    "imagereward": ("parquet",),
    "hpdv2": ("json",),
    "hpdv3": ("json",),
    "generic": ("parquet", "json"),
    "webdataset": ("tar",),
}


def open_source(config: IngestConfig, images: ImagesConfig) -> Source:
    """The dataset that the configuration names.

    Raises ValueError saying what is there where the path is wrong, or the files do not have the
    configured format, or none that is known.
    """
    folder, files = find_files(config.source)
    kind, files = _choose_kind(config, folder, files)
    root = Folder.at(config.image_root) if config.image_root else folder
    if config.image_root and not root.is_folder():
        raise ValueError(f"ingest.image_root {config.image_root!r} is not an existing folder")
    image_files = ImageFiles(root, images)
    columns = Columns(config.columns)
    source: Source
    if kind == "parquet":
        source = ParquetSource(
            folder,
            files,
            _table_layout(config.format, columns, folder, files[0], images),
            image_files,
            rows_per_chunk=config.rows_per_part,
            max_rows=config.max_pairs,
        )
    elif kind == "json":
        layout = _record_layout(config.format, columns, folder, files)
        source = RecordSource(
            folder,
            files,
            layout,
            image_files,
            rows_per_chunk=config.rows_per_part,
            max_rows=config.max_pairs,
            prefixes=_split_folders(root, files) if layout.format == "hpdv2" else {},
        )
    else:
        source = WebDatasetSource(folder, files, image_files, max_rows=config.max_pairs)
    logger.info("%s: %s, %d files", config.source, source.format, len(files))
    return source


def _choose_kind(
    config: IngestConfig, folder: Folder, files: list[DataFile]
) -> tuple[str, list[DataFile]]:
    """The one kind of file to read. A folder may hold others beside it, the first kind wins."""
    for kind in KINDS_OF_FORMAT[config.format]:
        chosen = [file for file in files if file.name.endswith(KINDS[kind])]
        if chosen:
            return kind, chosen
    counts = Counter(posixpath.splitext(file.name)[1] or file.name for file in files)
    found = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(counts.items()))
    wanted = [s for kind in KINDS_OF_FORMAT[config.format] for s in KINDS[kind]]
    raise ValueError(
        f"{config.source}: format {config.format} needs {' or '.join(wanted)} files; found {found}"
        f" in {folder.path}. Unpack archives first (webdataset shards are plain .tar)"
    )


def _table_layout(
    format_name: str, columns: Columns, folder: Folder, file: DataFile, images: ImagesConfig
) -> TableLayout:
    where = folder.join(file.name)
    with open_parquet(folder, file.name) as opened:
        schema = opened.schema_arrow
    names = set(schema.names)
    generic = {columns.names.get(name, name) for name in NEEDED}
    if format_name == "auto":
        format_name = (
            "pickapic"
            if {"caption", "label_0", "label_1"} <= names and not columns.names
            else "imagereward"
            if {"prompt_id", "image_path", "rank"} <= names and not columns.names
            else "generic"
            if generic <= names or columns.names
            else "unknown"
        )
    if format_name == "pickapic":
        has_bytes = set(BYTES) <= names
        if not has_bytes and set(URLS) <= names and not images.allow_urls:
            raise ValueError(
                f"{where} has no image bytes ({', '.join(BYTES)}), only URLs; set "
                "images.allow_urls=true to fetch them, or use the variant with images"
            )
        layout: TableLayout = PickAPic(has_bytes=has_bytes or not set(URLS) <= names)
    elif format_name == "imagereward":
        layout = ImageReward()
    elif format_name == "generic":
        layout = GenericTable.of(schema, columns, where)
    else:
        raise _unknown(where, schema.names)
    layout.read_columns(schema.names, where)
    return layout


def _record_layout(
    format_name: str, columns: Columns, folder: Folder, files: list[DataFile]
) -> RecordLayout:
    for file in files:
        record = read_first_record(folder, file.name)
        if record is not None:
            break
    else:
        raise ValueError(f"{folder.path}: no record in {', '.join(f.name for f in files)}")
    where, keys = folder.join(file.name), list(record)
    if format_name == "auto":
        format_name = (
            "generic"
            if columns.names or set(NEEDED) <= set(keys)
            else "hpdv2"
            if is_hpdv2(keys)
            else "hpdv3"
            if {"prompt", "path1", "path2"} <= set(keys)
            else "unknown"
        )
    layouts: dict[str, RecordLayout] = {
        "hpdv2": HpdV2(),
        "hpdv3": HpdV3(),
        "generic": GenericRecords(columns),
    }
    if format_name not in layouts:
        raise _unknown(where, keys)
    layouts[format_name].check(keys, where)
    return layouts[format_name]


def _split_folders(root: Folder, files: list[DataFile]) -> dict[str, str]:
    """HPDv2 unpacks `train.tar.gz` beside `train.json`: its paths are relative to `train/`."""
    stems = {file.name: posixpath.splitext(posixpath.basename(file.name))[0] for file in files}
    return {name: f"{stem}/" for name, stem in stems.items() if root.is_folder(stem)}


def _unknown(where: str, names: list[str]) -> ValueError:
    return ValueError(
        f"{where} has no layout that is known; it has {sorted(names)}. For your own layout "
        "set ingest.format=generic and map your columns: ingest.columns.prompt=NAME, "
        "ingest.columns.chosen=NAME, ingest.columns.rejected=NAME"
    )
