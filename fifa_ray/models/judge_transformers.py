"""The judge in process: one forward pass per batch, no text generated.

Both answers are single tokens, so their distributions are read from the logits. The rubric and its
examples pass through the model once; their attention states serve every prompt after. Prompts of a
batch are laid end to end in one sequence, each seeing the rubric and itself only (a block mask), so
nothing is padded and the cached states are never copied per prompt.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from fifa_ray.models.judge import JudgeReply
from fifa_ray.scoring import quality as rubric

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens per pass: enough to fill the device; attention to other prompts' tokens is wasted work.
PACK_TOKENS = {"cpu": 256, "cuda": 4096}
_PLACE = "\u2318prompt\u2318"


@dataclass(frozen=True)
class JudgeTokens:
    """Token ids of the constant parts of a judgement and of its two sets of answers."""

    prefix: list[int]
    after_prompt: list[int]
    between_answers: list[int]
    harm_answers: dict[int, str]
    quality_answers: dict[int, str]


def judge_tokens(tokenizer: Any) -> JudgeTokens:
    """Tokenise everything around a prompt with the model's own chat template.

    Raises ValueError where the template is missing or an answer is not a token of its own.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template, which the judge needs; use an "
            "instruction-tuned model"
        )
    messages = [*rubric.rubric_messages(), {"role": "user", "content": _PLACE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prefix, _, after = text.partition(_PLACE)

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False).input_ids)

    def first_tokens(start: str, answers: Sequence[str]) -> dict[int, str]:
        ids, before = {}, encode(start)
        for answer in answers:
            whole = encode(start + answer)
            if whole[: len(before)] != before:
                raise ValueError(
                    f"{tokenizer.name_or_path}: the tokens of {answer!r} merge with {start!r} "
                    "before it, so its probability cannot be read; use engine vllm or openai"
                )
            ids[whole[len(before)]] = tokenizer.decode([whole[len(before)]])
        return ids

    return JudgeTokens(
        prefix=encode(prefix),
        after_prompt=encode(after + rubric.ANSWER_START),
        between_answers=encode(rubric.ANSWER_MIDDLE),
        harm_answers=first_tokens(rubric.ANSWER_START, rubric.HARM_ANSWERS),
        quality_answers=first_tokens(
            rubric.ANSWER_START + rubric.ANSWER_MIDDLE, rubric.QUALITY_ANSWERS
        ),
    )


def read_prefix(model: Any, tokens: JudgeTokens) -> DynamicCache:
    """Attention states of the rubric, to be extended by every pack and cropped again.

    Raises ValueError for an architecture whose layers cannot take a block mask.
    """
    ids = torch.tensor([tokens.prefix], device=model.device)
    cache = model.get_decoder()(ids, use_cache=True).past_key_values
    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError(
            f"{type(model).__name__} does not keep full attention states (sliding windows or a "
            "recurrent state); use engine vllm or openai for it"
        )
    return cache


