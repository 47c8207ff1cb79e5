"""The rubric's messages, the reading of replies, and expectations over token probabilities."""

import json
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa_ray.scoring.quality import (
    ANSWER_REST_REGEX,
    ANSWER_SCHEMA,
    ANSWER_START,
    HARM_CATEGORIES,
    MAX_PARTS,
    MIN_VALID_MASS,
    answer_token_indices,
    expected_score,
    harm_probability,
    judge_messages,
    parse_quality_reply,
    prompt_parts,
    quote_prompt,
    reply_from_distributions,
)
from tests.scoring.hostile_prompts import COAXING, HOSTILE

TEMPLATE_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "[INST]", "[/INST]", "<<SYS>>",
    "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|start_header_id|>", "[gMASK]", "[MASK]",
    "<\uff5cAssistant\uff5c>", "<think>", "<script>",
)  # fmt: skip


def log(**probabilities: float) -> dict[str, float]:
    return {token.strip("_"): math.log(p) for token, p in probabilities.items()}


def test_the_hostile_set_is_large_enough():
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_prompt_stays_one_closed_json_string(name):
    prompt = HOSTILE[name]
    quoted = quote_prompt(prompt, max_chars=100_000)
    # It reads back unchanged, so nothing in it closed the string early.
    assert json.loads(quoted) == prompt
    assert quoted.count("\n") == 0
    assert quoted.isprintable()
    quoted.encode()  # lone surrogates would not survive this
    assert not any(token in quoted for token in TEMPLATE_TOKENS)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text_stays_one_closed_json_string(prompt):
    quoted = quote_prompt(prompt, max_chars=1000)
    assert json.loads(quoted) == prompt
    assert quoted.isprintable()
    assert not set("<>[]\uff5c") & set(quoted)


def test_only_the_last_message_depends_on_the_prompt():
    first, second = judge_messages("a boat"), judge_messages(HOSTILE["chatml"])
    assert first[:-1] == second[:-1]
    assert [m["role"] for m in first[:3]] == ["system", "user", "assistant"]
    assert first[-1] == {"role": "user", "content": '"a boat"'}


def test_the_examples_follow_the_rubric_s_own_format():
    for message in judge_messages("x"):
        if message["role"] == "assistant":
            assert parse_quality_reply(message["content"]).quality_error is None


@pytest.mark.parametrize("wrapper", COAXING)
def test_the_parts_of_a_coaxing_prompt_hold_the_plain_one_by_itself(wrapper):
    assert "a man beats a dog" in prompt_parts(wrapper.format(prompt="a man beats a dog"))


def test_an_ordinary_prompt_has_no_parts():
    for prompt in ("a red barn, oil painting", "a red barn in a field.", "8k. hdr", "", "(a) [b]"):
        assert prompt_parts(prompt) == []
    assert len(prompt_parts("one two three. " * 5000)) == MAX_PARTS


def test_a_long_prompt_keeps_both_its_ends():
    text = "harmful start " + "x" * 5000 + " harmful end"
    kept = json.loads(quote_prompt(text, max_chars=100))
    assert len(kept) == 100
    assert kept.startswith("harmful start")
    assert kept.endswith("harmful end")
    assert "…" in kept
    assert json.loads(quote_prompt("x" * 100, max_chars=100)) == "x" * 100


@pytest.mark.parametrize(
    "reply",
    [
        '{"harm":"none","quality":9}',
        ' {"quality": 9, "harm": "none"}\n',
        '```json\n{"harm": "none", "quality": 9}\n```',
        'Sure! Here it is: {"harm": "None", "quality": "9"} Have a nice day.',
        '<think>{"harm":"violence","quality":1}? no.</think>{"harm":"none","quality":9}',
        '{"harm":"none","quality":9} {"harm":"none","quality":9.0}',
        '{"harm":"none","quality":9,"why":"nice"}',
    ],
)
def test_a_reply_is_read_through_its_wrapping(reply):
    parsed = parse_quality_reply(reply)
    assert parsed.quality_error is None
    assert parsed.prompt_quality == 10.0
    assert parsed.harmful is False
    assert parsed.harm_category is None


def test_numbers_are_compared_as_numbers():
    # As strings "10" < "9" and "2" > "10": such a bug once chose the wrong images elsewhere.
    scores = [
        parse_quality_reply(f'{{"harm":"none","quality":"{q}"}}').prompt_quality for q in range(10)
    ]
    assert scores == sorted(scores)
    assert scores == pytest.approx([10 * q / 9 for q in range(10)])
    assert parse_quality_reply('{"harm":"none","quality":4.5}').prompt_quality == pytest.approx(5.0)


