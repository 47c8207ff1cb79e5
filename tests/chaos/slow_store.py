"""A TCP proxy in front of an object store's server that answers late, or cuts connections."""

import contextlib
import random
import socket
import threading
import time


class SlowProxy:
    """Forwards 127.0.0.1:`port` to `target` ("host:port").

    Each piece that the server sends waits `delay` seconds; a connection is cut with probability
    `cuts`, drawn from `seed`.
    """

    def __init__(self, target: str, *, delay: float, cuts: float = 0.0, seed: int = 0) -> None:
        host, _, port = target.partition(":")
        self.target, self.delay, self.cuts = (host, int(port)), delay, cuts
        self.random = random.Random(seed)
        self.connections = self.cut = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = "{}:{}".format(*self.listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Refuse what comes from now on."""
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.random.random() < self.cuts:
                self.cut += 1
                client.close()
                continue
            server = socket.create_connection(self.target)
            for source, sink, delay in ((client, server, 0.0), (server, client, self.delay)):
                threading.Thread(target=_forward, args=(source, sink, delay), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, delay: float) -> None:
    try:
        while data := source.recv(1 << 20):
            time.sleep(delay)
            sink.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
