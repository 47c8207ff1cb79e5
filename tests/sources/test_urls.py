"""Fetching URLs: which addresses are refused, on redirects and after rebinding too."""

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from fifa_ray.sources.urls import UrlError, fetch_url, is_public_address

BODY = b"image bytes" * 1000
LOOPBACK = ipaddress.ip_address("127.0.0.1")


class Handler(BaseHTTPRequestHandler):
    """Answers by path; remembers what was asked."""

    asked: ClassVar[list[str]] = []
    dripped: ClassVar[int] = 0

    def do_GET(self) -> None:
        Handler.asked.append(self.path)
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", rest.replace("PORT", str(self.server.server_port)))
            self.end_headers()
        elif kind == "slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if rest == "body" else b"X-Slow: "))
            with contextlib.suppress(OSError):  # The client hangs up.
                for Handler.dripped in range(50):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
        elif kind == "image":
            self.send_response(200)
            if rest != "unsized":
                self.send_header("Content-Length", str(len(BODY) + (5 if rest == "short" else 0)))
            self.end_headers()
            self.wfile.write(BODY)
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a server on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield http_server.server_port
        http_server.shutdown()


def fetch(url: str, max_bytes: int = 1_000_000, timeout_seconds: float = 5.0) -> bytes:
    """Fetch as if 127.0.0.1, and no other loopback address, were public."""
    return fetch_url(
        url,
        max_bytes=max_bytes,
        timeout_seconds=timeout_seconds,
        is_allowed=lambda address: address == LOOPBACK,
    )


def reason_of(call: Callable[[], bytes]) -> str:
    with pytest.raises(UrlError) as error:
        call()
    return error.value.reason


def fetch_for_real(url: str) -> bytes:
    return fetch_url(url, max_bytes=1000, timeout_seconds=5.0)


def test_a_body_is_fetched_through_redirects(server: int) -> None:
    assert fetch(f"http://127.0.0.1:{server}/image/1") == BODY
    assert fetch(f"http://127.0.0.1:{server}/image/unsized") == BODY
    assert fetch(f"http://127.0.0.1:{server}/redirect//image/1") == BODY


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "2130706433",  # 127.0.0.1 as one number
        "0x7f.1",
        "127.1",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",  # the metadata service of most clouds
        "100.100.100.200",  # of one more
        "168.63.129.16",
        "[fd00:ec2::254]",
        "[64:ff9b::7f00:1]",  # loopback through NAT64
        "[2002:7f00:1::]",  # and through 6to4
        "224.0.0.1",
    ],
)
def test_private_addresses_are_refused_however_they_are_written(server: int, host: str) -> None:
    Handler.asked.clear()
    reason = reason_of(lambda: fetch_for_real(f"http://{host}:{server}/image/1"))
    # A notation that this system does not resolve at all is a failure, never a fetch.
    assert reason == "url_private_address" or (host[:1] in "02[" and reason == "url_failed")
    assert not Handler.asked


def test_public_addresses_are_allowed() -> None:
    for address in ("1.1.1.1", "2606:4700:4700::1111", "64:ff9b::101:101"):
        assert is_public_address(ipaddress.ip_address(address)), address


def test_a_redirect_to_another_address_is_refused(server: int) -> None:
    Handler.asked.clear()
    url = f"http://127.0.0.1:{server}/redirect/http://127.0.0.2:PORT/image/secret"
    assert reason_of(lambda: fetch(url)) == "url_private_address"
    assert Handler.asked == ["/redirect/http://127.0.0.2:PORT/image/secret"]


def test_a_redirect_to_another_scheme_is_refused(server: int) -> None:
    url = f"http://127.0.0.1:{server}/redirect/file:///etc/passwd"
    assert reason_of(lambda: fetch(url)) == "url_failed"


def test_the_address_that_was_checked_is_the_one_connected_to(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the name is public when asked first, loopback afterwards."""
    Handler.asked.clear()
    lookups: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        lookups.append(host)
        address = "192.0.2.1" if len(lookups) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected: list[str] = []

    def connect(_: socket.socket, place: tuple[str, int]) -> None:
        connected.append(place[0])
        raise OSError("nobody there")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    reason = reason_of(
        lambda: fetch_url(
            f"http://rebind.example:{server}/image/1",
            max_bytes=1000,
            timeout_seconds=5.0,
            is_allowed=lambda address: address != LOOPBACK,
        )
    )
    assert reason == "url_failed"
    assert lookups == ["rebind.example"]
    assert connected == ["192.0.2.1"]


def test_one_private_address_among_several_is_enough(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("1.1.1.1", "127.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert reason_of(lambda: fetch_for_real("http://two.example/1.png")) == "url_private_address"


def test_sizes_are_limited_with_and_without_a_content_length(server: int) -> None:
    for path in ("image/1", "image/unsized"):
        url = f"http://127.0.0.1:{server}/{path}"
        assert reason_of(lambda url=url: fetch(url, max_bytes=100)) == "image_too_large"


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_drips_bytes_is_cut_off(server: int, part: str) -> None:
    url = f"http://127.0.0.1:{server}/slow/{part}"
    # Unhindered, the 50 bytes would arrive in the end.
    with pytest.raises(UrlError, match=r"url_failed"):
        fetch(url, timeout_seconds=0.5)
    assert Handler.dripped < 25


def test_failures_have_one_reason(server: int) -> None:
    base = f"http://127.0.0.1:{server}"
    loop = f"{base}/redirect/" + "redirect/" * 10
    for url in (f"{base}/none", f"{base}/image/short", loop, "http://", "ftp://127.0.0.1/x"):
        assert reason_of(lambda url=url: fetch(url)) == "url_failed", url
