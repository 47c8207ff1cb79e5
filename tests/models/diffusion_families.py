"""The families of tiny pipelines, and one fixed batch of pairs for each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import RESOLUTION, save_tiny_flux, save_tiny_sd, save_tiny_sd3, save_tiny_sdxl
from torch import Tensor

from fifa_ray.config import LoraConfig
from fifa_ray.dpo.loss import denoising_error, diffusion_dpo_loss
from fifa_ray.dpo.noising import pair_noise, pair_timesteps
from fifa_ray.models.diffusion import DiffusionModel, build_diffusion_model

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd-epsilon": save_tiny_sd,
    "sd-v": lambda folder: save_tiny_sd(folder, prediction_type="v_prediction"),
    "sdxl": save_tiny_sdxl,
    "sd3": save_tiny_sd3,
    "flux-dev": save_tiny_flux,
    "flux-schnell": lambda folder: save_tiny_flux(folder, guidance_embeds=False),
}
LORA = LoraConfig(rank=2, alpha=6.0)
# The second prompt is longer than any CLIP reads.
PROMPTS = ["a red cat on the house", "two green boats in the rain " * 20]


def build(folder: Path, **settings: Any) -> Any:
    return build_diffusion_model(str(folder), resolution=RESOLUTION, **settings)


def pixels_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, RESOLUTION, RESOLUTION, generator=generator) * 2 - 1


@dataclass(frozen=True)
class FixedPairs:
    """Two pairs: rows are both chosen images, then both rejected ones."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor]


def fixed_pairs(model: DiffusionModel) -> FixedPairs:
    mean, std = model.encode_images(pixels_of(4))
    fresh = pair_noise(0, range(2), (2, *model.latent_shape), "posterior")
    return FixedPairs(
        latents=mean + std * fresh.transpose(0, 1).flatten(0, 1),
        noise=pair_noise(0, range(2), model.latent_shape).repeat(2, 1, 1, 1),
        timesteps=pair_timesteps(0, range(2), model.sample_timesteps).repeat(2),
        conditioning={k: torch.cat([v, v]) for k, v in model.encode_prompts(PROMPTS).items()},
    )


def predictions(model: Any, pairs: FixedPairs, denoiser: Any = None) -> Tensor:
    """Of the policy, or of another denoiser."""
    noisy = model.add_noise(pairs.latents, pairs.noise, pairs.timesteps)
    denoiser = model.denoiser if denoiser is None else denoiser
    return model.predict(denoiser, noisy, pairs.timesteps, pairs.conditioning)


@torch.no_grad()
def reference_predictions(model: Any, pairs: FixedPairs) -> Tensor:
    with model.reference() as reference:
        return predictions(model, pairs, reference)


def dpo_loss(
    model: Any, pairs: FixedPairs, *, dpo_beta: float = 100.0, denoiser: Any = None
) -> Tensor:
    target = model.target(pairs.latents, pairs.noise, pairs.timesteps)
    errors = denoising_error(predictions(model, pairs, denoiser), target).chunk(2)
    ref_errors = denoising_error(reference_predictions(model, pairs), target).chunk(2)
    return diffusion_dpo_loss(*errors, *ref_errors, dpo_beta=dpo_beta)[0]


def train(model: Any, pairs: FixedPairs, steps: int = 3, rate: float = 1e-3) -> list[float]:
    """Losses before each of some steps of AdamW, and after the last."""
    trained = [p for p in model.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = dpo_loss(model, pairs)
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, dpo_loss(model, pairs).item()]


def disturbed(model: Any, scale: float = 0.02) -> dict[str, Tensor]:
    """Trained weights plus noise, so that the policy is no longer the reference."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: values + scale * torch.randn(values.shape, generator=generator)
        for name, values in model.trainable_state().items()
    }
