"""Forward processes against diffusers' schedulers; draws that depend on the position alone."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from fifa_ray.dpo import noising

SHAPE = (4, 8, 8)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(2))


def test_diffusion_is_what_diffusers_does(latents, noise):
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    noised = noising.diffusion_noised(latents, noise, alpha_bar)
    torch.testing.assert_close(noised, scheduler.add_noise(latents, noise, timesteps))
    velocity = noising.velocity_target(latents, noise, alpha_bar)
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, timesteps))


def test_flow_is_what_diffusers_does(latents, noise):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    places = torch.tensor([0, 1, 500, 998, 999])
    noised = noising.flow_noised(latents, noise, scheduler.sigmas[places])
    torch.testing.assert_close(
        noised, scheduler.scale_noise(latents, scheduler.timesteps[places], noise)
    )
    # The target is the path's derivative: a step of the sampler along it arrives at the latents.
    sigma = scheduler.sigmas[places].view(-1, 1, 1, 1)
    torch.testing.assert_close(noised - sigma * noising.flow_target(latents, noise), latents)


def test_one_value_per_image_is_asked_for(latents, noise):
    with pytest.raises(ValueError, match="one value for each of 5 images"):
        noising.flow_noised(latents, noise, torch.tensor([0.5]))


def uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 1000, (count,), generator=generator)


def test_draws_depend_on_seed_and_position_alone_not_on_the_batch():
    positions = list(range(100, 140))
    whole = noising.pair_noise(3, positions, SHAPE)
    times = noising.pair_timesteps(3, positions, uniform)
    torch.manual_seed(0)  # whatever the global generator did in between
    split = [positions[25:], positions[1::2][:3], positions[:1], [139, 100, 139]]
    for part in split:
        rows = [p - 100 for p in part]
        assert torch.equal(noising.pair_noise(3, part, SHAPE), whole[rows])
        assert torch.equal(noising.pair_timesteps(3, part, uniform), times[rows])
    assert not torch.equal(noising.pair_noise(4, positions, SHAPE), whole)
    assert noising.pair_noise(3, [], SHAPE).shape == (0, *SHAPE)


def test_positions_and_purposes_are_unrelated():
    draws = noising.pair_noise(0, range(400), SHAPE).flatten(1)
    correlation = torch.corrcoef(draws) - torch.eye(400)
    assert correlation.abs().max() < 6 / 16  # six standard deviations of 256 values
    assert draws.mean().abs() < 0.02
    assert draws.std().item() == pytest.approx(1, abs=0.01)
    posterior = noising.pair_noise(0, range(400), SHAPE, "posterior").flatten(1)
    assert ((draws * posterior).mean(1).abs() < 6 / 16).all()
    times = noising.pair_timesteps(0, range(4000), uniform).float()
    assert times.mean().item() == pytest.approx(499.5, abs=20)
    assert len(times.unique()) > 950


def test_augmentation_is_one_decision_per_pair_with_the_configured_shares():
    decisions = [
        noising.pair_augmentation(7, p, random_flip=True, prompt_dropout=0.2) for p in range(3000)
    ]
    assert decisions[11] == noising.pair_augmentation(7, 11, random_flip=True, prompt_dropout=0.2)
    assert sum(d.flip for d in decisions) / 3000 == pytest.approx(0.5, abs=0.04)
    assert sum(d.drop_prompt for d in decisions) / 3000 == pytest.approx(0.2, abs=0.03)
    off = noising.pair_augmentation(7, 11, random_flip=False, prompt_dropout=0)
    assert not off.flip
    assert not off.drop_prompt
    # Switching one decision off moves no other.
    assert (off.crop_top, off.crop_left) == (decisions[11].crop_top, decisions[11].crop_left)


def test_crops_reach_every_place_and_fit():
    offsets = {
        noising.pair_augmentation(1, p, random_flip=False, prompt_dropout=0).crop_offset(18, 16, 16)
        for p in range(200)
    }
    assert offsets == {(0, 0), (1, 0), (2, 0)}
    with pytest.raises(ValueError, match="at least 16 px"):
        noising.pair_augmentation(1, 0, random_flip=False, prompt_dropout=0).crop_offset(15, 20, 16)
