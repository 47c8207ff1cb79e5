"""Fixtures that several test folders share."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before anything imports ray: no token asked of a local session, no metrics agent, no chatter.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """The one local Ray of a test session: two cores, no dashboard, shut down at the end."""
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _workers_can_load(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions and classes of a test module travel to Ray's workers, which cannot import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A local S3 server with the empty bucket `data`; skips where moto is not installed."""
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="data")
    yield f"{host}:{port}"
    server.stop()
