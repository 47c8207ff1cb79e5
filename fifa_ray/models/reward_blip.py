"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while looking at the image.

A ViT-L/16 encodes the image, BLIP's BERT encoder reads the prompt with cross-attention to it, and a
linear stack turns the first token into a number that is standardised with the authors' two
constants. An image is encoded once and then read with each of its prompts. The authors' checkpoint
(ImageReward.pt: `blip.visual_encoder.*`, `blip.text_encoder.*`, `mlp.layers.*`) is converted to
transformers' BLIP modules on loading; the two projections that scoring never uses are dropped.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fifa_ray.models.batching import (
    LargestBatch,
    checked_indices,
    compute_dtype,
    finite_or_nan,
    normalized_pixels,
    prompts_by_image,
)
from fifa_ray.models.image_transform import OPENAI_CLIP_TRANSFORM
from fifa_ray.models.reward import AUTHORS_PROCESSOR, RewardModelInfo
from fifa_ray.models.reward_aesthetic import linear_stack
from fifa_ray.models.weight_files import (
    checkpoint_file,
    describe_weights,
    filled_model,
    load_state_dict,
    processor_folder,
)

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

REWARD_MEAN = 0.16717362830052426
REWARD_STD = 1.0333394966054072
MAX_TEXT_TOKENS = 35

# Heads cannot be read from the shapes; both towers have this width of a head.
_HEAD_WIDTH = 64
_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)


class ImageReward:
    """Standardised reward of an image for a prompt; a `RewardModel`."""

    def __init__(
        self,
        vision: Any,
        text: Any,
        mlp: torch.nn.Module,
        tokenizer: Any,
        source: str,
        file: Path,
        *,
        device: str,
        dtype: torch.dtype,
        batch_size: int | None,
    ) -> None:
        """`vision`: BlipVisionModel, `text`: BlipTextModel without a pooler, `mlp`: float32."""
        self._vision = vision.to(device=device, dtype=dtype).eval()
        self._text = text.to(device=device, dtype=dtype).eval()
        self._mlp = mlp.to(device=device, dtype=torch.float32).eval()
        self._tokenizer = tokenizer
        self._source, self._file = source, file
        self._device, self._dtype = device, dtype
        on_gpu = torch.device(device).type == "cuda"
        self._batch = LargestBatch(batch_size or (128 if on_gpu else 16), "images")

    @cached_property
    def info(self) -> RewardModelInfo:
        """See `RewardModelInfo`; reads the weight file once to hash it."""
        return RewardModelInfo(
            kind="imagereward",
            name="ImageReward",
            version="v1.0",
            preprocessing=OPENAI_CLIP_TRANSFORM.description,
            scale=f"(r - {REWARD_MEAN}) / {REWARD_STD}, mostly -2 to 2",
            dtype=str(self._dtype).removeprefix("torch."),
            weights=describe_weights(self._source, [self._file]),
        )

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """See `RewardModel.score`."""
        image_index, prompt_index = checked_indices(
            image_index, len(images), prompt_index, len(prompts)
        )
        if not len(image_index):
            return np.empty(0, np.float32)
        groups, place = prompts_by_image(image_index, prompt_index)

        def forward(batch: Sequence[tuple[int, np.ndarray]]) -> torch.Tensor:
            embeddings = self._encode_images([images[image] for image, _ in batch])
            of_image = torch.tensor(
                [at for at, (_, texts) in enumerate(batch) for _ in texts], device=self._device
            )
            texts = [prompts[text] for _, of_one in batch for text in of_one]
            return torch.cat(
                [
                    self._read(
                        embeddings[of_image[at : at + len(batch)]], texts[at : at + len(batch)]
                    )
                    for at in range(0, len(texts), len(batch))
                ]
            )

        with torch.inference_mode():
            return finite_or_nan(torch.cat(self._batch.run(groups, forward)))[place]

    def _encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        transform = OPENAI_CLIP_TRANSFORM
        pixels = normalized_pixels(
            images, transform.pixel_mean, transform.pixel_std, self._device, self._dtype
        )
        return self._vision(pixel_values=pixels).last_hidden_state

    def _read(self, image_embeddings: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        # The authors pad to 35 tokens. Padding is masked and only the first token is read, so
        # padding to the longest text of the batch gives the same.
        tokens = self._tokenizer(
            list(texts),
            padding="longest",
            truncation=True,
            max_length=MAX_TEXT_TOKENS,
            return_tensors="pt",
        ).to(self._device)
        hidden = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=image_embeddings,
        ).last_hidden_state
        return (self._mlp(hidden[:, 0].float()).squeeze(-1) - REWARD_MEAN) / REWARD_STD


def load_image_reward(
    weights: str,
    *,
    device: str,
    dtype: str,
    batch_size: int | None,
    trust_remote_code: bool,
    revision: str | None = None,
    processor: str | None = None,
) -> ImageReward:
    """ImageReward from the authors' checkpoint (a file, or a folder or hub name that holds it).

    `processor`: hub name or folder of the BERT tokenizer; default the weights' own or the authors'
    (bert-base-uncased).
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

    file = checkpoint_file(weights, ["ImageReward.safetensors", "ImageReward.pt"], revision)
    state_dict = load_state_dict(file)
    vision = _renamed(_part(state_dict, "blip.visual_encoder.", file))
    text = _part(state_dict, "blip.text_encoder.", file)
    text.pop("embeddings.position_ids", None)  # A buffer that newer versions do not store.
    processors = processor_folder(
        str(file.parent), processor, None, AUTHORS_PROCESSOR["imagereward"]
    )
    tokenizer = AutoTokenizer.from_pretrained(processors, trust_remote_code=trust_remote_code)
    # BLIP's two extra tokens, the last rows of its embedding.
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("[DEC]", "[ENC]")])
    return ImageReward(
        filled_model(BlipVisionModel, _vision_config(vision), vision, str(file)),
        filled_model(
            BlipTextModel,
            _text_config(text, vision["embeddings.class_embedding"].shape[-1]),
            text,
            str(file),
            add_pooling_layer=False,
        ),
        linear_stack(state_dict, "mlp.layers.", file),
        tokenizer,
        weights,
        file,
        device=device,
        dtype=compute_dtype(dtype, device),
        batch_size=batch_size,
    )


def _part(state_dict: dict[str, torch.Tensor], prefix: str, file: Path) -> dict[str, torch.Tensor]:
    part = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    if not part:
        raise ValueError(f"expected weights named {prefix}* in {file}, found none")
    return part


def _renamed(vision: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in vision.items():
        for pattern, replacement in _VISION_NAMES:
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", replacement, name)
                break
        renamed[name] = value
    return renamed


def _vision_config(vision: dict[str, torch.Tensor]) -> "BlipVisionConfig":
    from transformers import BlipVisionConfig

    width, _, patch_px, _ = vision["embeddings.patch_embedding.weight"].shape
    grid = round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_num_layers(vision, "encoder.layers."),
        num_attention_heads=width // _HEAD_WIDTH,
        patch_size=patch_px,
        image_size=grid * patch_px,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(text: dict[str, torch.Tensor], vision_width: int) -> "BlipTextConfig":
    from transformers import BlipTextConfig

    vocabulary, width = text["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_num_layers(text, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # transformers builds cross-attention only then; the call is not causal.
    )


def _num_layers(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    return len(
        {name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)}
    )
