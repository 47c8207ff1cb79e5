"""Preference pairs for benchmarks: JPEG images of a given size in Pick-a-Pic v2's columns."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DISTINCT_IMAGES = 512
ROWS_PER_GROUP = 500


def jpeg_images(count: int, side: int, target_bytes: int | None = None) -> Iterator[bytes]:
    """Smooth random pictures with some grain, as JPEG of about `target_bytes`."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 12, image.shape)
        picture = Image.fromarray(np.clip(image + grain, 0, 255).astype(np.uint8))
        yield _encode(picture, target_bytes)


def _encode(picture: Image.Image, target_bytes: int | None) -> bytes:
    for quality in (90,) if target_bytes is None else (100, *range(95, 5, -10)):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if target_bytes is None or buffer.tell() <= target_bytes:
            break
    return buffer.getvalue()


def write_pairs(
    folder: Path, num_pairs: int, side: int, target_bytes: int | None = None, num_files: int = 4
) -> None:
    """Write `num_pairs` labelled pairs; every row's images have uids of their own.

    Bytes repeat after DISTINCT_IMAGES images, uids do not: each is decoded and scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = list(jpeg_images(DISTINCT_IMAGES, side, target_bytes))
    for index, rows in enumerate(np.array_split(np.arange(num_pairs), num_files)):
        path = folder / f"train-{index:05}-of-{num_files:05}.parquet"
        with pq.ParquetWriter(path, _rows(rows[:1], images).schema, compression="none") as writer:
            for start in range(0, len(rows), ROWS_PER_GROUP):
                writer.write_table(_rows(rows[start : start + ROWS_PER_GROUP], images))


def _rows(rows: np.ndarray, images: list[bytes]) -> pa.Table:
    return pa.table(
        {
            "caption": [f"picture {row // 10} of a series of drawn scenes" for row in rows],
            "jpg_0": [images[(2 * row) % len(images)] for row in rows],
            "jpg_1": [images[(2 * row + 1) % len(images)] for row in rows],
            "image_0_uid": [f"{row}-0" for row in rows],
            "image_1_uid": [f"{row}-1" for row in rows],
            "label_0": np.where(rows % 2, 1.0, 0.0),
            "label_1": np.where(rows % 2, 0.0, 1.0),
            "has_label": np.ones(len(rows), bool),
            "ranking_id": rows.astype(np.int64),
        }
    )


def save_random_clip(folder: Path, *, width: int, layers: int, patch: int, side: int) -> Path:
    """A CLIP with random weights in hub format, with the demo's tokenizer."""
    import shutil

    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    from fifa_ray.demo.run import REWARD_WEIGHTS

    tokenizer = AutoTokenizer.from_pretrained(REWARD_WEIGHTS)
    torch.manual_seed(0)
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
    }
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = CLIPConfig(
        text_config={**tower, **ids, "vocab_size": len(tokenizer), "num_hidden_layers": 2},
        vision_config={**tower, "image_size": side, "patch_size": patch},
        projection_dim=512,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = (REWARD_WEIGHTS / "preprocessor_config.json").read_text()
    shutil.copy(REWARD_WEIGHTS / "preprocessor_config.json", folder)
    (folder / "preprocessor_config.json").write_text(processor.replace("64", str(side)))
    return folder
