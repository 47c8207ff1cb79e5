"""Train the demo's tiny text-to-image pipeline on pictures of worlds made for that alone.

    python -m fifa_ray.demo.train_pipeline --output fifa_ray/demo/weights/pipeline

One thread, fixed seeds; a killed run goes on where its work folder was. The pictures are those of
the world's own generators, with their errors and defects, as what a base model learns from is; no
label or utility is read. First an autoencoder is trained, then, on its latents, a UNet and the text
encoder, which starts as the text tower of the demo's reward model. Training seeds are odd, the
demo's is even, so that they share no prompt.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from fifa_ray.demo.area_autoencoder import build_vae
from fifa_ray.demo.known_drawings import DEFECT_NAMES, IMAGE_SIZE, draw_known, prompts_of
from fifa_ray.demo.pipeline_card import count_parameters, measure_pipeline, pipeline_card
from fifa_ray.demo.pipeline_parts import build_unet, save_pipeline, text_tower
from fifa_ray.demo.train_denoiser import train_denoiser
from fifa_ray.demo.train_vae import encode, train_vae

logger = logging.getLogger(__name__)

TRAINING_SEEDS, PROMPTS_PER_SEED, PICTURES_PER_PROMPT = (5, 7, 9), 6_000, 4
VAE_STEPS, DENOISER_STEPS = 700, 6_000
PICTURES_ENCODED = 1  # of each prompt: encoding all of them takes longer than it is worth
MAX_BLUR = 0.3
TEXT_TOWER = Path(__file__).parent / "weights" / "reward"


def train_pipeline(
    output: Path,
    work: Path,
    *,
    prompts_per_seed: int = PROMPTS_PER_SEED,
    vae_steps: int = VAE_STEPS,
    denoiser_steps: int = DENOISER_STEPS,
    num_processes: int = 2,
) -> str:
    """Draw, train and save to `output`; `work` keeps what a next call goes on from.

    Returns what was done, in words.
    """
    seed = TRAINING_SEEDS[0]
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    prompts = prompts_of(TRAINING_SEEDS, prompts_per_seed, ("normal", "near_duplicate", "vague"))
    drawings = draw_known(prompts, PICTURES_PER_PROMPT, seed, work / "drawings", num_processes)
    vae = build_vae(IMAGE_SIZE)
    noise, blur = (drawings.severity[:, DEFECT_NAMES.index(name)] for name in ("noise", "blur"))
    sharp = (noise == 0) & (blur < MAX_BLUR)  # the others have nothing to teach an autoencoder
    vae_seconds = train_vae(
        vae, drawings.pixels[sharp], checkpoint=work / "vae.pt", num_steps=vae_steps, seed=seed
    )
    encoded = np.arange(len(drawings.pixels)).reshape(len(prompts), -1)[:, :PICTURES_ENCODED]
    mean, deviation = _encode_once(
        vae, drawings.pixels[encoded.ravel()], work / f"latents-{vae_steps}.npz"
    )
    torch.manual_seed(seed)
    tokenizer, text_encoder = text_tower(TEXT_TOWER)
    unet = build_unet(text_encoder.config.hidden_size)
    shape = (len(prompts), PICTURES_ENCODED, *mean.shape[1:])
    scale = vae.config.scaling_factor
    latents = ((scale * mean).reshape(shape), (scale * deviation).reshape(shape))

    def save(step: int) -> None:
        save_pipeline(output, vae, unet, text_encoder, tokenizer)

    denoiser_seconds = train_denoiser(
        unet, text_encoder, tokenizer, [prompt.text for prompt in prompts], latents,
        checkpoint=work / "denoiser.pt", num_steps=denoiser_steps, seed=seed, on_save=save,
    )  # fmt: skip
    save(denoiser_steps)
    return (
        f"{vae_steps:,} steps of the autoencoder ({vae_seconds / 60:.0f} minutes of one CPU core)"
        f" and {denoiser_steps:,} of the UNet and the text encoder"
        f" ({denoiser_seconds / 60:.0f} minutes),"
        f" on up to {len(drawings.pixels):,} pictures of {len(prompts):,} prompts of the"
        f" catalogues of seeds {TRAINING_SEEDS}"
    )


def _encode_once(
    vae: AutoencoderKL, pixels: np.ndarray, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """`encode`, or what an earlier call left in `path`."""
    if not path.exists():
        mean, deviation = encode(vae, pixels)
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, mean=mean, deviation=deviation)
        unfinished.rename(path)
    cached = np.load(path)
    return cached["mean"], cached["deviation"]


def main() -> None:
    """Train, save, measure on held-out prompts, write the model card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--work", type=Path, help="pictures and checkpoints; default: OUTPUT.work")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS, help="of the autoencoder")
    parser.add_argument("--steps", type=int, default=DENOISER_STEPS, help="of the UNet")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output: Path = arguments.output
    training = train_pipeline(
        output,
        arguments.work or output.with_name(output.name + ".work"),
        vae_steps=arguments.vae_steps,
        denoiser_steps=arguments.steps,
    )
    measures = measure_pipeline(output)
    logger.info("held out: %s", measures)
    card = pipeline_card(
        measures,
        command=f"python -m fifa_ray.demo.train_pipeline --output {output}",
        training=training,
        num_parameters=count_parameters(output),
    )
    (output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
