"""Shared fixtures and the tiers of tests. Builders without a fixture are in factories.py.

A test without the marker `integration` or `slow` is a `unit` test: it starts no Ray and no server,
and takes less than about a second.
A test that uses a fixture of `STARTERS` is an `integration` test by itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers are nice otherwise, and wait while other tests compute.
os.environ.setdefault("RAY_worker_niceness", "0")

import browsers
import coin_grid
import factories
import pytest
import torch

from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig, RayConfig, TrackingConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.runs import mlflow_mirror
from mesocosm.store.artifacts import Storage

torch.set_num_threads(1)
# What a script starts in its background ignores Ctrl-C, and what nohup starts ignores SIGHUP. Tests
# send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MOTO = """
import os, sys, threading
from moto.server import main
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
main()
"""
"""A server that ends with the process that holds its standard input, however that one ends."""
STARTERS = {"ray_local", "one_rank", "s3_environment", "cluster", "lab"}
"""Fixtures that start Ray, a process group or a server."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier, and run longer tiers and files first: workers then end
    together.
    """
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        if not names & {"integration", "slow"}:
            starts = STARTERS & set(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.integration if starts else pytest.mark.unit)
    slowest: dict[Path, int] = {}
    for item in items:
        tier = 0 if item.get_closest_marker("slow") else 1
        tier = 2 if item.get_closest_marker("unit") else tier
        slowest[item.path] = min(slowest.get(item.path, 2), tier)
    counts = Counter((item.path, slowest[item.path]) for item in items)
    longest = {path: (tier, -count, path) for (path, tier), count in counts.items()}
    items.sort(key=lambda item: longest[item.path])


@pytest.fixture(autouse=True)
def unit_tests_start_no_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a unit test that starts Ray."""
    if request.node.get_closest_marker("unit") is None:
        yield
        return

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a unit test starts Ray; use the fixture ray_local or mark it integration")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_session, "ensure", fail)
        if "ray" in sys.modules:
            patch.setattr("ray.init", fail)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_idle_serve() -> Iterator[None]:
    """End Ray Serve after each file: its controller takes 4% of a core while nothing is served."""
    yield
    if "ray.serve" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray.serve"].shutdown()


@pytest.fixture(scope="session", autouse=True)
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy one empty MLflow database into each new root: MLflow takes seconds to create one."""
    template = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client_of, scheme = mlflow_mirror._client, "sqlite:///"

    def client(config: JobConfig) -> Any:
        uri = mlflow_mirror.uri_of(config)
        path = Path(uri.removeprefix(scheme))
        if uri.startswith(scheme) and path.parent.is_dir() and not path.exists():
            if not template.exists():
                client_of(JobConfig(tracking=TrackingConfig(uri=f"{scheme}{template}")))
            copy = path.with_suffix(f".{uuid.uuid4().hex}")
            shutil.copy(template, copy)
            copy.rename(path)
        return client_of(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_mirror, "_client", client)
        yield


@pytest.fixture(scope="session")
def golden() -> Any:
    """`golden.py` beside this file: digits that change only with a job's version."""
    spec = importlib.util.spec_from_file_location("golden", Path(__file__).parent / "golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A fresh storage root."""
    return str(tmp_path / "root")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The mark of the browsers that the test starts (`browsers.processes`)."""
    monkeypatch.setenv(browsers.MARK, str(tmp_path))
    return str(tmp_path)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A private local Ray with four logical CPUs, one in each process of pytest-xdist.

    It ends with the session, and not with a command that a test runs in this process.
    """
    import ray

    folder = tempfile.mkdtemp(prefix="mesoray-")
    ray_session.ensure(RayConfig(cpus=4), temp_dir=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_session, "shutdown", lambda: None)
        yield
    ray_session.shutdown()
    assert not ray.is_initialized()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """A process group of this process, made once: DeepSpeed remembers its first and cannot do with
    a second.
    """
    import torch.distributed as dist

    from mesocosm.scaling.trunk import single_rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        single_rank("cpu")
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """Environment variables that name an S3 endpoint: a moto_server in a process of its own, or
    what MESOCOSM_TEST_S3_ENDPOINT names.
    """
    named = os.environ.get("MESOCOSM_TEST_S3_ENDPOINT")
    if named:
        yield {"AWS_ENDPOINT_URL": named}
        return
    keys = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    port = factories.free_port()
    command = [sys.executable, "-c", MOTO, "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, **quiet)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None, "moto_server ended"
            time.sleep(0.1)
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys}
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def s3(s3_environment: dict[str, str]) -> Iterator[str]:
    """A root of this module's own in a bucket (MESOCOSM_TEST_S3_BUCKET, `bucket`) at a real S3
    endpoint; emptied afterwards.
    """
    bucket = os.environ.get("MESOCOSM_TEST_S3_BUCKET", "bucket")
    root = f"s3://{bucket}/mesocosm-tests-{uuid.uuid4().hex[:8]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        filesystem = Storage(root).fs
        filesystem.makedirs(bucket, exist_ok=True)
        yield root
        with suppress(FileNotFoundError):
            filesystem.rm(root, recursive=True)


@pytest.fixture(scope="session")
def cart_root() -> Callable[..., str]:
    """`cart_root(folder, transitions=400, **options of write_dataset)`"""
    return factories.cart_root


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 episodes of CoinGrid."""
    return coin_grid.coin_games(tmp_path_factory.mktemp("games"))


@pytest.fixture(scope="module")
def dictionary(games: Dataset) -> PatchDictionary:
    """The dictionary of their cells."""
    return coin_grid.cells(games)
