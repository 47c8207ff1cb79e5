"""Text-to-image models as preference training sees them, and how one is opened.

A pipeline of the hub's format (a folder with a model_index.json) becomes a `DiffusionModel`: its
denoiser, the one module that is trained; encoders, which are frozen; and the family's own noising,
target and conditioning. SD 1.x and 2.x (epsilon and v), SDXL, SD3 and FLUX differ in nothing else.
The adapters load torch and diffusers, so they are imported only when one is built.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from fifa_ray.config import LoraConfig

Family = Literal["sd", "sdxl", "sd3", "flux"]
# What of a pipeline is loaded: the rest takes neither memory nor time.
Parts = Literal["all", "encoders", "denoiser"]

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
        (scaling and shift factors applied), so latents = mean + std * noise. The batch is encoded
        at once: split it to bound the memory. Raises ValueError for pixels of another resolution.
        """
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> "dict[str, torch.Tensor]":
        """Conditioning of prompts (with "" for dropped ones): tensors in `dtype`, N rows each.

        Names are the adapter's; it gets them back, stacked by row, in `predict`. Prompts that are
        too long are cut where the pipeline cuts them.
        """
        ...

    def sample_timesteps(self, count: int, generator: "torch.Generator") -> "torch.Tensor":
        """Timesteps of `count` pairs (count,), as the family trains.

        int64 places in the noise schedule (SD, SDXL) or float32 1000 sigma (SD3, FLUX). The
        generator is on the CPU and so is the result: equal seeds, equal timesteps anywhere.
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
        inside the context for LoRA. Give it to `predict` under torch.no_grad(). Before the first
        step it predicts exactly what the policy does, in any `dtype`.
        """
        ...

    def trainable_state(self) -> "dict[str, torch.Tensor]":
        """Weights that training changes, float32: all of the denoiser's, or its adapters' alone.

        The tensors are the live ones, on `device`: copy what has to stay as it is now.
        """
        ...

    def load_trainable_state(self, state: "Mapping[str, torch.Tensor]") -> None:
        """Put back what `trainable_state` returned, from any device.

        Raises ValueError when names or shapes differ.
        """
        ...

    def save(self, folder: Path, state: "Mapping[str, torch.Tensor] | None" = None) -> None:
        """Write what diffusers opens, in safetensors, into a local folder (made if need be).

        Full fine-tuning: a whole pipeline, `DiffusionPipeline.from_pretrained(folder)`; its other
        components, a safety checker included, are copied from the model's folder. LoRA:
        pytorch_lora_weights.safetensors, `pipeline.load_lora_weights(folder)`. With a `state`, as
        `trainable_state` names it, its weights are written instead of the present ones (EMA).
        """
        ...

    def unload_encoders(self) -> None:
        """Free the VAE and the text encoders; encoding raises RuntimeError from then on."""
        ...


def build_diffusion_model(
    source: str,
    *,
    resolution: int,
    lora: "LoraConfig | None" = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
    revision: str | None = None,
    variant: str | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    parts: Parts = "all",
) -> DiffusionModel:
    """Open a pipeline for training, from a local folder or a hub name.

    `resolution` is the side of the square images in pixels. `dtype` is the compute type (None:
    float32): with a half type the forward pass runs under autocast, frozen encoders and the base of
    adapters are stored in it, trained weights in float32. `seed` draws the first adapter weights.
    `parts`: "encoders" to fill a cache, without the denoiser's weights; "denoiser" to train from
    one, without VAE and text encoders.

    The denoiser comes in training mode, its trained weights with requires_grad, the rest frozen.

    Raises FileNotFoundError where there is no pipeline, OSError where its weights are not in
    safetensors, and ValueError for a pipeline of another family, with components that would need
    code of its folder, or for a resolution that the model cannot have.
    """
    import torch

    from fifa_ray.models.diffusion_files import pipeline_family, pipeline_folder
    from fifa_ray.models.diffusion_flow import Flux, StableDiffusion3
    from fifa_ray.models.diffusion_sd import StableDiffusion, StableDiffusionXL

    folder = pipeline_folder(source, revision, variant)
    adapters: dict[Family, Callable[..., DiffusionModel]] = {
        "sd": StableDiffusion,
        "sdxl": StableDiffusionXL,
        "sd3": StableDiffusion3,
        "flux": Flux,
    }
    return adapters[pipeline_family(folder)](
        folder,
        resolution=resolution,
        lora=lora,
        device=torch.device(device),
        dtype=dtype or torch.float32,
        variant=variant,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        parts=parts,
    )
