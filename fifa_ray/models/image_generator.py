"""Drawing images with a text-to-image pipeline of the hub's format, as it is or after training.

The initial noise of an image comes from its own seed on the CPU, so models that share an
architecture and a precision begin with the same noise, on any device and in any batch.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fifa_ray.models.batching import LargestBatch, compute_dtype
from fifa_ray.models.diffusion_files import load_pipeline, pipeline_folder
from fifa_ray.models.weight_files import describe_weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
# Every pipeline halves its latents at least this often and refuses other sizes.
RESOLUTION_STEP = 8


@dataclass(frozen=True)
class GeneratorWeights:
    """Which weights draw: a pipeline (hub name or folder), and adapters on top (local folder)."""

    model: str
    revision: str | None = None
    variant: str | None = None
    lora: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How they draw. resolution: side of the square images, pixels, a multiple of 8."""

    resolution: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Drawing:
    """One image, uint8 (height, width, 3), or why there is none."""

    pixels: np.ndarray | None
    error: str | None = None
    detail: str | None = None


class ImageGenerator:
    """A loaded pipeline that draws one image for each prompt and seed."""

    def __init__(
        self,
        weights: GeneratorWeights,
        sampling: Sampling,
        *,
        device: str = "cpu",
        precision: str = "auto",
        batch_size: int = 4,
    ) -> None:
        """Load it. Raises FileNotFoundError where there is no such pipeline, ValueError for files
        that are none and for adapters that do not fit it. Pickled weights are refused.
        """
        if sampling.resolution % RESOLUTION_STEP:
            raise ValueError(
                f"expected a resolution that is a multiple of {RESOLUTION_STEP}, got "
                f"{sampling.resolution}"
            )
        self.weights, self.sampling, self.device = weights, sampling, device
        self.dtype = compute_dtype(precision, device)
        self.pipeline = _load_pipeline(weights, self.dtype)
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.batches = LargestBatch(batch_size, "images")

    @property
    def info(self) -> dict[str, Any]:
        """What a manifest says of it; hashes of its own weight files where it is a local folder."""
        hashed = self.weights.lora or self.weights.model
        files = sorted(Path(hashed).rglob("*.safetensors")) if Path(hashed).is_dir() else []
        return {
            "pipeline": type(self.pipeline).__name__,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "weights": asdict(self.weights),
            "sha256": {
                str(file.relative_to(hashed)): digest
                for file in files
                for digest in describe_weights(hashed, [file]).sha256.values()
            },
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
        }

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Drawing]:
        """An image for each prompt with its seed (0 to 2**63 - 1), in order.

        A batch that fails is drawn again one by one; an image that fails alone comes back as the
        error `generation_failed`, one whose pixels are not finite as `nan_image`. Out of memory,
        batches halve; raises the device's error when one image does not fit.
        """
        drawings: list[Drawing] = []
        requests = list(zip(prompts, seeds, strict=True))
        for start in range(0, len(requests), self.batches.size):
            drawings += self._draw_batch(requests[start : start + self.batches.size])
        return drawings

    def _draw_batch(self, requests: list[tuple[str, int]]) -> list[Drawing]:
        import torch

        try:
            images = torch.cat(self.batches.run(requests, self._forward))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if len(requests) > 1:
                return [drawing for one in requests for drawing in self._draw_batch([one])]
            detail = f"{type(error).__name__}: {error}"[:500]
            logger.warning("an image could not be drawn: %s", detail)
            return [Drawing(None, "generation_failed", detail)]
        return [_drawing(image) for image in images]

    def _forward(self, requests: Sequence[tuple[str, int]]) -> "torch.Tensor":
        """float32 (N, height, width, 3) in [0, 1] on the CPU; may hold NaN."""
        import torch

        with torch.inference_mode():
            images = self.pipeline(
                prompt=[prompt for prompt, _ in requests],
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in requests],
                height=self.sampling.resolution,
                width=self.sampling.resolution,
                num_inference_steps=self.sampling.num_inference_steps,
                guidance_scale=self.sampling.guidance_scale,
                output_type="pt",
            ).images
        return images.permute(0, 2, 3, 1).float().cpu()


def _drawing(image: "torch.Tensor") -> Drawing:
    if not bool(image.isfinite().all()):
        return Drawing(None, "nan_image", "the model gave NaN; try evaluate.precision=float32")
    return Drawing((image * 255).round().clamp(0, 255).byte().numpy())


def _load_pipeline(weights: GeneratorWeights, dtype: "torch.dtype") -> Any:
    """The pipeline on the CPU, without a safety checker.

    One that paints images black would be scored as the model's work; prompts that ask for such
    images belong in no evaluation.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # They would print every prompt that is longer than the model reads.
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    pipeline = load_pipeline(
        pipeline_folder(weights.model, weights.revision, weights.variant),
        left_out=(),
        given={},
        dtypes={"default": dtype},
        variant=weights.variant,
    )
    if weights.lora is not None:
        _add_adapters(pipeline, Path(weights.lora), weights.model)
    return pipeline


def _add_adapters(pipeline: Any, folder: Path, model: str) -> None:
    if not (folder / LORA_FILE).is_file():
        raise FileNotFoundError(f"expected LoRA weights ({LORA_FILE}) in {folder}, found none")
    try:
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"the LoRA weights in {folder} do not fit {model}: {str(error)[:500]}; evaluate with "
            "the base that they were trained on"
        ) from error
    # Adapters whose names match nothing would be left out with a warning: then tuned = base.
    if not pipeline.get_active_adapters():
        raise ValueError(
            f"the LoRA weights in {folder} change no layer of {model}; evaluate with the base that "
            "they were trained on"
        )
