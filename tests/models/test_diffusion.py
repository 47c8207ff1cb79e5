"""What every family promises to the training loop."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusion_families import (
    FAMILIES,
    LORA,
    build,
    disturbed,
    dpo_loss,
    fixed_pairs,
    pixels_of,
    predictions,
    reference_predictions,
    train,
)
from tiny_pipelines import RESOLUTION

from fifa_ray.config import LoraConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per family."""
    root = tmp_path_factory.mktemp("pipelines")
    return {family: save(root / family) for family, save in FAMILIES.items()}


def drawn(pipeline: DiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a blue dog",
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert image.shape == (RESOLUTION, RESOLUTION, 3)
    assert np.isfinite(image).all()
    return image


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_learns_keeps_its_reference_and_saves_a_pipeline(
    family, folders, tmp_path
):
    model = build(folders[family])
    pairs = fixed_pairs(model)
    with torch.no_grad():
        before = predictions(model, pairs)
    losses = train(model, pairs)
    assert losses[0] == np.float32(math.log(2))
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(reference_predictions(model, pairs), before)
    model.save(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    with torch.no_grad():
        saved = predictions(model, pairs, getattr(pipeline, model.denoiser_name))
        now = predictions(model, pairs)
    torch.testing.assert_close(saved, now, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(now, before, atol=1e-3)
    drawn(pipeline)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_leave_the_base_alone_and_save_lora_weights(family, folders, tmp_path):
    model = build(folders[family], lora=LORA)
    pairs = fixed_pairs(model)
    base = build(folders[family], parts="denoiser")
    with torch.no_grad():
        expected = predictions(base, pairs)
    losses = train(model, pairs, rate=1e-2)
    assert losses[0] == np.float32(math.log(2))
    assert losses[-1] < losses[0] - 0.02
    # Adapters off, exactly the base model; and on again afterwards.
    assert torch.equal(reference_predictions(model, pairs), expected)
    with torch.no_grad():
        now = predictions(model, pairs)
    assert not torch.allclose(now, expected, atol=1e-4)
    model.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = DiffusionPipeline.from_pretrained(folders[family])
    plain = drawn(pipeline)
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        loaded = predictions(model, pairs, getattr(pipeline, model.denoiser_name))
    torch.testing.assert_close(loaded, now, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(drawn(pipeline), plain)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_computes_in_it_and_starts_at_ln_2(family, lora, folders):
    model = build(folders[family], lora=lora, dtype=torch.bfloat16)
    assert {p.dtype for p in model.trainable_state().values()} == {torch.float32}
    pairs = fixed_pairs(model)
    assert pairs.latents.dtype == torch.float32
    policy = predictions(model, pairs)
    assert policy.dtype == torch.bfloat16
    assert torch.equal(policy, reference_predictions(model, pairs))
    assert dpo_loss(model, pairs).item() == np.float32(math.log(2))
    assert pairs.conditioning["text"].dtype == torch.bfloat16
    vae_dtype = torch.float32 if model.family == "sdxl" else torch.bfloat16
    assert model.pipeline.vae.dtype == vae_dtype
    exact = build(folders[family], lora=lora)
    with torch.no_grad():
        difference = predictions(exact, fixed_pairs(exact)) - policy
    assert 0 < difference.abs().mean() < 0.05
    dpo_loss(model, pairs).backward()
    assert all(p.grad.isfinite().all() for p in model.denoiser.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoded_images_are_the_posterior_in_the_denoisers_scale(family, folders):
    model = build(folders[family], parts="encoders")
    pixels = pixels_of(3)
    mean, std = model.encode_images(pixels)
    assert mean.shape == std.shape == (3, *model.latent_shape)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    vae = AutoencoderKL.from_pretrained(folders[family] / "vae")
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        drawn = posterior.sample(torch.Generator().manual_seed(4))
    expected = (drawn - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(mean + std * noise, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected pixels"):
        model.encode_images(pixels[..., :-2])


def test_vaes_with_a_mean_and_std_for_each_channel(folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders["sdxl"])
    pipeline.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1, 2, 3, 4])
    pipeline.save_pretrained(tmp_path)
    plain, _ = build(folders["sdxl"], parts="encoders").encode_images(pixels_of(2))
    mean, _ = build(tmp_path, parts="encoders").encode_images(pixels_of(2))
    scale, std = 0.13025, torch.tensor([1, 2, 3, 4.0]).view(-1, 1, 1)
    shift = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(-1, 1, 1)
    torch.testing.assert_close(mean, (plain / scale - shift) * scale / std)


def test_sdxl_trains_what_it_guides_against_for_a_dropped_prompt(folders):
    model = build(folders["sdxl"], parts="encoders")
    rows = model.encode_prompts(["a red cat", ""])
    assert not rows["text"][1].any()
    assert not rows["pooled_text"][1].any()
    assert rows["text"][0].any()
    assert rows["pooled_text"][0].any()
    # The others encode the empty prompt.
    for family in ("sd-epsilon", "sd3", "flux-dev"):
        assert build(folders[family], parts="encoders").encode_prompts([""])["text"].any()


def test_timesteps_are_drawn_as_the_family_trains(folders):
    generator = torch.Generator().manual_seed(0)
    steps = build(folders["sd-v"], parts="encoders").sample_timesteps(4000, generator)
    assert steps.dtype == torch.int64
    assert steps.min() >= 0
    assert steps.max() <= 999
    assert steps.double().mean().item() == pytest.approx(499.5, abs=15)
    # Logit-normal in the middle of the table, then shifted: the median is the shifted 1/2.
    medians = {"sd3": 3 / 4, "flux-schnell": 1 / 2}
    mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
    medians["flux-dev"] = math.exp(mu) / (math.exp(mu) + 1)
    for family, median in medians.items():
        steps = build(folders[family], parts="encoders").sample_timesteps(4000, generator)
        assert steps.dtype == torch.float32
        assert steps.min() > 0
        assert steps.max() <= 1000
        assert steps.median().item() / 1000 == pytest.approx(median, abs=0.02)
        # The logit's spread is that of the standard normal, whatever the shift.
        assert torch.logit(steps / 1000).std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_trained_weights_come_back_and_others_can_be_saved(lora, folders, tmp_path):
    model = build(folders["sd-epsilon"], lora=lora)
    pairs = fixed_pairs(model)
    start = {name: values.clone() for name, values in model.trainable_state().items()}
    if lora is None:
        assert start.keys() == dict(model.denoiser.named_parameters()).keys()
    else:
        assert all(".lora_" in name for name in start)
    averaged = disturbed(model)
    with torch.no_grad():
        own = predictions(model, pairs)
        model.save(tmp_path, averaged)
        assert torch.equal(predictions(model, pairs), own)
        model.load_trainable_state(averaged)
        expected = predictions(model, pairs)
        if lora is None:
            saved = DiffusionPipeline.from_pretrained(tmp_path)
        else:
            saved = DiffusionPipeline.from_pretrained(folders["sd-epsilon"])
            saved.load_lora_weights(tmp_path)
        torch.testing.assert_close(predictions(model, pairs, saved.unet), expected)
        model.load_trainable_state(start)
        assert torch.equal(predictions(model, pairs), own)
    with model.reference():  # the names do not depend on what is switched off
        assert model.trainable_state().keys() == start.keys()
    name = next(iter(start))
    with pytest.raises(ValueError, match="missing"):
        model.load_trainable_state({name: start[name]})
    with pytest.raises(ValueError, match="another shape"):
        model.load_trainable_state({**start, name: torch.zeros(1)})


def test_adapters_depend_on_their_seed_alone(folders):
    torch.manual_seed(1)
    first = build(folders["sd3"], lora=LORA, seed=3, parts="denoiser").trainable_state()
    torch.manual_seed(2)
    same = build(folders["sd3"], lora=LORA, seed=3, parts="denoiser").trainable_state()
    other = build(folders["sd3"], lora=LORA, seed=4, parts="denoiser").trainable_state()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux-dev"])
def test_gradient_checkpointing_changes_no_gradient(family, lora, folders):
    gradients = []
    for checkpointing in (False, True):
        model = build(folders[family], lora=lora, gradient_checkpointing=checkpointing)
        assert model.denoiser.is_gradient_checkpointing == checkpointing
        if lora is not None:
            model.load_trainable_state(disturbed(model))
        dpo_loss(model, fixed_pairs(model)).backward()
        gradients.append([p.grad for p in model.denoiser.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_hold_only_what_they_are_for(family, folders, tmp_path):
    whole = build(folders[family])
    pairs = fixed_pairs(whole)
    encoders = build(folders[family], parts="encoders")
    assert all(p.is_meta for p in encoders.denoiser.parameters())
    assert encoders.latent_shape == whole.latent_shape
    alone = fixed_pairs(encoders)
    assert torch.equal(alone.latents, pairs.latents)
    assert all(torch.equal(rows, pairs.conditioning[n]) for n, rows in alone.conditioning.items())
    denoiser = build(folders[family], parts="denoiser")
    assert denoiser.pipeline.vae is None
    assert torch.equal(predictions(denoiser, pairs), predictions(whole, pairs))
    whole.unload_encoders()
    for model in (denoiser, whole):
        with pytest.raises(RuntimeError, match="not loaded"):
            model.encode_images(pixels_of(1))
        with pytest.raises(RuntimeError, match="not loaded"):
            model.encode_prompts(["a"])
    whole.save(tmp_path)
    drawn(DiffusionPipeline.from_pretrained(tmp_path))


def test_adapters_train_under_ddp_with_the_reference_between_forward_and_backward(
    folders, tmp_path
):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        gradients = []
        for wrap in (lambda module: module, torch.nn.parallel.DistributedDataParallel):
            model = build(folders["sd-epsilon"], lora=LORA)
            model.load_trainable_state(disturbed(model))
            pairs = fixed_pairs(model)
            denoiser = wrap(model.denoiser)
            for _ in range(2):  # twice: the reducer has to be ready again
                model.denoiser.zero_grad()
                dpo_loss(model, pairs, denoiser=denoiser).backward()
            gradients.append([p.grad for p in model.denoiser.parameters() if p.requires_grad])
        for plain, reduced in zip(*gradients, strict=True):
            torch.testing.assert_close(reduced, plain)
    finally:
        torch.distributed.destroy_process_group()


def test_lora_settings_reach_the_layers(folders):
    settings = LoraConfig(rank=3, target_modules=("to_k", "conv1"))
    model = build(folders["sd-epsilon"], lora=settings, parts="denoiser")
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in model.trainable_state()}
    assert layers == {"to_k", "conv1"}
    assert {v.shape[0] for n, v in model.trainable_state().items() if ".lora_A." in n} == {3}
    with pytest.raises(ValueError, match=r"name ending in \['to_x'\]"):
        build(folders["sd-epsilon"], lora=LoraConfig(target_modules=("to_k", "to_x")))
