"""Tiny models with random weights, written to disk the way the hub and the authors store them."""

import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

MERGES = (
    "c a",
    "ca t</w>",
    "d o",
    "do g</w>",
    "r e",
    "re d</w>",
    "o n</w>",
    "a n",
    "t h",
    "th e</w>",
    "h o",
    "ho u",
)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip_vocabulary() -> list[str]:
    """CLIP's layout: bytes, bytes that end a word, merges, then start and end of text."""
    letters = _byte_alphabet()
    words = [merge.replace(" ", "") for merge in MERGES]
    ends = [letter + "</w>" for letter in letters]
    return [*letters, *ends, *words, "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="session")
def clip_merges() -> list[tuple[str, str]]:
    """Byte-pair merges of the tiny vocabulary, best first."""
    return [tuple(merge.split(" ")) for merge in MERGES]


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE vocabularies begin with."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + n) for n in range(len(moved))]


@pytest.fixture(scope="session")
def save_clip_tokenizer(
    clip_vocabulary: list[str], clip_merges: list[tuple[str, str]]
) -> Callable[[Path], None]:
    """Writes the tiny tokenizer into a folder."""
    from transformers import CLIPTokenizer

    vocabulary = {token: at for at, token in enumerate(clip_vocabulary)}
    return CLIPTokenizer(vocab=vocabulary, merges=clip_merges).save_pretrained


@pytest.fixture(scope="session")
def save_clip_processor() -> Callable[[Path, int], None]:
    """Writes an image processor for square images of some size into a folder."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def save(folder: Path, size: int) -> None:
        crop = {"height": size, "width": size}
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def tiny_clip(
    tmp_path_factory: pytest.TempPathFactory,
    clip_vocabulary: list[str],
    save_clip_tokenizer: Callable[[Path], None],
    save_clip_processor: Callable[[Path, int], None],
) -> Path:
    """A CLIP in hub format: 32 px images, two layers a tower, logit scale 4.2."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_factor": 4.0,
    }
    vocabulary_size = len(clip_vocabulary)
    config = CLIPConfig(
        projection_dim=16,
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={
            **tower,
            "vocab_size": vocabulary_size,
            "max_position_embeddings": 77,
            "bos_token_id": vocabulary_size - 2,
            "eos_token_id": vocabulary_size - 1,
            "pad_token_id": vocabulary_size - 1,
        },
    )
    model = CLIPModel(config)
    model.logit_scale.data.fill_(4.2)
    folder = tmp_path_factory.mktemp("tiny_clip")
    model.save_pretrained(folder)
    save_clip_tokenizer(folder)
    save_clip_processor(folder, 32)
    return folder


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    """Smooth random pictures, so that a resize keeps some of them: (seed, width, height, mode)."""

    def draw(seed: int, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, size=(6, 7, 4), dtype=np.uint8)
        image = Image.fromarray(small, "RGBA").resize((width, height), Image.Resampling.BILINEAR)
        return image.convert(mode)

    return draw


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Prompts that the tiny vocabulary knows well, hardly and not at all, one of them too long."""
    return [
        "a red cat on the house",
        "dog",
        "Ünïcødé  &  DOGS, 42 of them!",
        " ".join(string.ascii_lowercase) * 6,
        "",
    ]
