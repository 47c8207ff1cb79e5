"""Image preprocessing of the reward models, as their authors do it, without torchvision.

Each transform returns what still has to be normalised (uint8 wherever the authors' pipeline has
bytes at that point), so that little memory moves from the decode workers to the device;
`pixel_mean` and `pixel_std` are applied there. Pillow's bicubic filter is what the authors' Pillow
pipelines used. Two details differ between pipelines and are kept: whether an image becomes RGB
before or after the resize, and how the offset of a centre crop is rounded. Transparency is dropped,
as it was when these models were trained (transformers 5 would paint it white).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ResizeAndCrop:
    """Resize (short side, or to an exact size) and centre crop, on bytes: uint8 (3, H, W)."""

    resize_px: int | tuple[int, int] | None
    crop_px: tuple[int, int] | None
    resample: int = int(Image.Resampling.BICUBIC)
    rgb_first: bool = True
    crop_offset: Literal["floor", "round"] = "floor"
    pixel_mean: tuple[float, ...] = OPENAI_MEAN
    pixel_std: tuple[float, ...] = OPENAI_STD

    def __call__(self, image: Image.Image) -> np.ndarray:
        """One image to uint8 (3, H, W)."""
        if self.rgb_first:
            image = image.convert("RGB")
        if self.resize_px is not None:
            new_size = _resized(*image.size, self.resize_px)
            image = image.resize(new_size, Image.Resampling(self.resample))
        if self.crop_px is not None:
            image = self._center_crop(image, *self.crop_px)
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))

    @property
    def description(self) -> str:
        """Short text for a manifest."""
        side = "short side " if isinstance(self.resize_px, int) else ""
        return (
            f"resize {side}{self.resize_px} {Image.Resampling(self.resample).name.lower()} "
            f"(Pillow), centre crop {self.crop_px}, mean {self.pixel_mean}, std {self.pixel_std}"
        )

    def _center_crop(self, image: Image.Image, height: int, width: int) -> Image.Image:
        left, top = (image.width - width) / 2, (image.height - height) / 2
        if left < 0 or top < 0:
            raise ValueError(
                f"expected an image of at least {width}x{height} px after the resize, got "
                f"{image.width}x{image.height}; the preprocessor's crop is larger than its resize"
            )
        nearest = math.floor if self.crop_offset == "floor" else round
        return image.crop(
            (nearest(left), nearest(top), nearest(left) + width, nearest(top) + height)
        )


def _resized(width: int, height: int, resize_px: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(resize_px, tuple):
        return resize_px[1], resize_px[0]
    # torchvision and transformers both truncate the long side.
    new_long = int(resize_px * max(width, height) / min(width, height))
    return (resize_px, new_long) if width <= height else (new_long, resize_px)


# torchvision's Resize(224) and CenterCrop(224) on a Pillow image, as OpenAI's CLIP package and
# ImageReward have them: RGB comes last and half pixels go to the even neighbour.
OPENAI_CLIP_TRANSFORM = ResizeAndCrop(224, (224, 224), rgb_first=False, crop_offset="round")


@dataclass(frozen=True)
class LongestSideAndPad:
    """HPSv2: longest side to `size_px`, bicubic, and centred black padding.

    The authors resize a float tensor. `resize` says how: "antialias" (default) is torchvision
    since 0.17, which a fresh installation of their package gets; "no_antialias" is older
    torchvision; both keep the filter's overshoot and return float32 in about [0, 1]. "pillow" is
    Pillow's filter on bytes: uint8, a quarter of the memory, equal to "antialias" but for rounding
    and clipping. An image whose longest side already is `size_px` is padded too, where the
    authors' code returns it unpadded (and their model then fails unless it is square).
    """

    size_px: int = 224
    resize: Literal["antialias", "no_antialias", "pillow"] = "antialias"
    pixel_mean: tuple[float, ...] = OPENAI_MEAN
    pixel_std: tuple[float, ...] = OPENAI_STD

    def __post_init__(self) -> None:
        """Check the one setting that comes from a config."""
        if self.resize not in ("antialias", "no_antialias", "pillow"):
            raise ValueError(
                f"unknown resize {self.resize!r}; expected antialias, no_antialias or pillow"
            )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """One image to (3, size_px, size_px): float32 or, with "pillow", uint8."""
        image = image.convert("RGB")
        scale = self.size_px / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if self.resize == "pillow":
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
            pixels = pixels.transpose(2, 0, 1)
        else:
            pixels = self._resize_tensor(np.asarray(image), height, width)
        top, left = (self.size_px - height) // 2, (self.size_px - width) // 2
        padded = np.zeros((3, self.size_px, self.size_px), pixels.dtype)
        padded[:, top : top + height, left : left + width] = pixels
        return padded

    @property
    def description(self) -> str:
        """Short text for a manifest."""
        return (
            f"longest side {self.size_px} bicubic ({self.resize}), centred zero pad, "
            f"mean {self.pixel_mean}, std {self.pixel_std}"
        )

    def _resize_tensor(self, pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        import torch

        tensor = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)
        if tensor.shape[1:] == (height, width):
            return tensor.numpy()
        resized = torch.nn.functional.interpolate(
            tensor[None],
            size=(height, width),
            mode="bicubic",
            align_corners=False,
            antialias=self.resize == "antialias",
        )
        return resized[0].numpy()


@dataclass(frozen=True)
class PixelBudget:
    """HPSv3: both sides to multiples of 28 px so that about 256*28*28 px remain, bicubic.

    uint8 (3, H, W); H and W follow the aspect ratio, so arrays of one batch differ in shape.
    """

    budget_px: int = 256 * 28 * 28
    factor_px: int = 28
    pixel_mean: tuple[float, ...] = OPENAI_MEAN
    pixel_std: tuple[float, ...] = OPENAI_STD

    def __call__(self, image: Image.Image) -> np.ndarray:
        """One image to uint8 (3, H, W). Raises ValueError for an aspect ratio above 200."""
        image = image.convert("RGB")
        height, width = self.resized(image.height, image.width)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    @property
    def description(self) -> str:
        """Short text for a manifest."""
        return (
            f"sides to multiples of {self.factor_px} within {self.budget_px} px, bicubic (Pillow), "
            f"mean {self.pixel_mean}, std {self.pixel_std}"
        )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in px after the resize: Qwen2-VL's rule with equal lower and upper limit.

        Rounds each side to the factor; a product above the budget is scaled down and floored, one
        below it scaled up and ceiled.
        """
        if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"expected an aspect ratio of at most {_MAX_ASPECT_RATIO}, got {width}x{height} px"
            )
        factor = self.factor_px
        rounded = [max(factor, round(side / factor) * factor) for side in (height, width)]
        area = rounded[0] * rounded[1]
        if area == self.budget_px:
            return rounded[0], rounded[1]
        # The authors' own order of operations: another one can round across a multiple.
        if area > self.budget_px:
            shrink = math.sqrt(height * width / self.budget_px)
            sides = [math.floor(side / shrink / factor) for side in (height, width)]
        else:
            grow = math.sqrt(self.budget_px / (height * width))
            sides = [math.ceil(side * grow / factor) for side in (height, width)]
        return max(1, sides[0]) * factor, max(1, sides[1]) * factor


