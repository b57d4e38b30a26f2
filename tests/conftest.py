"""Shared fixtures: one private local Ray a session, and a fresh storage root a test."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a script starts in its background ignores Ctrl-C, which tests send


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A fresh storage root."""
    return str(tmp_path / "root")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A private local Ray with four logical CPUs, ended with the session."""
    import ray

    from mesocosm import cluster
    from mesocosm.config import RayConfig

    folder = tempfile.mkdtemp(prefix="mesoray-")
    cluster.ensure(RayConfig(cpus=4), temp_dir=folder)
    yield
    cluster.shutdown()
    assert not ray.is_initialized()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """A process group of this process, made once: DeepSpeed remembers its first and cannot do with a second."""
    import torch.distributed as dist

    from mesocosm.scaling.trunk import alone

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        alone("cpu")
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a bucket at an S3 endpoint of this module's own, on loopback."""
    from moto.server import ThreadedMotoServer

    from mesocosm.storage import Storage

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        Storage("s3://bucket").fs.makedirs("bucket", exist_ok=True)  # the servers of one process share their buckets
        yield "s3://bucket"
    server.stop()
