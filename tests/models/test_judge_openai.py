"""The endpoint engine against a real HTTP server that misbehaves."""

import json
import logging
import math

import pytest

from fifa_ray.config import JudgeConfig
from fifa_ray.models.judge import build_judge
from fifa_ray.models.judge_openai import OUTAGE_REASONS, PROBE_PROMPT, OpenAIJudge
from tests.models.endpoint import GOOD, Endpoint, Reply
from tests.scoring.hostile_prompts import HOSTILE

SECRET = "sk-very-secret-key-123"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)


def judge_for(endpoint: Endpoint, **settings) -> OpenAIJudge:
    defaults = {
        "model": "m",
        "api_key_env": "TEST_JUDGE_KEY",
        "max_retries": 2,
        "timeout_seconds": 5.0,
        "first_wait_seconds": 0.01,
    }
    return OpenAIJudge(endpoint=endpoint.url, **(defaults | settings))


def script_for(bad_prompt: str, *replies: Reply):
    """Good answers, but for `bad_prompt` these replies in turn (the last one for ever)."""

    def script(prompt: str, attempt: int) -> Reply:
        if json.loads(prompt) == bad_prompt:
            return replies[min(attempt, len(replies) - 1)]
        return Reply()

    return script


def test_answers_come_in_the_order_of_the_prompts():
    def script(prompt: str, attempt: int) -> Reply:
        number = json.loads(prompt).removeprefix("prompt ")
        if not number.isdigit():
            return Reply()
        # The first ones answer last.
        return Reply(f'{{"harm":"none","quality":{number}}}', delay=0.02 * (9 - int(number)))

    with Endpoint(script) as endpoint:
        replies = judge_for(endpoint).judge([f"prompt {i}" for i in range(10)])
    assert [r.prompt_quality for r in replies] == pytest.approx([10 * i / 9 for i in range(10)])
    assert {r.harmful for r in replies} == {False}
    assert replies[3].judge_reply == '{"harm":"none","quality":3}'
    assert endpoint.keys == {f"Bearer {SECRET}"}


def test_tokens_are_those_of_the_bill_and_failed_tries_count():
    replies = [Reply(content="no JSON", usage=(100, 7)), Reply(usage=(100, 12)), Reply()]
    with Endpoint(lambda prompt, attempt: replies[min(attempt, 2)]) as endpoint:
        engine = judge_for(endpoint)
        engine.judge(["a lemon"])
        before = engine.tokens()
        engine.judge(["a plum"])
    # Probe: 100 + 100; each prompt the same two tries.
    assert before == {"input": 400, "output": 38}
    assert engine.tokens() == {"input": 600, "output": 57}


def test_the_request_asks_for_structured_output_and_probabilities():
    with Endpoint(lambda *_: Reply()) as endpoint:
        judge_for(endpoint, extra_body={"chat_template_kwargs": {"thinking": False}}).judge(["a"])
    request = endpoint.requests[-1]
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["harm", "quality"]
    assert request["logprobs"] is True
    assert request["temperature"] == 0.0
    assert request["chat_template_kwargs"] == {"thinking": False}
    assert request["messages"][0]["role"] == "system"


