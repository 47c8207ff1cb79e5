"""The parts of the demo's Stable-Diffusion-shaped pipeline, untrained, and how they are saved.

64 px images, 16 x 16 x 4 latents (an autoencoder of factor 4), a UNet with cross-attention at 4 x
4, and as text encoder the text tower of a CLIP.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS, LATENT_SIZE = 4, 16
# Nearly all of the demo's prompts fit; every further token costs time in each cross-attention.
MAX_PROMPT_TOKENS = 24
# The betas that Stable Diffusion was trained with.
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
}


def build_unet(text_width: int) -> UNet2DConditionModel:
    """An untrained denoiser of `LATENT_SIZE` latents and text states of `text_width` numbers."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
        use_linear_projection=True,
    )


def text_tower(clip: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text encoder of a trained CLIP, for prompts of `MAX_PROMPT_TOKENS`."""
    tokenizer = CLIPTokenizer.from_pretrained(clip, model_max_length=MAX_PROMPT_TOKENS)
    source = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    text_config: Any = source.config.text_config
    settings = text_config.to_dict()
    settings |= {"max_position_embeddings": MAX_PROMPT_TOKENS, "dtype": "float32"}
    encoder = CLIPTextModel(CLIPTextConfig(**settings))
    state = source.text_model.state_dict()
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    state[name] = state[name][:MAX_PROMPT_TOKENS]
    target = getattr(encoder, "text_model", encoder)
    target.load_state_dict({k: v for k, v in state.items() if not k.endswith("position_ids")})
    return tokenizer, encoder


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write a pipeline folder in the hub's format, weights as float16; the modules stay as are."""
    vae, unet, text_encoder = (copy.deepcopy(part).half() for part in (vae, unet, text_encoder))
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    # transformers computes in the type named here, diffusers in float32 unless told otherwise.
    path = folder / "text_encoder" / "config.json"
    settings = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
