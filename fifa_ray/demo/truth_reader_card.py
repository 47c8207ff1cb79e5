"""How well the truth reader reads pictures that it never saw, and its model card."""

from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fifa_ray.demo.known_drawings import (
    DEFECT_NAMES,
    ITEM_FIELDS,
    KnownDrawings,
    decode_scene,
    draw_known,
    prompts_of,
)
from fifa_ray.demo.pictures import ALIGNMENT_UTILITY, QUALITY_UTILITY, technical_quality
from fifa_ray.demo.scenes import alignment
from fifa_ray.demo.truth_reader import TruthReader

HELD_OUT_SEED, HELD_OUT_PROMPTS, HELD_OUT_PICTURES = 6, 700, 4


class ReaderMeasures(TypedDict):
    """`accuracy` maps a head to the share of pictures that it reads right; `correlation` and
    `quality_correlation` are Pearson's, with the true utility and quality; `pairwise` is the share
    of pairs of pictures of one prompt put in their true order, ties left out, and `pairwise_clear`
    that among pairs whose utilities differ by 0.5 or more."""

    num_pictures: int
    accuracy: dict[str, float]
    correlation: float
    quality_correlation: float
    utility_error: float
    pairwise: float
    pairwise_clear: float


def true_utilities(drawings: KnownDrawings) -> tuple[np.ndarray, np.ndarray]:
    """Utility and technical quality, float64 (N,) each, of drawings for their own prompts."""
    quality = np.array(
        [
            technical_quality(dict(zip(DEFECT_NAMES, row.tolist(), strict=True)))
            for row in drawings.severity
        ]
    )
    aligned = np.array(
        [
            alignment(drawings.prompts[prompt].scene, decode_scene(codes))[0]
            for prompt, codes in zip(drawings.prompt, drawings.codes, strict=True)
        ]
    )
    return ALIGNMENT_UTILITY * aligned + QUALITY_UTILITY * quality, quality


def held_out_drawings(
    folder: Path,
    *,
    seed: int = HELD_OUT_SEED,
    num_prompts: int = HELD_OUT_PROMPTS,
    num_processes: int = 1,
) -> KnownDrawings:
    """Pictures of prompts that no training saw, `HELD_OUT_PICTURES` of each."""
    prompts = prompts_of((seed,), num_prompts, ("normal", "near_duplicate"))
    return draw_known(prompts, HELD_OUT_PICTURES, seed, folder, num_processes)


def compare(reader: TruthReader, drawings: KnownDrawings, pixels: np.ndarray) -> ReaderMeasures:
    """Read `pixels` (N, H, W, 3), which show the drawings, and hold it against the truth."""
    readings = reader.read([Image.fromarray(picture) for picture in pixels])
    utility, quality = true_utilities(drawings)
    read = np.array(
        [
            reading.expected_utility(drawings.prompts[prompt].scene)
            for reading, prompt in zip(readings, drawings.prompt, strict=True)
        ]
    )
    names = ["setting", "layout", *(f"first {f}" for f in ITEM_FIELDS)]
    names += [f"second {f}" for f in ITEM_FIELDS]
    accuracy = {}
    for head, name in enumerate(names):
        said = np.array([reading.probabilities[head].argmax() for reading in readings])
        applies = drawings.codes[:, head] >= 0
        accuracy[name] = float(np.mean(said[applies] == drawings.codes[applies, head]))
    at, other = np.triu_indices(len(read), 1)
    near = drawings.prompt[at] == drawings.prompt[other]
    gap, said_gap = (v[at[near]] - v[other[near]] for v in (utility, read))
    agrees, clear = gap * said_gap > 0, np.abs(gap) >= 0.5
    read_quality = [reading.technical_quality for reading in readings]
    return {
        "num_pictures": len(read),
        "accuracy": accuracy,
        "correlation": float(np.corrcoef(utility, read)[0, 1]),
        "quality_correlation": float(np.corrcoef(quality, read_quality)[0, 1]),
        "utility_error": float(np.abs(utility - read).mean()),
        "pairwise": float(agrees[np.abs(gap) > 1e-9].mean()),
        "pairwise_clear": float(agrees[clear].mean()),
    }


def measure_reader(
    weights: Path, vae: AutoencoderKL, folder: Path
) -> tuple[ReaderMeasures, ReaderMeasures]:
    """On held-out drawings, and on the same as the pipeline's autoencoder reconstructs them."""
    from fifa_ray.demo.train_truth_reader import reconstruct

    torch.set_num_threads(1)
    drawings = held_out_drawings(folder)
    reader = TruthReader.load({}, weights)
    soft = reconstruct(vae, drawings.pixels, HELD_OUT_SEED)
    return compare(reader, drawings, drawings.pixels), compare(reader, drawings, soft)


def reader_card(
    measures: tuple[ReaderMeasures, ReaderMeasures],
    *,
    command: str,
    training: str,
    num_parameters: int,
) -> str:
    """The README.md of the weights folder."""
    drawn, soft = measures
    lines: list[tuple[str, ...]] = [
        (f"{name} read right", f"{value:.1%}", f"{soft['accuracy'][name]:.1%}")
        for name, value in drawn["accuracy"].items()
    ]
    lines += [
        ("correlation with true utility", *(f"{m['correlation']:.3f}" for m in measures)),
        ("correlation with true quality", *(f"{m['quality_correlation']:.3f}" for m in measures)),
        ("mean absolute error of utility", *(f"{m['utility_error']:.2f}" for m in measures)),
        ("pairs of one prompt in true order", *(f"{m['pairwise']:.1%}" for m in measures)),
        ("those at least 0.5 apart", *(f"{m['pairwise_clear']:.1%}" for m in measures)),
    ]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""---
license: apache-2.0
---
# The demo world's truth reader

A network of {num_parameters / 1e6:.2f} million parameters that reads a 64 px picture of the demo
world of fifa-ray: setting, layout, shapes, colours, sizes and counts of up to two kinds of objects,
technical defects. From its probabilities follows the utility that the world would give the picture
in expectation. It is for measuring generated images, which have no scene behind them; neither the
filter nor training asks it. Weights are stored in float16.

Made by `{command}`:
{training}.

Measured on {drawn["num_pictures"]:,} pictures of prompts that no training saw, drawn with the
world's usual errors and defects, and on the same as the pipeline's autoencoder reconstructs them:

| | drawn | reconstructed |
|---|---|---|
{rows}

## What it is not

An estimate, not the truth. Shapes, above all of a second object, are its weakest readings. A
reconstruction is held against the severities of the drawing it came from, so the autoencoder's own
softness does not count as blur. A generated image may show what no drawing shows, half a boat and
half a car: the reader then spreads its probabilities, or is wrong with confidence. Compare means
over many images of two models, as the demo does, and do not trust single readings.
"""