def pack_logits(
    model: Any, cache: DynamicCache, tokens: JudgeTokens, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Logits of the harm's and of the quality's first token, each (prompts, vocabulary).

    `prompts` are the token ids of quoted prompts. `cache` holds the prefix, and again on return.
    """
    device, prefix_length = model.device, cache.get_seq_length()
    sequences = [[*ids, *tokens.after_prompt, *tokens.between_answers] for ids in prompts]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    owner = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    total = len(owner)
    sees = (owner[:, None] == owner[None, :]) & torch.ones(total, total, dtype=torch.bool).tril()
    sees = torch.cat([torch.ones(total, prefix_length, dtype=torch.bool), sees], dim=1)
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(
        ~sees, torch.finfo(model.dtype).min
    )
    positions = torch.cat([torch.arange(len(s)) for s in sequences]) + prefix_length
    ends = lengths.cumsum(0) - 1
    reads = torch.cat([ends - len(tokens.between_answers), ends])
    try:
        hidden = model.get_decoder()(
            torch.tensor([[i for s in sequences for i in s]], device=device),
            attention_mask=mask[None, None].to(device),
            position_ids=positions[None].to(device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    finally:
        cache.crop(-(cache.get_seq_length() - prefix_length))
    logits = model.get_output_embeddings()(hidden[0, reads.to(device)])
    harm, quality = logits.float().chunk(2)
    return harm, quality


class TransformersJudge:
    """A causal language model of the hub or a local folder, run in this process."""

    def __init__(
        self,
        *,
        model: str,
        device: str = "cpu",
        dtype: str = "auto",
        max_prompt_chars: int = 2000,
        harmful_threshold: float = 0.5,
        max_model_len: int | None = None,
        adapter: str | None = None,
        pack_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`adapter`: a PEFT folder, merged into the weights.

        Raises ValueError: see `judge_tokens` and `read_prefix`.
        """
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        # Left to itself the loader would also take pickled weights.
        load = {"trust_remote_code": trust_remote_code}
        self._tokenizer = AutoTokenizer.from_pretrained(model, **load)
        network: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=DTYPES[dtype], attn_implementation="sdpa", use_safetensors=True, **load
        )
        if adapter is not None:
            from peft import PeftModel

            network = PeftModel.from_pretrained(network, adapter).merge_and_unload()
        self._model = network.to(device).eval()
        self._tokens = judge_tokens(self._tokenizer)
        self._pack_tokens = pack_tokens or PACK_TOKENS["cpu" if device == "cpu" else "cuda"]
        self._max_prompt_chars = max_prompt_chars
        self._harmful_threshold = harmful_threshold
        longest = getattr(network.config, "max_position_embeddings", None) or 4096
        around = len(self._tokens.prefix) + len(self._tokens.after_prompt)
        self._longest_prompt = (
            min(max_model_len or longest, longest) - around - len(self._tokens.between_answers)
        )
        if self._longest_prompt < 16:
            raise ValueError(
                f"the rubric takes {around} tokens, which leaves no room for a prompt in a context "
                f"of {max_model_len or longest}; raise judge.max_model_len or take another model"
            )
        with torch.inference_mode():
            self._cache = read_prefix(self._model, self._tokens)
        self._tokens_read = len(self._tokens.prefix)
        self._info = {"model": model, "adapter": adapter, "dtype": dtype, "device": device}

    def info(self) -> dict[str, Any]:
        """Model, adapter, compute type and the tokens of the shared prefix."""
        return self._info | {"prefix_tokens": len(self._tokens.prefix)}

    def tokens(self) -> dict[str, int]:
        """Of the prompts and what surrounds them; the shared prefix is read once, none written."""
        return {"input": self._tokens_read, "output": 0}

    def judge(self, prompts: Sequence[str]) -> list[JudgeReply]:
        """One reply per prompt; `too_long` for one that the context cannot hold."""
        quoted = [rubric.quote_prompt(text, self._max_prompt_chars) for text in prompts]
        ids = self._tokenizer(quoted, add_special_tokens=False).input_ids if quoted else []
        replies: list[JudgeReply | None] = [
            JudgeReply(quality_error="too_long") if len(i) > self._longest_prompt else None
            for i in ids
        ]
        fitting = [index for index, reply in enumerate(replies) if reply is None]
        for pack in self._packs(fitting, ids):
            with torch.inference_mode():
                harm, quality = pack_logits(
                    self._model, self._cache, self._tokens, [ids[index] for index in pack]
                )
            harm, quality = harm.log_softmax(-1), quality.log_softmax(-1)
            for index, harm_row, quality_row in zip(pack, harm, quality, strict=True):
                replies[index] = read_reply(
                    _named(harm_row, self._tokens.harm_answers),
                    _named(quality_row, self._tokens.quality_answers),
                    self._harmful_threshold,
                )
        return [reply for reply in replies if reply is not None]

    def _packs(self, indices: list[int], ids: list[list[int]]) -> Iterator[list[int]]:
        """Indices in groups whose sequences together hold at most `pack_tokens` tokens."""
        around = len(self._tokens.after_prompt) + len(self._tokens.between_answers)
        pack: list[int] = []
        size = 0
        for index in indices:
            length = len(ids[index]) + around
            self._tokens_read += length
            if pack and size + length > self._pack_tokens:
                yield pack
                pack, size = [], 0
            pack.append(index)
            size += length
        if pack:
            yield pack


def _named(logprobs: Tensor, answers: dict[int, str]) -> dict[str, float]:
    values = logprobs[list(answers)].tolist()
    return dict(zip(answers.values(), values, strict=True))


def read_reply(
    harm: dict[str, float], quality: dict[str, float], harmful_threshold: float
) -> JudgeReply:
    """The judgement from both distributions, and as its reply the likeliest answers themselves."""
    parsed = rubric.reply_from_distributions(harm, quality, harmful_threshold)
    danger = rubric.harm_probability(harm)
    text = json.dumps(
        {
            "harm": max(harm, key=harm.__getitem__),
            "quality": max(quality, key=quality.__getitem__),
            "harm_probability": None
            if danger.probability is None
            else round(danger.probability, 4),
            "valid_mass": [round(danger.mass, 4), round(rubric.expected_score(quality).mass, 4)],
        }
    )
    return JudgeReply(
        parsed.prompt_quality, parsed.harmful, parsed.harm_category, parsed.quality_error, text
    )
