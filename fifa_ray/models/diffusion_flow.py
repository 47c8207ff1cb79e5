"""SD3, SD3.5 and FLUX: a transformer and rectified flow, x = (1 - sigma) latents + sigma noise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from fifa_ray.dpo.noising import flow_noised, flow_target
from fifa_ray.models.diffusion import Family
from fifa_ray.models.diffusion_pipeline import PipelineModel


class FlowModel(PipelineModel):
    """What SD3 and FLUX share. A timestep is 1000 sigma, as a float.

    Sigmas come from the scheduler's own table, shifted towards noise as it says for all images
    (`shift`) or for images of this size (`use_dynamic_shifting`), at places whose logit is standard
    normal: Esser et al. 2024, arXiv 2403.03206, section 3.1.
    """

    denoiser_name: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    patch_size: ClassVar[int] = 2

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = self.pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                "expected a FlowMatchEulerDiscreteScheduler, whose table of sigmas says how the "
                f"model is trained, found {type(scheduler).__name__} in {folder / 'scheduler'}"
            )
        self._num_timesteps: int = self.pipeline.scheduler.config.num_train_timesteps
        self._sigmas = self._shifted(self.pipeline.scheduler)

    def _shifted(self, scheduler: Any) -> Tensor:
        """The scheduler's sigmas (T,), from 1 down, for images of this resolution; on the CPU."""
        if not scheduler.config.use_dynamic_shifting:
            return scheduler.sigmas.clone()
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = scheduler.config
        _, height, width = self.latent_shape
        mu = calculate_shift(
            height * width // self.patch_size**2,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        return scheduler.time_shift(mu, 1.0, scheduler.sigmas)

    def sample_timesteps(self, count: int, generator: Generator) -> Tensor:
        """1000 sigma, float32; see the class and `DiffusionModel`."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        density = compute_density_for_timestep_sampling(
            "logit_normal", count, logit_mean=0.0, logit_std=1.0, generator=generator
        )
        places = (density * len(self._sigmas)).long().clamp_(max=len(self._sigmas) - 1)
        return self._sigmas[places] * self._num_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `DiffusionModel`."""
        return flow_noised(latents.float(), noise.float(), timesteps / self._num_timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `DiffusionModel`."""
        return flow_target(latents.float(), noise.float())


class StableDiffusion3(FlowModel):
    """SD3 and SD3.5: two CLIP encoders and, where the folder has it, a T5."""

    family: Family = "sd3"

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        texts, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
        )
        return {"text": texts, "pooled_text": pooled}

    def _predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Mapping[str, Tensor]
    ) -> Tensor:
        return denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=texts["text"],
            pooled_projections=texts["pooled_text"],
            return_dict=False,
        )[0]


class Flux(FlowModel):
    """FLUX.1: latents in packs of 2 x 2, a T5's text and a CLIP's pooled text.

    The dev model, distilled from guided sampling, is told a guidance scale. It is trained at 1,
    no guidance, because noise - latents is the velocity without guidance.
    """

    family: Family = "flux"
    latents_per_token: ClassVar[int] = 4
    guidance_scale: ClassVar[float] = 1.0

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        texts, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device)
        return {"text": texts, "pooled_text": pooled}

    def _predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Mapping[str, Tensor]
    ) -> Tensor:
        count, channels, height, width = noisy.shape
        text, side = texts["text"], self.resolution
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((count,), self.guidance_scale, device=self.device)
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / self._num_timesteps,
            guidance=guidance,
            pooled_projections=texts["pooled_text"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=self.device),
            img_ids=self.pipeline._prepare_latent_image_ids(
                count, height // 2, width // 2, self.device, torch.float32
            ),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(packed, side, side, self._vae_factor)
