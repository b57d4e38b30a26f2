"""Cluster files, and a Ray cluster on loopback that wants a token, as `cluster up` starts one."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mesocosm.cluster import spec

Reader = Callable[..., spec.ClusterConfig]
NODES = """nodes:
  - {name: gpu, count: 4, min_count: 1, cpus: 8, gpus: 1, price_per_hour: 1, PART}
  - {name: head, cpus: 4, price_per_hour: 0.5, HEAD}
"""
LAUNCHER = (
    "where: launcher\naddress: http://127.0.0.1:8265\nimage: r/i:1\nregion: us-west-2\nami: ami-1\n"
    + NODES.replace("PART", "instance: g6.2xlarge, spot: true").replace(
        "HEAD", "instance: m7i.xlarge"
    )
)
KUBERAY = (
    "where: kuberay\naddress: http://127.0.0.1:8265\nimage: r/i:1\nstorage_root: s3://b/p\n"
    + NODES.replace("PART", "memory_gib: 26").replace("HEAD", "memory_gib: 12")
)


@pytest.fixture
def cluster_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Reads a text, with `old` replaced once by `new`, as the file of the cluster `mine`."""
    monkeypatch.setattr(spec, "FOLDERS", (tmp_path,))

    def read(text: str, old: str = "", new: str = "") -> spec.ClusterConfig:
        assert old in text, old
        (tmp_path / "mine.yaml").write_text(text.replace(old, new, 1))
        return spec.read("mine")

    return read


@dataclass
class Cluster:
    folder: Path
    """Where the user stands: it holds clusters/test.yaml"""
    root: Path
    """Its storage"""
    token: str
    process: subprocess.Popen[bytes]
    home: Path

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "MESOCOSM_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def mesocosm(self, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mesocosm", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout
        )

    def end(self) -> None:
        """End every process of the cluster; a head's children are of its own process group."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("c")
    token, (gcs, dashboard, agent, agent_grpc) = secrets.token_hex(32), free_ports(4)
    for name, text in (("token", token), ("other", "not-the-token")):
        (base / name).touch(mode=0o600)
        (base / name).write_text(text)
    folder = base / "user"
    (folder / "clusters").mkdir(parents=True)
    url = f"http://127.0.0.1:{dashboard}"
    for name, token_file in (("test", base / "token"), ("wrong", base / "other")):
        values = {"where": "address", "address": url, "token_file": str(token_file)}
        values |= {"storage_root": str(base / "root"), "nodes": [{"name": "n", "cpus": 4}]}
        (folder / "clusters" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(base / "token")}
    options = f"""start --head --block --disable-usage-stats --num-cpus=4
        --object-store-memory=200000000 --port={gcs} --dashboard-port={dashboard}
        --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc}
        --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --include-dashboard=true
        --temp-dir=/tmp/mesoray-{gcs}"""
    with open(base / "ray.log", "wb") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *options.split()],
            env=os.environ | auth | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    running = Cluster(folder, base / "root", token, process, base / "home")
    try:
        end = time.monotonic() + 120
        while True:
            starting = process.poll() is None and time.monotonic() < end
            assert starting, (base / "ray.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{url}/api/jobs/", timeout=5)
            except urllib.error.HTTPError as error:
                assert error.code == 401, "no token, no answer"
                break
            except OSError:
                time.sleep(0.5)
        yield running
    finally:
        running.end()
