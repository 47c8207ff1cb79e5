"""Finding a dataset's files, and reading images by a reference that must stay below a root."""

import fnmatch
import os
import posixpath
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any

import pyarrow.fs as pafs

from fifa_ray.config import ImagesConfig
from fifa_ray.run_dir import resolve_filesystem
from fifa_ray.sources.urls import UrlError, fetch_url, is_url

DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".tar")
# Folders this deep below the one that is named are searched for data files.
MAX_DEPTH = 3
# What the `datasets` library leaves beside the data.
NOT_DATA = frozenset({"dataset_infos.json", "dataset_info.json", "state.json", "README.json"})
THREADS = 16
# A file of this name beside the data says what the data is; else names, sizes and times do.
CONTENT_DIGEST = "content.digest"

Answer = tuple[int, bytes | None, str | None]


@dataclass(frozen=True)
class DataFile:
    """A file of a dataset; `name` is its path below the dataset's folder."""

    name: str
    size: int | None
    mtime_ns: int | None


@dataclass(frozen=True)
class Folder:
    """A folder on any filesystem."""

    uri: str
    filesystem: pafs.FileSystem
    path: str

    @staticmethod
    def at(uri: str) -> "Folder":
        """The folder that a path or URI names, whether it exists or not."""
        return Folder(uri, *resolve_filesystem(uri))

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's disk."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def join(self, name: str) -> str:
        """Path inside the filesystem of something below."""
        return posixpath.join(self.path, name) if name else self.path

    def is_folder(self, name: str = "") -> bool:
        """Whether a folder of this name is there."""
        return bool(self._type(name) == pafs.FileType.Directory)

    def is_file(self, name: str = "") -> bool:
        """Whether a file of this name is there."""
        return bool(self._type(name) == pafs.FileType.File)

    def list(self, name: str = "", recursive: bool = False) -> list[pafs.FileInfo]:
        """What is in a folder, sorted by path, hidden entries left out; empty if it is absent."""
        selector = pafs.FileSelector(self.join(name), allow_not_found=True, recursive=recursive)
        infos = self.filesystem.get_file_info(selector)
        return sorted((i for i in infos if i.base_name[:1] not in "._"), key=lambda i: i.path)

    def name_of(self, info: pafs.FileInfo) -> str:
        """Path of an entry below this folder."""
        return posixpath.relpath(info.path, self.path)

    def _type(self, name: str) -> pafs.FileType:
        return self.filesystem.get_file_info(self.join(name).rstrip("/")).type


def find_files(source: str) -> tuple[Folder, list[DataFile]]:
    """The folder of a dataset and its data files, from a folder, a file or a glob.

    In a folder: the files with a data suffix at the shallowest depth that has any. Raises
    ValueError saying what is there instead where nothing is found.
    """
    place = Folder.at(source) if not _has_wildcard(source) else None
    if place is not None and place.is_file():
        folder = Folder(source, place.filesystem, posixpath.dirname(place.path))
        return folder, [_data_file(folder, place.filesystem.get_file_info(place.path))]
    if place is not None and place.is_folder():
        infos = _shallowest_data(place)
        if not infos:
            raise ValueError(
                f"{source} holds no {', '.join(DATA_SUFFIXES)} file within {MAX_DEPTH} folders; "
                f"it holds {_entries(place)}"
            )
        return place, [_data_file(place, info) for info in infos]
    if place is not None:
        raise ValueError(f"ingest.source {source!r} does not exist; {_nearest_parent(place)}")
    folder, pattern = _split_glob(source)
    infos = _glob(folder, "", pattern.split("/"))
    if not infos:
        there = f"{folder.uri} holds {_entries(folder)}"
        there = there if folder.is_folder() else _nearest_parent(folder)
        raise ValueError(f"ingest.source {source!r} matches no file; {there}")
    return folder, [_data_file(folder, info) for info in infos]


def identity_of(folder: Folder, files: list[DataFile]) -> list[Any]:
    """JSON-like value that changes when the files do."""
    if folder.is_file(CONTENT_DIGEST):
        with folder.filesystem.open_input_stream(folder.join(CONTENT_DIGEST)) as stream:
            return [stream.read().decode()]
    return [list(astuple(file)) for file in files]


