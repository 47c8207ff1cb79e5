"""Image features for a reward fitted on the dataset's own labels (`fifa fit-reward`).

Any vision folder that transformers' Auto classes load (CLIP and SigLIP through their projected
image features, ViT, DINOv2 and the like through their class token or the mean of their patches),
or, without a folder, `ImageStatistics`: hand-computed numbers, weak, see `image_statistics`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from fifa_ray.models.image_statistics import STATISTIC_NAMES, TwoViews, image_statistics
from fifa_ray.models.image_transform import ResizeAndCrop, processor_transform
from fifa_ray.models.reward import ImageTransform, WeightFiles
from fifa_ray.models.weight_files import (
    CONFIG_PATTERNS,
    describe_weights,
    local_path,
    model_folder,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ImageEncoderInfo:
    """What image features were made with; goes into a manifest. `weights` is None without any."""

    name: str
    feature_width: int
    preprocessing: str
    dtype: str
    weights: WeightFiles | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON-ready values."""
        return asdict(self)


class ImageEncoder(Protocol):
    """Images to feature vectors."""

    @property
    def transform(self) -> ImageTransform:
        """Decoded images to the arrays that `encode` takes; picklable, no weights."""
        ...

    @property
    def info(self) -> ImageEncoderInfo:
        """Name, width, preprocessing, dtype and weights (hashed when first asked for)."""
        ...

    @property
    def feature_names(self) -> tuple[str, ...] | None:
        """A name for each column where columns mean something, else None."""
        ...

    @property
    def reads_text(self) -> bool:
        """Whether prompts have features in the same space."""
        ...

    def encode(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """float32 (N, D) features of images, or of arrays that `transform` made of them."""
        ...

    def encode_texts(self, prompts: Sequence[str]) -> np.ndarray:
        """float32 (N, D) unit vectors of prompts; TypeError unless `reads_text`."""
        ...


def build_encoder_transform(path: str | None, *, revision: str | None = None) -> ImageTransform:
    """The encoder's preprocessing, for CPU workers: picklable, loads no weights."""
    if path is None:
        return TwoViews()
    return processor_transform(local_path(path, CONFIG_PATTERNS, revision))


def build_image_encoder(
    path: str | None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> ImageEncoder:
    """Encoder of a hub name or folder in hub format; None: `ImageStatistics`.

    dtype and batch_size are those of `build_reward_model`. Raises FileNotFoundError without a
    model or an image processor's configuration there, ValueError when weights are missing.
    """
    if path is None:
        return ImageStatistics()
    return VisionModelEncoder(
        path,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )


class ImageStatistics:
    """`image_statistics` as an `ImageEncoder`: no weights, CPU only."""

    def __init__(self) -> None:
        """Nothing to load."""
        self.transform: ImageTransform = TwoViews()

    @cached_property
    def info(self) -> ImageEncoderInfo:
        """See `ImageEncoderInfo`."""
        return ImageEncoderInfo(
            name="hand-computed image statistics (no learned encoder)",
            feature_width=len(STATISTIC_NAMES),
            preprocessing=TwoViews().description,
            dtype="float32",
            weights=None,
        )

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The statistics' names."""
        return STATISTIC_NAMES

    reads_text = False

    def encode(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """See `ImageEncoder.encode`."""
        return image_statistics(_as_arrays(images, self.transform))

    def encode_texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Raises TypeError."""
        raise TypeError("image statistics know nothing of texts; use an image-text encoder")


class VisionModelEncoder:
    """Unit-length features of a transformers vision model."""

    def __init__(
        self,
        path: str,
        *,
        device: str,
        dtype: str,
        batch_size: int | None,
        trust_remote_code: bool,
        revision: str | None,
    ) -> None:
        """See `build_image_encoder`."""
        import torch
        from transformers import AutoModel

        from fifa_ray.models.batching import LargestBatch, compute_dtype

        self._path = path
        self._folder: Path = model_folder(path, revision)
        self._device, self._dtype = device, compute_dtype(dtype, device)
        self.transform: ResizeAndCrop = processor_transform(self._folder)
        loaded: Any = AutoModel.from_pretrained(
            self._folder,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
        # A pooler is not read below; checkpoints for classification come without it.
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if missing:
            raise ValueError(f"{self._folder} lacks weights of its own model: {missing[:5]}")
        self._model = model.to(device=device, dtype=self._dtype).eval()
        on_gpu = torch.device(device).type == "cuda"
        self._batch = LargestBatch(batch_size or (256 if on_gpu else 32), "images")
        self._text_batch = LargestBatch(batch_size or (512 if on_gpu else 32), "prompts")
        self._trust_remote_code = trust_remote_code

    @cached_property
    def info(self) -> ImageEncoderInfo:
        """See `ImageEncoderInfo`; encodes one blank image to learn the width."""
        blank = Image.new("RGB", (256, 256))
        return ImageEncoderInfo(
            name=f"{type(self._model).__name__} {self._path}",
            feature_width=self.encode([blank]).shape[1],
            preprocessing=self.transform.description,
            dtype=str(self._dtype).removeprefix("torch."),
            weights=describe_weights(self._path, [self._folder]),
        )

    @property
    def feature_names(self) -> None:
        """Learned features have no names."""
        return None

    def encode(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """See `ImageEncoder.encode`; rows have unit length."""
        import torch

        if not len(images):
            raise ValueError("expected at least one image to encode, got none")
        with torch.inference_mode():
            features = torch.cat(
                self._batch.run(_as_arrays(images, self.transform), self._encode_batch)
            )
        return features.cpu().numpy()

    @property
    def reads_text(self) -> bool:
        """Whether the model has a text tower that projects into the images' space."""
        return hasattr(self._model, "get_text_features")

    def encode_texts(self, prompts: Sequence[str]) -> np.ndarray:
        """See `ImageEncoder.encode_texts`."""
        import torch

        if not self.reads_text:
            raise TypeError(f"{self._path} has no text tower; use an image-text encoder (CLIP)")
        with torch.inference_mode():
            batches = self._text_batch.run(prompts, self._encode_text_batch)
        return torch.cat(batches).cpu().numpy()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self._folder, trust_remote_code=self._trust_remote_code
        )

    def _encode_text_batch(self, prompts: Sequence[str]) -> "torch.Tensor":
        # SigLIP pools the last place and was trained on texts padded to full length.
        full_length = self._model.config.model_type.startswith("siglip")
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length" if full_length else True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        features = self._model.get_text_features(**tokens).pooler_output.float()
        return features / features.norm(dim=-1, keepdim=True)

    def _encode_batch(self, images: Sequence[np.ndarray]) -> "torch.Tensor":
        from fifa_ray.models.batching import normalized_pixels

        pixels = normalized_pixels(
            images,
            self.transform.pixel_mean,
            self.transform.pixel_std,
            self._device,
            self._dtype,
        )
        features = _pooled(self._model, pixels).float()
        return features / features.norm(dim=-1, keepdim=True)


def _pooled(model: Any, pixels: "torch.Tensor") -> "torch.Tensor":
    """(B, D): projected features of a two-tower model, class token, or mean over places."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=pixels).pooler_output
    hidden = model(pixel_values=pixels).last_hidden_state
    if hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    patch_px = getattr(model.config, "patch_size", None)
    if isinstance(patch_px, int):
        num_patches = (pixels.shape[2] // patch_px) * (pixels.shape[3] // patch_px)
        if hidden.shape[1] > num_patches:
            return hidden[:, 0]
    return hidden.mean(dim=1)


def _as_arrays(
    images: Sequence[Image.Image | np.ndarray], transform: ImageTransform
) -> list[np.ndarray]:
    return [transform(image) if isinstance(image, Image.Image) else image for image in images]
