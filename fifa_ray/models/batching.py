"""Forward passes in the largest batch that fits, and where and in which precision they run."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype of a setting; "auto" is bfloat16 on a GPU, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


class LargestBatch:
    """Runs a forward pass over a sequence, batch by batch, and halves the batch when it must."""

    def __init__(self, start: int, what: str) -> None:
        """`start`: items of the first batch; `what`: their name in the log, "images"."""
        if start < 1:
            raise ValueError(f"expected a batch size of at least 1, got {start}")
        self.size = start
        self._what = what

    def run(
        self, items: Sequence[Item], forward: Callable[[Sequence[Item]], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Outputs of `forward` on consecutive slices that together cover `items`, in order.

        After an out-of-memory error the size stays halved for good, so it is found once. Raises
        the device's error when a single item does not fit.
        """
        outputs = []
        start = 0
        while start < len(items):
            output = self._attempt(items[start : start + self.size], forward)
            if output is None:
                continue
            outputs.append(output)
            start += self.size
        return outputs

    def _attempt(
        self, batch: Sequence[Item], forward: Callable[[Sequence[Item]], torch.Tensor]
    ) -> torch.Tensor | None:
        try:
            return forward(batch)
        except torch.cuda.OutOfMemoryError:
            if self.size == 1:
                raise
        # Outside the except block: its traceback would keep the failed batch's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        full, self.size = self.size, max(1, min(self.size, len(batch)) // 2)
        logger.warning(
            "out of device memory with a batch of %d %s; going on with %d",
            min(full, len(batch)),
            self._what,
            self.size,
        )
        return None


def normalized_pixels(
    images: Sequence[np.ndarray],
    mean: Sequence[float],
    std: Sequence[float],
    device: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(B, C, H, W) network input: uint8 arrays are scaled to [0, 1], float ones are there already.

    Moves the small arrays and does the arithmetic on the device, in float32.
    """
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"expected images of one shape, got {sorted(shapes)}; make them all with the image "
            "transform of this reward model"
        )
    stacked = torch.from_numpy(np.stack(images))
    if torch.device(device).type == "cuda":
        stacked = stacked.pin_memory()
    pixels = stacked.to(device, non_blocking=True)
    pixels = pixels.float() / 255 if stacked.dtype == torch.uint8 else pixels.float()
    shape = (1, -1, 1, 1)
    centered = pixels - torch.tensor(mean, device=device).view(shape)
    return (centered / torch.tensor(std, device=device).view(shape)).to(dtype)


def checked_index(index: np.ndarray, count: int, what: str) -> np.ndarray:
    """`index` as int64 (S,), when every entry points into `count` items; else ValueError."""
    index = np.asarray(index)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(
            f"expected a one-dimensional integer {what}_index, got {index.dtype} {index.shape}"
        )
    if index.size and (index.min() < 0 or index.max() >= count):
        raise ValueError(
            f"{what}_index runs from {index.min()} to {index.max()}, but there are {count} {what}s"
        )
    return index.astype(np.int64)


def checked_indices(
    image_index: np.ndarray, num_images: int, prompt_index: np.ndarray, num_prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both indices of `RewardModel.score` as int64 (S,), checked one by one and for length."""
    image_index = checked_index(image_index, num_images, "image")
    prompt_index = checked_index(prompt_index, num_prompts, "prompt")
    if image_index.shape != prompt_index.shape:
        raise ValueError(
            "expected an image_index and a prompt_index of equal length, got "
            f"{len(image_index)} and {len(prompt_index)}"
        )
    return image_index, prompt_index


def prompts_by_image(
    image_index: np.ndarray, prompt_index: np.ndarray
) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
    """Distinct requests grouped by image: ((image, its prompts), ...), and where each one went.

    The second value, int64 (S,), is each request's place in the groups laid end to end.
    """
    distinct, place = np.unique(
        np.stack([image_index, prompt_index], axis=1), axis=0, return_inverse=True
    )
    images, starts = np.unique(distinct[:, 0], return_index=True)
    prompts = np.split(distinct[:, 1], starts[1:])
    return list(zip(images.tolist(), prompts, strict=True)), place.reshape(-1)


def finite_or_nan(rewards: torch.Tensor) -> np.ndarray:
    """float32 (S,) on the host, with NaN for every reward that is not finite."""
    values = rewards.detach().float().cpu().numpy()
    return np.where(np.isfinite(values), values, np.float32("nan")).astype(np.float32)
