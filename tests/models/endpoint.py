"""A real HTTP server on localhost that answers like an OpenAI-compatible endpoint, or misbehaves.

`Endpoint(script)` asks `script(prompt, attempt)` what to do about each request: the user's prompt
as the judge quoted it, and how many times it was asked before. The answer is a `Reply`.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = '{"harm":"none","quality":8}'


@dataclass
class Reply:
    """What the server sends: a chat completion around `content`, or `raw` bytes instead."""

    content: str | None = GOOD
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    finish: str = "stop"
    refusal: str | None = None
    logprobs: list[tuple[str, dict[str, float]]] | None = None
    # Tokens of (prompt, completion).
    usage: tuple[int, int] | None = None

    def body(self) -> bytes:
        """The bytes of the answer."""
        if self.raw is not None:
            return self.raw
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self.finish,
            "message": {"role": "assistant", "content": self.content, "refusal": self.refusal},
        }
        if self.logprobs is not None:
            choice["logprobs"] = {
                "content": [
                    {
                        "token": token,
                        "logprob": 0.0,
                        "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()],
                    }
                    for token, top in self.logprobs
                ]
            }
        completion: dict[str, Any] = {
            "id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
        }  # fmt: skip
        if self.usage is not None:
            prompt, answer = self.usage
            completion["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": answer,
                "total_tokens": prompt + answer,
            }
        return json.dumps(completion).encode()


Script = Callable[[str, int], Reply]


class Endpoint:
    """The running server: `url`, and what it saw."""

    def __init__(
        self,
        script: Script,
        accepts: Callable[[dict[str, Any]], bool] | None = None,
        port: int = 0,
    ):
        """`accepts`: requests for which it is False are refused with status 400; `port` 0: any."""
        self.script, self.accepts = script, accepts or (lambda request: True)
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Base URL for the judge."""
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "Endpoint":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        with self.lock:
            self.times.append(time.monotonic())
            self.requests.append(request)
            self.keys.add(handler.headers.get("Authorization", ""))
            attempt = self.asked[prompt]
            self.asked[prompt] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if handler.path != "/v1/chat/completions":
                reply = Reply(status=404, raw=b'{"error":{"message":"no such path"}}')
            elif not self.accepts(request):
                reply = Reply(status=400, raw=b'{"error":{"message":"unknown field"}}')
            else:
                reply = self.script(prompt, attempt)
            time.sleep(reply.delay)
        finally:
            with self.lock:
                self.in_flight -= 1
        body = reply.body()
        try:
            handler.send_response(reply.status)
            for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as it should on a hang
