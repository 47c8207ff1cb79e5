"""HPSv3 (arXiv 2508.03789): Qwen2-VL reads the image, a rubric and the prompt, a head rates them.

The text ends in a special token <|Reward|>; the last hidden state there goes through a float32 head
(hidden, 1024, 16, 2; ReLU between) to (mu, sigma), and mu is the reward. The backbone runs in
bfloat16 on a GPU; batches are padded on the right.

Known from the authors' published inference code, read in several re-publications that agree to the
letter (their repository's own copy was not at hand): rubric and its trailing spaces, pixel budget,
head, dtype, token names. Two details follow from that code rather than being stated in it.
Positions: it calls the language model with embeddings alone, so image tokens get consecutive
positions like text, not Qwen2-VL's two-dimensional ones; so do we, but ports that let a newer
transformers compute positions score differently. Vocabulary: the embedding ends with <|Reward|>, so
that token's id is the length of the base model's tokenizer. Not confirmed: scores of the released
7B weights, which no test could load.

One thing is ours: in a prompt that spells one of the tokenizer's special tokens, "<|" is broken up,
because it could otherwise add an image slot or a second reward token and break the batch.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fifa_ray.models.batching import (
    LargestBatch,
    checked_indices,
    compute_dtype,
    finite_or_nan,
    normalized_pixels,
    prompts_by_image,
)
from fifa_ray.models.image_transform import PixelBudget
from fifa_ray.models.reward import RewardModelInfo
from fifa_ray.models.weight_files import (
    CONFIG_PATTERNS,
    checkpoint_file,
    describe_weights,
    filled_model,
    load_state_dict,
    local_path,
)

BASE_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
# One image and its text are some 900 tokens of a 7B model: larger batches gain nothing.
MAX_BATCH_SIZE = 8

# The authors' wording and white space, trailing spaces included: the model was trained on it.
RUBRIC = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment "
    "and give a overall score to estimate the human preference. Please provide a rating from 0 to "
    "10, with 0 being the worst and 10 being the best. \n"
    "\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be "
    "considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear "
    "and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and "
    "other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene "
    "should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality and "
    "satisfaction score should be the lowest possible. \n"
    "\n**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description "
    "in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, "
    "evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding "
    "elements in the image logically fit the scenario described in the prompt. The environment "
    "should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are "
    "captured in the image. The generated content should not introduce elements that conflict with "
    "or distort the original description.\n"
    "Textual prompt - {prompt}\n\n\n"
)
QUESTION = f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"


class Hpsv3:
    """mu of an image for a prompt; a `RewardModel`."""

    def __init__(
        self,
        backbone: Any,
        head: nn.Module,
        tokenizer: Any,
        source: str,
        file: Path,
        *,
        device: str,
        dtype: torch.dtype,
        batch_size: int | None,
    ) -> None:
        """`backbone`: Qwen2VLModel; `head`: float32, hidden width to (mu, sigma)."""
        self._backbone = backbone.to(device=device, dtype=dtype).eval()
        self._head = head.to(device=device, dtype=torch.float32).eval()
        self._tokenizer = tokenizer
        self._reward_token = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self._source, self._file = source, file
        self._device, self._dtype = device, dtype
        self._transform = PixelBudget()
        self._batch = LargestBatch(min(batch_size or MAX_BATCH_SIZE, MAX_BATCH_SIZE), "images")

    @cached_property
    def info(self) -> RewardModelInfo:
        """See `RewardModelInfo`; reads the weight file once to hash it."""
        return RewardModelInfo(
            kind="hpsv3",
            name="HPSv3",
            version="7B, mu",
            preprocessing=self._transform.description,
            scale="mu of the rating, unbounded",
            dtype=f"{str(self._dtype).removeprefix('torch.')}, head float32",
            weights=describe_weights(self._source, [self._file]),
        )

    def score(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        image_index: np.ndarray,
        prompt_index: np.ndarray,
    ) -> np.ndarray:
        """See `RewardModel.score`. The vision tower sees each image once, whatever its prompts."""
        image_index, prompt_index = checked_indices(
            image_index, len(images), prompt_index, len(prompts)
        )
        if not len(image_index):
            return np.empty(0, np.float32)
        groups, place = prompts_by_image(image_index, prompt_index)

        def forward(batch: Sequence[tuple[int, np.ndarray]]) -> torch.Tensor:
            embeddings = self._encode_images([images[image] for image, _ in batch])
            pairs = [
                (embedding, prompts[text])
                for embedding, (_, texts) in zip(embeddings, batch, strict=True)
                for text in texts
            ]
            return torch.cat(
                [self._rate(pairs[at : at + len(batch)]) for at in range(0, len(pairs), len(batch))]
            )

        with torch.inference_mode():
            return finite_or_nan(torch.cat(self._batch.run(groups, forward)))[place]

    def _encode_images(self, images: Sequence[np.ndarray]) -> Sequence[torch.Tensor]:
        """One (tokens, hidden) tensor an image; images may differ in shape."""
        vision = self._backbone.config.vision_config
        patches, grids = [], []
        for image in images:
            pixels = normalized_pixels(
                [image],
                self._transform.pixel_mean,
                self._transform.pixel_std,
                self._device,
                self._dtype,
            )[0]
            patches.append(
                patchify(
                    pixels,
                    vision.patch_size,
                    vision.spatial_merge_size,
                    vision.temporal_patch_size,
                )
            )
            height, width = image.shape[1:]
            grids.append([1, height // vision.patch_size, width // vision.patch_size])
        output = self._backbone.get_image_features(
            torch.cat(patches), torch.tensor(grids, device=self._device), return_dict=True
        )
        return output.pooler_output

    def _rate(self, pairs: Sequence[tuple[torch.Tensor, str]]) -> torch.Tensor:
        texts = [self._conversation(prompt, len(image)) for image, prompt in pairs]
        tokens = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        tokens = tokens.to(self._device)
        ids = tokens["input_ids"]
        embeddings = self._backbone.get_input_embeddings()(ids)
        slots = (ids == self._backbone.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(slots, torch.cat([image for image, _ in pairs]))
        positions = torch.arange(ids.shape[1], device=self._device).expand(3, *ids.shape)
        hidden = self._backbone.language_model(
            inputs_embeds=embeddings,
            attention_mask=tokens["attention_mask"],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        at = (ids == self._reward_token).int().argmax(dim=-1)
        rated = self._head(hidden[torch.arange(len(ids), device=self._device), at].float())
        return rated[:, 0]

    def _conversation(self, prompt: str, num_image_tokens: int) -> str:
        if any(token in prompt for token in self._tokenizer.get_added_vocab()):
            prompt = prompt.replace("<|", "< |")
        text = RUBRIC.format(prompt=prompt) + QUESTION
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return chat.replace(IMAGE_TOKEN, IMAGE_TOKEN * num_image_tokens, 1)


def patchify(
    pixels: torch.Tensor, patch_px: int, merge_size: int, temporal_patch_size: int
) -> torch.Tensor:
    """(C, H, W) to Qwen2-VL's rows of patches, (H*W/patch_px^2, C*temporal_patch_size*patch_px^2).

    Patches that merge into one token are neighbours in the order; the still image is repeated in
    time.
    """
    channels, height, width = pixels.shape
    across, down = width // patch_px // merge_size, height // patch_px // merge_size
    blocks = pixels.reshape(channels, down, merge_size, patch_px, across, merge_size, patch_px)
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    repeated = blocks.expand(*blocks.shape[:5], temporal_patch_size, patch_px, patch_px)
    return repeated.reshape(down * across * merge_size**2, -1)


def load_hpsv3(
    weights: str,
    *,
    device: str,
    dtype: str,
    batch_size: int | None,
    trust_remote_code: bool,
    revision: str | None = None,
    base_model: str = BASE_MODEL,
) -> Hpsv3:
    """HPSv3 from the authors' checkpoint (a file, or a folder or hub name that holds it).

    `base_model`: hub name or folder of the Qwen2-VL whose configuration, tokenizer and chat
    template go with it; none of its weights are read. Raises ValueError when they do not fit.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

    file = checkpoint_file(weights, ["HPSv3.safetensors", "HPSv3.pt"], revision)
    base = local_path(base_model, CONFIG_PATTERNS)
    backbone, head = _split(load_state_dict(file), file)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise ValueError(f"expected a chat template with the tokenizer in {base}, found none")
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True)])
    rows = backbone["language_model.embed_tokens.weight"].shape[0]
    reward_token_id: Any = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    if reward_token_id >= rows:
        raise ValueError(
            f"{file} has {rows} token embeddings, fewer than the tokenizer in {base} with "
            f"{REWARD_TOKEN} ({len(tokenizer)}); name the base model it was trained from"
        )
    config: Any = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = rows
    chosen = compute_dtype(dtype, device)
    return Hpsv3(
        filled_model(Qwen2VLModel, config, backbone, str(file), dtype=chosen),
        head,
        tokenizer,
        weights,
        file,
        device=device,
        dtype=chosen,
        batch_size=batch_size,
    )


