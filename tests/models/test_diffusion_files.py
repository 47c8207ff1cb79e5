"""Pipeline folders: which open, which do not and why, and what a saved one keeps."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusion_families import build
from safetensors.torch import load_file
from tiny_pipelines import save_tiny_flux, save_tiny_sd, save_tiny_sdxl

from fifa_ray.models.diffusion import build_diffusion_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_sd(tmp_path / "source")


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))


def test_a_saved_pipeline_keeps_every_other_component(tmp_path):
    folder = save_tiny_sd(tmp_path / "source", safety_checker=True)
    model = build(folder)
    assert model.pipeline.safety_checker is None
    assert model.pipeline.feature_extractor is None
    model.save(tmp_path / "saved")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert pipeline.safety_checker is not None
    assert pipeline.feature_extractor is not None
    source_files = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    saved_files = {
        p.relative_to(tmp_path / "saved") for p in (tmp_path / "saved").rglob("*") if p.is_file()
    }
    assert saved_files == source_files
    for path in source_files:
        if path.parts[0] != "unet" and path.name != "model_index.json":
            assert (tmp_path / "saved" / path).read_bytes() == (folder / path).read_bytes()


def test_a_variants_weights_are_saved_without_its_mark_shards_and_all(tmp_path):
    folder = save_tiny_flux(tmp_path / "source", variant="fp16")
    pipeline = DiffusionPipeline.from_pretrained(folder, variant="fp16")
    for path in (folder / "text_encoder_2").glob("*.safetensors"):
        path.unlink()
    pipeline.text_encoder_2.save_pretrained(
        folder / "text_encoder_2", variant="fp16", max_shard_size="6KB"
    )
    names = {path.name for path in (folder / "text_encoder_2").iterdir()}
    assert "model.safetensors.index.fp16.json" in names
    # Unmarked weights beside them are others, and stay behind.
    pipeline.vae.decoder.conv_in.bias.data += 1
    pipeline.vae.save_pretrained(folder / "vae")
    model = build(folder, variant="fp16")
    model.save(tmp_path / "saved")
    saved = DiffusionPipeline.from_pretrained(tmp_path / "saved", use_safetensors=True)
    assert not [p for p in (tmp_path / "saved").rglob("*") if "fp16" in p.name]
    for name in ("text_encoder_2", "vae", "text_encoder"):
        expected = getattr(model.pipeline, name).state_dict()
        found = getattr(saved, name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_safety_checker_that_is_only_a_pickle_is_left_out(tmp_path):
    folder = save_tiny_sd(tmp_path / "source", safety_checker=True)
    weights = folder / "safety_checker" / "model.safetensors"
    torch.save(load_file(weights), folder / "safety_checker" / "pytorch_model.bin")
    weights.unlink()
    build(folder).save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "safety_checker").exists()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert pipeline.safety_checker is None


def test_pickled_weights_are_not_opened(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        build(folder)


def test_other_kinds_of_models_are_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index.json, found none"):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        build(tmp_path / "absent" / "folder" / "here")
    edit_index(folder, _class_name="StableDiffusionInpaintPipeline")
    with pytest.raises(ValueError, match="a StableDiffusionInpaintPipeline, which cannot be"):
        build(folder)
    edit_index(folder, _class_name=["my_pipeline", "MyPipeline"])
    with pytest.raises(ValueError, match="my_pipeline"):
        build(folder)


def test_code_in_a_models_folder_never_runs(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "unet" / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    edit_index(folder, unet=["mine", "Mine"])
    with pytest.raises(ValueError, match="run code of the model's folder"):
        build(folder)
    edit_index(
        folder, unet=["diffusers", "UNet2DConditionModel"], **{"../unet": ["diffusers", "x"]}
    )
    with pytest.raises(ValueError, match="run code of the model's folder"):
        build(folder)
    assert not marker.exists()


def test_resolutions_that_do_not_fit_are_refused_with_the_nearest_that_do(folder, tmp_path):
    with pytest.raises(ValueError, match="multiple of 2 for this model, got 17; take 16 or 18"):
        build_diffusion_model(str(folder), resolution=17)
    flux = save_tiny_flux(tmp_path / "flux")
    with pytest.raises(ValueError, match="multiple of 4 for this model, got 18; take 16 or 20"):
        build_diffusion_model(str(flux), resolution=18)


def test_denoisers_and_schedulers_that_cannot_be_trained_are_refused(folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    config = {**pipeline.unet.config, "in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="with 4 input channels, found 9"):
        build(folder)
    sdxl = save_tiny_sdxl(tmp_path / "sdxl")
    settings = sdxl / "scheduler" / "scheduler_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction_type epsilon or v_prediction, found sample"):
        build(sdxl)
