"""A Ray cluster of this machine that wants a token, as `cluster up` would start one: a head with a
dashboard, on loopback, ended with its module.
"""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml


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
    token_file = base / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    folder = base / "user"
    (folder / "clusters").mkdir(parents=True)
    where = {
        "where": "address",
        "address": f"http://127.0.0.1:{dashboard}",
        "token_file": str(token_file),
        "storage_root": str(base / "root"),
    }
    for name, other in (("test", {}), ("wrong", {"token_file": str(base / "other")})):
        (folder / "clusters" / f"{name}.yaml").write_text(
            yaml.safe_dump(where | other | {"nodes": [{"name": "n", "cpus": 4}]})
        )
    (base / "other").touch(mode=0o600)
    (base / "other").write_text("not-the-token")
    auth = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "OMP_NUM_THREADS": "1",
    }
    ports = [
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
    ]
    local = [
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",
        f"--temp-dir=/tmp/mesoray-{gcs}",
    ]
    ray = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--num-cpus=4",
        "--object-store-memory=200000000",
    ]
    with open(base / "ray.log", "wb") as log:
        process = subprocess.Popen(
            [*ray, *ports, *local],
            env=os.environ | auth,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    cluster_ = Cluster(folder, base / "root", token, process, base / "home")
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < end, (
                base / "ray.log"
            ).read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/jobs/", timeout=5)
            except urllib.error.HTTPError as error:
                assert error.code == 401, "no token, no answer"
                break
            except OSError:
                time.sleep(0.5)
        yield cluster_
    finally:
        cluster_.end()
