"""The judge behind an OpenAI-compatible endpoint: `vllm serve`, a gateway, or a hosted model.

A probe on first use finds out what the server can do (structured output and token probabilities,
structured output alone, neither); what it lacks is logged once and stands in `info()`. After that
no answer of the server, however bad, raises: it is retried, then recorded with its reason. Where
the probe's prompt is not answered either, it is the server that fails: prompts wait until it is
back, at most `max_outage_seconds`.
"""

import asyncio
import itertools
import logging
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import openai
import tenacity

from fifa_ray.models.judge import JudgeReply, is_too_long
from fifa_ray.scoring import quality as rubric

logger = logging.getLogger(__name__)

T = TypeVar("T")
TOP_LOGPROBS = 20
LONGEST_WAIT_SECONDS = 60.0
LONGEST_KEPT_REPLY = 500
PROBE_PROMPT = "a wooden rowing boat on a calm lake, early morning"

# Failures that may be the server's, not the prompt's.
OUTAGE_REASONS = frozenset(
    {"connection_error", "timeout", "server_error", "rate_limited", "bad_response"}
)

_STRUCTURED = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "judgement", "strict": True, "schema": rubric.ANSWER_SCHEMA},
    }
}
_PROBABILITIES = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
# What a request asks for beyond its text, best first; the probe takes the first that is accepted.
ABILITIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("structured output and probabilities", _STRUCTURED | _PROBABILITIES),
    ("structured output", _STRUCTURED),
    ("probabilities", _PROBABILITIES),
    ("plain text", {}),
)


