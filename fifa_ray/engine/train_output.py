"""What a training leaves behind: sample images while it runs, and its model."""

import io
from collections.abc import Iterable
from pathlib import Path

import pyarrow.fs as pafs
import torch

from fifa_ray.engine.train_inputs import TrainJob
from fifa_ray.models.diffusion import DiffusionModel
from fifa_ray.run_dir import RunDir


def draw_samples(job: TrainJob, model: DiffusionModel, step: int, indices: Iterable[int]) -> None:
    """Draw some of the sample prompts, each with its own fixed seed, into samples/ as PNG files."""
    num_steps, guidance = job.sampler
    for index in indices:
        prompt = job.settings.sample_prompts[index]
        generator = torch.Generator().manual_seed(job.seed + index)
        image = model.generate(
            [prompt], [generator], num_inference_steps=num_steps, guidance_scale=guidance
        )[0]
        data = io.BytesIO()
        image.save(data, "PNG")
        with job.run.open_atomic(job.stage, "samples", sample_name(step, index)) as stream:
            stream.write(data.getvalue())


def sample_name(step: int, index: int) -> str:
    """File name of the image of a prompt, by its index, after an optimizer step."""
    return f"step-{step:08d}-prompt-{index:03d}.png"


def upload_folder(folder: Path, run: RunDir, *parts: str) -> None:
    """Copy a local folder to a place in the run, in the place of what was there."""
    run.remove(*parts)
    target = run.path(*parts)
    run.filesystem.create_dir(target, recursive=True)
    pafs.copy_files(str(folder), target, pafs.LocalFileSystem(), run.filesystem)
