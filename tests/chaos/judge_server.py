"""The judge's endpoint of a chaos round: the same answer to the same prompt, or none at all."""

import hashlib
import json
import threading
from typing import Literal

from tests.models.endpoint import Endpoint, Reply

Mode = Literal["up", "flaky", "refuse", "hang", "500", "garbage", "429"]
BROKEN = {
    "hang": Reply(delay=60.0),
    "500": Reply(status=500, raw=b"Internal Server Error"),
    "garbage": Reply(raw=b"<html>maintenance</html>", headers={"Content-Type": "text/html"}),
    "429": Reply(status=429, raw=b"{}", headers={"Retry-After": "1"}),
}


class JudgeServer:
    """A server whose `mode` can change while it is asked; `port` 0: any."""

    def __init__(self, port: int = 0) -> None:
        self.mode: Mode = "up"
        # Requests that got no proper answer.
        self.failed = 0
        self.endpoint = Endpoint(self._answer, port=port).__enter__()
        self.url = self.endpoint.url
        self.port = int(self.endpoint.server.server_address[1])

    def set(self, mode: Mode) -> None:
        """From now on; for `flaky`, what was asked before does not count as a try."""
        if mode == "refuse" and self.mode != "refuse":
            self.endpoint.__exit__()
        if mode != "refuse" and self.mode == "refuse":
            self.endpoint = Endpoint(self._answer, port=self.port).__enter__()
        self.endpoint.asked.clear()
        self.mode = mode

    def set_for(self, mode: Mode, seconds: float) -> None:
        """From now on for so long, then up again."""
        self.set(mode)
        threading.Timer(seconds, self.set, args=("up",)).start()

    def close(self) -> None:
        """End the server."""
        self.set("refuse")

    def _answer(self, prompt: str, attempt: int) -> Reply:
        digest = hashlib.blake2b(prompt.encode(), digest_size=2).digest()
        broken = BROKEN.get(self.mode)
        if self.mode == "flaky" and attempt == 0 and digest[1] % 3 == 0:
            broken = BROKEN["garbage" if digest[1] % 2 else "500"]
        if broken is not None:
            self.failed += 1
            return broken
        harm = "violence" if digest[0] % 16 == 0 else "none"
        return Reply(json.dumps({"harm": harm, "quality": digest[0] % 10}))
