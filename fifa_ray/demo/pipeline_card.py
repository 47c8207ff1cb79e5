"""How good the demo's pipeline is on prompts that it never saw, and its model card."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fifa_ray.demo.known_drawings import prompts_of
from fifa_ray.demo.prompts import Prompt
from fifa_ray.demo.scenes import SETTINGS, SHAPES
from fifa_ray.demo.truth_reader import TruthReader

HELD_OUT_SEED, HELD_OUT_PROMPTS = 6, 200
NUM_INFERENCE_STEPS, GUIDANCE_SCALE, DRAW_BATCH = 20, 3.0, 50


class PipelineMeasures(TypedDict):
    """Means over held-out prompts, as the truth reader estimates them from the images.

    utility: 0 to 6; alignment and technical_quality: in [0, 1]; setting, shape: share of images
    whose most probable setting, and one of whose most probable shapes, is what was asked for;
    unasked_alignment: alignment with other prompts' scenes, what a model that ignores its prompt
    would reach.
    """

    num_images: int
    utility: float
    alignment: float
    unasked_alignment: float
    technical_quality: float
    setting: float
    shape: float


@torch.inference_mode()
def draw_images(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    guidance_scale: float = GUIDANCE_SCALE,
) -> list[Image.Image]:
    """One image a prompt; the i-th starts from the noise of `seed` + i."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for at in range(0, len(prompts), DRAW_BATCH):
        batch = list(prompts[at : at + DRAW_BATCH])
        generators = [torch.Generator().manual_seed(seed + at + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=guidance_scale,
            generator=generators,
        ).images
    return images


def held_out_prompts(count: int = HELD_OUT_PROMPTS) -> list[Prompt]:
    """Prompts of scenes, of a catalogue that shares none with training."""
    return prompts_of((HELD_OUT_SEED,), 2 * count, ("normal",))[:count]


def measure_images(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> PipelineMeasures:
    """Read the images and hold them against what their prompts asked for."""
    readings = TruthReader.load({}).read(images)
    asked = [prompt.scene for prompt in prompts]
    settings, shapes = [], []
    for reading, scene in zip(readings, asked, strict=True):
        setting, layout, shape, *rest = (p.argmax() for p in reading.probabilities)
        if scene.setting is not None:
            settings.append(SETTINGS[setting] == scene.setting)
        seen = {SHAPES[shape]} | ({SHAPES[rest[3]]} if layout else set())
        shapes.append(any(item.shape in seen for item in scene.items))
    others = asked[1:] + asked[:1]
    return {
        "num_images": len(images),
        "utility": _mean(r.expected_utility(s) for r, s in zip(readings, asked, strict=True)),
        "alignment": _mean(r.expected_alignment(s) for r, s in zip(readings, asked, strict=True)),
        "unasked_alignment": _mean(
            r.expected_alignment(s) for r, s in zip(readings, others, strict=True)
        ),
        "technical_quality": _mean(r.technical_quality for r in readings),
        "setting": float(np.mean(settings)),
        "shape": float(np.mean(shapes)),
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def measure_pipeline(folder: Path, guidance_scale: float = GUIDANCE_SCALE) -> PipelineMeasures:
    """Draw held-out prompts by the pipeline of a folder and measure the images."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    prompts = held_out_prompts()
    texts = [prompt.text for prompt in prompts]
    images = draw_images(pipeline, texts, seed=HELD_OUT_SEED, guidance_scale=guidance_scale)
    return measure_images(images, prompts)


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters of each network of a pipeline's folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    networks = {
        "autoencoder": pipeline.vae, "text encoder": pipeline.text_encoder, "UNet": pipeline.unet,
    }  # fmt: skip
    return {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()}


def pipeline_card(
    measures: PipelineMeasures, *, command: str, training: str, num_parameters: dict[str, int]
) -> str:
    """The README.md of the pipeline's folder."""
    sizes = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in num_parameters.items())
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The demo world's text-to-image pipeline

A StableDiffusionPipeline for 64 px pictures of the demo world of fifa-ray ({sizes} million
parameters): 16 x 16 x 4 latents, prompts of at most 24 tokens. It knows drawn scenes and nothing
else, and is meant to be imperfect: preference training is to mend it. Weights are stored in
float16.

Made by `{command}`:
{training}.
The pictures are those of the world's own generators, with wrong attributes (7% to 36% each) and
technical defects; no label or utility of them was read, and the demo's own world (another seed) was
not used.

Measured on {measures["num_images"]:,} prompts that share none with training, one image each,
{NUM_INFERENCE_STEPS} steps, guidance {GUIDANCE_SCALE:g}, as the truth reader
(`fifa_ray/demo/weights/truth_reader`) estimates it from the images:

| | |
|---|---|
| utility (0 to 6) | {measures["utility"]:.2f} |
| alignment with the prompt (0 to 1) | {measures["alignment"]:.2f} |
| alignment with another prompt, by chance | {measures["unasked_alignment"]:.2f} |
| technical quality (0 to 1) | {measures["technical_quality"]:.2f} |
| setting as asked | {measures["setting"]:.0%} |
| a shape that was asked for | {measures["shape"]:.0%} |
"""