def processor_transform(folder: Path) -> ResizeAndCrop:
    """The preprocessing that the image processor's configuration in a local folder asks for.

    Raises FileNotFoundError when there is none, ValueError when it has steps unknown here.
    """
    return transform_from_config(_preprocessor_config(folder))


def _preprocessor_config(folder: Path) -> dict[str, Any]:
    names = ("processor_config.json", "preprocessor_config.json")
    for name in names:
        path = folder / name
        if path.is_file():
            config = json.loads(path.read_text())
            config = config.get("image_processor", config)
            if "image_mean" in config:
                return config
    raise FileNotFoundError(
        f"expected an image preprocessor's configuration ({' or '.join(names)}) in "
        f"{folder}; name a folder that has one in the option `processor`"
    )


def transform_from_config(config: dict[str, Any]) -> ResizeAndCrop:
    """A transform from the fields of a transformers image processor (CLIP, ViT and the like).

    Raises ValueError for steps that it does not have (padding, another rescale factor).
    """
    if config.get("do_pad") or not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(
            "expected an image processor that resizes, crops, scales by 1/255 and normalises; got "
            f"do_pad={config.get('do_pad')}, rescale_factor={config.get('rescale_factor')}"
        )
    crop = config.get("crop_size")
    normalize = config.get("do_normalize", True)
    return ResizeAndCrop(
        resize_px=_resize_size(config["size"]) if config.get("do_resize", True) else None,
        crop_px=_exact_size(crop) if crop and config.get("do_center_crop", True) else None,
        resample=int(config.get("resample", Image.Resampling.BICUBIC)),
        pixel_mean=tuple(config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        pixel_std=tuple(config["image_std"]) if normalize else (1.0, 1.0, 1.0),
    )


def _resize_size(size: int | Sequence[int] | dict[str, int]) -> int | tuple[int, int]:
    if isinstance(size, int):  # Configurations older than transformers 4.24.
        return size
    if isinstance(size, dict) and "shortest_edge" in size:
        return size["shortest_edge"]
    return _exact_size(size)


def _exact_size(size: int | Sequence[int] | dict[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        return size["height"], size["width"]
    return size[0], size[1]