class ImageFiles:
    """Reads images by path below one root, or by URL where that is allowed. Picklable."""

    def __init__(self, root: Folder, images: ImagesConfig) -> None:
        self.root, self.images = root, images

    def read_all(self, refs: Iterable[tuple[int, str]]) -> Iterator[Answer]:
        """(request, bytes or None, reason or None) of each (request, reference), in order."""
        waiting: deque[tuple[int, Future[tuple[bytes | None, str | None]]]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for request, ref in refs:
                waiting.append((request, pool.submit(self.read, ref)))
                if len(waiting) >= THREADS:
                    request, done = waiting.popleft()
                    yield request, *done.result()
            while waiting:
                request, done = waiting.popleft()
                yield request, *done.result()

    def read(self, ref: str) -> tuple[bytes | None, str | None]:
        """The encoded image and None, or None and the reason why not."""
        try:
            if is_url(ref):
                return self._read_url(ref), None
            if "://" in ref:
                raise _Refused("path_outside_root")
            if self.root.is_local:
                return self._read_local(ref), None
            return self._read_remote(ref), None
        except (_Refused, UrlError) as error:
            return None, error.reason
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None, "missing_image"
        except (OSError, ValueError):
            # ValueError: a name that no filesystem can hold, such as one with a NUL byte.
            return None, "unreadable_source"

    def _read_url(self, ref: str) -> bytes:
        if not self.images.allow_urls:
            raise _Refused("url_not_allowed")
        return fetch_url(
            ref,
            max_bytes=self.images.max_bytes,
            timeout_seconds=self.images.url_timeout_seconds,
        )

    def _read_local(self, ref: str) -> bytes:
        root = os.path.realpath(self.root.path)
        # Resolves .., absolute paths and symbolic links alike; what counts is where it ends up.
        path = os.path.realpath(os.path.join(root, ref))
        if os.path.commonpath([root, path]) != root:
            raise _Refused("path_outside_root")
        # NOFOLLOW: a link put there since. NONBLOCK: a pipe must not hang the reader.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as stream:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise _Refused("missing_image")
            self._check_size(status.st_size)
            return stream.read(self.images.max_bytes + 1)

    def _read_remote(self, ref: str) -> bytes:
        if ref.startswith("/") or ".." in ref.split("/"):
            raise _Refused("path_outside_root")
        with self.root.filesystem.open_input_file(self.root.join(ref)) as stream:
            self._check_size(stream.size())
            return bytes(stream.read())

    def _check_size(self, size: int) -> None:
        if size > self.images.max_bytes:
            raise _Refused("image_too_large")


class _Refused(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _data_file(folder: Folder, info: pafs.FileInfo) -> DataFile:
    return DataFile(folder.name_of(info), info.size, info.mtime_ns)


def _is_data(info: pafs.FileInfo) -> bool:
    return (
        info.type == pafs.FileType.File
        and info.base_name.endswith(DATA_SUFFIXES)
        and info.base_name not in NOT_DATA
    )


def _shallowest_data(folder: Folder) -> list[pafs.FileInfo]:
    level = [""]
    for _ in range(MAX_DEPTH + 1):
        entries = [info for name in level for info in folder.list(name)]
        found = [info for info in entries if _is_data(info)]
        if found:
            return found
        level = [folder.name_of(i) for i in entries if i.type == pafs.FileType.Directory]
    return []


def _has_wildcard(source: str) -> bool:
    body = source.partition("?")[0] if "://" in source else source
    if "://" not in source and os.path.exists(source):
        return False
    return any(c in body for c in ("*?[" if "://" not in source else "*["))


def _split_glob(source: str) -> tuple[Folder, str]:
    body, mark, query = source.partition("?") if "://" in source else (source, "", "")
    parts = body.split("/")
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    base = "/".join(parts[:first]) or ("/" if body.startswith("/") else ".")
    return Folder.at(base + mark + query), "/".join(parts[first:])


def _glob(folder: Folder, below: str, parts: list[str]) -> list[pafs.FileInfo]:
    """Files that match a pattern of path components, `**` for any number of folders."""
    head, *rest = parts
    if head == "**":
        tail = rest or ["*"]
        files = [i for i in folder.list(below, recursive=True) if i.type == pafs.FileType.File]
        return [i for i in files if _matches(folder.name_of(i).split("/")[-len(tail) :], tail)]
    found = [i for i in folder.list(below) if fnmatch.fnmatchcase(i.base_name, head)]
    if not rest:
        return [i for i in found if i.type == pafs.FileType.File]
    folders = [folder.name_of(i) for i in found if i.type == pafs.FileType.Directory]
    return [info for name in folders for info in _glob(folder, name, rest)]


def _matches(parts: list[str], patterns: list[str]) -> bool:
    return len(parts) == len(patterns) and all(
        fnmatch.fnmatchcase(part, pattern) for part, pattern in zip(parts, patterns, strict=True)
    )


def _nearest_parent(place: Folder) -> str:
    path = place.path.rstrip("/")
    while path and path != "/":
        path = posixpath.dirname(path)
        parent = Folder(path, place.filesystem, path)
        if path and parent.is_folder():
            return f"the nearest folder that exists, {path}, holds {_entries(parent)}"
    return "none of its parent folders exists either"


def _entries(folder: Folder, most: int = 12) -> str:
    entries = folder.list()
    if not entries:
        return "nothing"
    names = [
        i.base_name + ("/" if i.type == pafs.FileType.Directory else "") for i in entries[:most]
    ]
    more = f" and {len(entries) - most:,} more" if len(entries) > most else ""
    return ", ".join(names) + more
