"""Pairs on their way to the denoiser: batches on the CPU, and what is drawn for them.

Everything random comes from (seed, position), on the CPU: see `fifa_ray.dpo.noising`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fifa_ray.dpo.noising import pair_noise, pair_timesteps
from fifa_ray.engine.train_order import split_batches
from fifa_ray.models.diffusion import DiffusionModel


@dataclass(frozen=True)
class PairBatch:
    """B pairs. Tensors of both images have 2B rows: the chosen ones, then the rejected ones.

    Either the images' posteriors are known (`mean`, `std`: float32 (2B, *latents)), or their pixels
    (float32 (2B, 3, H, W) in [-1, 1]) are still to be encoded.
    """

    mean: Tensor | None
    std: Tensor | None
    pixels: Tensor | None
    conditioning: Mapping[str, Tensor]  # B rows each
    reward_margin: Tensor  # float32 (B,)
    noise: Tensor  # float32 (B, *latents)
    posterior_noise: Tensor  # float32 (2B, *latents)
    timesteps: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.reward_margin)

    def pinned(self, device: torch.device) -> "PairBatch":
        """A copy that a GPU fetches while the host goes on; on a CPU the batch itself."""
        return self._map(Tensor.pin_memory) if device.type == "cuda" else self

    def to(self, device: torch.device) -> "PairBatch":
        """The batch on the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def halves(self) -> list["PairBatch"]:
        """Two batches with together the same pairs, in the same order; one pair stays whole."""
        return [self._rows(part) for part in split_batches(len(self), -(-len(self) // 2))]

    def _rows(self, part: slice) -> "PairBatch":
        count = len(self)

        def cut(tensor: Tensor) -> Tensor:
            if len(tensor) == count:
                return tensor[part]
            return torch.cat([tensor[:count][part], tensor[count:][part]])

        return self._map(cut)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PairBatch":
        changed = {
            field.name: function(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        conditioning = {name: function(value) for name, value in self.conditioning.items()}
        return replace(self, conditioning=conditioning, **changed)


@dataclass(frozen=True)
class PairInputs:
    """What a reader found for some pairs: fields of `PairBatch`, of those that can be used.

    `usable` are indices into the pairs that were asked for; `bad` the (index, reason) of the rest.
    """

    mean: Tensor | None
    std: Tensor | None
    pixels: Tensor | None
    conditioning: Mapping[str, Tensor]
    reward_margin: Tensor
    usable: Sequence[int]
    bad: Sequence[tuple[int, str]]


def make_batch(
    inputs: PairInputs, positions: Sequence[int], model: DiffusionModel, seed: int
) -> PairBatch:
    """Draw noise and timesteps for the usable pairs at their positions (all that was asked for)."""
    at = [positions[i] for i in inputs.usable]
    shape = model.latent_shape
    posterior = pair_noise(seed, at, (2, *shape), "posterior")
    return PairBatch(
        mean=inputs.mean,
        std=inputs.std,
        pixels=inputs.pixels,
        conditioning=inputs.conditioning,
        reward_margin=inputs.reward_margin,
        noise=pair_noise(seed, at, shape),
        posterior_noise=posterior.transpose(0, 1).flatten(0, 1).contiguous(),
        timesteps=pair_timesteps(seed, at, model.sample_timesteps),
    )


def with_posteriors(batch: PairBatch, model: DiffusionModel) -> PairBatch:
    """The batch with its pixels encoded, if they are not yet."""
    if batch.pixels is None:
        return batch
    with torch.no_grad():
        mean, std = model.encode_images(batch.pixels)
    return replace(batch, pixels=None, mean=mean, std=std)


def sample_latents(batch: PairBatch, model: DiffusionModel) -> Tensor:
    """Latents of both images, float32 (2B, *latents): a draw from each posterior."""
    batch = with_posteriors(batch, model)
    assert batch.mean is not None
    assert batch.std is not None
    return batch.mean + batch.std * batch.posterior_noise


def twice(tensor: Tensor) -> Tensor:
    """(B, ...) -> (2B, ...): what both images of a pair share."""
    return torch.cat([tensor, tensor])
