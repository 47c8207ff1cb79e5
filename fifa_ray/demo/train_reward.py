"""Train the demo's tiny reward model, a CLIP, on the noisy labels of a world made for that alone.

    python -m fifa_ray.demo.train_reward --output fifa_ray/demo/weights/reward

One thread, fixed seeds. The training world has an odd seed, the demo's is even, so that the two
share neither prompt nor image; the truth of the training world is never read. As PickScore (arXiv
2305.01569, equation 1) the model learns softmax(scale * cos(image, prompt)) over the two images of
a pair against the label, ties being (0.5, 0.5). PickScore starts from a trained CLIP; this one
starts from nothing, so CLIP's own objective (which of the batch's prompts is this picture's?) is
added, fading to nothing by the end. A held-out world then says how good it is, in the model card.
"""

import argparse
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from fifa_ray.demo.clip_tokenizer import MAX_TEXT_TOKENS, train_tokenizer
from fifa_ray.demo.labelled_pairs import LabelledPairs, read_labelled_pairs
from fifa_ray.demo.reward_card import measure_reward_model, model_card
from fifa_ray.demo.world import generate_world

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
PATCH_SIZE, WIDTH = 16, 128
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TRAINING_SEED, HELD_OUT_SEED, HELD_OUT_PAIRS = 1, 2, 10_000
TRAINING_TEXT_TOKENS = 40
NUM_STEPS, LEARNING_RATE = 5_000, 7e-4
MAX_SHIFT_PX = 4
CHUNKS_PER_STEP, CHUNK_PAIRS = 24, 2
PREFERENCE_SCALE, CONTRASTIVE_SCALE = 5.0, 10.0  # at the start; both are learnt
LOG_STEPS = 50


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A randomly initialised CLIP for `IMAGE_SIZE` images and the tokenizer's vocabulary."""
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TEXT_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(PREFERENCE_SCALE))
    return model


def normalized(pixels: np.ndarray) -> torch.Tensor:
    """(B, 3, H, W) float32 network input of uint8 pixels."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def shifted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image (B, 3, H, W) moved by up to `MAX_SHIFT_PX` either way, its edges repeated.

    A picture's worth does not change with it, while the patches that the model sees do.
    """
    size = pixels.shape[-1]
    border = ((0, 0), (0, 0), (MAX_SHIFT_PX, MAX_SHIFT_PX), (MAX_SHIFT_PX, MAX_SHIFT_PX))
    padded = np.pad(pixels, border, mode="edge")
    corners = rng.integers(0, 2 * MAX_SHIFT_PX + 1, (len(pixels), 2))
    return np.stack(
        [
            image[:, y : y + size, x : x + size]
            for image, (y, x) in zip(padded, corners, strict=True)
        ]
    )


@torch.no_grad()
def spread_features(
    model: CLIPModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixels: np.ndarray
) -> None:
    """Set both projections so that the features of a sample start centred and nearly white.

    A random CLIP maps all images to about one direction and all texts to another, and would spend
    its first thousand steps on leaving it.
    """
    text = model.text_model(input_ids, attention_mask).pooler_output
    vision = model.vision_model(normalized(pixels)).pooler_output
    for pooled, projection in ((text, model.text_projection), (vision, model.visual_projection)):
        mean = pooled.mean(dim=0)
        variance, axes = torch.linalg.eigh(torch.cov(pooled.T, correction=0))
        whiten = axes @ torch.diag((variance + 0.1 * variance.mean()).rsqrt()) @ axes.T
        without_mean = torch.eye(len(mean)) - torch.outer(mean, mean) / mean.dot(mean)
        turn = torch.linalg.qr(torch.randn(len(mean), len(mean)))[0]
        projection.weight.copy_(turn @ whiten @ without_mean)