def test_the_score_is_an_expectation_where_the_server_gives_probabilities():
    half = math.log(0.5)
    entries = [
        ('{"harm":"', {'{"harm":"': 0.0}),
        ("violence", {"violence": math.log(0.6), "none": math.log(0.4)}),
        ('","quality":', {'","quality":': 0.0}),
        ("6", {"6": half, "8": half}),
        ("}", {"}": 0.0}),
    ]
    script = script_for("knife fight", Reply('{"harm":"violence","quality":6}', logprobs=entries))
    with Endpoint(script) as endpoint:
        judge = judge_for(endpoint)
        (reply,) = judge.judge(["knife fight"])
        (lenient,) = judge_for(endpoint, harmful_threshold=0.7).judge(["knife fight"])
    assert reply.prompt_quality == pytest.approx(7 * 10 / 9)
    assert (reply.harmful, reply.harm_category) == (True, "violence")
    assert lenient.harmful is False
    assert judge.info()["counts"]["expected_scores"] == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(status=500, raw=b"Internal Server Error"), "server_error"),
        (Reply(status=503, raw=b'{"error":"busy"}', headers={"Retry-After": "0"}), "server_error"),
        (Reply(status=429, raw=b"slow down", headers={"Retry-After": "0.01"}), "rate_limited"),
        (Reply(status=429, raw=b"{}", headers={"Retry-After": "soon"}), "rate_limited"),
        (Reply(raw=b"{not json"), "bad_response"),
        (Reply(raw=b"\xff\xfe\x00"), "bad_response"),
        (Reply(raw=b"<html>proxy</html>", headers={"Content-Type": "text/html"}), "bad_response"),
        (Reply(raw=b"[]"), "bad_response"),
        (Reply(raw=b"null"), "bad_response"),
        (Reply(raw=b'{"error":{"message":"oops"}}'), "bad_response"),
        (Reply(raw=b'{"choices":[]}'), "bad_response"),
        (Reply(raw=b'{"choices":[{"message":null}]}'), "bad_response"),
        (Reply(raw=b'{"choices":"no"}'), "bad_response"),
        (Reply(None), "empty"),
        (Reply(""), "empty"),
        (Reply("nine out of ten"), "no_json"),
        (Reply("I'm sorry, I can't help with that."), "refused"),
        (Reply(None, refusal="I can't help with that."), "refused"),
        (Reply(None, finish="content_filter"), "refused"),
        (Reply('{"harm":"none","qua', finish="length"), "truncated"),
        (Reply('{"rating":"excellent"}'), "missing_field"),
        (Reply('{"harm":"none","quality":"10"}'), "bad_quality"),
        (Reply('{"harm":"fine","quality":9}'), "bad_harm"),
    ],
)
def test_a_bad_answer_is_retried_then_recorded_and_costs_the_others_nothing(reply, reason):
    with Endpoint(script_for("bad", reply)) as endpoint:
        judge = judge_for(endpoint)
        good, bad, also_good = judge.judge(["good", "bad", "also good"])
    assert bad.quality_error == reason
    assert bad.prompt_quality is None
    assert bad.harmful is None
    assert good.quality_error is None
    assert also_good.prompt_quality == pytest.approx(80 / 9)
    # Where the server may have been down, once more after the probe has shown that it is not.
    assert endpoint.asked['"bad"'] == 3 + (reason in OUTAGE_REASONS)
    assert judge.info()["counts"][reason] == 1


@pytest.mark.parametrize(
    "reply", [Reply(status=500), Reply(status=429), Reply(raw=b"{"), Reply("no"), Reply(None)]
)
def test_a_passing_failure_is_forgotten(reply):
    with Endpoint(script_for("flaky", reply, Reply(GOOD))) as endpoint:
        (found,) = judge_for(endpoint).judge(["flaky"])
    assert found.quality_error is None
    assert found.prompt_quality == pytest.approx(80 / 9)
    # Asking the same question again at temperature 0 would bring the same bad answer.
    assert [r["temperature"] for r in endpoint.requests if "flaky" in str(r)] == [0.0, 0.5]


def test_a_hanging_answer_times_out():
    with Endpoint(script_for("slow", Reply(delay=8.0))) as endpoint:
        judge = judge_for(endpoint, timeout_seconds=2.0, max_retries=1)
        good, slow = judge.judge(["good", "slow"])
    assert slow.quality_error == "timeout"
    assert good.quality_error is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{}", "bad_request"),
        (b'{"error":{"message":"maximum context length is 2048 tokens"}}', "too_long"),
    ],
)
def test_a_request_that_the_server_refuses_is_not_repeated(body, reason):
    with Endpoint(script_for("bad", Reply(status=400, raw=body))) as endpoint:
        (reply,) = judge_for(endpoint).judge(["bad"])
    assert reply.quality_error == reason
    assert endpoint.asked['"bad"'] == 1


@pytest.mark.parametrize(
    ("refused", "ability"),
    [
        (set(), "structured output and probabilities"),
        ({"logprobs"}, "structured output"),
        ({"response_format"}, "probabilities"),
        ({"logprobs", "response_format"}, "plain text"),
    ],
)
def test_what_a_server_lacks_is_done_without_and_said_once(refused, ability, caplog):
    with (
        Endpoint(
            lambda *_: Reply(), accepts=lambda request: not refused & set(request)
        ) as endpoint,
        caplog.at_level(logging.WARNING),
    ):
        judge = judge_for(endpoint)
        replies = judge.judge(["a", "b"]) + judge.judge(["c"])
    assert [r.quality_error for r in replies] == [None] * 3
    assert judge.info()["ability"] == ability
    warnings = [record for record in caplog.records if "refuses" in record.message]
    assert len(warnings) == (1 if refused else 0)


