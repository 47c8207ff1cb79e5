"""Our loss against one written out from the papers, with diffusers and transformers called bare."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusion_families import (
    FAMILIES,
    PROMPTS,
    build,
    disturbed,
    dpo_loss,
    fixed_pairs,
    pixels_of,
    predictions,
)
from tiny_pipelines import RESOLUTION
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from fifa_ray.dpo.noising import pair_noise

BETA = 40.0


def tokens(folder: Path, part: str, kind: Any, length: int) -> torch.Tensor:
    tokenizer = kind.from_pretrained(folder / part)
    return tokenizer(
        PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def clip(folder: Path, number: str, kind: Any) -> Any:
    model = kind.from_pretrained(folder / f"text_encoder{number}").eval()
    ids = tokens(folder, f"tokenizer{number}", CLIPTokenizer, 77)
    return model(ids, output_hidden_states=True)


def t5(folder: Path, number: str, length: int) -> torch.Tensor:
    model = T5EncoderModel.from_pretrained(folder / f"text_encoder{number}").eval()
    return model(tokens(folder, f"tokenizer{number}", T5Tokenizer, length)).last_hidden_state


def latents_of(folder: Path) -> torch.Tensor:
    """Posterior draws in the denoiser's scale: 4 images with the draws of pairs 0 and 1."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    posterior = vae.encode(pixels_of(4)).latent_dist
    draws = pair_noise(0, range(2), (2, *posterior.mean.shape[1:]), "posterior")
    fresh = torch.stack([draws[0, 0], draws[1, 0], draws[0, 1], draws[1, 1]])
    sample = posterior.mean + posterior.std * fresh
    return (sample - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def discrete(folder: Path, latents: Any, noise: Any, steps: Any) -> tuple[Any, Any]:
    """Noisy latents and target of SD and SDXL by diffusers' scheduler."""
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    noisy = scheduler.add_noise(latents, noise, steps)
    if scheduler.config.prediction_type == "epsilon":
        return noisy, noise
    return noisy, scheduler.get_velocity(latents, noise, steps)


def unet_predictions(folder: Path, denoiser: Any, noisy: Any, steps: Any) -> torch.Tensor:
    if not (folder / "text_encoder_2").exists():
        text = clip(folder, "", CLIPTextModel).last_hidden_state
        return denoiser(noisy, steps, encoder_hidden_states=torch.cat([text, text])).sample
    first = clip(folder, "", CLIPTextModel)
    second = clip(folder, "_2", CLIPTextModelWithProjection)
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    sizes = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * 4)
    return denoiser(
        noisy,
        steps,
        encoder_hidden_states=torch.cat([text, text]),
        added_cond_kwargs={
            "text_embeds": torch.cat([second.text_embeds, second.text_embeds]),
            "time_ids": sizes,
        },
    ).sample


def sd3_predictions(folder: Path, denoiser: Any, noisy: Any, steps: Any) -> torch.Tensor:
    first = clip(folder, "", CLIPTextModelWithProjection)
    second = clip(folder, "_2", CLIPTextModelWithProjection)
    third = t5(folder, "_3", 256)
    of_clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    padded = torch.zeros(2, 77, third.shape[-1])
    padded[..., : of_clip.shape[-1]] = of_clip
    text = torch.cat([padded, third], dim=1)
    pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
    return denoiser(
        hidden_states=noisy,
        timestep=steps,
        encoder_hidden_states=torch.cat([text, text]),
        pooled_projections=torch.cat([pooled, pooled]),
    ).sample


