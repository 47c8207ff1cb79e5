"""Decoded image -> the square of pixels that a diffusion model is trained on. No torch."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fifa_ray.dpo.noising import PairAugmentation


@dataclass(frozen=True)
class TrainingImage:
    """Short side to `resolution` pixels (bilinear, as the published trainers do), then a square.

    Without an augmentation the square is the middle one and the image is not mirrored. With one,
    images of other shapes get the corresponding place.
    """

    resolution: int
    random_crop: bool = False

    def __call__(
        self, image: Image.Image, augmentation: PairAugmentation | None = None
    ) -> np.ndarray:
        """One image of any size to uint8 (3, resolution, resolution)."""
        size = self.resolution
        image = image.convert("RGB")
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if augmentation is not None and self.random_crop:
            top, left = augmentation.crop_offset(height, width, size)
        else:
            top, left = (height - size) // 2, (width - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        if augmentation is not None and augmentation.flip:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def flipped(pixels: np.ndarray) -> np.ndarray:
    """The mirror image of channels-first pixels (3, height, width)."""
    return np.ascontiguousarray(pixels[:, :, ::-1])
