"""Forward processes, their targets, and everything random about a pair, from its position alone.

Two families. Discrete diffusion (DDPM, Ho et al. 2020, arXiv 2006.11239) mixes an image's latents
with noise by alpha_bar, the cumulative product of its schedule (`alphas_cumprod`); the denoiser
predicts the noise, or the velocity (Salimans & Ho 2022, arXiv 2202.00512). Rectified flow (Liu et
al. 2022, arXiv 2209.03003) goes straight from the latents to the noise by sigma in [0, 1].

Randomness. Pairs are trained in one endless sequence, and all that is random about the pair at a
position of it comes from (seed, position): noise, timestep, flip, crop, dropped prompt. So it is
the same for any number of workers and any split into batches, a resumed run needs no random state,
and both images of a pair share it. It is drawn on the CPU, the same for every device.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

Purpose = Literal["noise", "posterior", "timestep", "augmentation"]


def diffusion_noised(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise: (N, ...), `alpha_bar` (N,)."""
    keep, add = _signal_and_noise(alpha_bar, latents)
    return keep * latents + add * noise


def velocity_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * latents: what v-prediction predicts."""
    keep, add = _signal_and_noise(alpha_bar, latents)
    return keep * noise - add * latents


def flow_noised(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) * latents + sigma * noise: (N, ...), `sigma` (N,) in [0, 1]."""
    sigma = _per_image(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """noise - latents: the velocity of the straight path, the same at every sigma."""
    return noise - latents


def _signal_and_noise(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = _per_image(alpha_bar, like)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), to multiply `like`."""
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"expected one value for each of {len(like)} images, got {tuple(values.shape)}"
        )
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def pair_generator(seed: int, position: int, purpose: Purpose = "noise") -> Generator:
    """A generator on the CPU for one purpose of the pair at one position of the sequence.

    Each purpose has a stream of its own, so that leaving one out (latents that are cached need no
    crop) moves no other. Seeds are hashed, so neighbouring positions are unrelated.
    """
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def pair_noise(
    seed: int, positions: Sequence[int], shape: Sequence[int], purpose: Purpose = "noise"
) -> Tensor:
    """Standard normal float32 (P, *shape) on the CPU: one draw for each pair.

    With "noise" and the latents' shape, what both images of a pair get; with "posterior" and
    (2, *latents), what turns each image's posterior mean and std into latents.
    """
    draws = [torch.randn(*shape, generator=pair_generator(seed, p, purpose)) for p in positions]
    return torch.stack(draws) if draws else torch.empty(0, *shape)


def pair_timesteps(
    seed: int, positions: Sequence[int], sample: Callable[[int, Generator], Tensor]
) -> Tensor:
    """Timesteps of pairs (P,) on the CPU; `sample(count, generator)` draws as a family trains."""
    return torch.cat([sample(1, pair_generator(seed, p, "timestep")) for p in positions])


@dataclass(frozen=True)
class PairAugmentation:
    """What happens to both images of a pair and to their prompt."""

    flip: bool
    drop_prompt: bool
    # Where the crop lies between the first and the last place it can, each in [0, 1).
    crop_top: float
    crop_left: float

    def crop_offset(self, height: int, width: int, size: int) -> tuple[int, int]:
        """Top and left of a square crop of `size` pixels in an image of height x width.

        Images of other sizes get the corresponding place. Raises ValueError when it cannot fit.
        """
        if min(height, width) < size:
            raise ValueError(f"expected an image of at least {size} px a side: {height} x {width}")
        return (
            int(self.crop_top * (height - size + 1)),
            int(self.crop_left * (width - size + 1)),
        )


def pair_augmentation(
    seed: int, position: int, *, random_flip: bool, prompt_dropout: float
) -> PairAugmentation:
    """The random decisions about the pair at `position`; `prompt_dropout` is a share in [0, 1)."""
    draws = torch.rand(4, generator=pair_generator(seed, position, "augmentation")).tolist()
    return PairAugmentation(
        flip=random_flip and draws[0] < 0.5,
        drop_prompt=draws[1] < prompt_dropout,
        crop_top=draws[2],
        crop_left=draws[3],
    )
