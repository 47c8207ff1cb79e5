"""Training that may be killed at any time: its checkpoints, learning rates and order of data.

Everything random in a step depends on the seed and the step's number alone, so what a checkpoint
has to hold is the step and the tensors, and a resumed training goes on as if nothing had happened.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

SAVE_SECONDS, LOG_STEPS = 60.0, 50


def learning_rate_factor(step: int, num_steps: int, warmup: int, decay_share: float) -> float:
    """Share of the peak rate at a step (from 0): linear warm-up, constant, linear to nearly 0."""
    decay = max(1, round(decay_share * num_steps))
    return min(1.0, (step + 1) / warmup, (num_steps - step) / decay)


def rows_of_step(step: int, batch_size: int, num_rows: int, seed: int) -> np.ndarray:
    """Rows (batch_size,) of a step: passes over all rows, each in an order of its own.

    A last batch that a pass could not fill is left out. Raises ValueError where rows are fewer than
    a batch.
    """
    per_pass = num_rows // batch_size
    if per_pass == 0:
        raise ValueError(f"expected at least {batch_size} rows for a batch, found {num_rows}")
    order = np.random.default_rng([seed, step // per_pass]).permutation(num_rows)
    start = step % per_pass * batch_size
    return order[start : start + batch_size]


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator of one step's noise."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class Averaged:
    """Exponential moving average of parameters, with a shorter memory at the start."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: list[torch.nn.Parameter], step: int) -> None:
        """Take in the parameters after a step (from 0)."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.values, tuple(parameters), 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: list[torch.nn.Parameter]) -> None:
        """Overwrite the parameters with the averages."""
        for parameter, value in zip(parameters, self.values, strict=True):
            parameter.copy_(value)


def run_steps(
    modules: dict[str, torch.nn.Module],
    loss_of_step: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    checkpoint: Path,
    num_steps: int,
    peak_rate: float,
    ema_decay: float,
    warmup: int = 200,
    decay_share: float = 0.3,
    on_save: Callable[[int], None] = lambda step: None,
) -> float:
    """Train modules in place by AdamW until `num_steps`; they end as their moving averages.

    `loss_of_step` returns a step's loss and figures to log. Goes on from `checkpoint` where it
    exists; it is written every `SAVE_SECONDS`, after which `on_save` is called with the modules
    holding their averages. Returns seconds of CPU spent, over all runs.
    """
    parameters = [p for module in modules.values() for p in module.parameters()]
    averaged = Averaged(parameters, ema_decay)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=peak_rate,
        betas=(0.9, 0.99),
        foreach=True,
    )
    first, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        averaged.values, first, spent = state["averages"], state["step"], state["seconds"]
        logger.info("goes on from step %d of %s", first, checkpoint)
    started, saved = time.process_time(), time.monotonic()
    sums: dict[str, float] = {}

    def save(step: int) -> None:
        state: dict[str, Any] = {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "averages": averaged.values,
            "step": step,
            "seconds": spent + time.process_time() - started,
        }
        unfinished = checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.rename(checkpoint)
        present = [parameter.detach().clone() for parameter in parameters]
        averaged.copy_to(parameters)
        on_save(step)
        with torch.no_grad():
            for parameter, value in zip(parameters, present, strict=True):
                parameter.copy_(value)

    for step in range(first, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * learning_rate_factor(step, num_steps, warmup, decay_share)
        loss, figures = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        averaged.update(parameters, step)
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value
        if (step + 1) % LOG_STEPS == 0:
            words = ", ".join(f"{name} {value / LOG_STEPS:.4f}" for name, value in sums.items())
            seconds = spent + time.process_time() - started
            logger.info("step %d of %d: %s, %.0f s of CPU", step + 1, num_steps, words, seconds)
            sums = {}
        if time.monotonic() - saved > SAVE_SECONDS:
            save(step + 1)
            saved = time.monotonic()
    if first < num_steps:
        save(num_steps)
    averaged.copy_to(parameters)
    return spent + time.process_time() - started
