"""Image features: of vision folders against the models' own arithmetic, and hand-computed ones."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fifa_ray.models.image_encoder import build_encoder_transform, build_image_encoder
from fifa_ray.models.image_statistics import STATISTIC_NAMES

Draw = Callable[..., Image.Image]


def unit(rows: torch.Tensor) -> np.ndarray:
    array = rows.detach().numpy().astype(np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_clip_folder_gives_projected_features(tiny_clip: Path, make_image: Draw) -> None:
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = [make_image(seed, 60, 40 + 5 * seed) for seed in range(5)]
    encoder = build_image_encoder(str(tiny_clip), batch_size=2)
    features = encoder.encode(pictures)
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    pixels = torch.tensor(np.stack(processor(pictures)["pixel_values"]))
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    vision = model.vision_model(pixel_values=pixels).pooler_output
    np.testing.assert_allclose(features, unit(model.visual_projection(vision)), atol=1e-5)
    assert features.dtype == np.float32
    assert encoder.info.feature_width == features.shape[1] == 16

    transform = build_encoder_transform(str(tiny_clip))
    arrays = [transform(picture) for picture in pictures]
    np.testing.assert_allclose(encoder.encode(arrays[::-1]), features[::-1], atol=1e-6)


def _save(model, folder: Path, **processor: object) -> None:
    model.save_pretrained(folder)
    config = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    config |= {"size": {"height": 24, "width": 32}} | processor
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def _pixels(picture: Image.Image) -> torch.Tensor:
    small = np.asarray(picture.resize((32, 24), Image.BILINEAR)) / 255
    normal = (small - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    return torch.tensor(normal.transpose(2, 0, 1), dtype=torch.float32)[None]


def test_vit_folder_gives_the_class_token(tmp_path: Path, make_image: Draw) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(6)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=(24, 32),
        patch_size=8,
        initializer_range=0.3,
    )
    classifier = ViTForImageClassification(config).eval()  # Saved without a pooler.
    _save(classifier, tmp_path)
    picture = make_image(3, 70, 50)
    features = build_image_encoder(str(tmp_path)).encode([picture])
    expected = unit(classifier.vit(pixel_values=_pixels(picture)).last_hidden_state[:, 0])
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_convolutional_folder_gives_the_mean_over_places(tmp_path: Path, make_image: Draw) -> None:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(7)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()
    _save(model, tmp_path)
    picture = make_image(4, 70, 50)
    features = build_image_encoder(str(tmp_path)).encode([picture])
    hidden = model(pixel_values=_pixels(picture)).last_hidden_state
    np.testing.assert_allclose(features, unit(hidden.mean(dim=(2, 3))), atol=1e-5)


def test_folder_without_some_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    _save(ViTModel(config), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("cls_token"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cls_token"):
        build_image_encoder(str(tmp_path))


def statistics(picture: Image.Image) -> dict[str, float]:
    row = build_image_encoder(None).encode([picture])[0]
    return dict(zip(STATISTIC_NAMES, row.tolist(), strict=True))


def noise(seed: int = 0, px: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(px, px, 3), dtype=np.uint8)


def test_flat_images_are_plain_and_finite() -> None:
    for color in ("black", "white", "gray", "red"):
        found = statistics(Image.new("RGB", (300, 250), color))
        assert np.isfinite(list(found.values())).all()
        assert found["contrast"] == pytest.approx(0, abs=1e-6)
        assert found["luma_entropy"] == pytest.approx(0, abs=1e-6)
        assert found["edge_density"] == 0
        assert found["flat_fraction"] == 1
    assert statistics(Image.new("RGB", (300, 250), "black"))["black_fraction"] == 1
    assert statistics(Image.new("RGB", (300, 250), "white"))["white_fraction"] == 1
    assert statistics(Image.new("RGB", (300, 250), "red"))["saturation_mean"] == pytest.approx(1)


def test_values_against_their_definitions() -> None:
    picture = Image.fromarray(noise(px=224))  # Both views are the image itself.
    found = statistics(picture)
    rgb = np.asarray(picture).astype(np.float64) / 255
    luma = rgb @ [0.299, 0.587, 0.114]
    red_green, yellow_blue = rgb[..., 0] - rgb[..., 1], rgb[..., :2].mean(-1) - rgb[..., 2]
    colorfulness = np.sqrt(red_green.var() + yellow_blue.var()) + 0.3 * np.sqrt(
        red_green.mean() ** 2 + yellow_blue.mean() ** 2
    )
    counts = np.histogram(luma, bins=64, range=(0, 1))[0] / luma.size
    entropy = -sum(share * np.log(share) for share in counts if share)
    assert found["brightness"] == pytest.approx(luma.mean(), abs=1e-5)
    assert found["contrast"] == pytest.approx(luma.std(), abs=1e-5)
    assert found["luma_p95"] == pytest.approx(np.percentile(luma, 95), abs=1e-5)
    assert found["colorfulness"] == pytest.approx(colorfulness, abs=1e-5)
    assert found["luma_entropy"] == pytest.approx(entropy, abs=1e-3)
    # White noise: flat spectrum, no blocks, and the noise estimate is its standard deviation.
    assert found["spectral_slope"] == pytest.approx(0, abs=0.1)
    assert found["blockiness"] == pytest.approx(0, abs=0.05)
    assert np.exp(found["log_noise"]) == pytest.approx(luma.std(), rel=0.05)


def test_spectral_slope_of_pink_noise_is_minus_two() -> None:
    rng = np.random.default_rng(1)
    rows, columns = np.fft.fftfreq(224)[:, None], np.fft.rfftfreq(224)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(224, 224))) / frequency
    field = np.fft.irfft2(spectrum, s=(224, 224))
    field = np.clip((field - field.mean()) / field.std() * 45 + 128, 0, 255).astype(np.uint8)
    found = statistics(Image.fromarray(np.stack([field] * 3, axis=-1)))
    assert found["spectral_slope"] == pytest.approx(-2, abs=0.2)


def test_blur_blocks_and_mirrors_are_seen(make_image: Draw) -> None:
    base = Image.blend(make_image(5, 512, 512), Image.fromarray(noise(px=512)), 0.15)
    plain = statistics(base)
    blurred = statistics(base.filter(ImageFilter.GaussianBlur(2)))
    assert blurred["log_sharpness"] < plain["log_sharpness"] - 2
    assert blurred["log_noise"] < plain["log_noise"] - 1
    buffer = BytesIO()
    base.save(buffer, "JPEG", quality=5)
    assert statistics(Image.open(buffer))["blockiness"] > plain["blockiness"] + 0.3
    mirrored = np.asarray(base).copy()
    mirrored[:, 256:] = mirrored[:, 255::-1]
    assert statistics(Image.fromarray(mirrored))["mirror_symmetry"] == pytest.approx(1, abs=0.01)
    gray = statistics(base.convert("L"))
    assert gray["colorfulness"] == pytest.approx(0, abs=1e-6)
    assert gray["brightness"] == pytest.approx(plain["brightness"], abs=0.01)


def test_texture_patterns_against_a_loop_over_pixels() -> None:
    picture = Image.fromarray(noise(seed=2, px=224))
    found = statistics(picture)
    rgb = np.asarray(picture).astype(np.float32) / 255
    luma = 0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]
    counts = dict.fromkeys([*map(str, range(9)), "mixed"], 0)
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    for y in range(1, 223):
        for x in range(1, 223):
            bits = [luma[y + dy, x + dx] > luma[y, x] + 0.01 for dy, dx in ring]
            changes = sum(bits[i] != bits[i - 1] for i in range(8))
            counts[str(sum(bits)) if changes <= 2 else "mixed"] += 1
    for kind, count in counts.items():
        expected = np.log(count / 222**2 + 1e-3)
        assert found[f"fine_pattern_{kind}"] == pytest.approx(expected, abs=1e-3)
    # Blur takes the mixed patterns away, at both scales.
    blurred = statistics(picture.filter(ImageFilter.GaussianBlur(3)))
    for scale in ("fine", "coarse"):
        assert blurred[f"{scale}_pattern_mixed"] < found[f"{scale}_pattern_mixed"] - 1


def test_statistics_do_not_depend_on_the_batch(make_image: Draw) -> None:
    encoder = build_image_encoder(None)
    pictures = [make_image(seed, 230 + 7 * seed, 300) for seed in range(19)]
    pictures.append(make_image(99, 30, 90))  # Smaller than the view.
    together = encoder.encode(pictures)
    assert together.shape == (20, len(STATISTIC_NAMES))
    assert together.dtype == np.float32
    one_by_one = np.concatenate([encoder.encode([picture]) for picture in pictures])
    np.testing.assert_array_equal(together, one_by_one)
    transform = build_encoder_transform(None)
    np.testing.assert_array_equal(encoder.encode([transform(p) for p in pictures]), together)
    assert encoder.encode([]).shape == (0, len(STATISTIC_NAMES))
    assert len(set(encoder.feature_names)) == encoder.info.feature_width == len(STATISTIC_NAMES)