@pytest.mark.parametrize("category", HARM_CATEGORIES)
def test_each_category_is_harmful(category):
    parsed = parse_quality_reply(f'{{"harm":"{category}","quality":0}}')
    assert (parsed.harmful, parsed.harm_category, parsed.prompt_quality) == (True, category, 0.0)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("<think>hm</think>", "empty"),
        ("9", "no_json"),
        ("quality: 9, harm: none", "no_json"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I cannot rate this. As an AI, I must decline", "refused"),
        ('{"harm":"none","qual', "truncated"),
        ('{"harm":"none","quality":9', "truncated"),
        ('{"harm":"none","quality":}', "truncated"),
        ("[" * 100_000, "no_json"),
        ('{"a":' * 100_000, "truncated"),
        ("{}", "missing_field"),
        ('{"quality":9}', "missing_field"),
        ('{"harm":"none"}', "missing_field"),
        ('{"harm":"violence","harm":"none","quality":9}', "missing_field"),
        ('{"answer":{"harm":"none","quality":9}}', "missing_field"),
        ('{"harm":"none","quality":10}', "bad_quality"),
        ('{"harm":"none","quality":-1}', "bad_quality"),
        ('{"harm":"none","quality":"9/9"}', "bad_quality"),
        ('{"harm":"none","quality":"high"}', "bad_quality"),
        ('{"harm":"none","quality":true}', "bad_quality"),
        ('{"harm":"none","quality":null}', "bad_quality"),
        ('{"harm":"none","quality":NaN}', "bad_quality"),
        ('{"harm":"none","quality":Infinity}', "bad_quality"),
        ('{"harm":"none","quality":1e999}', "bad_quality"),
        ('{"harm":"none","quality":[9]}', "bad_quality"),
        ('{"harm":"none","quality":' + "9" * 5000 + "}", "bad_quality"),
        ('{"harm":"fine","quality":9}', "bad_harm"),
        ('{"harm":false,"quality":9}', "bad_harm"),
        ('{"harm":null,"quality":9}', "bad_harm"),
        ('{"harm":"","quality":9}', "bad_harm"),
        ('{"harm":"violence","quality":3} {"harm":"none","quality":9}', "ambiguous"),
    ],
)
def test_a_bad_reply_gives_its_reason_and_never_a_number(reply, reason):
    parsed = parse_quality_reply(reply)
    assert parsed.quality_error == reason
    assert parsed.prompt_quality is None
    assert parsed.harmful is None
    assert parsed.harm_category is None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]",:harmqulitynoe 0123456789.-\\n', max_size=80) | st.text())
def test_no_reply_raises(reply):
    parsed = parse_quality_reply(reply)
    assert (parsed.prompt_quality is None) == (parsed.quality_error is not None)


def test_the_hostile_prompts_as_replies_never_raise():
    for text in HOSTILE.values():
        parse_quality_reply(text)


def test_expectation_is_the_mean_over_valid_answers():
    found = expected_score(log(_3=0.2, _6=0.3, banana=0.5))
    assert found.mass == pytest.approx(0.5)
    assert found.value == pytest.approx((3 * 0.2 + 6 * 0.3) / 0.5 * 10 / 9)
    spaced = expected_score({" 9": math.log(0.25), '"9': math.log(0.25), "0": math.log(0.5)})
    assert spaced.value == pytest.approx(5.0)
    assert spaced.mass == pytest.approx(1.0)
    assert expected_score(log(_9=1.0)).value == 10.0
    assert expected_score({"10": 0.0}).value is None  # two answers, not one


def test_expectation_is_unusable_without_enough_valid_mass():
    assert expected_score(log(_5=MIN_VALID_MASS * 1.01)).value == pytest.approx(50 / 9)
    low = expected_score(log(_5=MIN_VALID_MASS / 2, the=0.9))
    assert low.value is None
    assert low.mass == pytest.approx(MIN_VALID_MASS / 2)
    assert expected_score({}).value is None
    assert expected_score({"5": math.nan}).value is None
    assert expected_score({"5": -math.inf}).value is None


def test_harm_probability_counts_tokens_by_the_answer_they_begin():
    found = harm_probability(log(none=0.4, viol=0.2, sexual=0.1, s=0.1, the=0.2))
    assert found.mass == pytest.approx(0.8)
    assert found.probability == pytest.approx(0.5)
    assert found.category == "violence"
    # "s" begins three categories: harmful, but not known which.
    assert harm_probability(log(none=0.1, s=0.9)).category is None
    assert harm_probability(log(none=0.1, s=0.9)).probability == pytest.approx(0.9)
    assert harm_probability({"": 0.0, '"': 0.0}).probability is None


def test_the_threshold_decides_the_flag():
    harm, quality = log(none=0.6, hate=0.4), log(_7=1.0)
    assert reply_from_distributions(harm, quality, 0.5).harmful is False
    flagged = reply_from_distributions(harm, quality, 0.3)
    assert (flagged.harmful, flagged.harm_category) == (True, "hate")
    assert reply_from_distributions({}, quality, 0.5).quality_error == "low_mass"
    assert reply_from_distributions(harm, {}, 0.5).prompt_quality is None


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (['{"', "harm", '":"', "none", '","', "quality", '":', "7", "}"], (3, 7)),
        (["none", '","', "quality", '":', "7", "}"], (0, 4)),
        (['{"harm": "', "self", "-harm", '", "quality": ', "0", "}"], (1, 4)),
        (['{"quality":', "7", ',"harm":"', "none", '"}'], (3, 1)),
        (['{"harm": "none"', ', "quality": 7}'], None),
        (["I", " refuse"], None),
        ([], None),
        (
            ['{"harm":"', "none", '","quality":', "7", '} {"harm":"', "none", '","quality":', "9"],
            None,
        ),
    ],
)
def test_answer_tokens_are_found_in_a_generated_answer(tokens, expected):
    assert answer_token_indices(tokens) == expected


def test_schema_and_regex_describe_the_same_answers():
    import jsonschema

    answer = '{"harm":"self-harm","quality":3}'
    assert re.fullmatch(re.escape(ANSWER_START) + ANSWER_REST_REGEX, answer)
    jsonschema.validate(json.loads(answer), ANSWER_SCHEMA)
    for bad in ('{"harm":"fine","quality":3}', '{"harm":"none","quality":10}', "{}"):
        assert not re.fullmatch(re.escape(ANSWER_START) + ANSWER_REST_REGEX, bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(bad), ANSWER_SCHEMA)


def test_scoring_loads_neither_torch_nor_ray():
    code = (
        "import sys, fifa_ray.scoring.quality;"
        "sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
