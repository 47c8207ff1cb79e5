"""From pairs' numbers to their latents (or pixels) and conditioning, cached or made on the fly.

Both readers answer any pairs in any order, and keep what they read in a bounded memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import torch

from fifa_ray.config import ImagesConfig
from fifa_ray.dpo.noising import PairAugmentation
from fifa_ray.engine.latents import LatentLayout, unpack_conditioning
from fifa_ray.engine.train_batch import PairInputs
from fifa_ray.engine.train_model import pixel_tensor
from fifa_ray.engine.train_pairs import PairTable
from fifa_ray.engine.train_rows import BoundedMemory, SingleRows
from fifa_ray.models.diffusion import DiffusionModel
from fifa_ray.models.training_image import TrainingImage
from fifa_ray.run_dir import RunDir
from fifa_ray.sources import Source
from fifa_ray.sources.images import BadImage, decode_image

# Reads that an object store is asked for at once; a local disk is read by one thread.
REMOTE_READS = 16


class PairReader(Protocol):
    """Reads pairs of one `PairTable`."""

    def read(
        self, pairs: np.ndarray, augmentations: Sequence[PairAugmentation | None]
    ) -> PairInputs:
        """Inputs of these pairs (indices into the table), each under its augmentation.

        None is the plain middle crop with the prompt as it is.
        """
        ...


class CachedReader:
    """Reads what the latents stage encoded."""

    def __init__(
        self,
        run: RunDir,
        folder: str,
        layout: LatentLayout,
        pairs: PairTable,
        empty_prompt: int,
        *,
        flips: bool,
        max_bytes: int,
    ) -> None:
        """`folder`: `latents/<key>`; `flips`: whether mirrored posteriors are wanted."""
        columns = ["mean", "std", *(["flipped_mean", "flipped_std"] if flips else [])]
        self.rows = SingleRows(run, folder, "item_id", [*columns, "conditioning"])
        self.layout, self.pairs, self.empty_prompt = layout, pairs, empty_prompt
        self.memory = BoundedMemory(max_bytes)
        local = isinstance(run.filesystem, pafs.LocalFileSystem)
        self.threads = None if local else ThreadPoolExecutor(REMOTE_READS)

    def read(
        self, pairs: np.ndarray, augmentations: Sequence[PairAugmentation | None]
    ) -> PairInputs:
        """See `PairReader`."""
        prompts = prompt_items(self.pairs, pairs, augmentations, self.empty_prompt)
        images = self.pairs.image_items[pairs]
        found = self._load([*images.ravel().tolist(), *prompts])
        posteriors = []
        for side in (0, 1):
            for item, augmentation in zip(images[:, side].tolist(), augmentations, strict=True):
                prefix = "flipped_" if augmentation is not None and augmentation.flip else ""
                row = found[item]
                posteriors.append([self.layout.array(row[prefix + n]) for n in ("mean", "std")])
        return PairInputs(
            mean=torch.from_numpy(np.stack([mean for mean, _ in posteriors])),
            std=torch.from_numpy(np.stack([std for _, std in posteriors])),
            pixels=None,
            conditioning=_stack([found[item] for item in prompts]),
            reward_margin=torch.from_numpy(self.pairs.reward_margin[pairs]),
            usable=range(len(pairs)),
            bad=(),
        )

    def _load(self, items: Sequence[int]) -> dict[int, Any]:
        """Rows of images and tensors of prompts by item_id."""
        found = {item: self.memory.get(item) for item in dict.fromkeys(items)}
        missing = [item for item, value in found.items() if value is None]
        fetch: Callable[..., Iterator[Any]] = self.threads.map if self.threads else map
        for item, value in zip(missing, fetch(self._fetch, missing), strict=True):
            found[item] = value
            self.memory.put(item, value, _num_bytes(value))
        return found

    def _fetch(self, item: int) -> Any:
        row = self.rows.read(item)
        packed = row.pop("conditioning")
        return row if packed is None else unpack_conditioning(packed)


class StreamedReader:
    """Reads encoded images from the dataset and decodes them; prompts are encoded by the model."""

    def __init__(
        self,
        source: Source,
        items: pa.Table,
        pairs: PairTable,
        empty_prompt: int,
        model: DiffusionModel,
        transform: TrainingImage,
        image_settings: ImagesConfig,
        *,
        max_bytes: int,
    ) -> None:
        """`items`: those of the training data, whose item_id is their row."""
        self.source, self.pairs, self.empty_prompt = source, pairs, empty_prompt
        self.model, self.transform, self.image_settings = model, transform, image_settings
        self.items = items.combine_chunks()
        images = self.items.filter(pc.is_null(self.items.column("prompt")))
        self.group_of, self.places, self.members = _group_images(images)
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
                both = [self._pixels(int(i), augmentation) for i in self.pairs.image_items[pair]]
            except BadImage as error:
                bad.append((index, error.reason))
                continue
            chosen.append(both[0])
            rejected.append(both[1])
            usable.append(index)
        prompts = prompt_items(self.pairs, pairs, augmentations, self.empty_prompt)
        pixels = pixel_tensor(chosen + rejected, "cpu") if usable else None
        return PairInputs(
            mean=None,
            std=None,
            pixels=pixels,
            conditioning=self._encode([prompts[i] for i in usable]),
            reward_margin=torch.from_numpy(self.pairs.reward_margin[pairs[usable]]),
            usable=usable,
            bad=bad,
        )

    def _pixels(self, item: int, augmentation: PairAugmentation | None) -> np.ndarray:
        data = self.memory.get(item)
        if data is None:
            data = self._read_group(item)
        if isinstance(data, BadImage):
            raise data
        return self.transform(decode_image(data, self.image_settings.max_pixels), augmentation)

    def _read_group(self, wanted: int) -> bytes | BadImage:
        """All training images of one image's group of the source: they are needed soon, too."""
        group = int(self.group_of[wanted])
        members = self.members[group]
        rows = self.items.take(members)
        requests = rows.select(["source_row", "ref"])
        found: bytes | BadImage | None = None
        for batch in self.source.read_images(*self.places[group], requests):
            for answer in batch.to_pylist():
                item = int(members[answer["request"]])
                data = answer["image"]
                value = BadImage(answer["error"] or "missing_image") if data is None else data
                self.memory.put(item, value, len(data or b"") + 100)
                if item == wanted:
                    found = value
        if found is None:
            raise RuntimeError(f"the source did not answer for image {wanted} of group {group}")
        return found

    def _encode(self, prompts: Sequence[int]) -> dict[str, torch.Tensor]:
        found = {item: self.conditioning.get(item) for item in dict.fromkeys(prompts)}
        missing = [item for item, value in found.items() if value is None]
        if missing:
            texts = self.items.column("prompt").take(pa.array(missing)).to_pylist()
            encoded = self.model.encode_prompts(texts)
            for index, item in enumerate(missing):
                row = {name: values[index].cpu().clone() for name, values in encoded.items()}
                found[item] = row
                self.conditioning.put(item, row, _num_bytes(row))
        return _stack([found[item] for item in prompts])


