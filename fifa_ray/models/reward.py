"""Proxy reward models: what every adapter offers, and the two builders that the engine calls.

A reward stage builds an `ImageTransform` in its CPU decode workers (no weights, little memory) and
a `RewardModel` in its scoring actors. Each adapter scores exactly as its authors do; scales differ
by a factor of a hundred between kinds, so margins of different kinds never add up unstandardised.
The adapters load torch, so they are imported only when one is built.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

REWARD_KINDS = (
    "pickscore",
    "hpsv2",
    "hpsv2.1",
    "clip_score",
    "aesthetic",
    "imagereward",
    "hpsv3",
)

DEFAULT_WEIGHTS: dict[str, str] = {
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "xswu/HPSv2",
    "hpsv2.1": "xswu/HPSv2",
    "clip_score": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor",
    "imagereward": "THUDM/ImageReward",
    "hpsv3": "MizzenAI/HPSv3",
}

# Tokenizer and image processor that the authors use where the weights' repository has none.
AUTHORS_PROCESSOR: dict[str, str] = {
    "pickscore": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "hpsv2": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "hpsv2.1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "imagereward": "google-bert/bert-base-uncased",
}

# Settings of one kind in `options`; the adapters' docstrings say what they do.
_OPTIONS: dict[str, frozenset[str]] = {
    "pickscore": frozenset({"revision", "processor", "text_cache_size"}),
    "clip_score": frozenset({"revision", "processor", "text_cache_size", "scale"}),
    "hpsv2": frozenset({"revision", "processor", "text_cache_size", "resize", "text_cleaning"}),
    "hpsv2.1": frozenset({"revision", "processor", "text_cache_size", "resize", "text_cleaning"}),
    "aesthetic": frozenset({"revision", "clip"}),
    "imagereward": frozenset({"revision", "processor"}),
    "hpsv3": frozenset({"revision", "base_model"}),
}


@dataclass(frozen=True)
class WeightFiles:
    """Where weights came from: hub name or path, hub commit or None, and each file's SHA-256."""

    source: str
    revision: str | None
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class RewardModelInfo:
    """What a reward was measured with; goes into the stage's manifest."""

    kind: str
    name: str
    version: str
    preprocessing: str
    scale: str
    dtype: str
    weights: WeightFiles

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON-ready values."""
        return asdict(self)


class ImageTransform(Protocol):
    """Picklable; turns one decoded image into the small array that `RewardModel.score` takes."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """One image of any mode and size to a channels-first array, before normalisation."""
        ...


class RewardModel(Protocol):
    """A loaded proxy reward model."""

    @property
    def info(self) -> RewardModelInfo:
        """Kind, version, preprocessing, scale, dtype and weights (hashed when first asked for)."""
        ...

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """float32 (S,): reward of images[image_index[s]] for prompts[prompt_index[s]].

        `images` are distinct arrays of this kind's `ImageTransform`, `prompts` distinct texts; each
        is encoded once. A reward that is not finite comes back as NaN. Raises ValueError when an
        index is out of range.
        """
        ...


def build_reward_model(
    kind: str,
    weights: str | None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    options: Mapping[str, Any] | None = None,
) -> RewardModel:
    """Load a reward model; `weights` is a hub name, a folder or a file, None the authors' own.

    dtype: "auto" (bfloat16 on a GPU, float32 elsewhere), "float32", "bfloat16" or "float16".
    batch_size: images per forward pass to begin with (None: the kind's own default); it halves
    itself when the device's memory runs out. Raises ValueError for an unknown kind or option,
    FileNotFoundError when the weights are not there.
    """
    options = _checked_options(kind, options)
    weights = DEFAULT_WEIGHTS[kind] if weights is None else weights
    loading: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
        "trust_remote_code": trust_remote_code,
    }
    if kind in ("pickscore", "clip_score"):
        from fifa_ray.models.reward_clip import load_clip_reward

        return load_clip_reward(kind, weights, **loading, **options)
    if kind in ("hpsv2", "hpsv2.1"):
        from fifa_ray.models.reward_clip import load_hpsv2

        return load_hpsv2(kind, weights, **loading, **options)
    if kind == "aesthetic":
        from fifa_ray.models.reward_aesthetic import load_aesthetic

        return load_aesthetic(weights, **loading, **options)
    if kind == "imagereward":
        from fifa_ray.models.reward_blip import load_image_reward

        return load_image_reward(weights, **loading, **options)
    from fifa_ray.models.reward_qwen import load_hpsv3

    return load_hpsv3(weights, **loading, **options)


def build_image_transform(
    kind: str, weights: str | None, *, options: Mapping[str, Any] | None = None
) -> ImageTransform:
    """The preprocessing of a kind, for CPU workers: reads small configuration files, no weights.

    Takes the same `weights` and `options` as `build_reward_model`, and raises the same errors.
    """
    from fifa_ray.models import image_transform as transforms
    from fifa_ray.models.weight_files import processor_folder

    options = _checked_options(kind, options)
    weights = DEFAULT_WEIGHTS[kind] if weights is None else weights
    if kind in ("pickscore", "clip_score"):
        folder = processor_folder(
            weights, options.get("processor"), options.get("revision"), AUTHORS_PROCESSOR.get(kind)
        )
        return transforms.processor_transform(folder)
    if kind in ("hpsv2", "hpsv2.1"):
        return transforms.LongestSideAndPad(resize=options.get("resize", "antialias"))
    if kind in ("aesthetic", "imagereward"):
        return transforms.OPENAI_CLIP_TRANSFORM
    return transforms.PixelBudget()


def _checked_options(kind: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if kind not in REWARD_KINDS:
        raise ValueError(
            f"unknown reward kind {kind!r}; expected one of {', '.join(REWARD_KINDS)}"
            f"{_did_you_mean(kind, REWARD_KINDS)}"
        )
    known = _OPTIONS[kind]
    for name in options or {}:
        if name not in known:
            raise ValueError(
                f"unknown option {name!r} of reward kind {kind!r}; expected one of "
                f"{', '.join(sorted(known))}{_did_you_mean(name, known)}"
            )
    return dict(options or {})


def _did_you_mean(word: str, known: Sequence[str] | frozenset[str]) -> str:
    close = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
