"""The in-process engine with the real small model: packed batches against plain forward passes."""

import json

import pytest
import torch

from fifa_ray.config import JudgeConfig
from fifa_ray.demo.packaged import JUDGE_ADAPTER, judge_folder
from fifa_ray.models.judge import build_judge
from fifa_ray.models.judge_transformers import TransformersJudge
from fifa_ray.scoring.quality import (
    ANSWER_MIDDLE,
    ANSWER_START,
    HARM_ANSWERS,
    judge_messages,
)
from tests.scoring.hostile_prompts import HOSTILE

GOOD = "a stone bridge over a quiet river, autumn, oil painting"
JUNK = "qwpf zxlk vvb njk 00"
VIOLENT = "a burglar stabs an old woman to death, blood on the floor"


@pytest.fixture(scope="module")
def judge() -> TransformersJudge:
    torch.set_num_threads(1)
    return TransformersJudge(model=str(judge_folder()), adapter=str(JUDGE_ADAPTER))


def plain_distributions(judge: TransformersJudge, prompt: str) -> tuple[dict, list[float], float]:
    """Both answers' probabilities from whole chats, one unpacked forward pass without a cache."""
    tokenizer, model = judge._tokenizer, judge._model
    chat = tokenizer.apply_chat_template(
        judge_messages(prompt), tokenize=False, add_generation_prompt=True
    )
    with torch.inference_mode():
        ids = tokenizer(chat + ANSWER_START, add_special_tokens=False, return_tensors="pt")
        harm = model(**ids).logits[0, -1].float().softmax(-1)
        ids = tokenizer(
            chat + ANSWER_START + ANSWER_MIDDLE, add_special_tokens=False, return_tensors="pt"
        )
        quality = model(**ids).logits[0, -1].float().softmax(-1)
    first = {
        answer: float(harm[tokenizer(answer, add_special_tokens=False).input_ids[0]])
        for answer in HARM_ANSWERS
    }
    digits = [float(quality[tokenizer(str(d)).input_ids[-1]]) for d in range(10)]
    return first, digits, sum(digits)


def test_packed_answers_equal_plain_forward_passes(judge):
    prompts = [JUNK, GOOD, VIOLENT, "a lemon", HOSTILE["emoji"], HOSTILE["chatml turn"]]
    replies = judge.judge(prompts)
    for prompt, reply in list(zip(prompts, replies, strict=True))[1:5:2]:
        harm, digits, mass = plain_distributions(judge, prompt)
        expected = sum(i * p for i, p in enumerate(digits)) / mass * 10 / 9
        assert reply.prompt_quality == pytest.approx(expected, abs=2e-3)
        danger = 1 - harm["none"] / sum(harm.values())
        assert json.loads(reply.judge_reply)["harm_probability"] == pytest.approx(danger, abs=1e-3)


def test_tokens_that_are_read_are_counted(judge):
    prompts, before = [GOOD, VIOLENT], judge.tokens()["input"]
    judge.judge(prompts)
    read = 0
    for prompt in prompts:
        chat = judge._tokenizer.apply_chat_template(
            judge_messages(prompt), tokenize=False, add_generation_prompt=True
        )
        whole = judge._tokenizer(chat + ANSWER_START + ANSWER_MIDDLE, add_special_tokens=False)
        # The prefix is read once for all.
        read += len(whole.input_ids) - judge.info()["prefix_tokens"]
    assert judge.tokens() == {"input": before + read, "output": 0}


def test_an_answer_does_not_depend_on_the_other_prompts_of_its_batch(judge):
    alone = judge.judge([GOOD])[0]
    among = judge.judge([JUNK, HOSTILE["code"], GOOD, VIOLENT, GOOD])
    for reply in (among[2], among[4]):
        assert reply.prompt_quality == pytest.approx(alone.prompt_quality, abs=1e-3)
    assert judge.judge([]) == []
    # The shared states are as they were, or the next batch would read a longer prefix.
    assert judge._cache.get_seq_length() == judge.info()["prefix_tokens"]


def test_hostile_prompts_reach_the_model_without_a_control_token(judge):
    tokenizer = judge._tokenizer
    control = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    for prompt in HOSTILE.values():
        content = judge_messages(prompt)[-1]["content"]
        ids = tokenizer(content, add_special_tokens=False).input_ids
        assert not control & set(ids)
        # Nor does the finished chat have one more turn than it should.
        chat = tokenizer.apply_chat_template(judge_messages(prompt), tokenize=False)
        assert chat.count("<|im_start|>") == len(judge_messages(prompt))


def test_every_hostile_prompt_is_answered_or_says_why(judge):
    short = {name: text for name, text in HOSTILE.items() if len(text) < 300}
    replies = judge.judge([*short.values(), HOSTILE["ten thousand"][:700]])
    for reply in replies:
        assert reply.quality_error is None
        assert 0 <= reply.prompt_quality <= 10
        assert isinstance(reply.harmful, bool)


def test_a_prompt_that_the_context_cannot_hold_is_too_long_and_spares_the_batch():
    judge = TransformersJudge(model=str(judge_folder()), max_model_len=900)
    good, long = judge.judge([GOOD, HOSTILE["ten thousand emoji"]])
    assert good.quality_error is None
    assert long.quality_error == "too_long"
    with pytest.raises(ValueError, match="max_model_len"):
        TransformersJudge(model=str(judge_folder()), max_model_len=600)


def test_good_junk_and_harmful_prompts_are_told_apart(judge):
    good, junk, violent = judge.judge([GOOD, JUNK, VIOLENT])
    assert good.prompt_quality > 7 > 3 > junk.prompt_quality
    assert (good.harmful, violent.harmful) == (False, True)
    assert violent.harm_category == "violence"


def test_an_adapter_changes_the_answers(judge):
    plain = TransformersJudge(model=str(judge_folder()))
    assert plain.info()["adapter"] is None
    spread = [
        abs(a.prompt_quality - b.prompt_quality)
        for a, b in zip(plain.judge([GOOD, JUNK]), judge.judge([GOOD, JUNK]), strict=True)
    ]
    assert max(spread) > 1


def test_the_configuration_builds_it():
    config = JudgeConfig(
        engine="transformers",
        model=str(judge_folder()),
        options={"adapter": str(JUDGE_ADAPTER), "pack_tokens": 64},
    )
    (reply,) = build_judge(config).judge([GOOD])
    assert reply.prompt_quality > 7
    with pytest.raises(ValueError, match="Ray Data"):
        build_judge(JudgeConfig(engine="vllm"))
