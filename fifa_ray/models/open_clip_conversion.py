"""open_clip's CLIP checkpoints as a transformers `CLIPModel`: other names, the same function.

Covers plain transformers towers (ViT-B to ViT-bigG with class-token pooling), which is what HPSv2
and HPSv2.1 are. What differs from OpenAI's own models: the activation is the exact GELU, and query,
key and value of each layer are stored as one matrix. The pooled text token is the highest id, which
is the end-of-text token.
"""

import math
import re
from typing import TYPE_CHECKING

import torch

from fifa_ray.models.weight_files import filled_model

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

# Heads cannot be read from the shapes; these are ViT-H/14's widths of a head.
VISION_HEAD_WIDTH = 80
TEXT_HEAD_WIDTH = 64

_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUTER_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# open_clip multiplies features by these from the right, transformers stores linear layers.
_PROJECTIONS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def clip_from_open_clip(
    state_dict: dict[str, torch.Tensor],
    *,
    vision_head_width: int = VISION_HEAD_WIDTH,
    text_head_width: int = TEXT_HEAD_WIDTH,
) -> "CLIPModel":
    """A CLIPModel on the CPU in float32 with the weights of an open_clip checkpoint.

    Raises ValueError when names are missing or left over, so that no tower is half random.
    """
    from transformers import CLIPModel

    state_dict = {name: value for name, value in state_dict.items() if name != "attn_mask"}
    needed = {*_OUTER_NAMES, *_PROJECTIONS}
    if missing := sorted(needed - state_dict.keys()):
        raise ValueError(
            f"expected an open_clip checkpoint of a CLIP with two transformer towers; it lacks "
            f"{', '.join(missing[:5])}"
        )
    converted: dict[str, torch.Tensor] = {}
    for name, value in state_dict.items():
        converted.update(_converted(name, value))
    config = _config(state_dict, vision_head_width, text_head_width)
    return filled_model(CLIPModel, config, converted, "of open_clip")


def _converted(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if name in _OUTER_NAMES:
        return {_OUTER_NAMES[name]: value}
    if name in _PROJECTIONS:
        return {_PROJECTIONS[name]: value.T.contiguous()}
    block = _BLOCK.fullmatch(name)
    if block is None:
        return {name: value}  # Reported as left over.
    tower = "vision_model" if block[1] else "text_model"
    layer = f"{tower}.encoder.layers.{block[2]}"
    if block[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = block[3].removeprefix("attn.in_proj_")
        return {
            f"{layer}.self_attn.{part}_proj.{kind}": piece.contiguous()
            for part, piece in zip("qkv", value.chunk(3), strict=True)
        }
    module, _, kind = block[3].rpartition(".")
    return {f"{layer}.{_BLOCK_NAMES.get(module, module)}.{kind}": value}


def _config(
    state_dict: dict[str, torch.Tensor], vision_head_width: int, text_head_width: int
) -> "CLIPConfig":
    from transformers import CLIPConfig

    vision_width, _, patch_px, _ = state_dict["visual.conv1.weight"].shape
    grid = math.isqrt(state_dict["visual.positional_embedding"].shape[0] - 1)
    vocabulary, text_width = state_dict["token_embedding.weight"].shape
    embedding_width = state_dict["text_projection"].shape[1]
    return CLIPConfig(
        projection_dim=embedding_width,
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": _mlp_width(state_dict, "visual.transformer"),
            "num_hidden_layers": _num_layers(state_dict, "visual.transformer"),
            "num_attention_heads": vision_width // vision_head_width,
            "patch_size": patch_px,
            "image_size": grid * patch_px,
            "projection_dim": embedding_width,
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": _mlp_width(state_dict, "transformer"),
            "num_hidden_layers": _num_layers(state_dict, "transformer"),
            "num_attention_heads": text_width // text_head_width,
            "vocab_size": vocabulary,
            "max_position_embeddings": state_dict["positional_embedding"].shape[0],
            "projection_dim": embedding_width,
            "hidden_act": "gelu",
            # The last two ids of CLIP's vocabulary; the pooled token is the first end-of-text.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
    )


def _num_layers(state_dict: dict[str, torch.Tensor], tower: str) -> int:
    prefix = f"{tower}.resblocks."
    layers = {name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)}
    return len(layers)


def _mlp_width(state_dict: dict[str, torch.Tensor], tower: str) -> int:
    return state_dict[f"{tower}.resblocks.0.mlp.c_fc.weight"].shape[0]