def _split(
    state_dict: dict[str, torch.Tensor], file: Path
) -> tuple[dict[str, torch.Tensor], nn.Sequential]:
    """Backbone weights under transformers' present names, and the head.

    The checkpoint has the names of 2024, `visual.*` and `model.*`; present ones,
    `model.visual.*` and `model.language_model.*`, are taken too. The unused `lm_head` is dropped.
    """
    backbone, head = {}, {}
    for name, value in state_dict.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = value.float()
        elif name.startswith(("visual.", "model.visual.", "model.language_model.")):
            backbone[name.removeprefix("model.")] = value
        elif name.startswith("model."):
            backbone["language_model." + name.removeprefix("model.")] = value
    expected = [f"{layer}.{kind}" for layer in (0, 3, 5) for kind in ("bias", "weight")]
    if sorted(head) != expected or "language_model.embed_tokens.weight" not in backbone:
        raise ValueError(
            f"expected HPSv3's backbone and its head rm_head.{{0,3,5}} in {file}, found a head of "
            f"{sorted(head)} and {len(backbone)} backbone weights"
        )
    # Position 2 of the authors' Sequential is a dropout, so the second ReLU is at 4.
    layers = nn.Sequential(
        *(
            nn.Linear(head[f"{at}.weight"].shape[1], head[f"{at}.weight"].shape[0])
            if at in (0, 3, 5)
            else (nn.Identity() if at == 2 else nn.ReLU())
            for at in range(6)
        )
    )
    layers.load_state_dict(head)
    return backbone, layers