class UnusableAnswer(Exception):
    """An answer that gives no judgement: a short reason, and whether asking again may help."""

    def __init__(
        self, reason: str, retry: bool = True, wait: float | None = None, reply: str = ""
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry, self.wait, self.reply = reason, retry, wait, reply


class OpenAIJudge:
    """Asks an endpoint about many prompts at once, within its limits.

    The key is read from the environment variable `api_key_env`, unless given, and kept in the
    client alone.
    """

    def __init__(
        self,
        *,
        model: str,
        endpoint: str,
        api_key_env: str = "OPENAI_API_KEY",
        api_key: str | None = None,
        max_concurrency: int = 32,
        requests_per_minute: float | None = None,
        max_retries: int = 3,
        timeout_seconds: float = 60.0,
        max_outage_seconds: float = 600.0,
        max_prompt_chars: int = 2000,
        harmful_threshold: float = 0.5,
        max_tokens: int = 64,
        first_wait_seconds: float = 0.5,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        """`max_tokens`: length of an answer; `first_wait_seconds`: back-off before a second try.

        `max_outage_seconds`: how long prompts wait for a server that answers nothing at all.
        """
        self._model, self._endpoint = model, endpoint
        self._api_key_env = api_key_env
        self._timeout_seconds = timeout_seconds
        self._max_retries, self._first_wait_seconds = max_retries, first_wait_seconds
        self._max_prompt_chars, self._harmful_threshold = max_prompt_chars, harmful_threshold
        self._request: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "extra_body": extra_body,
        }
        self._ability: int | None = None
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._client = openai.AsyncOpenAI(
            base_url=endpoint,
            api_key=api_key or os.environ.get(api_key_env) or "none",
            timeout=timeout_seconds,
            max_retries=0,
        )
        self._max_outage_seconds = max_outage_seconds
        self._outage, self._back_since = asyncio.Lock(), -math.inf
        self._slots = asyncio.Semaphore(max_concurrency)
        self._seconds_between = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_request = 0.0
        # A loop of its own, in a thread: a notebook or an actor may already be running one here.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="judge", daemon=True).start()

    def info(self) -> dict[str, Any]:
        """Endpoint (without credentials), model, what the server could do, tries and failures."""
        ability = None if self._ability is None else ABILITIES[self._ability][0]
        return {
            "model": self._model,
            "endpoint": _without_credentials(self._endpoint),
            "ability": ability,
            "counts": dict(sorted(self._counts.items())),
        }

    def tokens(self) -> dict[str, int]:
        """As the server counts them for its bill; 0 where it does not say."""
        return {name: self._tokens[name] for name in ("input", "output")}

    def judge(self, prompts: Sequence[str]) -> list[JudgeReply]:
        """One reply per prompt.

        Raises RuntimeError where the endpoint cannot be used at all (no connection, an unknown
        model, a refused key), and where it stops answering for `max_outage_seconds`.
        """
        if not prompts:
            return []
        if self._ability is None:
            self._ability = self._run(self._probe())
        return self._run(self._judge_all(prompts))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _probe(self) -> int:
        for level, (name, _) in enumerate(ABILITIES):
            try:
                await self._ask(PROBE_PROMPT, level)
            except UnusableAnswer as problem:
                if problem.reason == "bad_request":
                    continue
                if problem.reason in OUTAGE_REASONS - {"rate_limited"}:
                    raise RuntimeError(
                        f"the judge's endpoint {_without_credentials(self._endpoint)} gave no "
                        f"usable answer in {self._max_retries + 1} tries ({problem.reason}); check "
                        "judge.endpoint and that the server runs"
                    ) from None
            if level:
                logger.warning(
                    "the judge's endpoint refuses %s; going on with %s", ABILITIES[0][0], name
                )
            return level
        raise RuntimeError(
            f"the judge's endpoint {_without_credentials(self._endpoint)} refuses even a plain "
            "request (status 400); check judge.model and judge.options"
        )

    async def _judge_all(self, prompts: Sequence[str]) -> list[JudgeReply]:
        return list(await asyncio.gather(*(self._judge_one(prompt) for prompt in prompts)))

    async def _judge_one(self, prompt: str) -> JudgeReply:
        assert self._ability is not None
        failed: UnusableAnswer
        while True:
            try:
                return await self._ask(prompt, self._ability)
            except UnusableAnswer as problem:
                failed = problem
            if failed.reason not in OUTAGE_REASONS:
                break
            if await self._was_down(failed.reason):
                continue
            try:  # The server answers now, but the tries may have met the end of an outage.
                return await self._try(prompt, self._ability, attempt=2)
            except UnusableAnswer as problem:
                failed = problem
                break
        self._counts[failed.reason] += 1
        return JudgeReply(quality_error=failed.reason, judge_reply=failed.reply)

    async def _was_down(self, reason: str) -> bool:
        """Whether the server itself failed just now: it does not answer the probe's prompt either.

        Returns when it answers again. Raises RuntimeError if it does not for `max_outage_seconds`.
        """
        assert self._ability is not None
        failed_at = time.monotonic()
        async with self._outage:
            if failed_at < self._back_since:
                return True  # another prompt has waited for it meanwhile
            wait = self._first_wait_seconds
            for attempt in itertools.count():
                try:
                    await self._try(PROBE_PROMPT, self._ability, attempt=1)
                except UnusableAnswer as problem:
                    if problem.reason in OUTAGE_REASONS:
                        await self._wait_out(failed_at, wait, problem)
                        wait *= 2
                        continue
                if attempt:
                    self._back_since = time.monotonic()
                    logger.warning(
                        "the judge's endpoint answers again after %.0f s (%s)",
                        self._back_since - failed_at,
                        reason,
                    )
                return attempt > 0
        raise AssertionError("unreachable")

    async def _wait_out(self, failed_at: float, wait: float, problem: UnusableAnswer) -> None:
        """Sleep before the next probe; RuntimeError where the outage has lasted long enough."""
        lasted = time.monotonic() - failed_at
        if lasted >= self._max_outage_seconds:
            raise RuntimeError(
                f"the judge's endpoint {_without_credentials(self._endpoint)} stopped answering: "
                f"{problem.reason} for {lasted:.0f} s (judge.max_outage_seconds); see to the "
                "server, then run the same command again: answers so far are kept"
            )
        wait = max(wait, problem.wait or 0.0)
        left = self._max_outage_seconds - lasted
        await asyncio.sleep(min(wait, LONGEST_WAIT_SECONDS, left))

    async def _ask(self, prompt: str, level: int) -> JudgeReply:
        """The answer, after retries with exponential back-off and jitter."""
        jitter = tenacity.wait_random_exponential(
            multiplier=self._first_wait_seconds, max=LONGEST_WAIT_SECONDS
        )

        def wait(state: tenacity.RetryCallState) -> float:
            problem = state.outcome.exception() if state.outcome else None
            asked = problem.wait if isinstance(problem, UnusableAnswer) else None
            return max(jitter(state), min(asked or 0.0, LONGEST_WAIT_SECONDS))

        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._max_retries + 1),
            wait=wait,
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, UnusableAnswer) and e.retry),
            reraise=True,
        ):
            with attempt:
                return await self._try(prompt, level, attempt.retry_state.attempt_number)
        raise AssertionError("tenacity either returns or raises")

    async def _try(self, prompt: str, level: int, attempt: int) -> JudgeReply:
        create: Any = self._client.chat.completions.create
        async with self._slots:
            await self._pace()
            self._counts["requests"] += 1
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    completion = await create(
                        messages=rubric.judge_messages(prompt, self._max_prompt_chars),
                        # The same question at temperature 0 would get the same bad answer again.
                        temperature=0.0 if attempt == 1 else 0.5,
                        **self._request,
                        **ABILITIES[level][1],
                    )
            except Exception as error:
                raise self._explain(error) from None
        self._count_tokens(getattr(completion, "usage", None))
        return self._read(completion)

    def _count_tokens(self, usage: Any) -> None:
        for name, field in (("input", "prompt_tokens"), ("output", "completion_tokens")):
            tokens = getattr(usage, field, None)
            self._tokens[name] += tokens if isinstance(tokens, int) else 0

    async def _pace(self) -> None:
        """Wait for this request's turn under the rate limit."""
        now = time.monotonic()
        turn = max(now, self._next_request)
        self._next_request = turn + self._seconds_between
        await asyncio.sleep(turn - now)

    def _explain(self, error: Exception) -> Exception:
        """What an exception of the client means. Server texts are left out: some echo the key."""
        match error:
            case TimeoutError() | openai.APITimeoutError():
                return UnusableAnswer("timeout")
            case openai.APIConnectionError():
                return UnusableAnswer("connection_error")
            case openai.RateLimitError():
                return UnusableAnswer("rate_limited", wait=_retry_after(error))
            case openai.AuthenticationError():
                return RuntimeError(
                    f"the judge's endpoint refuses the key (status 401); set the environment "
                    f"variable {self._api_key_env}"
                )
            case openai.NotFoundError():
                return RuntimeError(
                    f"the judge's endpoint {_without_credentials(self._endpoint)} knows no model "
                    f"{self._model!r} or no such path (status 404); check judge.model and "
                    "judge.endpoint"
                )
            case openai.BadRequestError() | openai.UnprocessableEntityError():
                reason = "too_long" if is_too_long(str(error)) else "bad_request"
                return UnusableAnswer(reason, retry=False)
            case openai.APIStatusError() if error.status_code < 500:
                return UnusableAnswer(f"status_{error.status_code}", retry=False)
            case openai.APIStatusError():
                return UnusableAnswer("server_error", wait=_retry_after(error))
        return UnusableAnswer("bad_response")  # a body that is no completion

    def _read(self, completion: Any) -> JudgeReply:
        """The judgement in a completion. Servers send what they like, so nothing is taken for
        granted; raises UnusableAnswer."""
        try:
            choice = completion.choices[0]
            text, refusal = choice.message.content, choice.message.refusal
            finish = choice.finish_reason
            entries = choice.logprobs.content if choice.logprobs else None
        except (AttributeError, IndexError, TypeError):
            raise UnusableAnswer("bad_response") from None
        reply = str(text or refusal or "")[:LONGEST_KEPT_REPLY]
        if refusal or finish == "content_filter":
            raise UnusableAnswer("refused", reply=reply)
        parsed = rubric.parse_quality_reply(text if isinstance(text, str) else "")
        if parsed.quality_error is not None:
            cut = finish == "length" and parsed.quality_error in ("no_json", "truncated", "empty")
            raise UnusableAnswer("truncated" if cut else parsed.quality_error, reply=reply)
        if (found := _distributions(entries)) is None:
            self._counts["parsed_numbers"] += 1
        else:
            parsed = rubric.reply_from_distributions(*found, self._harmful_threshold)
            if parsed.quality_error is not None:
                raise UnusableAnswer(parsed.quality_error, reply=reply)
            self._counts["expected_scores"] += 1
        return JudgeReply(parsed.prompt_quality, parsed.harmful, parsed.harm_category, None, reply)


def _distributions(entries: Any) -> tuple[dict[str, float], dict[str, float]] | None:
    """Log-probabilities of the harm's and the quality's first token; None if not to be had."""
    try:
        places = rubric.answer_token_indices([entry.token for entry in entries])
        if places is None:
            return None
        harm, quality = (
            {top.token: float(top.logprob) for top in entries[place].top_logprobs}
            for place in places
        )
    except (AttributeError, TypeError, ValueError):
        return None
    return (harm, quality) if harm and quality else None


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait; dates and nonsense count as nothing asked."""
    value = error.response.headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,6}(\.\d+)?", value) else None


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
