"""Train the reader that estimates the demo world's truth for generated images.

    python -m fifa_ray.demo.train_truth_reader --output fifa_ray/demo/weights/truth_reader

One thread, fixed seeds; a killed run goes on where its work folder was. The reader learns from
pictures with known scenes. In the second half of the training a share of them has passed through
the autoencoder of the demo's pipeline and keeps the labels of what went in: so the softness that
every generated image has is no defect, and no reason to misread a shape.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from fifa_ray.demo.known_drawings import (
    DEFECT_NAMES,
    KnownDrawings,
    draw_known,
    prompts_of,
)
from fifa_ray.demo.pictures import technical_quality
from fifa_ray.demo.resumable import rows_of_step, run_steps, step_generator
from fifa_ray.demo.train_vae import ENCODE_BATCH, to_network
from fifa_ray.demo.truth_reader import HEADS, WEIGHTS_FILE, build_reader
from fifa_ray.demo.truth_reader_card import measure_reader, reader_card

logger = logging.getLogger(__name__)

TRAINING_SEEDS, PROMPTS_PER_SEED, PICTURES_PER_PROMPT = (5, 7, 9), 6_000, 4
NUM_STEPS, BATCH_SIZE, PEAK_RATE, EMA_DECAY = 2_600, 64, 3e-3, 0.995
RECONSTRUCTED = 8_000
MAX_SHIFT_PX = 3
QUALITY_WEIGHT, SEVERITY_WEIGHT = 10.0, 4.0
PIPELINE = Path(__file__).parent / "weights" / "pipeline"


def qualities(severity: np.ndarray) -> np.ndarray:
    """Technical quality, float32 (N,), of severities (N, defects)."""
    rows = [dict(zip(DEFECT_NAMES, row.tolist(), strict=True)) for row in severity]
    return np.array([technical_quality(row) for row in rows], np.float32)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray, seed: int) -> np.ndarray:
    """uint8 (N, H, W, 3): pixels encoded, sampled and decoded again."""
    parts = []
    for at in range(0, len(pixels), ENCODE_BATCH):
        latents = vae.encode(to_network(pixels[at : at + ENCODE_BATCH])).latent_dist
        decoded = vae.decode(latents.sample(step_generator(seed, at))).sample
        values = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
        parts.append(values.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def reader_loss(
    outputs: torch.Tensor, codes: torch.Tensor, severity: torch.Tensor, quality: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of every head that applies, and squared errors of severities and quality.

    outputs (B, NUM_OUTPUTS); codes int64 (B, NUM_CODES), -1 where a head does not apply; severity
    (B, defects); quality (B,). The minimiser of a squared error is the expectation.
    """
    *logits, read_severity, read_quality = outputs.split([*HEADS, severity.shape[1], 1], dim=1)
    named = [
        F.cross_entropy(head, codes[:, index], ignore_index=-1, reduction="sum") / len(codes)
        for index, head in enumerate(logits)
    ]
    naming = torch.stack(named).sum()
    off = F.mse_loss(read_quality[:, 0], quality)
    severities = F.mse_loss(read_severity, severity)
    return naming + QUALITY_WEIGHT * off + SEVERITY_WEIGHT * severities, {
        "naming loss": naming.item(), "squared error of quality": off.item(),
    }  # fmt: skip


def shifted(drawn: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """All pictures (B, 3, H, W) of a batch moved alike by up to `MAX_SHIFT_PX`, edges repeated."""
    left, top = (int(v) for v in rng.integers(-MAX_SHIFT_PX, MAX_SHIFT_PX + 1, 2))
    padded = F.pad(drawn, (MAX_SHIFT_PX,) * 4, mode="replicate")
    y, x = MAX_SHIFT_PX + top, MAX_SHIFT_PX + left
    return padded[..., y : y + drawn.shape[2], x : x + drawn.shape[3]]


def train_reader(
    network: nn.Module, drawings: KnownDrawings, reconstructed: np.ndarray, *,
    checkpoint: Path, num_steps: int, seed: int,
) -> float:  # fmt: skip
    """Train in place; returns seconds of CPU.

    `reconstructed` holds reconstructions of the first len(reconstructed) drawings; each
    batch of the second half of the steps takes a third of its pictures from there.
    """
    quality = torch.from_numpy(qualities(drawings.severity))
    codes = torch.from_numpy(drawings.codes.astype(np.int64))
    severity = torch.from_numpy(drawings.severity)
    num_soft = min(BATCH_SIZE // 3, len(reconstructed))

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rows = rows_of_step(step, BATCH_SIZE, len(drawings.pixels), seed)
        pixels = drawings.pixels[rows]
        if num_soft and step >= num_steps // 2:
            soft = rows_of_step(step, num_soft, len(reconstructed), seed + 1)
            rows = np.concatenate([rows[num_soft:], soft])
            pixels = np.concatenate([pixels[num_soft:], reconstructed[soft]])
        drawn = shifted(to_network(pixels), np.random.default_rng([seed, step]))
        return reader_loss(network(drawn), codes[rows], severity[rows], quality[rows])

    network.train()
    seconds = run_steps(
        {"reader": network}, loss_of_step, checkpoint=checkpoint, num_steps=num_steps,
        peak_rate=PEAK_RATE, ema_decay=EMA_DECAY, decay_share=0.5,
    )  # fmt: skip
    network.eval()
    return seconds


def save_reader(network: nn.Module, folder: Path) -> None:
    """Write the weights as float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    save_file(state, folder / WEIGHTS_FILE)


def main() -> None:
    """Draw, reconstruct, train, save, measure, write the model card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the reader")
    parser.add_argument("--work", type=Path, help="pictures and checkpoints; default: OUTPUT.work")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="optimizer steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = arguments.work or arguments.output.with_name(arguments.output.name + ".work")
    seed = TRAINING_SEEDS[0]
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = build_reader()
    prompts = prompts_of(TRAINING_SEEDS, PROMPTS_PER_SEED, ("normal", "near_duplicate", "vague"))
    drawings = draw_known(prompts, PICTURES_PER_PROMPT, seed, work / "drawings")
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    reconstructed = reconstruct(vae, drawings.pixels[:RECONSTRUCTED], seed)
    seconds = train_reader(
        network, drawings, reconstructed, checkpoint=work / "reader.pt",
        num_steps=arguments.steps, seed=seed,
    )  # fmt: skip
    save_reader(network, arguments.output)
    measures = measure_reader(arguments.output, vae, work / "held_out")
    logger.info("held out: %s", measures)
    training = (
        f"{arguments.steps:,} steps of {BATCH_SIZE} on {len(drawings.pixels):,} pictures of"
        f" {len(prompts):,} prompts of the catalogues of seeds {TRAINING_SEEDS},"
        f" {RECONSTRUCTED:,} of them also as the pipeline's autoencoder reconstructs them;"
        f" {seconds / 60:.0f} minutes of one CPU core"
    )
    card = reader_card(
        measures,
        command=f"python -m fifa_ray.demo.train_truth_reader --output {arguments.output}",
        training=training,
        num_parameters=sum(p.numel() for p in network.parameters()),
    )
    (arguments.output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
