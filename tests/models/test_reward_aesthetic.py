"""The aesthetic predictor against the authors' formula, with their checkpoint names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fifa_ray.models.reward import build_image_transform, build_reward_model

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP for 224 px images whose features are 12 wide."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(2)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_factor": 4.0,
    }
    config = CLIPConfig(
        projection_dim=12,
        vision_config={**tower, "image_size": 224, "patch_size": 56},
        text_config={**tower, "vocab_size": 20},
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mlp() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    widths = [12, 1024, 128, 64, 16, 1]
    positions = [0, 2, 4, 6, 7]
    weights = {}
    for position, wide, narrow in zip(positions, widths, widths[1:], strict=False):
        weights[f"layers.{position}.weight"] = torch.randn(narrow, wide) / wide**0.5
        weights[f"layers.{position}.bias"] = torch.randn(narrow)
    return weights


def expected_rating(folder: Path, mlp: dict[str, torch.Tensor], image: Image.Image) -> float:
    from transformers import CLIPModel

    width, height = image.size
    scale = 224 / min(width, height)
    image = image.resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), Image.BICUBIC)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    crop = image.convert("RGB").crop((left, top, left + 224, top + 224))
    pixels = ((np.asarray(crop) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
    with torch.no_grad():
        model = CLIPModel.from_pretrained(folder).eval()
        vision = model.vision_model(torch.tensor(pixels, dtype=torch.float32))
        features = model.visual_projection(vision.pooler_output)[0].numpy().astype(np.float64)
    x = features / np.linalg.norm(features)
    for position in (0, 2, 4, 6, 7):
        x = mlp[f"layers.{position}.weight"].numpy() @ x + mlp[f"layers.{position}.bias"].numpy()
    return x.item()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_rating_is_the_linear_stack_on_unit_features(
    clip_folder: Path,
    mlp: dict[str, torch.Tensor],
    tmp_path: Path,
    make_image: Callable[..., Image.Image],
    suffix: str,
) -> None:
    path = tmp_path / f"sac+logos+ava1-l14-linearMSE{suffix}"
    if suffix == ".pth":
        torch.save(mlp, path)
    else:
        save_file(mlp, path)
    options = {"clip": str(clip_folder)}
    model = build_reward_model("aesthetic", str(tmp_path), options=options, batch_size=2)
    transform = build_image_transform("aesthetic", str(tmp_path), options=options)
    shapes = [(300, 240), (225, 301), (229, 224)]
    pictures = [make_image(seed, *shape) for seed, shape in enumerate(shapes)]
    pictures.append(make_image(9, 300, 231, mode="RGBA"))
    images = [transform(picture) for picture in pictures]
    image_index = np.array([3, 0, 1, 2, 0])
    ratings = model.score(images, ["cat", "dog"], image_index, np.array([0, 1, 0, 1, 0]))
    expected = [expected_rating(clip_folder, mlp, pictures[i]) for i in image_index]
    np.testing.assert_allclose(ratings, expected, atol=1e-5)
    assert np.std(ratings) > 0.01
    assert set(model.info.weights.sha256) == {path.name, "model.safetensors"}


def test_safetensors_are_preferred(
    clip_folder: Path, mlp: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "sac+logos+ava1-l14-linearMSE.pth").write_bytes(b"not a checkpoint")
    save_file(mlp, tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors")
    build_reward_model("aesthetic", str(tmp_path), options={"clip": str(clip_folder)})


def test_missing_layer_is_named(
    clip_folder: Path, mlp: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mlp.safetensors"
    save_file({name: value for name, value in mlp.items() if name != "layers.6.bias"}, path)
    with pytest.raises(ValueError, match=r"layers\.6\.bias is missing"):
        build_reward_model("aesthetic", str(path), options={"clip": str(clip_folder)})
