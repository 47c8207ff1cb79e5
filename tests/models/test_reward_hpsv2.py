"""HPSv2 against open_clip's CLIP, tokenizer and preprocessing, written again in plain torch."""

import html
import math
from collections.abc import Callable
from pathlib import Path

import ftfy
import numpy as np
import pytest
import regex
import torch
from PIL import Image
from torch import nn

from fifa_ray.models.open_clip_conversion import clip_from_open_clip
from fifa_ray.models.reward import build_image_transform, build_reward_model

Draw = Callable[..., Image.Image]
OPENAI_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
OPENAI_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class Block(nn.Module):
    """Pre-norm transformer layer with open_clip's parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)}
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        exact_gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + self.mlp["c_proj"](exact_gelu)


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, patch: int, image: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, heads, 2)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Heads of 80 and 64 as in ViT-H/14; two layers a tower; 224 px, so that HPSv2 can feed it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Visual(width=160, heads=2, patch=56, image=224, out=24)
        self.transformer = Tower(width=128, heads=2, layers=3)
        self.token_embedding = nn.Embedding(vocabulary, 128)
        self.positional_embedding = nn.Parameter(torch.randn(77, 128))
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, 24))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        causal = torch.full((77, 77), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, causal))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def tokenize(text: str, vocabulary: list[str], merges: list[tuple[str, str]]) -> torch.Tensor:
    """open_clip's byte-pair encoding of one text: (1, 77) ids, cut before the end, zero padded."""
    ids = {token: at for at, token in enumerate(vocabulary)}
    by_byte = [*range(33, 127), *range(161, 173), *range(174, 256)]
    by_byte += [byte for byte in range(256) if byte not in by_byte]
    letters = {byte: vocabulary[at] for at, byte in enumerate(by_byte)}
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    found = [len(vocabulary) - 2]
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", text):
        pieces = [letters[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        for left, right in merges:  # Best merge first, everywhere it applies.
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == (left, right):
                    pieces[at : at + 2] = [left + right]
                at += 1
        found += [ids[piece] for piece in pieces]
    found = [*found[:76], len(vocabulary) - 1]
    return torch.tensor([found + [0] * (77 - len(found))])


def hpsv2_pixels(image: Image.Image, antialias: bool) -> torch.Tensor:
    """Longest side to 224 on a float tensor, black margins, CLIP's normalisation."""
    pixels = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1).float().div(255)
    height, width = pixels.shape[1:]
    scale = 224 / float(max(height, width))
    size = round(height * scale), round(width * scale)
    small = nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=antialias)
    down, across = 224 - size[0], 224 - size[1]
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return (nn.functional.pad(small, margins) - OPENAI_MEAN) / OPENAI_STD


