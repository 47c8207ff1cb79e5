"""Fetching an image by URL without letting a dataset reach into the network that we run in.

A URL in a dataset is a stranger's choice of where this machine connects. So the host is resolved
once, every address it has must be public, and the socket goes to exactly the address that was
checked: a name that resolves differently a moment later (DNS rebinding) gains nothing. Redirects
are followed by hand under the same rule. Proxies of the environment are not used, since they would
resolve the name themselves.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 5
USER_AGENT = "fifa-ray"
READ_BYTES = 65_536

# Public by number, yet the cloud's own: Azure's host agent.
_CLOUD_ADDRESSES = frozenset({ipaddress.ip_address("168.63.129.16")})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class UrlError(ValueError):
    """A URL that was not fetched. `reason` is a quarantine reason."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def is_url(ref: str) -> bool:
    """Whether an image reference is an http(s) URL."""
    return ref[:8].lower().startswith(("http://", "https://"))


def is_public_address(address: IPAddress) -> bool:
    """Whether an address belongs to the public internet, IPv4 carried inside IPv6 included."""
    if isinstance(address, ipaddress.IPv6Address):
        teredo = address.teredo
        inner = address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public_address(inner)
    return address.is_global and not address.is_multicast and address not in _CLOUD_ADDRESSES


def fetch_url(
    url: str,
    *,
    max_bytes: int,
    timeout_seconds: float,
    is_allowed: Callable[[IPAddress], bool] = is_public_address,
) -> bytes:
    """The body behind an http(s) URL, at most `max_bytes`, within `timeout_seconds` all in all.

    Raises UrlError with the reason `url_private_address` (the host, or that of a redirect, has an
    address that `is_allowed` refuses), `image_too_large` or `url_failed`.
    """
    deadline = time.monotonic() + timeout_seconds
    try:
        for _ in range(MAX_REDIRECTS + 1):
            answer = _get(url, max_bytes, deadline, is_allowed)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UrlError):
            raise
        raise UrlError("url_failed", f"{type(error).__name__}: {error}") from None
    raise UrlError("url_failed", f"more than {MAX_REDIRECTS} redirects")


def _get(
    url: str, max_bytes: int, deadline: float, is_allowed: Callable[[IPAddress], bool]
) -> bytes | str:
    """The body, or where to go next."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UrlError("url_failed", f"not an http(s) URL: {url[:200]!r}")
    connection = _GuardedConnection(parts.hostname, parts.port, parts.scheme, deadline, is_allowed)
    # A socket's own timeout starts anew with every byte; this one does not.
    alarm = threading.Timer(connection.seconds_left(), connection.cut)
    alarm.daemon = True
    alarm.start()
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            location = response.getheader("Location")
            if not location:
                raise UrlError("url_failed", f"HTTP {response.status} without a Location")
            return location
        if response.status != 200:
            raise UrlError("url_failed", f"HTTP {response.status}")
        return _read_body(response, connection, max_bytes)
    finally:
        alarm.cancel()
        connection.close()


def _read_body(
    response: http.client.HTTPResponse, connection: "_GuardedConnection", max_bytes: int
) -> bytes:
    if response.length is not None and response.length > max_bytes:
        raise UrlError("image_too_large", f"{response.length:,} bytes, allowed {max_bytes:,}")
    body = bytearray()
    while piece := response.read1(READ_BYTES):
        body += piece
        if len(body) > max_bytes:
            raise UrlError("image_too_large", f"more than {max_bytes:,} bytes")
    connection.seconds_left()  # The alarm looks like the end of the body.
    if response.length:
        raise UrlError("url_failed", f"cut short, {response.length:,} bytes missing")
    return bytes(body)


class _GuardedConnection(http.client.HTTPConnection):
    """Connects to an address that was checked, whatever the name resolves to later."""

    def __init__(
        self,
        host: str,
        port: int | None,
        scheme: str,
        deadline: float,
        is_allowed: Callable[[IPAddress], bool],
    ) -> None:
        super().__init__(host, port or (443 if scheme == "https" else 80))
        self.default_port = 443 if scheme == "https" else 80
        self.tls = scheme == "https"
        self.deadline, self.is_allowed = deadline, is_allowed
        # The socket; `sock` is None while the body of a response without a length is read.
        self.wire: socket.socket | None = None

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for *_, place in found:
            address = ipaddress.ip_address(str(place[0]).partition("%")[0])
            if not self.is_allowed(address):
                raise UrlError("url_private_address", f"{self.host} is at {address}")
        self.sock = self.wire = self._connect_first(found)
        if self.tls:
            context = ssl.create_default_context()
            self.sock = self.wire = context.wrap_socket(self.sock, server_hostname=self.host)

    def _connect_first(self, found: list[tuple]) -> socket.socket:
        failure: OSError = OSError("the host has no address")
        for family, kind, protocol, _, place in found:
            plain = socket.socket(family, kind, protocol)
            plain.settimeout(self.seconds_left())
            try:
                plain.connect(place)
                return plain
            except OSError as error:
                plain.close()
                failure = error
        raise failure

    def seconds_left(self) -> float:
        """Until the deadline. Raises UrlError when it has passed."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise UrlError("url_failed", "timed out")
        return seconds

    def cut(self) -> None:
        """End whatever is being read or written, from another thread."""
        with contextlib.suppress(OSError):
            if self.wire is not None:
                self.wire.shutdown(socket.SHUT_RDWR)
