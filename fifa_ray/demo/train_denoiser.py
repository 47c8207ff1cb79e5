"""Train the UNet of the demo's pipeline, and its text encoder with it, on cached latents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fifa_ray.demo.pipeline_parts import NOISE_SCHEDULE
from fifa_ray.demo.resumable import rows_of_step, run_steps, step_generator

# A text is encoded once for all pictures of its prompt in a step.
PROMPTS_PER_STEP, PICTURES_PER_PROMPT = 32, 1
PEAK_RATE, EMA_DECAY = 1.2e-3, 0.998
PROMPT_DROPOUT = 0.1
# Weight of a timestep is min(SNR, this) / SNR (arXiv 2303.09556): steps with little noise, whose
# errors are small details, would drown those that decide what is in the picture.
MAX_SNR = 5.0


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    prompts: list[str],
    latents: tuple[np.ndarray, np.ndarray],
    *,
    checkpoint: Path,
    num_steps: int,
    seed: int,
    on_save: Callable[[int], None] = lambda step: None,
) -> float:
    """Train both modules in place; returns seconds of CPU.

    `latents` is (mean, standard deviation), each float32 (P, pictures, C, H, W) in the denoiser's
    scale, for P prompts. Each step draws fresh latents, timesteps and noise.
    """
    schedule = DDPMScheduler(**{k: v for k, v in NOISE_SCHEDULE.items() if k != "steps_offset"})
    alphas = schedule.alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=MAX_SNR) / snr
    tokens = tokenizer([*prompts, ""], padding="max_length", truncation=True, return_tensors="pt")
    means, deviations = latents

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = step_generator(seed, step)
        rng = np.random.default_rng([seed, step])
        rows = rows_of_step(step, PROMPTS_PER_STEP, len(prompts), seed)
        pictures = np.stack([rng.permutation(means.shape[1])[:PICTURES_PER_PROMPT] for _ in rows])
        flat = (np.repeat(rows, PICTURES_PER_PROMPT), pictures.ravel())
        mean, deviation = torch.from_numpy(means[flat]), torch.from_numpy(deviations[flat])
        clean = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        timesteps = torch.randint(0, len(alphas), (len(mean),), generator=generator)
        texts = np.append(rows, len(prompts))
        states = text_encoder(tokens["input_ids"][texts]).last_hidden_state
        text = np.repeat(np.arange(len(rows)), PICTURES_PER_PROMPT)
        text[rng.random(len(text)) < PROMPT_DROPOUT] = len(rows)
        noisy = schedule.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, states[text]).sample
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        loss = (weights[timesteps] * errors).mean()
        return loss, {"weighted error": loss.item(), "error": errors.mean().item()}

    unet.train()
    text_encoder.train()
    seconds = run_steps(
        {"unet": unet, "text_encoder": text_encoder}, loss_of_step, checkpoint=checkpoint,
        num_steps=num_steps, peak_rate=PEAK_RATE, ema_decay=EMA_DECAY, on_save=on_save,
    )  # fmt: skip
    unet.eval()
    text_encoder.eval()
    return seconds
