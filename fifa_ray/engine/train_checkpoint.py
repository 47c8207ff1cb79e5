"""The complete state of a training, as files: safetensors, and plain tensors that run no code.

    weights.safetensors   what training changes        average.safetensors   its moving average
    optimizer.pt          the optimiser's moments      state.json            all the rest

Data order and noise need no state: they follow from the step.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fifa_ray.engine.train_optimizer import AveragedWeights
from fifa_ray.models.diffusion import DiffusionModel

WEIGHTS, AVERAGE, OPTIMIZER = "weights.safetensors", "average.safetensors", "optimizer.pt"
STATE = "state.json"


@dataclass
class TrainState:
    """Where a training stands, besides its tensors."""

    # Optimizer steps done, which is also the number of the next one.
    step: int = 0
    best_accuracy: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    stopped_early: bool = False
    # Sums since the last line of metrics, over all workers.
    totals: dict[str, float] = field(default_factory=dict)
    pairs_seen: int = 0
    # Of training alone, over all attempts.
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    # Reason by pair_id (as text) of pairs that could not be read.
    bad_pairs: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    state: TrainState,
    model: DiffusionModel,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights | None,
) -> None:
    """Write a checkpoint into an empty folder; `state.json` says how long the other files are."""
    save_file(on_cpu(model.trainable_state()), folder / WEIGHTS)
    if averaged is not None:
        save_file(on_cpu(averaged.averages), folder / AVERAGE)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / STATE).write_text(json.dumps(asdict(state) | {"sizes": sizes}))


def load_checkpoint(
    folder: Path,
    model: DiffusionModel,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights | None,
) -> TrainState:
    """Put everything back as it was. Raises ValueError where the weights' names differ."""
    values = json.loads((folder / STATE).read_text())
    values.pop("sizes")
    state = TrainState(**values)
    model.load_trainable_state(load_file(folder / WEIGHTS))
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
    if averaged is not None:
        averaged.load(load_file(folder / AVERAGE))
    return state


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies of named tensors that share no memory, as safetensors wants them."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
