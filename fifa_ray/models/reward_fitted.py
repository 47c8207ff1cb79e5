"""A reward fitted to a dataset's own labels: the features it reads, and the model saved on disk.

A saved model is a folder with `model.safetensors` (weights, mean and std of the features; under
`fold_*` those of the cross-fitted models, which judge the prompts of the dataset itself) and
`config.json` (what the features are, how it was fitted and how well). Rewards are in logits: the
difference of two of them is the log odds that people prefer the first image.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load, save

from fifa_ray.models.batching import checked_indices
from fifa_ray.models.image_encoder import build_image_encoder
from fifa_ray.models.reward import RewardModelInfo
from fifa_ray.models.weight_files import describe_weights
from fifa_ray.scoring.bradley_terry import BradleyTerry

MODEL_TYPE = "fifa_ray_fitted_reward"
REWARD_SCALE = "logits of preference, 0 for the mean image"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

TextFeatures = Literal["none", "cosine", "products"]


@dataclass(frozen=True)
class FeatureSpec:
    """Which features of an (image, prompt) a reward is linear in.

    encoder: hub name or folder of an image encoder, None for image statistics. text: what an
    image-text encoder (CLIP, SigLIP) adds to the image's features: the cosine of image and prompt,
    or also the elementwise products that it sums; an encoder without a text tower adds nothing.
    """

    encoder: str | None = None
    revision: str | None = None
    text: TextFeatures = "cosine"


@dataclass(frozen=True)
class FeatureInfo:
    """What the features were made with; goes into a manifest."""

    encoder: Mapping[str, Any]
    text: TextFeatures
    feature_names: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON-ready values."""
        return asdict(self)


class PairFeatures:
    """Features of an image for a prompt."""

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the encoder; see `build_image_encoder` for the arguments and errors."""
        self._encoder = build_image_encoder(
            spec.encoder,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            revision=spec.revision,
        )
        self._text: TextFeatures = spec.text if self._encoder.reads_text else "none"

    @cached_property
    def info(self) -> FeatureInfo:
        """See `FeatureInfo`."""
        encoder = self._encoder.info
        width = range(encoder.feature_width)
        names = list(self._encoder.feature_names or [f"image_{i}" for i in width])
        if self._text != "none":
            names.append("cosine")
        if self._text == "products":
            names += [f"product_{i}" for i in width]
        return FeatureInfo(encoder.as_dict(), self._text, tuple(names))

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """float32 (S, F): features of images[image_index[s]] for prompts[prompt_index[s]]."""
        image_index, prompt_index = checked_indices(
            image_index, len(images), prompt_index, len(prompts)
        )
        if not len(image_index):
            return np.empty((0, len(self.info.feature_names)), np.float32)
        of_image = self._encoder.encode(images)[image_index]
        if self._text == "none":
            return of_image
        products = of_image * self._encoder.encode_texts(prompts)[prompt_index]
        columns = [of_image, products.sum(axis=1, keepdims=True)]
        return np.concatenate([*columns, products] if self._text == "products" else columns, axis=1)


@dataclass(frozen=True)
class FittedReward:
    """What a saved folder holds: the model of all folds, those of each, and their description."""

    model: BradleyTerry
    folds: tuple[BradleyTerry, ...]
    config: dict[str, Any]

    @property
    def spec(self) -> FeatureSpec:
        """The features it was fitted to."""
        return FeatureSpec(**self.config["features"])

    def to_files(self) -> dict[str, bytes]:
        """Contents of the folder by file name, the configuration last."""
        tensors = {name: getattr(self.model, name) for name in ("weights", "mean", "std")}
        for name in ("weights", "mean", "std"):
            tensors[f"fold_{name}"] = np.stack([getattr(fold, name) for fold in self.folds])
        config = self.config | {
            "model_type": MODEL_TYPE,
            "l2": self.model.l2,
            "fold_l2": [fold.l2 for fold in self.folds],
        }
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        return {WEIGHTS_FILE: save(tensors), CONFIG_FILE: text.encode()}

    @classmethod
    def from_files(cls, weights: bytes, config: str) -> "FittedReward":
        """The reverse of `to_files`. Raises ValueError for another kind of model."""
        values = json.loads(config)
        if values.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"expected the configuration of a reward that `fifa fit-reward` saved (model_type "
                f"{MODEL_TYPE}), found model_type {values.get('model_type')!r}"
            )
        tensors = load(weights)
        folds = zip(
            tensors["fold_weights"],
            tensors["fold_mean"],
            tensors["fold_std"],
            values["fold_l2"],
            strict=True,
        )
        model = BradleyTerry(tensors["weights"], tensors["mean"], tensors["std"], values["l2"])
        return cls(model, tuple(BradleyTerry(*fold) for fold in folds), values)


def is_fitted_reward(weights: str | None) -> bool:
    """Whether this is a folder that `fifa fit-reward` saved, not an image encoder."""
    config = Path(weights or "", CONFIG_FILE)
    if weights is None or not config.is_file():
        return False
    return bool(json.loads(config.read_text()).get("model_type") == MODEL_TYPE)


def read_fitted_reward(folder: str) -> FittedReward:
    """The model in a local folder."""
    return FittedReward.from_files(
        Path(folder, WEIGHTS_FILE).read_bytes(), Path(folder, CONFIG_FILE).read_text()
    )


class FittedRewardModel:
    """A saved fitted reward that scores other data; a `RewardModel`."""

    def __init__(self, folder: str, **loading: Any) -> None:
        """`loading`: device, dtype, batch_size and trust_remote_code, see `PairFeatures`."""
        self._folder = folder
        self._fitted = read_fitted_reward(folder)
        self._features = PairFeatures(self._fitted.spec, **loading)

    @cached_property
    def info(self) -> RewardModelInfo:
        """See `RewardModelInfo`."""
        encoder = self._features.info.encoder
        return RewardModelInfo(
            kind="fitted",
            name=f"Bradley-Terry on {encoder['name']}",
            version=str(self._fitted.config.get("fitted_to", "")),
            preprocessing=encoder["preprocessing"],
            scale=REWARD_SCALE,
            dtype=encoder["dtype"],
            weights=describe_weights(self._folder, [Path(self._folder)]),
        )

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """See `RewardModel.score`."""
        features = self._features.score(images, prompts, image_index, prompt_index)
        reward = self._fitted.model.reward(features)
        return np.where(np.isfinite(reward), reward, np.nan).astype(np.float32)
