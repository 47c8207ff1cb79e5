"""Run directory and dataset on an object store that answers late, or cuts connections."""

import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from fifa_ray.run_dir import RunDir
from tests.chaos.scene import Scene

# The local S3 server takes any key.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def slow_store(delay: float, cuts: float) -> Callable[[Scene], Any]:
    """Run directory and dataset on S3, behind a proxy that is late and cuts connections."""

    @contextlib.contextmanager
    def prepare(scene: Scene) -> Iterator[None]:
        from moto.server import ThreadedMotoServer

        with mock.patch.dict(os.environ, CREDENTIALS):
            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
            server.start()
            host, port = server.get_host_and_port()
            proxy = SlowProxy(
                f"{host}:{port}", delay=delay, cuts=cuts, seed=scene.random.randrange(99)
            )
            bucket = "s3://chaos/{}?endpoint_override={}&scheme=http&region=us-east-1"
            direct = RunDir(bucket.format("", f"{host}:{port}") + "&allow_bucket_creation=true")
            direct.filesystem.create_dir("chaos")
            for file in sorted(scene.workload.data.glob("*.parquet")):
                with direct.filesystem.open_output_stream(f"chaos/data/{file.name}") as stream:
                    stream.write(file.read_bytes())
            scene.config["ingest"]["source"] = bucket.format("data", proxy.address)
            scene.config["run_dir"] = bucket.format("run", proxy.address)
            scene.result = bucket.format("run", f"{host}:{port}")
            try:
                yield
            finally:
                scene.notes.append(f"{proxy.connections:,} connections, {proxy.cut} cut")
                proxy.close()
                server.stop()

    return prepare


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