def flux_predictions(folder: Path, denoiser: Any, noisy: Any, steps: Any) -> torch.Tensor:
    pooled = clip(folder, "", CLIPTextModel).pooler_output
    text = t5(folder, "_2", 512)
    count, channels, height, width = noisy.shape
    rows, columns = height // 2, width // 2
    # Each token is a 2 x 2 patch: channel by channel, row by row.
    packed = np.empty((count, rows * columns, channels * 4), np.float32)
    for row in range(rows):
        for column in range(columns):
            patch = noisy[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            packed[:, row * columns + column] = patch.reshape(count, -1).numpy()
    places = [[0, row, column] for row in range(rows) for column in range(columns)]
    guided = denoiser.config.guidance_embeds
    out = denoiser(
        hidden_states=torch.from_numpy(packed),
        timestep=steps / 1000,
        guidance=torch.ones(count) if guided else None,
        encoder_hidden_states=torch.cat([text, text]),
        pooled_projections=torch.cat([pooled, pooled]),
        img_ids=torch.tensor(places).float(),
        txt_ids=torch.zeros(512, 3),
    ).sample
    unpacked = torch.empty_like(noisy)
    for row in range(rows):
        for column in range(columns):
            patch = out[:, row * columns + column].reshape(count, channels, 2, 2)
            unpacked[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch
    return unpacked


CALLS = {
    "sd-epsilon": ("unet", UNet2DConditionModel, unet_predictions),
    "sd-v": ("unet", UNet2DConditionModel, unet_predictions),
    "sdxl": ("unet", UNet2DConditionModel, unet_predictions),
    "sd3": ("transformer", SD3Transformer2DModel, sd3_predictions),
    "flux-dev": ("transformer", FluxTransformer2DModel, flux_predictions),
    "flux-schnell": ("transformer", FluxTransformer2DModel, flux_predictions),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_the_published_formula(family, tmp_path):
    folder = FAMILIES[family](tmp_path)
    model = build(folder)
    pairs = fixed_pairs(model)
    policy_weights = disturbed(model)
    model.load_trainable_state(policy_weights)

    part, kind, predict = CALLS[family]
    reference = kind.from_pretrained(folder / part)
    policy = kind.from_pretrained(folder / part)
    policy.load_state_dict({**policy.state_dict(), **policy_weights})
    with torch.no_grad():
        latents = latents_of(folder)
        noise, steps = pairs.noise, pairs.timesteps
        if part == "unet":
            noisy, target = discrete(folder, latents, noise, steps)
        else:
            sigma = (steps / 1000).view(-1, 1, 1, 1)
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        found = predict(folder, policy, noisy, steps)
        errors = ((found - target).double() ** 2).mean(dim=(1, 2, 3)).numpy()
        of_reference = predict(folder, reference, noisy, steps)
        ref_errors = ((of_reference - target).double() ** 2).mean(dim=(1, 2, 3)).numpy()
        ours = dpo_loss(model, pairs, dpo_beta=BETA).item()
        torch.testing.assert_close(pairs.latents, latents, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(predictions(model, pairs), found, rtol=1e-5, atol=1e-5)
    chosen, rejected = errors[:2] - ref_errors[:2], errors[2:] - ref_errors[2:]
    logit = -BETA * (chosen - rejected)
    assert abs(logit).max() > 0.01  # the policy is not the reference
    expected = -np.log(1 / (1 + np.exp(-logit))).mean()
    assert ours == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_noising_is_the_schedulers_own(family, tmp_path):
    folder = FAMILIES[family](tmp_path)
    model = build(folder, parts="denoiser")
    latents = pair_noise(1, range(6), model.latent_shape)
    noise = pair_noise(2, range(6), model.latent_shape)
    steps = model.sample_timesteps(6, torch.Generator().manual_seed(3))
    ours = model.add_noise(latents, noise, steps)
    if model.family in ("sd", "sdxl"):
        expected, _ = discrete(folder, latents, noise, steps)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        if scheduler.config.use_dynamic_shifting:  # its table knows no resolution
            scheduler.set_timesteps(1000, mu=model_shift())
            nearest = (scheduler.timesteps[None] - steps[:, None]).abs().argmin(1)
            torch.testing.assert_close(scheduler.timesteps[nearest], steps, rtol=1e-3, atol=1.0)
            steps = scheduler.timesteps[nearest]
            ours = model.add_noise(latents, noise, steps)
        expected = scheduler.scale_noise(latents, steps, noise)
    torch.testing.assert_close(ours, expected)


def model_shift() -> float:
    """FLUX's mu for 16 tokens: linear between 0.5 at 256 and 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
