"""What a training leaves behind: sample images while it runs, and its model."""

import io
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fifa_ray.engine.train_checkpoint import on_cpu
from fifa_ray.engine.train_inputs import TrainJob
from fifa_ray.engine.train_metrics import sample_name
from fifa_ray.run_dir import RunDir

_COPY_BYTES = 16 << 20


def draw_samples(job: TrainJob, model: Any, step: int, indices: Iterable[int]) -> None:
    """Draw some of the sample prompts, each with its own fixed seed, into samples/ as PNG files."""
    for index in indices:
        image = draw(model, job, job.settings.sample_prompts[index], job.seed + index)
        data = io.BytesIO()
        image.save(data, "PNG")
        with job.run.open_atomic(job.stage, "samples", sample_name(step, index)) as stream:
            stream.write(data.getvalue())


def draw(model: Any, job: TrainJob, prompt: str, seed: int) -> Image.Image:
    """One image of the model as it is, by its own pipeline and sampler.

    The denoiser's float32 weights meet half-precision text under autocast; the VAE decodes outside
    of it, in its own type, because some of them overflow.
    """
    pipeline, side = model.pipeline, job.settings.resolution
    num_steps, guidance = job.sampler
    was_training = model.denoiser.training
    model.denoiser.eval()
    pipeline.set_progress_bar_config(disable=True)
    half = model.dtype != torch.float32
    try:
        with torch.no_grad():
            with torch.autocast(model.device.type, dtype=model.dtype, enabled=half):
                latents = pipeline(
                    prompt,
                    height=side,
                    width=side,
                    num_inference_steps=num_steps,
                    guidance_scale=guidance,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                ).images
            return _decode(pipeline, latents, side)
    finally:
        model.denoiser.train(was_training)


def _decode(pipeline: Any, latents: torch.Tensor, side: int) -> Image.Image:
    vae = pipeline.vae
    if latents.ndim == 3:  # FLUX packs 2 x 2 latents
        latents = pipeline._unpack_latents(latents, side, side, pipeline.vae_scale_factor)
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    latents = latents.float() / vae.config.scaling_factor
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(std).view(shape)
        latents = latents + latents.new_tensor(mean).view(shape)
    else:
        latents = latents + (vae.config.get("shift_factor") or 0.0)
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    image: Image.Image = pipeline.image_processor.postprocess(pixels.float())[0]
    return image


class BestWeights:
    """The weights of the best validation so far, in `training/<name>/best/`, by their step."""

    def __init__(self, run: RunDir, stage: str) -> None:
        self.run, self.stage = run, stage

    def exists(self, step: int) -> bool:
        """Whether the weights of this step are there."""
        return self.run.exists(self.stage, "best", _best_name(step))

    def save(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep a copy of weights; they appear whole or not at all."""
        with tempfile.TemporaryDirectory(prefix="best-") as folder:
            file = Path(folder) / "weights.safetensors"
            save_file(on_cpu(weights), file)
            with (
                file.open("rb") as source,
                self.run.open_atomic(self.stage, "best", _best_name(step)) as target,
            ):
                shutil.copyfileobj(source, target, _COPY_BYTES)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        """What was saved at this step, on the CPU."""
        path = self.run.path(self.stage, "best", _best_name(step))
        with tempfile.TemporaryDirectory(prefix="best-") as folder:
            file = Path(folder) / "weights.safetensors"
            with self.run.filesystem.open_input_stream(path) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
            return dict(load_file(file))

    def drop_all_but(self, step: int | None) -> None:
        """Delete the weights of other steps."""
        for name in self.run.list(self.stage, "best", suffix=".safetensors"):
            if step is None or name != _best_name(step):
                self.run.filesystem.delete_file(self.run.path(self.stage, "best", name))


def _best_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def upload_folder(folder: Path, run: RunDir, *parts: str) -> None:
    """Copy a local folder to a place in the run, in the place of what was there."""
    run.remove(*parts)
    target = run.path(*parts)
    run.filesystem.create_dir(target, recursive=True)
    pafs.copy_files(str(folder), target, pafs.LocalFileSystem(), run.filesystem)
