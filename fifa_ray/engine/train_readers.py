"""From pairs' numbers to their latents (or pixels) and conditioning, cached or made on the fly.

Both readers answer any pairs in any order, and keep what they read in a bounded memory.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch

from fifa_ray import schema
from fifa_ray.config import ImagesConfig
from fifa_ray.dpo.noising import PairAugmentation
from fifa_ray.engine.latents import LatentLayout, unpack_conditioning
from fifa_ray.engine.train_batch import PairInputs
from fifa_ray.engine.train_model import pixel_tensor
from fifa_ray.engine.train_pairs import PairTable
from fifa_ray.models.diffusion import DiffusionModel
from fifa_ray.models.training_image import TrainingImage
from fifa_ray.run_dir import RunDir
from fifa_ray.sources import Source
from fifa_ray.sources.images import BadImage, decode_image

Value = TypeVar("Value")

# Reads that an object store is asked for at once; a local disk is read by one thread.
REMOTE_READS = 16
EMPTY_PROMPT = schema.prompt_id("")


class PairReader(Protocol):
    """Reads pairs of one `PairTable`."""

    def read(
        self, pairs: np.ndarray, augmentations: Sequence[PairAugmentation | None]
    ) -> PairInputs:
        """Inputs of these pairs (indices into the table), each under its augmentation.

        None is the plain middle crop with the prompt as it is.
        """
        ...


class BoundedMemory:
    """Values by key, those used least recently dropped when together they take too many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """The value, or None."""
        found = self.values.get(key)
        if found is None:
            return None
        self.values.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        """Keep a value; at least the newest one is kept, however large."""
        if key in self.values:
            self.num_bytes -= self.values.pop(key)[1]
        self.values[key] = value, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes and len(self.values) > 1:
            self.num_bytes -= self.values.popitem(last=False)[1][1]


class SingleRows:
    """Rows of a table whose parts have one row a row group, by an int64 key."""

    def __init__(self, run: RunDir, table: str, key: str, columns: Sequence[str]) -> None:
        self.run, self.table, self.columns = run, table, list(columns)
        self.parts = run.list(table)
        keys = [
            run.read_table(table, part, columns=[key]).column(0).to_numpy() for part in self.parts
        ]
        lengths = [len(of_part) for of_part in keys]
        everything = np.concatenate([np.empty(0, np.int64), *keys])
        order = np.argsort(everything, kind="stable")
        self.keys = everything[order]
        self.part_of = np.repeat(np.arange(len(keys)), lengths)[order]
        self.row_of = np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths)])[order]
        self.opened = threading.local()

    def read(self, key: int) -> dict[str, Any]:
        """One row's columns. Raises KeyError where there is no such row."""
        at = int(np.searchsorted(self.keys, key))
        if at == len(self.keys) or self.keys[at] != key:
            raise KeyError(f"{self.table} has no row {key}; run the same command again")
        file = self._open(int(self.part_of[at]))
        row: dict[str, Any] = file.read_row_group(
            int(self.row_of[at]), columns=self.columns, use_threads=False
        ).to_pylist()[0]
        return row

    def _open(self, part: int) -> pq.ParquetFile:
        files: OrderedDict[int, pq.ParquetFile] | None = getattr(self.opened, "files", None)
        if files is None:
            files = self.opened.files = OrderedDict()
        if part not in files:
            path = self.run.path(self.table, self.parts[part])
            files[part] = pq.ParquetFile(self.run.filesystem.open_input_file(path), pre_buffer=True)
            if len(files) > 64:
                files.popitem(last=False)[1].close()
        files.move_to_end(part)
        return files[part]