def test_an_unusable_endpoint_stops_the_stage_and_says_what_to_do():
    with Endpoint(lambda *_: Reply()) as gone:
        url = gone.url
    judge = OpenAIJudge(model="m", endpoint=url, max_retries=1, first_wait_seconds=0.01)
    with pytest.raises(RuntimeError, match=r"connection_error.*judge\.endpoint"):
        judge.judge(["a"])
    with Endpoint(lambda *_: Reply(status=401, raw=f"bad key {SECRET}".encode())) as endpoint:
        with pytest.raises(RuntimeError, match="TEST_JUDGE_KEY") as refused:
            judge_for(endpoint).judge(["a"])
        assert SECRET not in str(refused.value)
    with (
        Endpoint(lambda *_: Reply(status=404)) as endpoint,
        pytest.raises(RuntimeError, match=r"judge\.model"),
    ):
        judge_for(endpoint).judge(["a"])
    with (
        Endpoint(lambda *_: Reply(), accepts=lambda _: False) as endpoint,
        pytest.raises(RuntimeError, match="even a plain request"),
    ):
        judge_for(endpoint).judge(["a"])


@pytest.mark.parametrize(
    "outage",
    [
        Reply(status=500),
        Reply(status=429),
        Reply(raw=b"<html>maintenance</html>"),
        Reply(delay=2.0),
    ],
    ids=["500", "429", "garbage", "hang"],
)
def test_prompts_wait_for_an_endpoint_that_is_down_and_are_judged_when_it_is_back(outage):
    seen = 0

    def down_for_a_while(prompt: str, attempt: int) -> Reply:
        nonlocal seen
        seen += 1
        # The probe at the start and three answers, then nothing for any prompt.
        return outage if 4 < seen <= 20 else Reply()

    with Endpoint(down_for_a_while) as endpoint:
        judge = judge_for(endpoint, max_retries=1, timeout_seconds=0.5, max_concurrency=8)
        replies = judge.judge([f"prompt {i}" for i in range(12)])
    assert [reply.quality_error for reply in replies] == [None] * 12
    assert seen > 20


def test_an_endpoint_that_stays_down_stops_the_run():
    with Endpoint(lambda prompt, _: Reply(status=200 if "rowing" in prompt else 503)) as endpoint:
        # The probe is answered, so each prompt is to blame for its failure.
        replies = judge_for(endpoint, max_outage_seconds=0.2).judge(["a", "b"])
    assert {reply.quality_error for reply in replies} == {"server_error"}
    with Endpoint(lambda *_: Reply()) as endpoint:
        judge = judge_for(endpoint, max_outage_seconds=0.5, max_retries=1)
        assert judge.judge(["a"])[0].quality_error is None
    # Its socket is closed now: connections are refused.
    with pytest.raises(RuntimeError, match=r"connection_error for \d+ s .* the same command again"):
        judge.judge(["b", "c"])


def test_requests_in_flight_and_per_minute_are_limited():
    with Endpoint(lambda *_: Reply(delay=0.05)) as endpoint:
        judge_for(endpoint, max_concurrency=3).judge([str(i) for i in range(12)])
        assert 1 < endpoint.most_in_flight <= 3
    with Endpoint(lambda *_: Reply()) as endpoint:
        judge_for(endpoint, requests_per_minute=1200).judge([str(i) for i in range(10)])
        # 11 requests (one probe) are 50 ms apart, so they take at least half a second.
        assert endpoint.times[-1] - endpoint.times[0] >= 0.45


def test_the_key_reaches_the_server_and_nothing_else(caplog):
    with (
        caplog.at_level(logging.DEBUG),
        Endpoint(script_for("bad", Reply(status=500, raw=SECRET.encode()))) as endpoint,
    ):
        url = endpoint.url.replace("http://", f"http://user:{SECRET}@")
        judge = judge_for(endpoint)
        replies = judge.judge(["good", "bad"])
        with_password = OpenAIJudge(model="m", endpoint=url, api_key_env="TEST_JUDGE_KEY")
    assert endpoint.keys == {f"Bearer {SECRET}"}
    seen = json.dumps([judge.info(), with_password.info(), [r.judge_reply for r in replies]])
    assert SECRET not in seen + caplog.text + repr(judge) + repr(vars(judge))


def test_hostile_prompts_reach_the_endpoint_closed_and_are_all_answered():
    with Endpoint(lambda *_: Reply()) as endpoint:
        replies = judge_for(endpoint).judge(list(HOSTILE.values()))
    assert [r.quality_error for r in replies] == [None] * len(HOSTILE)
    asked = [r["messages"][-1]["content"] for r in endpoint.requests]
    for content in asked:
        assert isinstance(json.loads(content), str)  # one closed JSON string
        assert not set("<>[]") & set(content)
    assert json.dumps(PROBE_PROMPT) in asked


def test_the_configuration_builds_it():
    with Endpoint(lambda *_: Reply()) as endpoint:
        config = JudgeConfig(
            engine="openai", model="m", endpoint=endpoint.url, options={"max_tokens": 16}
        )
        replies = build_judge(config).judge(["a"])
        assert endpoint.requests[0]["max_tokens"] == 16
    assert replies[0].harmful is False
    assert build_judge(config).judge([]) == []
