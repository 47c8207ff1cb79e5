"""One optimizer step: errors of policy and reference, the loss, exact gradients of the mean.

The gradient of a step is that of the mean over its G pairs, however they fall into workers and
batches: every pair has the weight W/G, because DDP averages over the W workers.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fifa_ray.config import LossConfig
from fifa_ray.dpo.loss import Metrics, denoising_error, preference_loss
from fifa_ray.engine.train_batch import PairBatch, sample_latents, twice, with_posteriors
from fifa_ray.models.diffusion import DiffusionModel

logger = logging.getLogger(__name__)


Errors = tuple[Tensor, Tensor]


class OutOfDeviceMemory(RuntimeError):
    """One pair does not fit, or memory ran out where a step cannot be taken back."""


class PairLoss:
    """Loss and metrics of batches of pairs under a model and its reference."""

    def __init__(self, model: DiffusionModel, loss: LossConfig) -> None:
        self.model, self.loss = model, loss

    def __call__(
        self, denoiser: torch.nn.Module, batch: PairBatch, pair_weight: float
    ) -> tuple[Tensor, Metrics]:
        """Weighted sum of the pairs' losses (), and metrics; see `fifa_ray.dpo.loss`."""
        reference = self.reference_errors(batch)
        policy = self.errors(denoiser, batch)
        weights = torch.full_like(policy[0], pair_weight)
        return self.of_errors(policy, reference, batch.reward_margin, weights)

    def of_errors(
        self, policy: Errors, reference: Errors, reward_margin: Tensor, pair_weight: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The same from errors that are known."""
        return preference_loss(
            self.loss.kind,
            *policy,
            *reference,
            dpo_beta=self.loss.dpo_beta,
            anchor_weight=self.loss.anchor_weight,
            reward_margin=reward_margin,
            pair_weight=pair_weight,
        )

    @torch.no_grad()
    def reference_errors(self, batch: PairBatch) -> Errors:
        """Errors of the frozen reference: a copy, or the denoiser with its adapters off."""
        with self.model.reference() as reference:
            return self.errors(reference, batch)

    def errors(self, denoiser: torch.nn.Module, batch: PairBatch) -> Errors:
        """float32 (B,) errors of the chosen and the rejected images, in one forward pass.

        `denoiser` is bare or wrapped by DDP.
        """
        model = self.model
        noise, timesteps = twice(batch.noise), twice(batch.timesteps)
        conditioning = {name: twice(values) for name, values in batch.conditioning.items()}
        with torch.no_grad():
            latents = sample_latents(batch, model)
            noisy = model.add_noise(latents, noise, timesteps)
            target = model.target(latents, noise, timesteps)
        predicted = model.predict(denoiser, noisy, timesteps, conditioning)
        chosen, rejected = denoising_error(predicted, target).chunk(2)
        return chosen, rejected


class GradientStep:
    """Gradients of one optimizer step, from batches that may shrink to what fits.

    Where a GPU runs out of memory the gradients of this worker's step so far are dropped and the
    step starts again with half the batch, at most one pair. Other workers need not know: the only
    moment they meet is the last backward pass. `rehearse` finds the size before that matters.
    """

    def __init__(
        self,
        loss: PairLoss,
        denoiser: torch.nn.Module,
        scaler: torch.amp.GradScaler,
        batch_size: int,
    ) -> None:
        """`denoiser`: bare, or wrapped by DDP; `batch_size`: pairs of one forward pass."""
        self.loss, self.denoiser, self.scaler = loss, denoiser, scaler
        self.batch_size = batch_size

    def run(self, batches: Sequence[PairBatch], pair_weight: float) -> Metrics:
        """Fill the gradients from all batches, and return the sums of the metrics.

        Raises OutOfDeviceMemory where one pair does not fit, or memory ran out in the last pass.
        """
        while True:
            metrics = self._attempt(batches, pair_weight, synchronize=True)
            if metrics is not None:
                return metrics

    def rehearse(self, batch: PairBatch) -> None:
        """Find the largest batch that fits before anything depends on it; leaves no gradients."""
        while self._attempt([batch], 1.0, synchronize=False) is None:
            pass
        self._drop_gradients()

    def _attempt(
        self, batches: Sequence[PairBatch], pair_weight: float, *, synchronize: bool
    ) -> Metrics | None:
        """None where it has to be tried again with a smaller batch."""
        self._drop_gradients()
        parts = [part for batch in batches for part in _cut(batch, self.batch_size)]
        totals: Metrics = {}
        largest = 0
        try:
            for index, part in enumerate(parts):
                last = synchronize and index == len(parts) - 1
                largest = len(part)
                add_metrics(totals, self._backward(part, pair_weight, synchronize=last))
        except torch.cuda.OutOfMemoryError as error:
            if largest == 1 or last:
                raise OutOfDeviceMemory(
                    f"out of device memory with {largest} pairs at once; use a smaller "
                    "train.per_device_batch_size, train.gradient_checkpointing=true, train.lora, "
                    "or a smaller train.resolution"
                ) from error
        else:
            return totals
        # Outside the except block: its traceback would keep the failed batch's tensors alive.
        self._drop_gradients()
        torch.cuda.empty_cache()
        self.batch_size = max(1, largest // 2)
        logger.warning(
            "out of device memory with %d pairs at once; going on with %d", largest, self.batch_size
        )
        return None

    def _backward(self, batch: PairBatch, pair_weight: float, *, synchronize: bool) -> Metrics:
        alone = isinstance(self.denoiser, DistributedDataParallel) and not synchronize
        with self.denoiser.no_sync() if alone else nullcontext():  # type: ignore[operator]
            on_device = with_posteriors(batch.to(self.loss.model.device), self.loss.model)
            loss, metrics = self.loss(self.denoiser, on_device, pair_weight)
            self.scaler.scale(loss).backward()
        return metrics

    def _drop_gradients(self) -> None:
        for parameter in self.denoiser.parameters():
            parameter.grad = None


def _cut(batch: PairBatch, batch_size: int) -> Iterator[PairBatch]:
    if len(batch) <= batch_size:
        yield batch
        return
    for half in batch.halves():
        yield from _cut(half, batch_size)


def add_metrics(totals: Metrics, more: Mapping[str, Tensor]) -> None:
    """Add sums to sums, in place."""
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value.clone()
