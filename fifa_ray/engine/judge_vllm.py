"""The judge in the cluster: Ray Data's LLM processor, one vLLM engine per actor.

The answer is generated under a grammar, a dozen tokens, with the probabilities of each; the start
of the answer is given, so that the first token is the harm's. vLLM's prefix cache computes the
rubric once.
"""

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import ray.data

from fifa_ray import schema
from fifa_ray.config import JudgeConfig
from fifa_ray.engine import metrics
from fifa_ray.engine.cluster import actor_need
from fifa_ray.engine.judge_parts import PART_FIELDS, split_prompts
from fifa_ray.engine.nodes import Need, wait_for_nodes
from fifa_ray.models.judge import JudgeReply, is_too_long
from fifa_ray.scoring import quality as rubric

if TYPE_CHECKING:
    from fifa_ray.models.judge_transformers import JudgeTokens

MAX_TOKENS = 32
LOGPROBS = 20
# Ray Data's columns of what an engine read and wrote.
TOKEN_COLUMNS = {"input": "num_input_tokens", "output": "num_generated_tokens"}
ERROR_COLUMN = "__inference_error__"
CARRIED = (schema.PROMPT_ID, *(field.name for field in PART_FIELDS))


def vllm_pool(judge: JudgeConfig, wait_seconds: float) -> dict[str, Any]:
    """The engines as a pool of `cluster.actor_pool`, once there is room for one of them.

    An engine of several GPUs (tensor or pipeline parallel) asks for that many times one actor's.
    Raises what `actor_pool` raises.
    """
    need = actor_need(judge.actors, wait_seconds=wait_seconds)
    parallel = ("tensor_parallel_size", "pipeline_parallel_size")
    devices = math.prod(int(judge.engine_kwargs.get(name, 1)) for name in parallel)
    of_engine = Need(need.resources, need.label_selector, count=devices)
    wait_for_nodes("quality (vllm)", of_engine, wait_seconds=wait_seconds)
    smallest = judge.actors.min_actors
    return {
        "compute": ray.data.ActorPoolStrategy(
            min_size=smallest, max_size=judge.actors.max_actors or smallest
        ),
        "num_cpus": judge.actors.num_cpus * devices,
        "num_gpus": need.resources.get("GPU", 0.0) * devices,
    }


def judge_with_vllm(
    rows: "ray.data.Dataset", judge: JudgeConfig, *, num_gpus: float, tags: Mapping[str, str]
) -> "ray.data.Dataset":
    """(prompt_id, prompt) to the columns of `judge_parts.PARTIAL`, in one pass of vLLM actors.

    num_gpus: of one of an engine's workers, 0: on CPUs. tags: run and stage, for the metrics.
    A row that vLLM refuses (too long, say) comes back with its reason. Raises ModuleNotFoundError
    where ray.data.llm is not usable, ValueError for options that this engine does not have.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    if judge.options:
        raise ValueError(
            f"judge.options {sorted(judge.options)} are not options of engine vllm; use "
            "judge.engine_kwargs (vLLM's own arguments)"
        )
    processor = build_processor(
        vLLMEngineProcessorConfig(**processor_settings(judge, num_gpus)),
        preprocess=AskVllm(judge.model, judge.trust_remote_code, judge.max_prompt_chars),
        postprocess=lambda row: row,
    )
    texts = rows.map_batches(
        partial(split_prompts, check_parts=judge.check_parts),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.1,
    )
    return processor(texts).map(ReadVllm(judge.harmful_threshold, tags), num_cpus=0.1)


def processor_settings(judge: JudgeConfig, num_gpus: float) -> dict[str, Any]:
    """Arguments of `vLLMEngineProcessorConfig`; `judge.engine_kwargs` has the last word."""
    engine: dict[str, Any] = {
        "dtype": judge.dtype,
        "enable_prefix_caching": True,
        "max_logprobs": LOGPROBS,
        "trust_remote_code": judge.trust_remote_code,
    }
    if judge.max_model_len is not None:
        engine["max_model_len"] = judge.max_model_len
    settings: dict[str, Any] = {
        "model_source": judge.model,
        "engine_kwargs": engine | judge.engine_kwargs,
        "batch_size": judge.batch_size,
        "concurrency": (
            judge.actors.min_actors,
            judge.actors.max_actors or judge.actors.min_actors,
        ),
        "should_continue_on_error": True,
        "log_engine_metrics": False,
        # `AskVllm` gives token ids and vLLM gives text: no actors in between.
        "chat_template_stage": False,
        "tokenize_stage": False,
        "detokenize_stage": False,
    }
    if judge.actors.runtime_env:
        settings["runtime_env"] = judge.actors.runtime_env
    if not num_gpus:
        settings["placement_group_config"] = {
            "bundle_per_worker": {"CPU": judge.actors.num_cpus},
        }
    elif num_gpus < 1:
        settings["placement_group_config"] = {
            "bundle_per_worker": {"CPU": judge.actors.num_cpus, "GPU": num_gpus},
        }
    return settings


class AskVllm:
    """One text to the tokens of a chat whose last turn the model completes.

    They are the tokens that the in-process engine reads: a text prompt would get a second
    beginning-of-text token from vLLM where the chat template has one already.
    """

    def __init__(self, model: str, trust_remote_code: bool, max_prompt_chars: int) -> None:
        self._model, self._trust_remote_code = model, trust_remote_code
        self._max_prompt_chars = max_prompt_chars

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps what names the text and adds token ids and sampling parameters."""
        tokenizer, tokens = _load_tokenizer(self._model, self._trust_remote_code)
        quoted = rubric.quote_prompt(row["prompt"], self._max_prompt_chars)
        ids = tokenizer(quoted, add_special_tokens=False).input_ids
        return {
            **{name: row[name] for name in CARRIED},
            "tokenized_prompt": [*tokens.prefix, *ids, *tokens.after_prompt],
            "sampling_params": {
                "temperature": 0.0,
                "max_tokens": MAX_TOKENS,
                "logprobs": LOGPROBS,
                "structured_outputs": {"regex": rubric.ANSWER_REST_REGEX},
            },
        }


