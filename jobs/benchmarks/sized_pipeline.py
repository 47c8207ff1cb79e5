"""Stable Diffusion pipelines with random weights, of SD 1.5's size or its proportions in small."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Size:
    """Widths of the three networks and the side of the images in pixels."""

    unet: tuple[int, ...]
    heads: int
    vae: tuple[int, ...]
    text_width: int
    text_layers: int
    side: int


SIZES = {
    # A fifth of SD 1.5's widths, its depth, and images of a quarter of its side.
    "small": Size((64, 128, 256, 256), 8, (32, 64, 128, 128), 192, 12, 128),
    "sd15": Size((320, 640, 1280, 1280), 8, (128, 256, 512, 512), 768, 12, 512),
}


def save_sized_pipeline(folder: Path, size: Size) -> Path:
    """A pipeline of this size in hub format, with the demo's tokenizer."""
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from fifa_ray.demo.run import REWARD_WEIGHTS

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(REWARD_WEIGHTS)
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    text = CLIPTextConfig(
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=12,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        **ids,
    )
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    levels = len(size.vae)
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=size.vae,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=4,
            sample_size=size.side,
            scaling_factor=0.18215,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=size.side // 8,
            block_out_channels=size.unet,
            down_block_types=down,
            up_block_types=up,
            layers_per_block=2,
            attention_head_dim=size.heads,
            cross_attention_dim=size.text_width,
        ),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
