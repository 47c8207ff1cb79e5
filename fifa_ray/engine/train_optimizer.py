"""Optimiser, schedule, gradient scaling and averaged weights, from the settings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fifa_ray.config import OptimizerConfig, TrainConfig


def build_optimizer(
    parameters: Sequence[Tensor], settings: OptimizerConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (fused on a GPU), its 8-bit form, or Adafactor without its own learning rate.

    Adafactor is set as Diffusion-DPO's SDXL run had it: clip threshold 1, no parameter scaling, no
    relative steps. Raises RuntimeError where adamw_8bit has no bitsandbytes.
    """
    on_gpu = parameters[0].device.type == "cuda"
    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": settings.weight_decay}
    if settings.kind == "adamw":
        return torch.optim.AdamW(
            parameters, betas=settings.betas, eps=settings.eps, fused=on_gpu, **common
        )
    if settings.kind == "adamw_8bit":
        check_optimizer(settings, on_gpu=on_gpu)
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            parameters, betas=settings.betas, eps=settings.eps, **common
        )
        return optimizer
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        clip_threshold=1.0,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        **common,
    )


def check_optimizer(settings: OptimizerConfig, *, on_gpu: bool) -> None:
    """Raise RuntimeError where adamw_8bit has no GPU or no bitsandbytes."""
    if settings.kind != "adamw_8bit":
        return
    if not on_gpu:
        raise RuntimeError(
            "train.optimizer.kind=adamw_8bit needs GPUs; use adamw or adafactor on CPUs"
        )
    if find_spec("bitsandbytes") is None:
        raise RuntimeError(
            "train.optimizer.kind=adamw_8bit needs the package bitsandbytes, which is not "
            "installed: pip install bitsandbytes, or use adamw or adafactor"
        )


def base_learning_rate(settings: TrainConfig) -> float:
    """The learning rate after the warm-up."""
    rate = settings.optimizer.learning_rate
    return rate * settings.global_batch_size if settings.optimizer.scale_lr else rate


def learning_rate_factor(step: int, settings: OptimizerConfig, max_steps: int) -> float:
    """Share of the learning rate at optimizer step `step` (the first is 0), in [0, 1].

    Linear from 1/warmup_steps to 1 over the warm-up, then constant, or down to 0 at `max_steps`
    in a line or half a cosine.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    progress = min(1.0, progress)
    if settings.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(optimizer: torch.optim.Optimizer, settings: TrainConfig, step: int) -> LambdaLR:
    """The schedule as it stands before optimizer step `step`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = base_learning_rate(settings)
    return LambdaLR(
        optimizer,
        lambda at: learning_rate_factor(at, settings.optimizer, settings.max_steps),
        last_epoch=step - 1,
    )


class AveragedWeights:
    """Exponential moving average of the trained parameters, float32, on their device."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = [parameter.detach() for parameter in parameters.values()]
        self.averages = {name: p.detach().clone() for name, p in parameters.items()}
        self.average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take in the parameters after an optimizer step."""
        self.average(list(self.averages.values()), self.parameters, 0)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Put back what `averages` held."""
        for name, mine in self.averages.items():
            mine.copy_(averages[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The parameters are the averages inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages.values(), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)
