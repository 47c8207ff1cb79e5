"""The images of pairs with their prompts, decoded and resized, each distinct one once a row group.

A request is one distinct (image, prompt) of a row group, whatever number of pairs share it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from fifa_ray import schema
from fifa_ray.config import ImagesConfig
from fifa_ray.models.reward import ImageTransform
from fifa_ray.run_dir import RunDir
from fifa_ray.sources import Source
from fifa_ray.sources.images import BadImage, decode_image

INPUT_COLUMNS = (
    schema.PAIR_ID,
    schema.PROMPT_ID,
    "source_file",
    "source_row",
    "source_group",
    "chosen_ref",
    "rejected_ref",
    "chosen_uid",
    "rejected_uid",
)


@dataclass(frozen=True)
class PromptTexts:
    """All distinct prompts, sorted by id, in the object store: one copy a node."""

    table: "ray.ObjectRef[pa.Table]"

    def lookup(self, prompt_ids: np.ndarray) -> list[str]:
        """Texts of these ids (int64). Raises KeyError for an id that is not there."""
        table = ray.get(self.table)
        known = table.column(schema.PROMPT_ID).to_numpy()
        at = np.minimum(np.searchsorted(known, prompt_ids), len(known) - 1)
        if not np.array_equal(known[at], prompt_ids):
            raise KeyError("pairs/ names prompts that prompts/ lacks; run the ingest stage again")
        return list(table.column("prompt").take(at).to_pylist())


def share_prompts(run: RunDir) -> PromptTexts:
    """Put the prompts into the object store."""
    table = run.read_table("prompts", columns=[schema.PROMPT_ID, "prompt"]).combine_chunks()
    return PromptTexts(ray.put(table))


@dataclass(frozen=True)
class Requests:
    """Distinct (image, prompt) of one row group of the source, and the sides of pairs they answer.

    images: distinct images to read, columns source_row and ref. image_of, prompt_of: int64 (R,) per
    request, index into `images` and prompt_id. sides: per request, (pair_id, is_chosen) tuples.
    """

    images: pa.Table
    image_of: np.ndarray
    prompt_of: np.ndarray
    sides: list[list[tuple[int, bool]]]


def make_requests(pairs: pa.Table) -> Requests:
    """The distinct (image, prompt) requests of pairs of one source file and row group.

    Two images are the same where the dataset gives them the same uid, or is silent on uids and
    they are the same row and reference.
    """
    images: dict[Any, int] = {}
    requests: dict[tuple[int, int], int] = {}
    places: list[tuple[int, str]] = []
    sides: list[list[tuple[int, bool]]] = []
    rows = pairs.to_pylist()
    for is_chosen, side in ((True, "chosen"), (False, "rejected")):
        for row in rows:
            ref = row[f"{side}_ref"]
            identity = row[f"{side}_uid"] or (row["source_row"], ref)
            image = images.setdefault(identity, len(images))
            if image == len(places):
                places.append((row["source_row"], ref))
            request = requests.setdefault((image, row[schema.PROMPT_ID]), len(requests))
            if request == len(sides):
                sides.append([])
            sides[request].append((row[schema.PAIR_ID], is_chosen))
    order = np.argsort([row for row, _ in places], kind="stable")
    new_index = np.empty(len(places), np.int64)
    new_index[order] = np.arange(len(places))
    keys = np.array(list(requests), np.int64).reshape(-1, 2)
    table = pa.table(
        {
            "source_row": pa.array([places[i][0] for i in order], pa.int64()),
            "ref": pa.array([places[i][1] for i in order], pa.string()),
        }
    )
    return Requests(table, new_index[keys[:, 0]], keys[:, 1], sides)


@dataclass
class ImageBatch:
    """Decoded requests, ready for the model; `errors` of those that could not be read."""

    images: list[np.ndarray]
    prompts: list[str]
    sides: list[list[tuple[int, bool]]]
    errors: list[tuple[str, list[tuple[int, bool]]]]


class LoadImages:
    """Pairs -> decoded, resized images with their prompts. Picklable; loads no weights."""

    def __init__(
        self,
        source: Source,
        images: ImagesConfig,
        transform: ImageTransform,
        prompts: PromptTexts,
    ) -> None:
        self.source, self.images, self.prompts = source, images, prompts
        self.transform = transform

    def __call__(self, pairs: pa.Table) -> Iterator[ImageBatch]:
        """Batches in the order in which the source reads its images."""
        pairs = pairs.set_column(
            pairs.schema.get_field_index("source_file"),
            "source_file",
            pairs.column("source_file").cast(pa.string()),
        )
        files = pairs.column("source_file").unique().to_pylist()
        for file in files:
            of_file = pairs.filter(pc.equal(pairs.column("source_file"), file))
            for group in of_file.column("source_group").unique().to_pylist():
                chosen = pc.equal(of_file.column("source_group"), group)
                yield from self._load_group(file, group, make_requests(of_file.filter(chosen)))

    def as_columns(self, pairs: pa.Table) -> Iterator[dict[str, Any]]:
        """The same as rows of a block, for scorers elsewhere; an error's row has no image."""
        for batch in self(pairs):
            count = len(batch.images)
            if count:
                yield {
                    "image": np.stack(batch.images) if _same_shape(batch.images) else batch.images,
                    "prompt": batch.prompts,
                    "sides": [json.dumps(sides) for sides in batch.sides],
                    "error": [""] * count,
                }
            if batch.errors:
                blank = np.zeros(batch.images[0].shape if count else (3, 1, 1), np.uint8)
                yield {
                    "image": np.stack([blank] * len(batch.errors)),
                    "prompt": [""] * len(batch.errors),
                    "sides": [json.dumps(sides) for _, sides in batch.errors],
                    "error": [reason for reason, _ in batch.errors],
                }

    def _load_group(self, file: str, group: int, requests: Requests) -> Iterator[ImageBatch]:
        requests_of: list[list[int]] = [[] for _ in range(len(requests.images))]
        for request, image in enumerate(requests.image_of):
            requests_of[image].append(request)
        texts = self.prompts.lookup(requests.prompt_of)
        for read in self.source.read_images(file, group, requests.images):
            batch = ImageBatch([], [], [], [])
            for row in read.to_pylist():
                wanted = requests_of[row["request"]]
                try:
                    image = self._decode(row["image"], row["error"])
                except BadImage as bad:
                    batch.errors += [(bad.reason, requests.sides[r]) for r in wanted]
                    continue
                for request in wanted:
                    batch.images.append(image)
                    batch.prompts.append(texts[request])
                    batch.sides.append(requests.sides[request])
            yield batch

    def _decode(self, data: bytes | None, error: str | None) -> np.ndarray:
        if data is None or error:
            raise BadImage(error or "missing_image", "")
        decoded = decode_image(data, self.images.max_pixels)
        try:
            return self.transform(decoded)
        except ValueError as refused:  # a shape that this model's authors refuse, too
            raise BadImage("unsuitable_image", str(refused)) from refused


def _same_shape(images: list[np.ndarray]) -> bool:
    return all(image.shape == images[0].shape for image in images)
