"""Runs with trainings to evaluate: tiny random pipelines, and manifests as `fifa train` leaves."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models.tiny_pipelines import RESOLUTION, save_tiny_sd

from fifa_ray.config import FifaConfig, load_config
from fifa_ray.demo.run import REWARD_WEIGHTS
from fifa_ray.run_dir import Manifest, RunDir, fingerprint

PROMPTS = (
    ("a red cat on the house", "animals"),
    ("two green boats", "counting"),
    ("", None),
    ("very long " * 120, "text"),
    ("<script>alert('x')</script> & {{ 7 * 7 }}", "text"),
    ("a blue dog in the rain", "animals"),
    ("a piano", None),
)


def save_base(folder: Path) -> Path:
    return save_tiny_sd(folder / "base")


def save_full(base: Path, folder: Path, *, scale: float = 1.3) -> Path:
    """A copy of a pipeline with a changed denoiser: what full fine-tuning leaves."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(base, folder)
    denoiser = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(scale)
    denoiser.save_pretrained(folder / "unet")
    return folder


def save_lora(base: Path, folder: Path, *, seed: int = 0, spread: float = 1.0) -> Path:
    """LoRA weights for the denoiser's attention, as training leaves them."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(base, use_safetensors=True)
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, spread)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def publish_training(run: RunDir, base: Path, name: str, **settings: Any) -> None:
    """The manifest of a complete training; its model is in the run already."""
    values = {"model": str(base), "resolution": RESOLUTION, "name": name} | settings
    config = load_config(
        {"run_dir": run.uri, "ingest": {"source": "unused"}, "train": values}
    ).train.model_dump(mode="json")
    run.publish(
        Manifest(
            stage=f"training/{name}",
            fingerprint=fingerprint(name, settings),
            rows_in=4,
            rows_out=4,
            config=config,
            details={"model": {"source": str(base), "sha256": {"unet": "of the base"}}},
        )
    )


def evaluate_config(run: RunDir, base: Path, **settings: Any) -> FifaConfig:
    """Settings that draw in three steps and score with the demo's tiny reward model."""
    values: Mapping[str, Any] = {
        "trainings": ["dpo"],
        "num_prompts": None,
        "num_inference_steps": 3,
        "batch_size": 4,
        "num_resamples": 200,
        "actors": {"max_actors": 1},
    }
    reward = {
        "name": "tiny", "kind": "pickscore", "weights": str(REWARD_WEIGHTS),
        "actors": {"max_actors": 1},
    }  # fmt: skip
    return load_config(
        {
            "run_dir": run.uri,
            "ingest": {"source": "unused"},
            "rewards": [reward],
            "train": {"model": str(base), "resolution": RESOLUTION},
            "evaluate": {**values, **settings},
        }
    )
