"""Tiny text-to-image pipelines with random weights, written the way the hub stores them.

Each function writes a whole pipeline folder that diffusers opens, in well under a second, and
returns it. All take 16-pixel images (8 x 8 latents; FLUX packs them into 4 x 4 patches) and share a
byte-level tokenizer, so any prompt works.

    from tiny_pipelines import save_tiny_sd            # in tests/models/
    from models.tiny_pipelines import save_tiny_sd     # elsewhere under tests/
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fifa_ray.demo.clip_tokenizer import train_tokenizer

RESOLUTION = 16
_PROMPTS = ["a red cat on the house", "a blue dog in the rain", "two green boats", "a piano"]
_TEXT_WIDTH = 16
# Of the betas that Stable Diffusion was trained with.
_SD_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def save_tiny_sd(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    seed: int = 0,
    safety_checker: bool = False,
    variant: str | None = None,
) -> Path:
    """SD 1.x's layout with epsilon and PNDM, SD 2.x's with v_prediction and DDIM."""
    torch.manual_seed(seed)
    schedule: dict[str, Any] = {**_SD_SCHEDULE, "prediction_type": prediction_type}
    if prediction_type == "epsilon":
        scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, set_alpha_to_one=False)
    else:
        scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False)
    tokenizer = _clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **_UNET, sample_size=RESOLUTION // 2, cross_attention_dim=_TEXT_WIDTH
        ),
        scheduler=scheduler,
        safety_checker=_safety_checker() if safety_checker else None,
        feature_extractor=_feature_extractor() if safety_checker else None,
        requires_safety_checker=safety_checker,
    )
    return _save(pipeline, folder, variant)


def save_tiny_sdxl(folder: Path, *, seed: int = 0, variant: str | None = None) -> Path:
    """SDXL's layout: two text encoders, pooled text and size embeddings, Euler."""
    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer()
    size_dim = 4
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            **_UNET,
            sample_size=RESOLUTION // 2,
            cross_attention_dim=2 * _TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=size_dim,
            projection_class_embeddings_input_dim=6 * size_dim + _TEXT_WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(**_SD_SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return _save(pipeline, folder, variant)


def save_tiny_sd3(folder: Path, *, seed: int = 0, variant: str | None = None) -> Path:
    """SD3's layout: two CLIP encoders and a T5, a joint transformer, flow matching."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=RESOLUTION // 2,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * _TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * _TEXT_WIDTH,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip_config(clip_tokenizer)),
        tokenizer=clip_tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(clip_tokenizer)),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=_t5(t5_tokenizer, 2 * _TEXT_WIDTH),
        tokenizer_3=t5_tokenizer,
    )
    return _save(pipeline, folder, variant)


def save_tiny_flux(
    folder: Path, *, guidance_embeds: bool = True, seed: int = 0, variant: str | None = None
) -> Path:
    """FLUX's layout: a CLIP and a T5, packed latents; guidance_embeds as in dev, off: schnell."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
        ),
        vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip_config(clip_tokenizer)),
        tokenizer=clip_tokenizer,
        text_encoder_2=_t5(t5_tokenizer, _TEXT_WIDTH),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_TEXT_WIDTH,
            pooled_projection_dim=_TEXT_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    return _save(pipeline, folder, variant)


_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}


def _vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=latent_channels,
        sample_size=RESOLUTION,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **config,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    return train_tokenizer(_PROMPTS * 3, 600)


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=4.0,
    )


def _t5_tokenizer() -> T5Tokenizer:
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in letters]
    pieces += [("▁" + word, -3.0) for text in _PROMPTS for word in text.split()]
    vocabulary = list(dict(pieces).items())
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def _t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _safety_checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**tower, "image_size": 32, "patch_size": 16}
    return StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=tower, projection_dim=8)
    )


def _feature_extractor() -> CLIPImageProcessor:
    size = {"height": 32, "width": 32}
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)


def _save(pipeline: Any, folder: Path, variant: str | None) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True, variant=variant)
    return folder
