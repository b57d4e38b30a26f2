"""Shared fixtures: one private local Ray a session, and a fresh storage root a test."""

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import numpy as np
import pytest
import torch

from mesocosm.datasets.dataset import Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.store.artifacts import Storage

torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # what a script starts in its background ignores Ctrl-C, which tests send


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


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A private local Ray with four logical CPUs, ended with the session."""
    import ray

    from mesocosm.cluster import ray_session
    from mesocosm.config import RayConfig

    folder = tempfile.mkdtemp(prefix="mesoray-")
    ray_session.ensure(RayConfig(cpus=4), temp_dir=folder)
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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


def _cart_episodes(transitions: int) -> list[Episode]:
    """Random CartPole-v1 episodes, at least so many transitions; they terminate."""
    env = gymnasium.make("CartPole-v1")
    episodes: list[Episode] = []
    while sum(map(len, episodes)) < transitions:
        k = len(episodes)
        env.action_space.seed(k)
        observations, actions, rewards, done = [env.reset(seed=k)[0]], [], [], False
        while not done:
            actions.append(env.action_space.sample())
            observation, reward, done, _, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(float(reward))
        episodes.append(
            Episode(k, k, "random", observations, actions, np.array(rewards), "terminated")
        )
    return episodes


def _cart_root(folder: Path, transitions: int = 400, **options: Any) -> str:
    """A storage root that holds the dataset `cart`."""
    env = gymnasium.make("CartPole-v1")
    storage = Storage(str(folder / "root"))
    facts: dict[str, Any] = {
        "environment": Environment(id="CartPole-v1"),
        "observation_space": env.observation_space,
        "action_space": env.action_space,
    }
    facts |= options
    storage.make(
        "datasets",
        "cart",
        {},
        lambda to: (
            write_dataset(to, _cart_episodes(transitions), id="cart", seed=0, **facts) and None
        ),
    )
    return storage.root


@pytest.fixture(scope="session")
def cart_root() -> Callable[..., str]:
    """`cart_root(folder, transitions=400, **options of write_dataset)`"""
    return _cart_root