def train(
    model: CLIPModel, tokenizer: CLIPTokenizer, pairs: LabelledPairs, *, num_steps: int, seed: int
) -> None:
    """Train in place; see the module's docstring.

    A step takes `CHUNKS_PER_STEP` chunks of up to `CHUNK_PAIRS` pairs that share a prompt and most
    of their images; each distinct image and prompt is encoded once.
    """
    rng = np.random.default_rng(seed)
    encoded = tokenizer(
        pairs.prompts, padding=True, truncation=True, max_length=TRAINING_TEXT_TOKENS,
        return_tensors="pt",
    )  # fmt: skip
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    sample = rng.permutation(len(pairs.prompts))[:1_000]
    image_sample = rng.permutation(len(pairs.pixels))[:1_000]
    spread_features(model, tokens[sample], mask[sample], pairs.pixels[image_sample])
    contrastive_scale = torch.nn.Parameter(torch.tensor(math.log(CONTRASTIVE_SCALE)))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
            {
                "params": [*(p for p in model.parameters() if p.ndim < 2), contrastive_scale],
                "weight_decay": 0.0,
            },
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.08, cycle_momentum=False
    )
    model.train()
    started, sums = time.process_time(), np.zeros(2)
    for step, rows in enumerate(batches(pairs.prompt, num_steps, rng)):
        prompts, prompt = (
            torch.from_numpy(v) for v in np.unique(pairs.prompt[rows], return_inverse=True)
        )
        images, image = np.unique(pairs.image[rows], return_inverse=True)
        longest = int(mask[prompts].sum(dim=1).max())
        text_features = model.get_text_features(
            tokens[prompts, :longest], mask[prompts, :longest]
        ).pooler_output
        image_features = model.get_image_features(
            normalized(shifted(pairs.pixels[images], rng))
        ).pooler_output
        cosine = F.normalize(image_features, dim=1) @ F.normalize(text_features, dim=1).T
        preference, contrastive = losses(
            cosine,
            torch.from_numpy(image.reshape(-1, 2)),
            prompt,
            torch.from_numpy(pairs.label_0[rows]),
            model.logit_scale.exp(),
            contrastive_scale.exp(),
        )
        optimizer.zero_grad(set_to_none=True)
        (preference + (1 - step / num_steps) * contrastive).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        sums += preference.item(), contrastive.item()
        if (step + 1) % LOG_STEPS == 0:
            logger.info(
                "step %d of %d: preference loss %.3f, contrastive loss %.3f, %.0f s of CPU",
                step + 1, num_steps, *(sums / LOG_STEPS), time.process_time() - started,
            )  # fmt: skip
            sums[:] = 0
    model.eval()


def batches(prompt: np.ndarray, num_steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of each step: chunks of neighbouring pairs of one prompt, reshuffled in every pass."""
    sessions = np.split(np.arange(len(prompt)), np.flatnonzero(np.diff(prompt)) + 1)
    chunks = [s[i : i + CHUNK_PAIRS] for s in sessions for i in range(0, len(s), CHUNK_PAIRS)]
    order: list[int] = []
    for _ in range(num_steps):
        if len(order) < CHUNKS_PER_STEP:
            order = rng.permutation(len(chunks)).tolist()
        yield np.concatenate([chunks[order.pop()] for _ in range(CHUNKS_PER_STEP)])


def losses(
    cosine: torch.Tensor, image: torch.Tensor, prompt: torch.Tensor, label_0: torch.Tensor,
    preference_scale: torch.Tensor, contrastive_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """PickScore's loss and CLIP's (from image to text), each a mean in nats.

    `cosine` (images, prompts); `image` (pairs, 2) and `prompt` (pairs,) index it; `label_0`
    (pairs,) is 1 where the first image won, 0 where the second did, 0.5 for ties. An image belongs
    to the prompt of its pairs.
    """
    logits = preference_scale * cosine[image, prompt[:, None]]
    preference = F.cross_entropy(logits, torch.stack([label_0, 1 - label_0], dim=1))
    owner = torch.empty(len(cosine), dtype=torch.long)
    owner[image] = prompt[:, None].expand(-1, 2)
    return preference, F.cross_entropy(contrastive_scale * cosine, owner)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Weights in float16 safetensors, configuration, tokenizer and image processor, hub format."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    ).save_pretrained(folder)


def make_world(folder: Path, num_pairs: int, seed: int) -> Path:
    """A world of ten pairs to a prompt in `folder`, which is left as it is where it exists."""
    if not (folder / "data").is_dir():
        generate_world(folder, num_pairs=num_pairs, num_prompts=num_pairs // 10, seed=seed)
    return folder


def main() -> None:
    """Make the training world, train, save, measure on a held-out world, write the model card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--pairs", type=int, default=45_000, help="pairs of the training world")
    parser.add_argument("--worlds", type=Path, help="folder that keeps the worlds for a next run")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="optimizer steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(TRAINING_SEED)
    with tempfile.TemporaryDirectory() as scratch:
        worlds = arguments.worlds or Path(scratch)
        train_world = make_world(worlds / "train", arguments.pairs, TRAINING_SEED)
        pairs = read_labelled_pairs(train_world)
        tokenizer = train_tokenizer(pairs.prompts)
        model = build_model(tokenizer)
        started = time.process_time()
        train(model, tokenizer, pairs, num_steps=arguments.steps, seed=TRAINING_SEED)
        minutes = (time.process_time() - started) / 60
        save(model, tokenizer, arguments.output)
        held_out = make_world(worlds / "held_out", HELD_OUT_PAIRS, HELD_OUT_SEED)
        measures = measure_reward_model(arguments.output, held_out)
    logger.info("held out: %s", measures)
    card = model_card(
        measures,
        command=f"python -m fifa_ray.demo.train_reward --output {arguments.output}",
        training=(
            f"{arguments.steps:,} steps on {len(pairs.prompt):,} labelled pairs"
            f" ({len(pairs.prompts):,} prompts, {len(pairs.pixels):,} pictures) of the world of"
            f" seed {TRAINING_SEED}, {minutes:.0f} minutes of one CPU core"
        ),
        num_parameters=model.num_parameters(),
    )
    (arguments.output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
