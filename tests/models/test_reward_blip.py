"""ImageReward from a tiny checkpoint in the authors' naming, against plain tensor arithmetic."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import layer_norm

from fifa_ray.models.reward import RewardModel, build_image_transform, build_reward_model

Weights = dict[str, torch.Tensor]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "##s", "house"]
VISION, TEXT, LAYERS = 64, 128, 2  # One head of 64 and two.


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Every parameter that the authors' ImageReward.pt has, small, random, biases too."""
    torch.manual_seed(4)
    made: Weights = {}

    def matrix(name: str, out: int, inside: int) -> None:
        made[f"{name}.weight"] = torch.randn(out, inside) / inside**0.5
        made[f"{name}.bias"] = 0.1 * torch.randn(out)

    def norm(name: str, width: int) -> None:
        made[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
        made[f"{name}.bias"] = 0.1 * torch.randn(width)

    eye = "blip.visual_encoder"
    made[f"{eye}.cls_token"] = torch.randn(1, 1, VISION)
    made[f"{eye}.pos_embed"] = torch.randn(1, 17, VISION)
    made[f"{eye}.patch_embed.proj.weight"] = torch.randn(VISION, 3, 56, 56) / 97
    made[f"{eye}.patch_embed.proj.bias"] = torch.randn(VISION)
    norm(f"{eye}.norm", VISION)
    for layer in range(LAYERS):
        block = f"{eye}.blocks.{layer}"
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        matrix(f"{block}.attn.qkv", 3 * VISION, VISION)
        matrix(f"{block}.attn.proj", VISION, VISION)
        matrix(f"{block}.mlp.fc1", 96, VISION)
        matrix(f"{block}.mlp.fc2", VISION, 96)
    bert = "blip.text_encoder"
    made[f"{bert}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, TEXT)
    made[f"{bert}.embeddings.position_embeddings.weight"] = torch.randn(40, TEXT)
    made[f"{bert}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{bert}.embeddings.LayerNorm", TEXT)
    for layer in range(LAYERS):
        block = f"{bert}.encoder.layer.{layer}"
        for attention, inside in (("attention", TEXT), ("crossattention", VISION)):
            matrix(f"{block}.{attention}.self.query", TEXT, TEXT)
            matrix(f"{block}.{attention}.self.key", TEXT, inside)
            matrix(f"{block}.{attention}.self.value", TEXT, inside)
            matrix(f"{block}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{block}.{attention}.output.LayerNorm", TEXT)
        matrix(f"{block}.intermediate.dense", 160, TEXT)
        matrix(f"{block}.output.dense", TEXT, 160)
        norm(f"{block}.output.LayerNorm", TEXT)
    matrix("blip.vision_proj", 8, VISION)
    matrix("blip.text_proj", 8, TEXT)
    widths = [TEXT, 1024, 128, 64, 16, 1]
    for position, inside, out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        matrix(f"mlp.layers.{position}", out, inside)
    return made


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, folder / "ImageReward.pt")
    vocabulary = {word: at for at, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return build_reward_model("imagereward", str(folder), batch_size=3)


class Reference:
    """The authors' forward pass for one image and one prompt, from the weights alone."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = []
        for at in range(0, q.shape[-1], 64):
            part = slice(at, at + 64)
            weight = (q[:, part] @ k[:, part].T / 8).softmax(-1)
            heads.append(weight @ v[:, part])
        return torch.cat(heads, -1)

    @staticmethod
    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        eye = "blip.visual_encoder"
        kernel = self.weights[f"{eye}.patch_embed.proj.weight"].flatten(1)
        patches = pixels.unfold(1, 56, 56).unfold(2, 56, 56).permute(1, 2, 0, 3, 4).reshape(16, -1)
        x = patches @ kernel.T + self.weights[f"{eye}.patch_embed.proj.bias"]
        x = torch.cat([self.weights[f"{eye}.cls_token"][0], x])
        x = x + self.weights[f"{eye}.pos_embed"][0]
        for layer in range(LAYERS):
            block = f"{eye}.blocks.{layer}"
            y = self.norm(f"{block}.norm1", x, 1e-6)
            q, k, v = self.linear(f"{block}.attn.qkv", y).split(VISION, dim=-1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v))
            y = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", self.gelu(y))
        return self.norm(f"{eye}.norm", x, 1e-6)

    def cross(self, name: str, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        q = self.linear(f"{name}.self.query", x)
        k, v = (self.linear(f"{name}.self.{part}", source) for part in ("key", "value"))
        y = self.linear(f"{name}.output.dense", self.attend(q, k, v))
        return self.norm(f"{name}.output.LayerNorm", x + y, 1e-12)

    def reward(self, pixels: torch.Tensor, tokens: list[int]) -> float:
        seen = self.see(pixels)
        bert = "blip.text_encoder"
        x = self.weights[f"{bert}.embeddings.word_embeddings.weight"][tokens]
        x = x + self.weights[f"{bert}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{bert}.embeddings.LayerNorm", x, 1e-12)
        for layer in range(LAYERS):
            block = f"{bert}.encoder.layer.{layer}"
            x = self.cross(f"{block}.attention", x, x)
            x = self.cross(f"{block}.crossattention", x, seen)
            y = self.gelu(self.linear(f"{block}.intermediate.dense", x))
            y = self.linear(f"{block}.output.dense", y)
            x = self.norm(f"{block}.output.LayerNorm", x + y, 1e-12)
        x = x[0]
        for position in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{position}", x)
        return (x.item() - 0.16717362830052426) / 1.0333394966054072


def pixels_of(image: Image.Image) -> torch.Tensor:
    """224 px short side, RGB last, centre crop: torchvision's steps with Pillow."""
    width, height = image.size
    short = min(width, height)
    new = tuple(224 if side == short else int(224 * side / short) for side in (width, height))
    image = image.resize(new, Image.BICUBIC)
    left, top = (round((side - 224) / 2) for side in new)
    crop = np.asarray(image.crop((left, top, left + 224, top + 224)).convert("RGB")) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(((crop - mean) / std).transpose(2, 0, 1), dtype=torch.float32)


def tokens_of(prompt: str) -> list[int]:
    """Lower case, words of the tiny vocabulary, at most 35 tokens with the two ends."""
    found = []
    for word in prompt.lower().split():
        if word in WORDS:
            found.append(WORDS.index(word))
        elif word.endswith("s") and word[:-1] in WORDS:
            found += [WORDS.index(word[:-1]), WORDS.index("##s")]
        else:
            found.append(WORDS.index("[UNK]"))
    return [WORDS.index("[CLS]"), *found[:33], WORDS.index("[SEP]")]


PROMPTS = ["a red cat", "Dogs", "", "a house of unknown things", "a red dog " * 20]


def test_reward_is_the_authors_forward_pass(
    model: RewardModel, weights: Weights, make_image: Callable[..., Image.Image]
) -> None:
    transform = build_image_transform("imagereward", None)
    shapes = [(300, 240), (225, 301), (224, 224), (512, 512), (229, 224)]
    pictures = [make_image(seed, *shape) for seed, shape in enumerate(shapes)]
    images = [transform(picture) for picture in pictures]
    image_index = np.array([0, 1, 2, 3, 4, 0, 0, 3, 0])
    prompt_index = np.array([0, 1, 2, 3, 4, 4, 1, 0, 0])
    rewards = model.score(images, PROMPTS, image_index, prompt_index)
    reference = Reference(weights)
    expected = [
        reference.reward(pixels_of(pictures[i]), tokens_of(PROMPTS[p]))
        for i, p in zip(image_index, prompt_index, strict=True)
    ]
    np.testing.assert_allclose(rewards, expected, atol=1e-5)
    assert np.std(rewards) > 0.1
    assert rewards[0] == rewards[8]


def test_batches_order_and_sharing_do_not_matter(
    folder: Path, model: RewardModel, make_image: Callable[..., Image.Image]
) -> None:
    transform = build_image_transform("imagereward", None)
    images = [transform(make_image(seed, 230, 240)) for seed in range(4)]
    image_index, prompt_index = np.divmod(np.arange(20), 5)
    rewards = model.score(images, PROMPTS, image_index, prompt_index)
    large = build_reward_model("imagereward", str(folder), batch_size=64)
    shuffle = np.random.default_rng(0).permutation(20)
    again = large.score(images, PROMPTS, image_index[shuffle], prompt_index[shuffle])
    np.testing.assert_allclose(again, rewards[shuffle], atol=1e-5)
    for i, p, reward in list(zip(image_index, prompt_index, rewards, strict=True))[::3]:
        alone = large.score([images[i]], [PROMPTS[p]], np.array([0]), np.array([0]))
        assert alone[0] == pytest.approx(reward, abs=1e-5)


def test_each_image_is_encoded_once(
    folder: Path, make_image: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BlipVisionModel

    encoded = []
    forward = BlipVisionModel.forward

    def count(self, pixel_values):
        encoded.append(len(pixel_values))
        return forward(self, pixel_values=pixel_values)

    monkeypatch.setattr(BlipVisionModel, "forward", count)
    model = build_reward_model("imagereward", str(folder), batch_size=2)
    images = [build_image_transform("imagereward", None)(make_image(seed)) for seed in range(3)]
    image_index, prompt_index = np.divmod(np.arange(15), 5)
    model.score(images, PROMPTS, image_index, prompt_index)
    assert encoded == [2, 1]


def test_incomplete_or_foreign_checkpoints_are_refused(
    weights: Weights, folder: Path, tmp_path: Path
) -> None:
    path, options = tmp_path / "ImageReward.safetensors", {"processor": str(folder)}
    lacking = dict(weights)
    del lacking["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    save_file(lacking, path)
    with pytest.raises(ValueError, match=r"layer\.1\.crossattention\.self\.key\.bias"):
        build_reward_model("imagereward", str(tmp_path), options=options)
    save_file({"unet.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"expected weights named blip\.visual_encoder"):
        build_reward_model("imagereward", str(tmp_path), options=options)


def test_bfloat16_stays_close(
    folder: Path, model: RewardModel, make_image: Callable[..., Image.Image]
) -> None:
    images = [build_image_transform("imagereward", None)(make_image(seed)) for seed in range(2)]
    at = np.array([0, 1]), np.array([0, 3])
    rough = build_reward_model("imagereward", str(folder), dtype="bfloat16")
    np.testing.assert_allclose(
        rough.score(images, PROMPTS, *at), model.score(images, PROMPTS, *at), atol=0.1
    )
