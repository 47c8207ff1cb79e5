"""The demo's tiny pipeline: its autoencoder, its training."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from fifa_ray.demo.area_autoencoder import build_vae
from fifa_ray.demo.known_drawings import draw_known, prompts_of
from fifa_ray.demo.pipeline_card import draw_images
from fifa_ray.demo.pipeline_parts import text_tower
from fifa_ray.demo.resumable import learning_rate_factor, rows_of_step
from fifa_ray.demo.run import REWARD_WEIGHTS
from fifa_ray.demo.train_pipeline import train_pipeline
from fifa_ray.demo.train_vae import encode, train_vae

WEIGHTS = REWARD_WEIGHTS.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products are no faster on several threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_pictures_are_drawn_once_and_are_the_same_again(tmp_path: Path) -> None:
    prompts = prompts_of((5,), 60, ("normal",))[:8]
    first = draw_known(prompts, 2, 5, tmp_path / "a", num_processes=1)
    (chunk,) = (tmp_path / "a").iterdir()
    written = chunk.stat().st_mtime_ns
    assert np.array_equal(
        draw_known(prompts, 2, 5, tmp_path / "a", num_processes=1).pixels, first.pixels
    )
    assert chunk.stat().st_mtime_ns == written
    again = draw_known(prompts, 2, 5, tmp_path / "b", num_processes=1)
    assert np.array_equal(again.pixels, first.pixels)
    assert not np.array_equal(draw_known(prompts, 2, 7, tmp_path / "a", 1).pixels, first.pixels)
    assert first.prompt.tolist() == [i for i in range(8) for _ in range(2)]


def test_a_pass_takes_every_row_once_and_the_next_in_another_order() -> None:
    first = np.concatenate([rows_of_step(step, 4, 12, seed=1) for step in range(3)])
    second = np.concatenate([rows_of_step(step, 4, 12, seed=1) for step in range(3, 6)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    with pytest.raises(ValueError, match="at least 4 rows"):
        rows_of_step(0, 4, 3, seed=1)


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 10, 0.3) for step in range(100)]
    assert factors[4] == pytest.approx(0.5)
    assert factors[10:70] == [1.0] * 60
    assert factors[85] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.05


def test_the_text_encoder_starts_as_the_reward_models_tower() -> None:
    tokenizer, encoder = text_tower(REWARD_WEIGHTS)
    stored = load_file(REWARD_WEIGHTS / "model.safetensors")
    started = {name.removeprefix("text_model."): v for name, v in encoder.state_dict().items()}
    words = "embeddings.token_embedding.weight"
    assert torch.equal(started[words], stored[f"text_model.{words}"].float())
    assert tokenizer("a red balloon " * 30, truncation=True).input_ids[-1] == (
        tokenizer.eos_token_id
    )
    tokens = tokenizer(["two fish"], padding="max_length", return_tensors="pt").input_ids
    assert encoder(tokens).last_hidden_state.shape == (1, 24, 128)


def test_training_makes_a_pipeline_and_goes_on_exactly_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fifa_ray.demo.train_pipeline.TRAINING_SEEDS", (5,))
    monkeypatch.setattr("fifa_ray.demo.train_pipeline.PICTURES_PER_PROMPT", 2)
    settings = {"prompts_per_seed": 50, "vae_steps": 3, "denoiser_steps": 3, "num_processes": 1}
    train_pipeline(tmp_path / "whole", tmp_path / "work_whole", **settings)
    shutil.copytree(tmp_path / "work_whole" / "drawings", tmp_path / "work" / "drawings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fifa_ray.demo.resumable.SAVE_SECONDS", 0.0)
        calls = 0
        true_randint = torch.randint

        def killed_at_the_third(*arguments, **settings):
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return true_randint(*arguments, **settings)

        patch.setattr(torch, "randint", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train_pipeline(tmp_path / "resumed", tmp_path / "work", **settings)
    train_pipeline(tmp_path / "resumed", tmp_path / "work", **settings)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        whole, resumed = (
            load_file(tmp_path / name / f"{part}.safetensors") for name in ("whole", "resumed")
        )
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "resumed", safety_checker=None)
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {
        torch.float32
    }
    images = draw_images(pipeline, ["a red balloon", ""], seed=0)
    assert [image.size for image in images] == [(64, 64), (64, 64)]


def test_the_autoencoder_starts_as_area_averages_and_their_bilinear_inverse() -> None:
    torch.manual_seed(0)
    vae = build_vae(64).eval()
    drawn = torch.nn.functional.avg_pool2d(torch.rand(4, 3, 96, 96) * 2 - 1, 33, 1, 16)
    drawn = (drawn[..., :64, :64] * 4).clamp(-1, 1)
    averages = torch.nn.functional.avg_pool2d(drawn, 4)
    smooth = torch.nn.functional.interpolate(averages, scale_factor=4, mode="bilinear")
    with torch.no_grad():
        latents = vae.encode(drawn).latent_dist
        decoded = vae.decode(latents.mean).sample
    assert (latents.mean[:, :3] - averages).abs().max() < 0.1
    assert torch.allclose(latents.logvar, torch.tensor(-6.0), atol=1e-4)
    inner = (..., slice(8, -8), slice(8, -8))  # padding shows at the rim
    assert (decoded - smooth)[inner].abs().mean() < 0.05


def test_training_sets_the_scale_at_which_latents_have_unit_spread(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prompts = prompts_of((6,), 60, ("normal",))[:8]
    pixels = draw_known(prompts, 4, 6, tmp_path, num_processes=1).pixels
    vae = build_vae(64)
    train_vae(vae, pixels, checkpoint=tmp_path / "vae.pt", num_steps=3, seed=0)
    mean, deviation = encode(vae, pixels)
    assert mean.shape == (32, 4, 16, 16)
    spread = np.sqrt(mean.var() + np.square(deviation).mean()) * vae.config.scaling_factor
    assert spread == pytest.approx(1.0, abs=1e-3)


def test_all_weights_that_ship_are_small() -> None:
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    assert size < 10_000_000