@lru_cache(maxsize=1)
def _load_tokenizer(model: str, trust_remote_code: bool) -> "tuple[Any, JudgeTokens]":
    """Once per worker process."""
    from transformers import AutoTokenizer

    from fifa_ray.models.judge_transformers import judge_tokens

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    return tokenizer, judge_tokens(tokenizer)


class ReadVllm:
    """One answered or failed row to the columns of `judge_parts.PARTIAL`."""

    def __init__(self, harmful_threshold: float, tags: Mapping[str, str]) -> None:
        """`tags`: run and stage, for the metrics."""
        self._harmful_threshold, self._tags = harmful_threshold, dict(tags)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row of one text."""
        reply = self._read(row)
        for direction, column in TOKEN_COLUMNS.items():
            read = row.get(column) or 0
            metrics.count("fifa_judge_tokens", read, direction=direction, **self._tags)
        return {
            **{name: row[name] for name in CARRIED},
            **{name: getattr(reply, name) for name in schema.QUALITY.names[1:]},
        }

    def _read(self, row: dict[str, Any]) -> JudgeReply:
        if problem := row.get(ERROR_COLUMN):
            return JudgeReply(quality_error="too_long" if is_too_long(problem) else "engine_error")
        text = rubric.ANSWER_START + row["generated_text"]
        parsed = rubric.parse_quality_reply(text)
        steps = [_entries(step) for step in row["logprobs"]]
        tokens = [
            step[int(token)][0] for step, token in zip(steps, row["generated_tokens"], strict=True)
        ]
        places = rubric.answer_token_indices(tokens)
        if parsed.quality_error is None and places is not None:
            harm, quality = (dict(steps[place].values()) for place in places)
            parsed = rubric.reply_from_distributions(harm, quality, self._harmful_threshold)
        return JudgeReply(
            parsed.prompt_quality, parsed.harmful, parsed.harm_category, parsed.quality_error, text
        )


def _entries(step: dict[Any, Any]) -> dict[int, tuple[str, float]]:
    """Token id to (text, log-probability) of one generated token's candidates."""
    # Arrow turns a column of dicts into structs that have every row's keys, most of them null.
    return {
        int(token): (str(entry["decoded_token"]), float(entry["logprob"]))
        for token, entry in step.items()
        if entry is not None
    }
