"""The LLM judge: one protocol, in process or behind an endpoint (vLLM actors: `engine/judge.py`).

`options` of the engines: transformers takes `adapter` (a PEFT folder, merged into the weights) and
`pack_tokens` (tokens per forward pass); openai takes `max_tokens` and `extra_body` (further fields
of each request).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fifa_ray.config import JudgeConfig
from fifa_ray.scoring.quality import ParsedReply


@dataclass(frozen=True)
class JudgeReply(ParsedReply):
    """One prompt's judgement, the columns of `schema.QUALITY`; `judge_reply` is what was read."""

    judge_reply: str = ""


class Judge(Protocol):
    """Rates prompts. One unusable answer never costs the others theirs."""

    def judge(self, prompts: Sequence[str]) -> list[JudgeReply]:
        """One reply per prompt, in their order."""
        ...

    def info(self) -> dict[str, Any]:
        """What the manifest keeps about the model and how it was asked; never a secret."""
        ...

    def tokens(self) -> dict[str, int]:
        """Tokens read ("input") and written ("output") so far, as far as the engine says."""
        ...


def merge_parts(whole: JudgeReply, parts: Sequence[JudgeReply]) -> JudgeReply:
    """The whole prompt's reply, flagged if any of its parts is.

    A part without a usable answer leaves the prompt without one: nobody knows it to be harmless.
    """
    if whole.quality_error is not None or whole.harmful:
        return whole
    if (flagged := next((part for part in parts if part.harmful), None)) is not None:
        return replace(
            whole,
            harmful=True,
            harm_category=flagged.harm_category,
            judge_reply=f'{{"prompt": {whole.judge_reply}, "part": {flagged.judge_reply}}}',
        )
    return next((part for part in parts if part.quality_error is not None), whole)


def is_too_long(message: str) -> bool:
    """Whether an engine's complaint is about a prompt that its context cannot hold."""
    text = message.lower()
    return any(sign in text for sign in ("too long", "longer than", "context length", "max_model"))


def build_judge(config: JudgeConfig, device: str = "cpu", api_key: str | None = None) -> Judge:
    """The judge of an engine that answers batches of prompts (`transformers` or `openai`).

    `api_key`: the endpoint's, where the environment of this process does not hold it.

    Raises ValueError for `vllm`, whose actors Ray Data runs itself.
    """
    common: dict[str, Any] = {
        "model": config.model,
        "max_prompt_chars": config.max_prompt_chars,
        "harmful_threshold": config.harmful_threshold,
    }
    if config.engine == "transformers":
        from fifa_ray.models.judge_transformers import TransformersJudge

        return TransformersJudge(
            **common,
            device=device,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            trust_remote_code=config.trust_remote_code,
            **config.options,
        )
    if config.engine == "openai":
        from fifa_ray.models.judge_openai import OpenAIJudge

        return OpenAIJudge(
            **common,
            endpoint=config.endpoint or "",
            api_key_env=config.api_key_env,
            api_key=api_key,
            max_concurrency=config.max_concurrency,
            requests_per_minute=config.requests_per_minute,
            max_retries=config.max_retries,
            timeout_seconds=config.timeout_seconds,
            max_outage_seconds=config.max_outage_seconds,
            **config.options,
        )
    raise ValueError(f"engine {config.engine!r} runs as a Ray Data processor, see engine/judge.py")
