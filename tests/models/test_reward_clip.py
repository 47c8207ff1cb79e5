"""PickScore and CLIP score against the authors' formula, computed here on its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fifa_ray.models.reward import build_image_transform, build_reward_model

OPENAI_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
OPENAI_STD = np.array([0.26862954, 0.26130258, 0.27577711])

Draw = Callable[..., Image.Image]


def clip_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """What a CLIP processor feeds the network, written again: short side, centre crop, norm."""
    image = image.convert("RGB")
    width, height = image.size
    if width < height:
        new = (size, int(size * height / width))
    else:
        new = (int(size * width / height), size)
    resized = np.asarray(image.resize(new, Image.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    crop = resized[top : top + size, left : left + size] / 255.0
    normal = (crop - OPENAI_MEAN) / OPENAI_STD
    return torch.tensor(normal.transpose(2, 0, 1), dtype=torch.float32)[None]


def cosine_of(folder: Path, image: Image.Image, prompt: str) -> float:
    """Cosine of one image and one prompt, one at a time, from the transformers model."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=clip_pixels(image, 32), **tokens)
    text, picture = output.text_embeds[0], output.image_embeds[0]
    return float(text @ picture / text.norm() / picture.norm())


@pytest.fixture(scope="module")
def pictures(make_image: Draw) -> list[Image.Image]:
    shapes = [(48, 40), (40, 48), (32, 32), (101, 33), (33, 77)]
    return [make_image(seed, *shape) for seed, shape in enumerate(shapes)]


def test_pickscore_is_the_scaled_cosine(
    tiny_clip: Path, pictures: list[Image.Image], prompts: list[str]
) -> None:
    model = build_reward_model("pickscore", str(tiny_clip))
    transform = build_image_transform("pickscore", str(tiny_clip))
    images = [transform(picture) for picture in pictures]
    assert {(image.dtype, image.shape) for image in images} == {(np.dtype("uint8"), (3, 32, 32))}
    every_image = np.repeat(np.arange(len(images)), len(prompts))
    every_prompt = np.tile(np.arange(len(prompts)), len(images))
    rewards = model.score(images, prompts, every_image, every_prompt)
    expected = [
        np.exp(np.float32(4.2)) * cosine_of(tiny_clip, pictures[i], prompts[p])
        for i, p in zip(every_image, every_prompt, strict=True)
    ]
    assert rewards.dtype == np.float32
    # 1e-5 of the cosine: the scale is 67.
    np.testing.assert_allclose(rewards / 66.7, np.array(expected) / 66.7, atol=1e-5)
    assert np.std(rewards) > 1  # The tiny model does tell its inputs apart.


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("cosine", lambda cosine: cosine),
        ("logit_scale", lambda cosine: np.exp(4.2) * cosine),
        ("percent", lambda cosine: max(100 * cosine, 0)),
    ],
)
def test_clip_score_conventions(
    tiny_clip: Path, make_image: Draw, scale: str, expected: Callable[[float], float]
) -> None:
    model = build_reward_model("clip_score", str(tiny_clip), options={"scale": scale})
    transform = build_image_transform("clip_score", str(tiny_clip))
    for seed in range(3):
        picture = make_image(seed)
        reward = model.score([transform(picture)], ["a dog"], np.array([0]), np.array([0]))
        cosine = cosine_of(tiny_clip, picture, "a dog")
        assert reward[0] == pytest.approx(expected(cosine), abs=1e-3 if scale != "cosine" else 1e-5)


def test_batches_order_and_sharing_do_not_matter(
    tiny_clip: Path, pictures: list[Image.Image], prompts: list[str]
) -> None:
    transform = build_image_transform("pickscore", str(tiny_clip))
    images = [transform(picture) for picture in pictures]
    image_index = np.array([0, 1, 2, 3, 4, 0, 0, 3])
    prompt_index = np.array([0, 0, 1, 2, 3, 4, 1, 0])
    large = build_reward_model("pickscore", str(tiny_clip), batch_size=64)
    rewards = large.score(images, prompts, image_index, prompt_index)

    small = build_reward_model("pickscore", str(tiny_clip), batch_size=2)
    np.testing.assert_allclose(
        small.score(images, prompts, image_index, prompt_index), rewards, atol=1e-5 * 67
    )
    backwards = large.score(images[::-1], prompts[::-1], 4 - image_index, 4 - prompt_index)
    np.testing.assert_allclose(backwards, rewards, atol=1e-5 * 67)
    for s, (i, p) in enumerate(zip(image_index, prompt_index, strict=True)):
        alone = large.score([images[i]], [prompts[p]], np.array([0]), np.array([0]))
        assert alone[0] == pytest.approx(rewards[s], abs=1e-5 * 67)


