"""The labelled pairs of a demo world as arrays, to train a reward model on and to measure one."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of a world as arrays: M distinct images, P pairs in the order of the files."""

    prompts: list[str]  # distinct
    pixels: np.ndarray  # (M, 3, size, size) uint8
    prompt: np.ndarray  # (P,) int64 into prompts
    image: np.ndarray  # (P, 2) int64 into pixels
    label_0: np.ndarray  # (P,) float32, 1, 0 or 0.5
    ranking_id: np.ndarray  # (P,) int64


def read_labelled_pairs(world: Path) -> LabelledPairs:
    """The labelled pairs of `world/data` with both images whole and a prompt; each ranking once."""
    columns = ["caption", "has_label", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0"]
    table = pq.read_table(world / "data", columns=[*columns, "ranking_id"])
    prompts: dict[str, int] = {}
    images: dict[str, int | None] = {}
    pixels: list[np.ndarray] = []
    rows: dict[int, tuple[int, int, int, float]] = {}
    for batch in table.to_batches(max_chunksize=1_000):
        for row in batch.to_pylist():
            for side in "01":
                uid = row[f"image_{side}_uid"]
                if uid not in images:
                    decoded = _decode(row[f"jpg_{side}"])
                    images[uid] = None if decoded is None else len(pixels)
                    if decoded is not None:
                        pixels.append(decoded)
            first, second = images[row["image_0_uid"]], images[row["image_1_uid"]]
            caption = row["caption"].strip()
            if row["has_label"] and caption and first is not None and second is not None:
                at = prompts.setdefault(caption, len(prompts))
                rows[row["ranking_id"]] = (at, first, second, row["label_0"])
    prompt, first_image, second_image, label_0 = (
        np.array(v) for v in zip(*rows.values(), strict=True)
    )
    return LabelledPairs(
        list(prompts),
        np.stack(pixels),
        prompt,
        np.stack([first_image, second_image], axis=1),
        label_0.astype(np.float32),
        np.array(list(rows)),
    )


def _decode(data: bytes) -> np.ndarray | None:
    """(3, size, size) uint8, or None where the bytes are no picture."""
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError:
        return None
    return np.asarray(image).transpose(2, 0, 1)
