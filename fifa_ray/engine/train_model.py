"""The model that a configuration trains, opened in whatever process needs it."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from fifa_ray.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from fifa_ray.models.diffusion import DiffusionModel, Parts


def load_model(
    settings: TrainConfig, device: str, *, parts: "Parts" = "all", seed: int = 0
) -> "DiffusionModel":
    """Open `train.model` on a device: encoders to fill the cache, denoiser to train, or all.

    Raises FileNotFoundError or ValueError where there is no pipeline that can be trained.
    """
    from fifa_ray.models.batching import compute_dtype
    from fifa_ray.models.diffusion import build_diffusion_model

    return build_diffusion_model(
        settings.model,
        resolution=settings.resolution,
        lora=settings.lora,
        device=device,
        dtype=compute_dtype(settings.precision, device),
        revision=settings.revision,
        variant=settings.variant,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=seed,
        parts=parts,
    )


def describe_model(settings: TrainConfig) -> dict[str, Any]:
    """Source, hub commit and SHA-256 of every weight file, found out where the model will be used.

    Raises FileNotFoundError or ValueError where there is no pipeline that can be trained.
    """
    try:
        described: dict[str, Any] = ray.get(_describe.remote(settings))
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    return described


@ray.remote(num_cpus=1, max_calls=1)
def _describe(settings: TrainConfig) -> dict[str, Any]:
    from fifa_ray.models.diffusion_files import pipeline_folder
    from fifa_ray.models.weight_files import describe_weights

    folder = pipeline_folder(settings.model, settings.revision, settings.variant)
    digests: dict[str, str] = {}
    commit = None
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = describe_weights(settings.model, [inner])
        commit = commit or files.revision
        digests |= {f"{inner.name}/{name}": digest for name, digest in files.sha256.items()}
    others = [p for end in ("json", "txt", "model") for p in folder.glob(f"**/*.{end}")]
    for path in sorted(others):
        digests[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"source": settings.model, "revision": commit, "sha256": digests}


def pixel_tensor(images: "list[np.ndarray]", device: "torch.device | str") -> "torch.Tensor":
    """uint8 (3, H, W) arrays of one shape -> float32 (N, 3, H, W) in [-1, 1] on the device."""
    import torch

    stacked = torch.from_numpy(np.stack(images))
    if torch.device(device).type == "cuda":
        stacked = stacked.pin_memory()
    return stacked.to(device, non_blocking=True).float() / 127.5 - 1


def model_settings(settings: TrainConfig) -> dict[str, Any]:
    """The settings that say which weights these are and how images and prompts are encoded."""
    names = {"model", "revision", "variant", "resolution", "precision"}
    return settings.model_dump(mode="json", include=names)
