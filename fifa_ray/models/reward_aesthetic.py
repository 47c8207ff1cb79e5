"""LAION's aesthetic predictor: a linear stack on normalised CLIP ViT-L/14 image features.

The prompt plays no part, so both images of a pair are judged on looks alone. The authors'
checkpoint is an MLP D-1024-128-64-16-1 (D: CLIP's width) without activations, dropout off; ratings
are about 1 to 10. Preprocessing is that of OpenAI's CLIP package.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fifa_ray.models.batching import (
    LargestBatch,
    checked_index,
    compute_dtype,
    finite_or_nan,
    normalized_pixels,
)
from fifa_ray.models.image_transform import OPENAI_CLIP_TRANSFORM
from fifa_ray.models.reward import RewardModelInfo
from fifa_ray.models.reward_clip import unit_rows
from fifa_ray.models.weight_files import (
    checkpoint_file,
    describe_weights,
    load_state_dict,
    model_folder,
)

if TYPE_CHECKING:
    from transformers import CLIPModel

OPENAI_CLIP_L = "openai/clip-vit-large-patch14"
MLP_FILES = (
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "aesthetic-model.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
    "aesthetic-model.pth",
)
# Positions of the linear layers in the authors' Sequential; dropouts lie between.
_MLP_POSITIONS = (0, 2, 4, 6, 7)


class AestheticScore:
    """Aesthetic rating of an image; a `RewardModel` that does not read prompts."""

    def __init__(
        self,
        clip: "CLIPModel",
        mlp: torch.nn.Module,
        source: str,
        files: Sequence[Path],
        *,
        device: str,
        dtype: torch.dtype,
        batch_size: int | None,
    ) -> None:
        """`clip`: a CLIPModel; `mlp`: float32, from its width to one rating."""
        self._clip: Any = clip.to(device=device, dtype=dtype).eval()  # type: ignore[call-arg]
        self._mlp = mlp.to(device=device, dtype=torch.float32).eval()
        self._source, self._files = source, tuple(files)
        self._device, self._dtype = device, dtype
        on_gpu = torch.device(device).type == "cuda"
        self._batch = LargestBatch(batch_size or (256 if on_gpu else 32), "images")

    @cached_property
    def info(self) -> RewardModelInfo:
        """See `RewardModelInfo`; reads the weight files once to hash them."""
        return RewardModelInfo(
            kind="aesthetic",
            name="LAION aesthetic predictor",
            version="improved, linear (sac+logos+ava1)",
            preprocessing=OPENAI_CLIP_TRANSFORM.description,
            scale="rating, about 1 to 10; the prompt is not read",
            dtype=str(self._dtype).removeprefix("torch."),
            weights=describe_weights(self._source, self._files),
        )

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """See `RewardModel.score`; only checks `prompt_index`."""
        image_index = checked_index(image_index, len(images), "image")
        checked_index(prompt_index, len(prompts), "prompt")
        if not len(image_index):
            return np.empty(0, np.float32)
        with torch.inference_mode():
            ratings = torch.cat(self._batch.run(images, self._rate))
        return finite_or_nan(ratings)[image_index]

    def _rate(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        transform = OPENAI_CLIP_TRANSFORM
        pixels = normalized_pixels(
            images, transform.pixel_mean, transform.pixel_std, self._device, self._dtype
        )
        features = self._clip.get_image_features(pixel_values=pixels).pooler_output
        return self._mlp(unit_rows(features)).squeeze(-1)


def load_aesthetic(
    weights: str,
    *,
    device: str,
    dtype: str,
    batch_size: int | None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    clip: str = OPENAI_CLIP_L,
) -> AestheticScore:
    """The predictor with the MLP of `weights` (file, or folder or hub name that holds it).

    `clip`: the CLIP whose features it was trained on, hub name or folder. Its classes are
    transformers' own, so `trust_remote_code` changes nothing.
    """
    from transformers import CLIPModel

    mlp_file = checkpoint_file(weights, MLP_FILES, revision)
    clip_folder = model_folder(clip)
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    del model.text_model, model.text_projection
    return AestheticScore(
        model,
        linear_stack(load_state_dict(mlp_file), "layers.", mlp_file),
        weights,
        (mlp_file, clip_folder),
        device=device,
        dtype=compute_dtype(dtype, device),
        batch_size=batch_size,
    )


def linear_stack(
    state_dict: Mapping[str, torch.Tensor], prefix: str, path: Path
) -> torch.nn.Sequential:
    """The five linear layers of an MLP stored as `<prefix><position>.weight` and `.bias`.

    The same head serves the aesthetic predictor and ImageReward. Raises ValueError when a layer is
    missing; `path` is for the message.
    """
    layers = []
    for position in _MLP_POSITIONS:
        try:
            weight = state_dict[f"{prefix}{position}.weight"]
            bias = state_dict[f"{prefix}{position}.bias"]
        except KeyError as error:
            raise ValueError(
                f"expected a five-layer MLP in {path}; {error.args[0]} is missing"
            ) from error
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers.append(layer)
    return torch.nn.Sequential(*layers)
