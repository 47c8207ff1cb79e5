"""Reward models that compare an image's features with a prompt's: PickScore, CLIP score, HPSv2.

Images and texts are encoded apart, so each distinct image and text is encoded once however many
pairs share it, and text features are kept across calls. Features are normalised and compared in
float32 whatever the towers compute in.

- PickScore (arXiv 2305.01569): exp(logit_scale) * cosine, a Hugging Face CLIP and its processor.
- CLIP score: option `scale` says which of the conventions: "cosine" (default), "logit_scale"
  (exp(logit_scale) * cosine, CLIP's own logit) or "percent" (max(100 * cosine, 0), torchmetrics).
- HPSv2 and v2.1 (arXiv 2306.09341): cosine, of open_clip's ViT-H/14 checkpoint (converted on
  loading) or of a folder in hub format. Prompts are cleaned as open_clip cleans them.
"""

import html
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fifa_ray.models.batching import (
    LargestBatch,
    checked_indices,
    compute_dtype,
    finite_or_nan,
    normalized_pixels,
)
from fifa_ray.models.image_transform import (
    LongestSideAndPad,
    ResizeAndCrop,
    processor_transform,
)
from fifa_ray.models.open_clip_conversion import clip_from_open_clip
from fifa_ray.models.reward import AUTHORS_PROCESSOR, RewardModelInfo
from fifa_ray.models.weight_files import (
    checkpoint_file,
    describe_weights,
    load_state_dict,
    model_folder,
    processor_folder,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


MAX_TEXT_TOKENS = 77
DEFAULT_TEXT_CACHE_SIZE = 16_384  # 64 MiB of float32 features at ViT-H/14's width of 1,024.
_PAIRS_PER_PRODUCT = 16_384


@dataclass(frozen=True)
class _Provenance:
    kind: str
    name: str
    version: str
    scale: str
    source: str
    files: tuple[Path, ...]


class ClipReward:
    """A CLIP with a scale; a `RewardModel`."""

    def __init__(
        self,
        model: "CLIPModel",
        tokenizer: "PreTrainedTokenizerBase",
        transform: ResizeAndCrop | LongestSideAndPad,
        provenance: _Provenance,
        *,
        device: str,
        dtype: torch.dtype,
        batch_size: int | None,
        text_cache_size: int,
        rescale: Callable[[torch.Tensor], torch.Tensor],
        clean_text: Callable[[str], str] = str,
    ) -> None:
        """`rescale` turns float32 cosines into rewards, `clean_text` runs before the tokenizer."""
        self._model: Any = model.to(device=device, dtype=dtype).eval()  # type: ignore[call-arg]
        self._tokenizer = tokenizer
        self._transform = transform
        self._provenance = provenance
        self._device, self._dtype = device, dtype
        self._rescale, self._clean_text = rescale, clean_text
        on_gpu = torch.device(device).type == "cuda"
        self._image_batch = LargestBatch(batch_size or (256 if on_gpu else 32), "images")
        # On CPUs one text at a time, which costs nothing there: the last bits of its features must
        # not depend on the texts that happened to be new with it, or a rerun could choose others.
        self._text_batch = LargestBatch((batch_size or 512) if on_gpu else 1, "prompts")
        self._text_cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._text_cache_size = text_cache_size

    @cached_property
    def info(self) -> RewardModelInfo:
        """See `RewardModelInfo`; reads the weight files once to hash them."""
        made_by = self._provenance
        return RewardModelInfo(
            kind=made_by.kind,
            name=made_by.name,
            version=made_by.version,
            preprocessing=self._transform.description,
            scale=made_by.scale,
            dtype=str(self._dtype).removeprefix("torch."),
            weights=describe_weights(made_by.source, made_by.files),
        )

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """See `RewardModel.score`."""
        image_index, prompt_index = checked_indices(
            image_index, len(images), prompt_index, len(prompts)
        )
        if not len(image_index):
            return np.empty(0, np.float32)
        with torch.inference_mode():
            image_features = torch.cat(self._image_batch.run(images, self._encode_images))
            text_features = self._text_features(prompts)
            rewards = [
                self._rescale((image_features[at_image] * text_features[at_prompt]).sum(dim=-1))
                for at_image, at_prompt in zip(
                    torch.from_numpy(image_index).split(_PAIRS_PER_PRODUCT),
                    torch.from_numpy(prompt_index).split(_PAIRS_PER_PRODUCT),
                    strict=True,
                )
            ]
            return finite_or_nan(torch.cat(rewards))

    def _encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        mean, std = self._transform.pixel_mean, self._transform.pixel_std
        pixels = normalized_pixels(images, mean, std, self._device, self._dtype)
        return unit_rows(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            [self._clean_text(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=MAX_TEXT_TOKENS,
            return_tensors="pt",
        ).to(self._device)
        # Padding comes after the end-of-text token that is pooled, and attention is causal: neither
        # the padding token nor the length of the batch changes the features.
        output = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return unit_rows(output.pooler_output)

    def _text_features(self, texts: Sequence[str]) -> torch.Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._text_cache]
        # Similar lengths together: a batch is padded to its longest text.
        new.sort(key=len)
        fresh = torch.cat(self._text_batch.run(new, self._encode_texts)).unbind() if new else ()
        features = dict(zip(new, fresh, strict=True))
        for text in dict.fromkeys(texts):
            if text in features:
                self._text_cache[text] = features[text].clone()
            else:
                features[text] = self._text_cache[text]
                self._text_cache.move_to_end(text)
        while len(self._text_cache) > self._text_cache_size:
            self._text_cache.popitem(last=False)
        return torch.stack([features[text] for text in texts])


def load_clip_reward(
    kind: str,
    weights: str,
    *,
    device: str,
    dtype: str,
    batch_size: int | None,
    trust_remote_code: bool,
    revision: str | None = None,
    processor: str | None = None,
    text_cache_size: int = DEFAULT_TEXT_CACHE_SIZE,
    scale: Literal["cosine", "logit_scale", "percent"] = "cosine",
) -> ClipReward:
    """PickScore or the CLIP score of a CLIP in hub format.

    `processor`: hub name or folder of tokenizer and image processor; default: the weights' own,
    for PickScore the authors' (LAION's CLIP ViT-H/14) where the weights have none.
    """
    from transformers import CLIPModel

    folder = model_folder(weights, revision)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    if kind == "pickscore":
        scale = "logit_scale"
    rescale, scale_text = _scale(scale, model.logit_scale.exp().item())
    processors = processor_folder(weights, processor, revision, AUTHORS_PROCESSOR.get(kind))
    return ClipReward(
        model,
        _load_tokenizer(processors, trust_remote_code),
        processor_transform(processors),
        _Provenance(
            kind=kind,
            name="PickScore" if kind == "pickscore" else "CLIP score",
            version=folder.name if not Path(weights).exists() else Path(weights).name,
            scale=scale_text,
            source=weights,
            files=(folder,),
        ),
        device=device,
        dtype=compute_dtype(dtype, device),
        batch_size=batch_size,
        text_cache_size=text_cache_size,
        rescale=rescale,
    )


def load_hpsv2(
    kind: str,
    weights: str,
    *,
    device: str,
    dtype: str,
    batch_size: int | None,
    trust_remote_code: bool,
    revision: str | None = None,
    processor: str | None = None,
    text_cache_size: int = DEFAULT_TEXT_CACHE_SIZE,
    resize: Literal["antialias", "no_antialias", "pillow"] = "antialias",
    text_cleaning: Literal["ftfy", "none"] = "ftfy",
) -> ClipReward:
    """HPSv2: the authors' checkpoint (a file, or a folder or hub with it), or hub format.

    `resize`: see `LongestSideAndPad`. `text_cleaning`: "ftfy" as open_clip does before it
    tokenizes (mends broken characters, straightens quotes, unescapes HTML), "none" for prompts
    that are clean. `processor`: hub name or folder of the tokenizer, default the weights' own or
    LAION's CLIP ViT-H/14.
    """
    from transformers import CLIPModel

    version = "v2.1" if kind == "hpsv2.1" else "v2"
    if (Path(weights) / "config.json").is_file():
        files = model_folder(weights, revision)
        model = CLIPModel.from_pretrained(files, dtype=torch.float32)
    else:
        stem = f"HPS_{version}_compressed"
        files = checkpoint_file(weights, [f"{stem}.safetensors", f"{stem}.pt"], revision)
        model = clip_from_open_clip(load_state_dict(files))
    beside = weights if Path(weights).is_dir() else str(files.parent)
    processors = processor_folder(beside, processor, None, AUTHORS_PROCESSOR[kind])
    rescale, scale_text = _scale("cosine", 1.0)
    return ClipReward(
        model,
        _load_tokenizer(processors, trust_remote_code),
        LongestSideAndPad(resize=resize),
        _Provenance(
            kind=kind,
            name="HPSv2",
            version=version,
            scale=scale_text,
            source=weights,
            files=(files,),
        ),
        device=device,
        dtype=compute_dtype(dtype, device),
        batch_size=batch_size,
        text_cache_size=text_cache_size,
        rescale=rescale,
        clean_text=_text_cleaner(text_cleaning),
    )


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Rows of (N, D) divided by their Euclidean length, in float32; a zero row becomes NaN."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


def _scale(
    convention: str, logit_scale: float
) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    conventions: Mapping[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
        "cosine": (lambda cosine: cosine, "cosine, -1 to 1"),
        "logit_scale": (lambda cosine: logit_scale * cosine, f"{logit_scale:.6g} * cosine"),
        "percent": (lambda cosine: (100 * cosine).clamp(min=0), "max(100 * cosine, 0)"),
    }
    if convention not in conventions:
        raise ValueError(f"unknown scale {convention!r}; expected one of {', '.join(conventions)}")
    return conventions[convention]


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _text_cleaner(text_cleaning: str) -> Callable[[str], str]:
    if text_cleaning == "none":
        return str
    if text_cleaning != "ftfy":
        raise ValueError(f"unknown text_cleaning {text_cleaning!r}; expected ftfy or none")
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(
            "HPSv2 cleans prompts with ftfy before it tokenizes them: pip install ftfy, or set the "
            "option text_cleaning: none"
        ) from error
    return lambda text: html.unescape(html.unescape(ftfy.fix_text(text))).strip()