def test_each_image_and_text_is_encoded_once(
    tiny_clip: Path, make_image: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPModel

    encoded = {"images": 0, "texts": 0}
    image_features, text_features = CLIPModel.get_image_features, CLIPModel.get_text_features

    def count_images(self, pixel_values, **kwargs):
        encoded["images"] += len(pixel_values)
        return image_features(self, pixel_values=pixel_values, **kwargs)

    def count_texts(self, input_ids, *args, **kwargs):
        encoded["texts"] += len(input_ids)
        return text_features(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(CLIPModel, "get_image_features", count_images)
    monkeypatch.setattr(CLIPModel, "get_text_features", count_texts)
    options = {"text_cache_size": 2}
    model = build_reward_model("clip_score", str(tiny_clip), options=options)
    transform = build_image_transform("clip_score", str(tiny_clip))
    images = [transform(make_image(seed)) for seed in (1, 2)]
    grid = np.array([0, 0, 1, 1, 0]), np.array([0, 1, 0, 1, 0])
    first = model.score(images, ["cat", "dog"], *grid)
    assert encoded == {"images": 2, "texts": 2}
    again = model.score(images, ["dog", "cat"], grid[0], 1 - grid[1])
    assert encoded == {"images": 4, "texts": 2}
    np.testing.assert_array_equal(first, again)
    # The cache keeps the two latest texts only: "cat" goes, "dog" was used with "the house".
    model.score(images, ["the house", "dog"], *grid)
    model.score(images, ["cat", "dog"], *grid)
    assert encoded["texts"] == 4


def test_transform_equals_the_transformers_processor(
    tmp_path: Path, make_image: Draw, save_clip_processor: Callable[[Path, int], None]
) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    save_clip_processor(tmp_path, 24)
    (tmp_path / "tokenizer.json").write_text("{}")
    transform = build_image_transform("clip_score", str(tmp_path))
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    shapes = [(48, 40), (25, 91), (24, 24), (17, 9)]
    for seed, shape in enumerate(shapes):
        for mode in ("RGB", "L", "RGBA", "P"):
            picture = make_image(seed, *shape, mode=mode)
            # Transparency was dropped when these models were trained; transformers 5 paints white.
            opaque = picture.convert("RGB")
            theirs = processor(opaque, return_tensors="np")["pixel_values"][0]
            ours = (transform(picture).transpose(1, 2, 0) / 255 - OPENAI_MEAN) / OPENAI_STD
            np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, atol=1e-6)


def test_old_and_exact_size_configurations(tmp_path: Path, make_image: Draw) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    old = {**config, "size": 24, "crop_size": 20, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    transform = build_image_transform("clip_score", str(tmp_path))
    assert (transform.resize_px, transform.crop_px, transform.resample) == (24, (20, 20), 2)
    exact = {**config, "size": {"height": 24, "width": 16}, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(exact))
    assert build_image_transform("clip_score", str(tmp_path))(make_image(1)).shape == (3, 24, 16)
    padded = {**exact, "do_pad": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(padded))
    with pytest.raises(ValueError, match="do_pad=True"):
        build_image_transform("clip_score", str(tmp_path))


def test_model_that_overflows_gives_nan(tiny_clip: Path, make_image: Draw, tmp_path: Path) -> None:
    from transformers import CLIPModel

    broken = tmp_path / "broken"
    shutil.copytree(tiny_clip, broken)
    model = CLIPModel.from_pretrained(broken)
    model.visual_projection.weight.data.fill_(float("inf"))
    model.save_pretrained(broken)
    rewards = build_reward_model("clip_score", str(broken)).score(
        [build_image_transform("clip_score", str(broken))(make_image(0))],
        ["cat"],
        np.array([0, 0]),
        np.array([0, 0]),
    )
    assert np.isnan(rewards).all()


def test_bfloat16_stays_close(tiny_clip: Path, make_image: Draw, prompts: list[str]) -> None:
    transform = build_image_transform("clip_score", str(tiny_clip))
    images = [transform(make_image(seed)) for seed in range(5)]
    index = np.arange(5)
    exact = build_reward_model("clip_score", str(tiny_clip)).score(images, prompts, index, index)
    model = build_reward_model("clip_score", str(tiny_clip), dtype="bfloat16")
    assert model.info.dtype == "bfloat16"
    np.testing.assert_allclose(model.score(images, prompts, index, index), exact, atol=0.03)
