"""Text-to-image models as preference training sees them, and how one is opened.

A pipeline of the hub's format (a folder with a model_index.json) becomes a `DiffusionModel`: its
denoiser, the one module that is trained; encoders, which are frozen; and the family's own noising,
target and conditioning. SD 1.x and 2.x (epsilon and v), SDXL, SD3 and FLUX differ in nothing else.
The adapters load torch and diffusers, so they are imported only when one is built.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

Family = Literal["sd", "sdxl", "sd3", "flux"]

# Class of a pipeline in model_index.json -> its family here.
PIPELINE_FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}


class DiffusionModel(Protocol):
    """A pipeline taken apart for training. N counts images, all tensors are on `device`."""

    family: Family
    device: "torch.device"
    # Compute type of the forward pass; weights that are trained stay in float32.
    dtype: "torch.dtype"
    # The UNet or transformer: what the optimiser, DDP, EMA and checkpoints hold.
    denoiser: "torch.nn.Module"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents at the training resolution."""
        ...

    def encode_images(self, pixels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Posterior mean and standard deviation, float32 (N, *latent_shape) each.

        `pixels` is float32 (N, 3, height, width) in [-1, 1]. Both are in the denoiser's own scale
        (scaling and shift factors applied), so latents = mean + std * noise.
        """
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> "dict[str, torch.Tensor]":
        """Conditioning of prompts (with "" for dropped ones): tensors with N rows each.

        Names are the adapter's; it gets them back, stacked by row, in `predict`.
        """
        ...

    def sample_timesteps(self, count: int, generator: "torch.Generator") -> "torch.Tensor":
        """Timesteps of `count` pairs (N,), as the family trains: int64, or float32 sigmas' index.

        The generator is on the CPU and so is the result: equal seeds, equal timesteps anywhere.
        """
        ...

    def add_noise(
        self, latents: "torch.Tensor", noise: "torch.Tensor", timesteps: "torch.Tensor"
    ) -> "torch.Tensor":
        """Noisy latents of the family's forward process, float32, shaped like `latents`."""
        ...

    def target(
        self, latents: "torch.Tensor", noise: "torch.Tensor", timesteps: "torch.Tensor"
    ) -> "torch.Tensor":
        """What the denoiser should predict (epsilon, v or noise - latents), float32."""
        ...

    def predict(
        self,
        denoiser: "torch.nn.Module",
        noisy: "torch.Tensor",
        timesteps: "torch.Tensor",
        conditioning: "Mapping[str, torch.Tensor]",
    ) -> "torch.Tensor":
        """The denoiser's prediction, shaped like `noisy`, in `dtype`.

        `denoiser` is this model's own, bare or wrapped for DDP, or its reference.
        """
        ...

    def reference(self) -> "AbstractContextManager[torch.nn.Module]":
        """The frozen denoiser that the policy is tied to.

        A copy made before training for full fine-tuning; the same module with its adapters off
        inside the context for LoRA. Call its `predict` under torch.no_grad().
        """
        ...

    def trainable_state(self) -> "dict[str, torch.Tensor]":
        """Weights that training changes: all of the denoiser's, or its adapters' alone."""
        ...

    def load_trainable_state(self, state: "Mapping[str, torch.Tensor]") -> None:
        """Put back what `trainable_state` returned. Raises ValueError when names differ."""
        ...

    def save(self, folder: Path) -> None:
        """Write what diffusers opens: a whole pipeline folder, or LoRA weights, in safetensors.

        Full fine-tuning: `DiffusionPipeline.from_pretrained(folder)`; LoRA:
        `pipeline.load_lora_weights(folder)`.
        """
        ...
