"""What all families of text-to-image models share: loading, encoding, reference, saving."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fifa_ray.models.diffusion import Family, Parts
from fifa_ray.models.diffusion_files import copy_pipeline, empty_component, load_pipeline
from fifa_ray.models.diffusion_lora import add_adapters, save_adapters

if TYPE_CHECKING:
    from fifa_ray.config import LoraConfig

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class PipelineModel:
    """A diffusers pipeline as a `fifa_ray.models.diffusion.DiffusionModel`; see there.

    A family adds its noising, its target, and how prompts and the denoiser are called.
    """

    family: Family
    denoiser_name: ClassVar[str]
    # Module name endings that get adapters unless the settings name others: attention alone.
    lora_targets: ClassVar[tuple[str, ...]]
    # Pixels of an image's side are a multiple of the VAE's reduction times this.
    patch_size: ClassVar[int] = 1
    # Latent pixels that the family packs into one input of the denoiser.
    latents_per_token: ClassVar[int] = 1
    # The family's VAE overflows in half precision.
    vae_in_float32: ClassVar[bool] = False

    def __init__(
        self,
        folder: Path,
        *,
        resolution: int,
        lora: "LoraConfig | None",
        device: torch.device,
        dtype: torch.dtype,
        variant: str | None,
        gradient_checkpointing: bool,
        seed: int,
        parts: Parts,
    ) -> None:
        self.device, self.dtype, self.resolution = device, dtype, resolution
        self._folder, self._variant, self._lora = folder, variant, lora
        given = {}
        if parts == "encoders":
            given[self.denoiser_name] = empty_component(folder, self.denoiser_name)
        self.pipeline: Any = load_pipeline(
            folder,
            left_out=("vae", *_TEXT_ENCODERS) if parts == "denoiser" else (),
            given=given,
            dtypes={
                "default": dtype,
                "vae": torch.float32 if self.vae_in_float32 else dtype,
                # All of it is trained, or only adapters that stay in float32 beside it.
                self.denoiser_name: torch.float32 if lora is None else dtype,
            },
            variant=variant,
        )
        self.denoiser: Any = getattr(self.pipeline, self.denoiser_name)
        vae: Any = self.pipeline.vae
        vae = empty_component(folder, "vae") if vae is None else vae
        self._latent_offset, self._latent_scale = _latent_affine(vae.config)
        self._vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._latent_channels = vae.config.latent_channels
        self._check_resolution()
        self._check_channels()
        for name in ("vae", *_TEXT_ENCODERS):
            module = getattr(self.pipeline, name, None)
            if module is not None:
                module.requires_grad_(False).eval().to(device)
        self._adapters: list[Any] = []
        self._reference: Any = None
        self._trainable: list[str] = []
        if parts != "encoders":
            self._prepare_denoiser(lora, gradient_checkpointing, seed)

    def _prepare_denoiser(
        self, lora: "LoraConfig | None", gradient_checkpointing: bool, seed: int
    ) -> None:
        self.denoiser.requires_grad_(False).to(self.device)
        if lora is None:
            self._reference = frozen_copy(self.denoiser, self.dtype)
            self.denoiser.requires_grad_(True)
        else:
            self._adapters = add_adapters(self.denoiser, lora, self.lora_targets, seed)
        self._trainable = [n for n, p in self.denoiser.named_parameters() if p.requires_grad]
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.denoiser.train()

    def _check_resolution(self) -> None:
        multiple = self._vae_factor * self.patch_size
        if self.resolution % multiple:
            below = self.resolution // multiple * multiple
            raise ValueError(
                f"expected a resolution that is a multiple of {multiple} for this model, got "
                f"{self.resolution}; take {below or multiple} or {below + multiple}"
            )

    def _check_channels(self) -> None:
        expected = self._latent_channels * self.latents_per_token
        if self.denoiser.config.in_channels != expected:
            raise ValueError(
                f"expected a text-to-image denoiser with {expected} input channels, found "
                f"{self.denoiser.config.in_channels} in {self._folder}; models for inpainting or "
                "depth cannot be trained here"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `DiffusionModel`."""
        side = self.resolution // self._vae_factor
        return self._latent_channels, side, side

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `DiffusionModel`. Raises RuntimeError when the encoders are not there (any more)."""
        vae = self._encoder("vae")
        expected = (3, self.resolution, self.resolution)
        if pixels.shape[1:] != expected:
            raise ValueError(f"expected pixels (N, *{expected}), got {tuple(pixels.shape)}")
        with torch.no_grad():
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
            mean = posterior.mean.float().contiguous()
            std = torch.exp(0.5 * posterior.logvar.float()).contiguous()
            offset, scale = self._latent_offset.to(mean), self._latent_scale.to(mean)
            return (mean - offset) * scale, std * scale

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `DiffusionModel`. Raises RuntimeError when the encoders are not there (any more)."""
        self._encoder("text_encoder")
        with torch.no_grad(), _only_errors(type(self.pipeline).__module__):
            return self._encode_prompts(list(prompts))

    def _encoder(self, name: str) -> Any:
        module = getattr(self.pipeline, name)
        if module is None:
            raise RuntimeError(
                f"the {name} of this {self.family} model is not loaded: it was opened with "
                'parts="denoiser", or unload_encoders() was called'
            )
        return module

    def unload_encoders(self) -> None:
        """See `DiffusionModel`."""
        for name in ("vae", *_TEXT_ENCODERS):
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        """See `DiffusionModel`."""
        texts = {name: rows.to(self.device, self.dtype) for name, rows in conditioning.items()}
        with torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            # In one layout: else a UNet in training mode, which makes some inputs contiguous, and
            # its reference, which need not, would round differently.
            return self._predict(denoiser, noisy.contiguous(), timesteps.to(self.device), texts)

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Mapping[str, Tensor]
    ) -> Tensor:
        raise NotImplementedError

    def reference(self) -> AbstractContextManager[nn.Module]:
        """See `DiffusionModel`."""
        return self._reference_context()

    @contextmanager
    def _reference_context(self) -> Iterator[nn.Module]:
        if self._reference is not None:
            yield self._reference
            return
        for adapter in self._adapters:
            adapter.enable_adapters(False)
        try:
            yield self.denoiser
        finally:
            for adapter in self._adapters:
                adapter.enable_adapters(True)

    def trainable_state(self) -> dict[str, Tensor]:
        """See `DiffusionModel`."""
        parameters = dict(self.denoiser.named_parameters())
        return {name: parameters[name].detach() for name in self._trainable}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See `DiffusionModel`."""
        own = self.trainable_state()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        reshaped = sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
        if missing or unknown or reshaped:
            raise ValueError(
                f"these weights are not of this model's {len(own)} trained ones: missing "
                f"{missing[:3]}, unknown {unknown[:3]}, of another shape {reshaped[:3]}; they come "
                "from another model, or other LoRA settings"
            )
        with torch.no_grad():
            for name, values in state.items():
                own[name].copy_(values)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """See `DiffusionModel`."""
        folder = Path(folder)
        if self._lora is not None:
            weights = self.trainable_state() if state is None else state
            if weights.keys() != set(self._trainable):
                raise ValueError("expected the names of the weights in trainable_state()")
            save_adapters(self.pipeline, self.denoiser_name, weights, folder)
            return
        copy_pipeline(self._folder, folder, replaced=self.denoiser_name, variant=self._variant)
        with self._holding(state):
            self.denoiser.save_pretrained(folder / self.denoiser_name, safe_serialization=True)

    @contextmanager
    def _holding(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The denoiser with other trained weights, its own put back at the end."""
        if state is None:
            yield
            return
        own = {name: values.cpu().clone() for name, values in self.trainable_state().items()}
        self.load_trainable_state(state)
        try:
            yield
        finally:
            self.load_trainable_state(own)


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Pipelines print what they cut off of each long prompt: pages, for a whole dataset."""
    source = logging.getLogger(name)
    level = source.level
    source.setLevel(logging.ERROR)
    try:
        yield
    finally:
        source.setLevel(level)


def _latent_affine(config: Any) -> tuple[Tensor, Tensor]:
    """Offset and scale that take a VAE's latents to the denoiser's: (latents - offset) * scale.

    Each of shape () or (channels, 1, 1): most VAEs have one number, some one for each channel.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scale = torch.tensor(float(config.get("scaling_factor") or 1))
    if mean is not None and std is not None:
        return torch.tensor(mean).view(-1, 1, 1), scale / torch.tensor(std).view(-1, 1, 1)
    return torch.tensor(float(config.get("shift_factor") or 0)), scale


def frozen_copy(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy that gives, under autocast to `dtype`, the original's output to the last bit.

    Weights of linear layers and convolutions are kept in `dtype`: autocast would round them to it
    at each call. The rest, norms above all, stays as it is.
    """
    frozen = copy.deepcopy(denoiser).requires_grad_(False).eval()
    for module in frozen.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return frozen
