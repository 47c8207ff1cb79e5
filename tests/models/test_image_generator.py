"""Images of every family: from their own seeds, whatever the batch; failures cost one image."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import (
    RESOLUTION,
    save_tiny_flux,
    save_tiny_sd,
    save_tiny_sd3,
    save_tiny_sdxl,
)

from fifa_ray.models.image_generator import GeneratorWeights, ImageGenerator, Sampling

SAMPLING = Sampling(RESOLUTION, 3, 5.0)
PROMPTS = ["a red cat", "", "very long " * 200, "<b>two</b> boats"]
SEEDS = [1, 2**63 - 1, 3, 4]
SAVE = {
    "sd": save_tiny_sd,
    "sdxl": save_tiny_sdxl,
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
}


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return save_tiny_sd(tmp_path_factory.mktemp("sd"), safety_checker=True)


@pytest.fixture
def generator(tiny_sd):
    return ImageGenerator(GeneratorWeights(str(tiny_sd)), SAMPLING, batch_size=3)


def levels(drawings):
    return np.stack([drawing.pixels for drawing in drawings]).astype(int)


@pytest.mark.parametrize("family", SAVE)
def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch(family, tmp_path):
    SAVE[family](tmp_path)
    generator = ImageGenerator(GeneratorWeights(str(tmp_path)), SAMPLING, batch_size=4)
    images = levels(generator.draw(PROMPTS, SEEDS))
    assert images.shape == (4, RESOLUTION, RESOLUTION, 3)
    generator.batches.size = 3
    order = [2, 0, 3, 1]
    others = levels(generator.draw([PROMPTS[i] for i in order], [SEEDS[i] for i in order]))
    assert np.abs(others - images[order]).max() <= 1
    again, other_seed = levels(generator.draw([PROMPTS[0]] * 2, [SEEDS[0], 9]))
    assert np.abs(again - images[0]).max() <= 1
    assert np.abs(other_seed - images[0]).max() > 10


def test_no_safety_checker_paints_images_black(generator, tiny_sd):
    assert (tiny_sd / "safety_checker").is_dir()
    assert generator.pipeline.safety_checker is None
    assert generator.info["pipeline"] == "StableDiffusionPipeline"
    assert len(generator.info["sha256"]["unet/diffusion_pytorch_model.safetensors"]) == 64


def test_an_image_that_fails_costs_itself_alone(generator, monkeypatch):
    draw = generator._forward

    def refuse(requests):
        if any("boats" in prompt for prompt, _ in requests):
            raise IndexError("too many boats")
        return draw(requests)

    expected = levels(generator.draw(PROMPTS[:3], SEEDS[:3]))
    monkeypatch.setattr(generator, "_forward", refuse)
    found = generator.draw(["two boats", *PROMPTS[:3]], [7, *SEEDS[:3]])
    assert (found[0].pixels, found[0].error) == (None, "generation_failed")
    assert found[0].detail == "IndexError: too many boats"
    assert np.abs(levels(found[1:]) - expected).max() <= 1


def test_out_of_memory_halves_the_batch_and_is_raised_for_a_single_image(generator, monkeypatch):
    draw, sizes = generator._forward, []

    def limited(requests):
        sizes.append(len(requests))
        if len(requests) > limit:
            raise torch.cuda.OutOfMemoryError("full")
        return draw(requests)

    monkeypatch.setattr(generator, "_forward", limited)
    limit = 1
    assert len(generator.draw(PROMPTS, SEEDS)) == 4
    assert sizes == [3, 1, 1, 1, 1]
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        generator.draw(PROMPTS[:1], SEEDS[:1])


def test_nan_is_no_image(generator):
    with torch.no_grad():
        next(generator.pipeline.vae.decoder.parameters()).fill_(float("nan"))
    (found,) = generator.draw(["a cat"], [1])
    assert found.error == "nan_image"
    assert "precision=float32" in found.detail


def test_adapters_change_the_images_and_zero_ones_do_not(tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    expected = levels(ImageGenerator(GeneratorWeights(str(tiny_sd)), SAMPLING).draw(PROMPTS, SEEDS))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for spread, name in ((0.0, "zero"), (1.0, "spread")):
        with torch.no_grad():
            for key, parameter in pipeline.unet.named_parameters():
                if "lora_" in key:
                    parameter.normal_(0, 1).mul_(spread)
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        StableDiffusionPipeline.save_lora_weights(tmp_path / name, unet_lora_layers=state)
        weights = GeneratorWeights(str(tiny_sd), lora=str(tmp_path / name))
        found = levels(ImageGenerator(weights, SAMPLING).draw(PROMPTS, SEEDS))
        if name == "zero":
            assert np.abs(found - expected).max() <= 1
        else:
            assert np.abs(found - expected).max() > 10
    # Of another width, or of another family: left out with a warning, tuned would equal base.
    file = tmp_path / "wide" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    save_file(
        {f"unet.{name}": torch.zeros(5, 5) for name in state}, file, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="do not fit"):
        ImageGenerator(GeneratorWeights(str(tiny_sd), lora=str(file.parent)), SAMPLING)
    save_tiny_sd3(tmp_path / "sd3")
    weights = GeneratorWeights(str(tmp_path / "sd3"), lora=str(tmp_path / "spread"))
    with pytest.raises(ValueError, match=r"change no layer of|do not fit"):
        ImageGenerator(weights, SAMPLING)


def test_messages_of_what_cannot_be_loaded(tiny_sd, tmp_path):
    with pytest.raises(FileNotFoundError, match="check the path"):
        ImageGenerator(GeneratorWeights(str(tmp_path / "absent" / "x")), SAMPLING)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        ImageGenerator(GeneratorWeights(str(tmp_path)), SAMPLING)
    with pytest.raises(FileNotFoundError, match=r"pytorch_lora_weights\.safetensors"):
        ImageGenerator(GeneratorWeights(str(tiny_sd), lora=str(tmp_path)), SAMPLING)
    with pytest.raises(ValueError, match="multiple of 8, got 20"):
        ImageGenerator(GeneratorWeights(str(tiny_sd)), Sampling(20, 3, 5.0))