class CachedReader:
    """Reads what the latents stage encoded."""

    def __init__(
        self,
        run: RunDir,
        folder: str,
        layout: LatentLayout,
        pairs: PairTable,
        *,
        flips: bool,
        max_bytes: int,
    ) -> None:
        """`folder`: `latents/<key>`; `flips`: whether mirrored posteriors are wanted."""
        columns = ["mean", "std", *(["flipped_mean", "flipped_std"] if flips else [])]
        self.images = SingleRows(run, f"{folder}/images", "image_id", columns)
        self.prompts = SingleRows(run, f"{folder}/prompts", schema.PROMPT_ID, ["conditioning"])
        self.layout, self.pairs = layout, pairs
        self.memory = BoundedMemory(max_bytes)
        local = isinstance(run.filesystem, pafs.LocalFileSystem)
        self.threads = None if local else ThreadPoolExecutor(REMOTE_READS)

    def read(
        self, pairs: np.ndarray, augmentations: Sequence[PairAugmentation | None]
    ) -> PairInputs:
        """See `PairReader`."""
        prompt_ids = _prompts_of(self.pairs, pairs, augmentations)
        image_ids = self.pairs.image_id[pairs]
        self._load([("image", int(i)) for i in image_ids.ravel()])
        self._load([("prompt", i) for i in prompt_ids])
        sides: list[tuple[np.ndarray, np.ndarray]] = []
        for side in (0, 1):
            for image, augmentation in zip(image_ids[:, side], augmentations, strict=True):
                prefix = "flipped_" if augmentation is not None and augmentation.flip else ""
                row = self._get(("image", int(image)))
                sides.append(
                    (
                        self.layout.array(row[f"{prefix}mean"]),
                        self.layout.array(row[f"{prefix}std"]),
                    )
                )
        conditioning = [self._get(("prompt", i)) for i in prompt_ids]
        return PairInputs(
            mean=torch.from_numpy(np.stack([mean for mean, _ in sides])),
            std=torch.from_numpy(np.stack([std for _, std in sides])),
            pixels=None,
            conditioning=_stack(conditioning),
            reward_margin=torch.from_numpy(self.pairs.reward_margin[pairs]),
            usable=range(len(pairs)),
            bad=(),
        )

    def _get(self, key: tuple[str, int]) -> Any:
        value = self.memory.get(key)
        return self._fetch(key) if value is None else value

    def _load(self, keys: Sequence[tuple[str, int]]) -> None:
        missing = [key for key in dict.fromkeys(keys) if self.memory.get(key) is None]
        fetch: Callable[..., Iterator[Any]] = self.threads.map if self.threads else map
        for key, value in zip(missing, fetch(self._fetch, missing), strict=True):
            self.memory.put(key, value, _num_bytes(value))

    def _fetch(self, key: tuple[str, int]) -> Any:
        kind, identity = key
        if kind == "image":
            return self.images.read(identity)
        return unpack_conditioning(self.prompts.read(identity)["conditioning"])