@pytest.fixture(scope="module")
def open_clip(clip_vocabulary: list[str]) -> OpenClip:
    torch.manual_seed(1)
    model = OpenClip(len(clip_vocabulary)).eval()
    for parameter in model.parameters():  # Biases and norms too, so that a mix-up shows.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def checkpoint(
    open_clip: OpenClip, tmp_path_factory, save_clip_tokenizer: Callable[[Path], None]
) -> Path:
    """A folder as the authors publish it (`state_dict` in a .pt), with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("hpsv2")
    torch.save({"state_dict": open_clip.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    save_clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def expected(
    open_clip: OpenClip, clip_vocabulary: list[str], clip_merges: list[tuple[str, str]]
) -> Callable[..., float]:
    def score(image: Image.Image, prompt: str, antialias: bool = True) -> float:
        with torch.no_grad():
            picture = open_clip.visual(hpsv2_pixels(image, antialias))[0]
            text = open_clip.encode_text(tokenize(prompt, clip_vocabulary, clip_merges))[0]
        return float(nn.functional.cosine_similarity(picture, text, dim=0))

    return score


HARD_PROMPTS = [
    "a red cat on the house",
    "\u201cdon\u2019t\u201d &amp;amp; the dog&#39;s   HOUSE",
    "schÃ¶n ﬁre 123",
    "the dog on a red house and a cat " * 20,
    "",
]


@pytest.mark.parametrize("resize", ["antialias", "no_antialias"])
def test_score_is_open_clips_cosine(
    checkpoint: Path, make_image: Draw, expected: Callable[..., float], resize: str
) -> None:
    options = {"resize": resize}
    model = build_reward_model("hpsv2.1", str(checkpoint), options=options)
    transform = build_image_transform("hpsv2.1", str(checkpoint), options=options)
    shapes = [(300, 200), (96, 250), (64, 64), (512, 512), (333, 332)]
    pictures = [make_image(seed, *shape) for seed, shape in enumerate(shapes)]
    index = np.arange(5)
    rewards = model.score([transform(p) for p in pictures], HARD_PROMPTS, index, index)
    theirs = [
        expected(picture, prompt, antialias=resize == "antialias")
        for picture, prompt in zip(pictures, HARD_PROMPTS, strict=True)
    ]
    np.testing.assert_allclose(rewards, theirs, atol=1e-5)
    assert np.std(rewards) > 0.02
    assert model.info.version == "v2.1"


def test_pillow_resize_is_the_antialiased_one_in_bytes(make_image: Draw) -> None:
    transform = build_image_transform("hpsv2", None, options={"resize": "pillow"})
    exact = build_image_transform("hpsv2", None)
    for shape in [(300, 200), (96, 250), (224, 100)]:
        picture = make_image(7, *shape)
        ours, floats = transform(picture), exact(picture)
        assert ours.dtype == np.uint8
        assert ours.shape == floats.shape == (3, 224, 224)
        # Pillow rounds and clips between its two passes, so edges may be a few levels off.
        difference = np.abs(ours / 255 - floats.clip(0, 1))
        assert difference.mean() < 0.5 / 255
        assert difference.max() < 4 / 255


def test_padding_is_black_and_centred() -> None:
    white = Image.new("RGB", (224, 101), "white")
    padded = build_image_transform("hpsv2", None)(white)
    rows = padded.mean(axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(rows > 0.5), np.arange(61, 162))


def test_a_folder_in_hub_format_scores_the_same(
    checkpoint: Path, tmp_path: Path, save_clip_tokenizer: Callable[[Path], None], make_image: Draw
) -> None:
    state_dict = torch.load(checkpoint / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    clip_from_open_clip(state_dict).save_pretrained(tmp_path)
    save_clip_tokenizer(tmp_path)
    images = [build_image_transform("hpsv2.1", None)(make_image(3, 300, 200))]
    at = np.array([0])
    rewards = [
        build_reward_model("hpsv2.1", str(folder)).score(images, ["a red dog"], at, at)
        for folder in (checkpoint, tmp_path)
    ]
    np.testing.assert_allclose(rewards[0], rewards[1], atol=1e-6)


def test_an_incomplete_checkpoint_is_refused(open_clip: OpenClip) -> None:
    state_dict = dict(open_clip.state_dict())
    del state_dict["transformer.resblocks.1.ln_2.bias"]
    with pytest.raises(ValueError, match=r"layers\.1\.layer_norm2\.bias"):
        clip_from_open_clip(state_dict)
    del state_dict["visual.proj"]
    with pytest.raises(ValueError, match=r"lacks visual\.proj"):
        clip_from_open_clip(state_dict)
    with pytest.raises(ValueError, match="adapter"):
        clip_from_open_clip({**open_clip.state_dict(), "adapter.weight": torch.ones(2)})


def test_prompts_are_cleaned_only_when_asked(
    checkpoint: Path, make_image: Draw, expected: Callable[..., float]
) -> None:
    model = build_reward_model("hpsv2.1", str(checkpoint), options={"text_cleaning": "none"})
    picture = make_image(3, 300, 200)
    images, at = [build_image_transform("hpsv2.1", None)(picture)], np.array([0])
    clean, dirty = "the dog's house", "the dog\u2019s house"
    assert model.score(images, [clean], at, at)[0] == pytest.approx(
        expected(picture, clean), abs=1e-5
    )
    assert abs(model.score(images, [dirty], at, at)[0] - expected(picture, dirty)) > 1e-4
