"""Train the autoencoder of the demo's pipeline on drawn pictures."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from fifa_ray.demo.resumable import rows_of_step, run_steps, step_generator

BATCH_SIZE, PEAK_RATE, EMA_DECAY = 4, 1e-3, 0.998
KL_WEIGHT = 1e-4
ENCODE_BATCH = 16


def to_network(pixels: np.ndarray) -> torch.Tensor:
    """float32 (B, 3, H, W) in [-1, 1] of uint8 pixels (B, H, W, 3)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def train_vae(
    vae: AutoencoderKL, pixels: np.ndarray, *, checkpoint: Path, num_steps: int, seed: int
) -> float:
    """Train in place on uint8 pixels (N, H, W, 3), then set the scaling factor; seconds of CPU.

    Squared errors, as absolute ones would let small objects vanish into their background. The
    divergence from a standard normal has about half the weight that a variational bound with errors
    of a twentieth would give it.
    """

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = step_generator(seed, step)
        drawn = to_network(pixels[rows_of_step(step, BATCH_SIZE, len(pixels), seed)])
        if step % 2:
            drawn = drawn.flip(3)
        latents = vae.encode(drawn).latent_dist
        error = F.mse_loss(vae.decode(latents.sample(generator)).sample, drawn)
        divergence = latents.kl().mean() / latents.mean[0].numel()
        loss = error + KL_WEIGHT * divergence
        return loss, {"squared error": error.item(), "divergence": divergence.item()}

    vae.train()
    seconds = run_steps(
        {"vae": vae}, loss_of_step, checkpoint=checkpoint, num_steps=num_steps,
        peak_rate=PEAK_RATE, ema_decay=EMA_DECAY,
    )  # fmt: skip
    vae.eval()
    means, deviations = encode(vae, pixels[:2_048])
    spread = float(np.sqrt(means.var() + np.square(deviations).mean()))
    vae.register_to_config(scaling_factor=1.0 / spread)
    return seconds


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the latents, float32 (N, C, H, W) each, not scaled."""
    means, deviations = [], []
    for at in range(0, len(pixels), ENCODE_BATCH):
        latents = vae.encode(to_network(pixels[at : at + ENCODE_BATCH])).latent_dist
        means.append(latents.mean.numpy())
        deviations.append(latents.std.numpy())
    return np.concatenate(means), np.concatenate(deviations)