class StreamedReader:
    """Reads encoded images from the dataset and decodes them; prompts are encoded by the model."""

    def __init__(
        self,
        source: Source,
        images: pa.Table,
        prompts: pa.Table,
        pairs: PairTable,
        model: DiffusionModel,
        transform: TrainingImage,
        image_settings: ImagesConfig,
        *,
        max_bytes: int,
    ) -> None:
        """`images` and `prompts`: the tables of the training data, sorted by their ids."""
        self.source, self.pairs, self.model = source, pairs, model
        self.transform, self.image_settings = transform, image_settings
        self.images = images
        self.group_of, self.places, self.members = _group_images(images)
        self.prompt_ids = prompts.column(schema.PROMPT_ID).to_numpy()
        self.texts = prompts.column("prompt")
        self.memory = BoundedMemory(max_bytes)
        self.conditioning = BoundedMemory(max_bytes // 4)

    def read(
        self, pairs: np.ndarray, augmentations: Sequence[PairAugmentation | None]
    ) -> PairInputs:
        """See `PairReader`."""
        chosen: list[np.ndarray] = []
        rejected: list[np.ndarray] = []
        usable: list[int] = []
        bad: list[tuple[int, str]] = []
        for index, (pair, augmentation) in enumerate(zip(pairs, augmentations, strict=True)):
            try:
                both = [self._pixels(int(i), augmentation) for i in self.pairs.image_id[pair]]
            except BadImage as error:
                bad.append((index, error.reason))
                continue
            chosen.append(both[0])
            rejected.append(both[1])
            usable.append(index)
        prompt_ids = _prompts_of(self.pairs, pairs, augmentations)
        pixels = pixel_tensor(chosen + rejected, "cpu") if usable else None
        return PairInputs(
            mean=None,
            std=None,
            pixels=pixels,
            conditioning=self._encode([prompt_ids[i] for i in usable]),
            reward_margin=torch.from_numpy(self.pairs.reward_margin[pairs[usable]]),
            usable=usable,
            bad=bad,
        )

    def _pixels(self, image_id: int, augmentation: PairAugmentation | None) -> np.ndarray:
        data = self.memory.get(image_id)
        if data is None:
            data = self._read_group(image_id)
        if isinstance(data, BadImage):
            raise data
        return self.transform(decode_image(data, self.image_settings.max_pixels), augmentation)

    def _read_group(self, wanted: int) -> bytes | BadImage:
        """All training images of one image's group of the source: they are needed soon, too."""
        group = int(self.group_of[wanted])
        members = self.members[group]
        rows = self.images.take(members)
        requests = rows.select(["source_row", "ref"])
        found: bytes | BadImage | None = None
        for batch in self.source.read_images(*self.places[group], requests):
            for answer in batch.to_pylist():
                image_id = int(members[answer["request"]])
                data = answer["image"]
                value = BadImage(answer["error"] or "missing_image") if data is None else data
                self.memory.put(image_id, value, len(data or b"") + 100)
                if image_id == wanted:
                    found = value
        if found is None:
            raise RuntimeError(f"the source did not answer for image {wanted} of group {group}")
        return found

    def _encode(self, prompt_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        missing = [i for i in dict.fromkeys(prompt_ids) if self.conditioning.get(i) is None]
        rows: dict[int, dict[str, torch.Tensor]] = {}
        if missing:
            at = np.searchsorted(self.prompt_ids, np.array(missing))
            with torch.inference_mode():
                encoded = self.model.encode_prompts(self.texts.take(pa.array(at)).to_pylist())
            for index, prompt_id in enumerate(missing):
                row = {name: values[index].cpu().clone() for name, values in encoded.items()}
                rows[prompt_id] = row
                self.conditioning.put(prompt_id, row, _num_bytes(row))
        found = [self.conditioning.get(i) or rows[i] for i in prompt_ids]
        return _stack(found)


def _prompts_of(
    table: PairTable, pairs: np.ndarray, augmentations: Sequence[PairAugmentation | None]
) -> list[int]:
    """prompt_id of each pair, of the empty prompt where it is dropped."""
    return [
        EMPTY_PROMPT if augmentation is not None and augmentation.drop_prompt else int(prompt_id)
        for prompt_id, augmentation in zip(table.prompt_id[pairs], augmentations, strict=True)
    ]


def _stack(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = rows[0] if rows else {}
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def _num_bytes(value: Mapping[str, Any]) -> int:
    """Bytes of a row of bytes or tensors, with what keeping it costs."""
    sizes = [v.nbytes if isinstance(v, torch.Tensor) else len(v or b"") for v in value.values()]
    return sum(sizes) + 500


def _group_images(
    images: pa.Table,
) -> tuple[np.ndarray, list[tuple[str, int]], list[np.ndarray]]:
    """Number of each image's (file, group); those places; and the image ids of each."""
    files = images.column("source_file").to_pylist()
    groups = images.column("source_group").to_pylist()
    numbers: dict[tuple[str, int], int] = {}
    group_of = np.array(
        [numbers.setdefault(p, len(numbers)) for p in zip(files, groups, strict=True)], np.int64
    )
    order = np.argsort(group_of, kind="stable")
    counts = np.bincount(group_of, minlength=len(numbers))
    return group_of, list(numbers), np.split(order, np.cumsum(counts)[:-1])


class Prefetcher(Iterator[Value]):
    """The items of an iterator, made ahead of their use by one thread.

    An exception of the iterator is raised where its item would have come.
    """

    _END = object()

    def __init__(self, items: Iterator[Value], depth: int) -> None:
        self.queue: Queue[Any] = Queue(maxsize=max(1, depth))
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self.thread.start()

    def __next__(self) -> Value:
        item = self.queue.get()
        if item is self._END:
            raise StopIteration
        if isinstance(item, _Failure):
            raise item.error
        value: Value = item
        return value

    def close(self) -> None:
        """Stop making items and wait for the thread."""
        self.stopped.set()
        while self.thread.is_alive():
            while not self.queue.empty():
                self.queue.get()
            self.thread.join(0.05)

    def _run(self, items: Iterator[Value]) -> None:
        try:
            for item in items:
                self.queue.put(item)
                if self.stopped.is_set():
                    return
            self.queue.put(self._END)
        except BaseException as error:
            self.queue.put(_Failure(error))


@dataclass(frozen=True)
class _Failure:
    error: BaseException
