"""Stable Diffusion 1.x and 2.x, and SDXL: a UNet and discrete diffusion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from fifa_ray.dpo.noising import diffusion_noised, velocity_target
from fifa_ray.models.diffusion import Family
from fifa_ray.models.diffusion_pipeline import PipelineModel


class StableDiffusion(PipelineModel):
    """SD 1.x and 2.x. What the UNet predicts, noise or velocity, is the scheduler's word."""

    family: Family = "sd"
    denoiser_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        from diffusers import DDPMScheduler

        # The folder's own scheduler is a sampler; the noise levels of training are in its settings.
        training = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self._alpha_bar = training.alphas_cumprod.float().to(self.device)
        self.prediction_type: str = training.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"expected a scheduler with prediction_type epsilon or v_prediction, found "
                f"{self.prediction_type} in {folder / 'scheduler'}"
            )

    def sample_timesteps(self, count: int, generator: Generator) -> Tensor:
        """Uniform over the schedule, int64; see `DiffusionModel`."""
        return torch.randint(0, len(self._alpha_bar), (count,), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `DiffusionModel`."""
        return diffusion_noised(latents.float(), noise.float(), self._levels(timesteps))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `DiffusionModel`."""
        if self.prediction_type == "epsilon":
            return noise.float()
        return velocity_target(latents.float(), noise.float(), self._levels(timesteps))

    def _levels(self, timesteps: Tensor) -> Tensor:
        return self._alpha_bar[timesteps.to(self.device)]

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        texts, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": texts}

    def _predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Mapping[str, Tensor]
    ) -> Tensor:
        return denoiser(noisy, timesteps, encoder_hidden_states=texts["text"], return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL. Its VAE overflows in float16, so it runs in float32 always.

    The UNet is also told an image's original size, where its crop begins and its target size. They
    are (resolution, resolution), (0, 0) and (resolution, resolution) for every image, as the
    pipeline says when it draws one: the policy is trained in the very condition it is used in.
    """

    family: Family = "sdxl"
    vae_in_float32: ClassVar[bool] = True

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        texts, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            # What this pipeline guides against: zeros, not the encoding of an empty prompt.
            written = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
            texts, pooled = texts * written.view(-1, 1, 1), pooled * written.view(-1, 1)
        return {"text": texts, "pooled_text": pooled}

    def _predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Mapping[str, Tensor]
    ) -> Tensor:
        side = self.resolution
        sizes = torch.tensor([side, side, 0, 0, side, side], device=self.device).float()
        return denoiser(
            noisy,
            timesteps,
            encoder_hidden_states=texts["text"],
            added_cond_kwargs={
                "text_embeds": texts["pooled_text"],
                "time_ids": sizes.expand(len(noisy), -1),
            },
            return_dict=False,
        )[0]