def prompt_items(
    table: PairTable,
    pairs: np.ndarray,
    augmentations: Sequence[PairAugmentation | None],
    empty_prompt: int,
) -> list[int]:
    """item_id of each pair's prompt, of the empty one where it is dropped."""
    return [
        empty_prompt if augmentation is not None and augmentation.drop_prompt else int(item)
        for item, augmentation in zip(table.prompt_item[pairs], augmentations, strict=True)
    ]


def _stack(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    names = rows[0] if rows else {}
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def _num_bytes(value: Mapping[str, Any]) -> int:
    """Bytes of a row of bytes or tensors, with what keeping it costs."""
    sizes = [v.nbytes if isinstance(v, torch.Tensor) else len(v or b"") for v in value.values()]
    return sum(sizes) + 500


def _group_images(
    images: pa.Table,
) -> tuple[np.ndarray, list[tuple[str, int]], list[np.ndarray]]:
    """Number of each image's (file, group); those places; and the item_ids of each."""
    files = images.column("source_file").to_pylist()
    groups = images.column("source_group").to_pylist()
    numbers: dict[tuple[str, int], int] = {}
    group_of = np.array(
        [numbers.setdefault(p, len(numbers)) for p in zip(files, groups, strict=True)], np.int64
    )
    order = np.argsort(group_of, kind="stable")
    counts = np.bincount(group_of, minlength=len(numbers))
    return group_of, list(numbers), np.split(order, np.cumsum(counts)[:-1])
