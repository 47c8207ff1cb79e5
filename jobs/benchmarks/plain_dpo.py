"""Diffusion-DPO as the diffusers research script trains it: what the engine is compared with.

Written from the script's description: low-rank adapters on a UNet, images decoded and transformed
by the training process, both images of a pair through the VAE and its prompt through the text
encoder at every step, one forward pass for both images, a second one with the adapters off.
"""

import io
import json
import sys
import time
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

BETA = 2500.0
VAE_IMAGES = 8


@click.command()
@click.argument("pipeline_folder")
@click.argument("data_folder", type=click.Path(path_type=Path))
@click.option("--steps", required=True, type=int)
@click.option("--warmup", default=2, help="Steps that are not timed.")
@click.option("--batch", default=4, help="Pairs per step.")
@click.option("--rank", default=8, help="Of the adapters.")
@click.option("--side", required=True, type=int)
@click.option("--device", default="cpu")
@click.option("--dtype", default="float32")
@click.option("--threads", default=1)
def main(
    pipeline_folder: str,
    data_folder: Path,
    steps: int,
    warmup: int,
    batch: int,
    rank: int,
    side: int,
    device: str,
    dtype: str,
    threads: int,
) -> None:
    """Train for some steps and print a JSON line: pairs per second, peak memory of the GPU."""
    torch.set_num_threads(threads)
    loop = _PlainLoop(pipeline_folder, rank, device, getattr(torch, dtype))
    pairs = pq.read_table(
        next(data_folder.glob("*.parquet")), columns=["caption", "jpg_0", "jpg_1", "label_0"]
    ).to_pylist()
    started = time.perf_counter()
    for step in range(warmup + steps):
        if step == warmup:
            started = time.perf_counter()
        rows = [pairs[(step * batch + i) % len(pairs)] for i in range(batch)]
        loop.step(rows, side)
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    json.dump({"pairs_per_second": steps * batch / seconds, "gpu_bytes": memory}, sys.stdout)


class _PlainLoop:
    def __init__(self, folder: str, rank: int, device: str, dtype: torch.dtype) -> None:
        from diffusers import DDPMScheduler, StableDiffusionPipeline
        from peft import LoraConfig

        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
        self.vae, self.text_encoder = pipeline.vae, pipeline.text_encoder
        self.unet, self.tokenizer = pipeline.unet, pipeline.tokenizer
        for module in (self.vae, self.text_encoder, self.unet):
            module.requires_grad_(False)
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets
            )
        )
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=1e-2)
        self.device, self.dtype = device, dtype

    def step(self, rows: list[dict], side: int) -> None:
        chosen = [row["jpg_0"] if row["label_0"] else row["jpg_1"] for row in rows]
        rejected = [row["jpg_1"] if row["label_0"] else row["jpg_0"] for row in rows]
        pixels = torch.stack([_pixels(data, side) for data in (*chosen, *rejected)])
        pixels = pixels.to(self.device, self.dtype)
        with torch.no_grad():
            latents = torch.cat(
                [
                    self.vae.encode(pixels[i : i + VAE_IMAGES]).latent_dist.sample()
                    for i in range(0, len(pixels), VAE_IMAGES)
                ]
            )
            latents = latents * self.vae.config.scaling_factor
            ids = self.tokenizer(
                [row["caption"] for row in rows],
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            text = self.text_encoder(ids.to(self.device))[0].repeat(2, 1, 1)
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        steps = torch.randint(0, 1000, (len(rows),), device=self.device).repeat(2)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            policy = self._error(noisy, steps, text, noise)
            self.unet.disable_adapters()
            with torch.no_grad():
                reference = self._error(noisy, steps, text, noise)
            self.unet.enable_adapters()
        gap = (policy[0] - policy[1]) - (reference[0] - reference[1])
        loss = -F.logsigmoid(-BETA * gap).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _error(
        self, noisy: torch.Tensor, steps: torch.Tensor, text: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        predicted = self.unet(noisy, steps, text).sample
        error = (predicted.float() - noise.float()).pow(2).mean(dim=(1, 2, 3))
        chosen, rejected = error.chunk(2)
        return chosen, rejected


def _pixels(data: bytes, side: int) -> torch.Tensor:
    """Shorter side to `side`, bilinear, centre crop, [-1, 1]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    array = np.asarray(image.crop((left, top, left + side, top + side)), np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


if __name__ == "__main__":
    main()
