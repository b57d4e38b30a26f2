"""A Ray cluster of several nodes on one machine, isolated like separate machines.

A node is a process tree in its own network, PID, mount and UTS namespaces: an address on a bridge,
a loopback, a host name, a disk, and an init whose death ends everything in it. The bridge is in
another set of namespaces, the hub, with the user's terminal, storage and MLflow. Everything ends
with the process that made it.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

NETWORK = "10.77.0"
HUB = f"{NETWORK}.1"
HEAD = f"{NETWORK}.2"
PORT, DASHBOARD = 6379, 8265
STARTED = "Ray runtime started."
PATIENCE = 900.0
"""Seconds that a cluster may take to start."""
DISK, TMP = "/srv", "/srv/tmp"
"""Each place's own folder and its temporary files, at a path that any Linux has."""
BIN = Path(sys.executable).parent
RELAY = """
import asyncio, sys

async def pump(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def relay(reader, writer):
    try:
        remote = await asyncio.open_connection(sys.argv[2], int(sys.argv[1]))
    except OSError:
        return writer.close()
    await asyncio.gather(pump(reader, remote[1]), pump(remote[0], writer))

async def main():
    async with await asyncio.start_server(relay, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(main())
"""
"""The near end of a tunnel to the head's dashboard: a port of loopback, passed on."""
ALIVE = """
import ray
ray.init("auto", log_to_driver=False)
print("ALIVE", sum(node["Alive"] for node in ray.nodes()))
"""


def permitted() -> bool:
    """True if this machine lets us make namespaces."""
    command = "unshare --net --pid --fork --mount-proc ip link set lo up"
    try:
        return subprocess.run(command.split(), capture_output=True).returncode == 0
    except OSError:
        return False


class Place:
    """A set of namespaces, and the processes in them."""

    def __init__(self, base: Path, name: str, address: str, names: str = ""):
        self.name, self.address = name, address
        self._folder = folder = base / name
        (folder / "disk" / "tmp").mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n{names}")
        script = (
            f"hostname {name} && mount --bind {folder}/hosts /etc/hosts && mount --bind"
            f" {folder}/disk {DISK} && mount -t tmpfs shm /dev/shm && "
            # A shell that waits reaps orphans.
            "ip link set lo up && echo ready && while :; do sleep 5; done"
        )
        isolated = """setpriv --pdeathsig KILL unshare --net --pid --uts --mount --fork --kill-child
            --mount-proc bash -c"""
        command = [*isolated.split(), script]
        self._keeper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "ready\n", f"{name} did not start"
        self.init = psutil.Process(self._keeper.pid).children()[0].pid

    def command(self, *command: str, folder: Path | None = None) -> list[str]:
        """`command`, to be run in the namespaces, in `folder` or the current one."""
        enter = f"nsenter --target {self.init} --net --pid --uts --mount"
        return [*enter.split(), f"--wdns={folder or os.getcwd()}", *command]

    def ip(self, command: str) -> None:
        """`ip COMMAND` in its network; processes are numbered as outside."""
        words = f"nsenter --target {self.init} --net ip {command}".split()
        subprocess.run(words, check=True, capture_output=True, timeout=60)

    def start(self, *command: str, env: dict[str, str], log: str) -> subprocess.Popen[bytes]:
        with open(self._folder / f"{log}.log", "ab") as file:
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            return subprocess.Popen(self.command(*command), env=env, **streams)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def pids(self, prefix: str) -> list[int]:
        """The processes here whose program, or the title that it gave itself, begins with this."""
        namespace = os.stat(f"/proc/{self.init}/ns/pid").st_ino
        pids = []
        for process in psutil.process_iter(["cmdline"]):
            program = Path((process.info["cmdline"] or [""])[0]).name
            with suppress(OSError):
                inside = os.stat(f"/proc/{process.pid}/ns/pid").st_ino == namespace
                if program.startswith(prefix) and inside:
                    pids.append(process.pid)
        return pids

    def end(self) -> None:
        """End the place and everything in it."""
        self._keeper.kill()  # its child dies with it, and then the namespaces
        self._keeper.wait(30)


@dataclass
class Lab:
    """The hub, and a Ray of several nodes."""

    base: Path
    env: dict[str, str]
    """Credentials that every node has beside the token"""
    hub: Place
    token: str
    nodes: dict[str, Place] = field(default_factory=dict)
    tracking_uri: str | None = None
    places: list[Place] = field(default_factory=list)
    """On the bridge, dead nodes included"""

    @staticmethod
    def make(base: Path, env: dict[str, str]) -> Lab:
        hub = Place(base, "hub", HUB)
        for command in ("link add br0 type bridge", f"addr add {HUB}/24 dev br0"):
            hub.ip(command)
        hub.ip("link set br0 up")
        lab = Lab(base, env, hub, secrets.token_hex(32))
        lab.token_file.touch(mode=0o600)
        lab.token_file.write_text(lab.token)
        return lab

    @property
    def token_file(self) -> Path:
        return self.base / "token"

    @property
    def user(self) -> Path:
        """The user's current folder."""
        return self.base / "user"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of everybody, without secrets."""
        secret = ("RAY_", "AWS_", "MESOCOSM_")
        clean = {name: text for name, text in os.environ.items() if not name.startswith(secret)}
        return clean | {
            "OMP_NUM_THREADS": "1",
            "TMPDIR": TMP,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    @property
    def node_env(self) -> dict[str, str]:
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
        return self.environment | auth | self.env

    def place(self, name: str) -> Place:
        """A new place on the bridge."""
        number = len(self.places) + 1
        address, pair = f"{NETWORK}.{number + 1}", f"v{number}"
        unique = name if name == "head" else f"{name}{number}"
        place = Place(self.base, unique, address, f"{HEAD} head\n")
        self.places.append(place)
        self.hub.ip(f"link add {pair} type veth peer name eth0 netns {place.init}")
        self.hub.ip(f"link set {pair} master br0")
        self.hub.ip(f"link set {pair} up")
        place.ip(f"addr add {address}/24 dev eth0")
        place.ip("link set eth0 up")
        place.ip(f"route add default via {HUB}")
        return place

    def add(self, name: str, *options: str) -> Place:
        """A node with one CPU; the first is the head."""
        head = not self.nodes
        place = self.place("head" if head else name)
        command = f"""{BIN}/ray start --block --disable-usage-stats --num-cpus=1
            --node-ip-address={place.address} --object-store-memory=80000000"""
        if head:
            command += f""" --head --port={PORT} --dashboard-host={place.address}
                --dashboard-port={DASHBOARD} --temp-dir={DISK}/ray"""
            relay = (sys.executable, "-c", RELAY, str(DASHBOARD), place.address)
            self.hub.start(*relay, env=self.environment, log="relay")
        else:
            command += f" --address={HEAD}:{PORT}"
        words, end = [*command.split(), *options], time.monotonic() + PATIENCE
        process = place.start(*words, env=self.node_env, log="ray")
        while STARTED not in place.log("ray"):
            assert time.monotonic() < end, place.log("ray")
            if process.poll() is not None:  # Ray gives a node 30 s, too few on a busy machine
                process = place.start(*words, env=self.node_env, log="ray")
            time.sleep(0.5)
        self.nodes[place.name] = place
        return place

    def add_nodes(self, count: int) -> None:
        """Add nodes, and wait until the head counts all."""
        for _ in range(count):
            self.add("node")
        until(lambda: self.alive() == len(self.nodes), "all nodes", PATIENCE)

    def alive(self) -> int:
        """How many nodes the head counts; 0 if it does not answer yet."""
        command = self.nodes["head"].command(sys.executable, "-c", ALIVE)
        streams: Any = {"capture_output": True, "text": True, "timeout": PATIENCE}
        done = subprocess.run(command, env=self.node_env, **streams)
        return int(done.stdout.partition("ALIVE")[2] or 0)

    def cluster(self, name: str, storage_root: str, **group: int) -> None:
        """Write the user's clusters/NAME.yaml, of three nodes unless `group` differs."""
        values: dict[str, Any] = {
            "where": "address",
            "address": f"http://127.0.0.1:{DASHBOARD}",
            "token_file": str(self.token_file),
            "storage_root": storage_root,
            "nodes": [{"name": "n", "count": 3, "cpus": 1} | group],
        }
        values |= {"tracking_uri": self.tracking_uri} if self.tracking_uri else {}
        (self.user / "clusters").mkdir(parents=True, exist_ok=True)
        (self.user / "clusters" / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def mesocosm(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """`mesocosm ARGUMENTS` in the user's terminal: in the hub, without credentials."""
        home = self.base / "home"
        env = self.environment | {"HOME": str(home), "MESOCOSM_HOME": str(home / ".mesocosm")}
        command = (sys.executable, "-m", "mesocosm", *arguments)
        return subprocess.run(
            self.hub.command(*command, folder=self.user),
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def report(self, *arguments: str) -> Any:
        """The --json output of a command that must succeed."""
        done = self.mesocosm(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def end(self) -> None:
        for place in [*self.places, self.hub]:
            place.end()


@contextmanager
def running(base: Path, env: dict[str, str] | None = None) -> Iterator[Lab]:
    """A lab without nodes, whose logs are printed at its end. Skips where it is not permitted."""
    if not permitted():
        pytest.skip("network and PID namespaces are not permitted: run as root or CAP_SYS_ADMIN")
    lab = Lab.make(base, env or {})
    try:
        yield lab
    finally:
        for place in lab.nodes.values():
            print(f"--- {place.name}\n{place.log('ray')[-3000:]}")
        lab.end()


def until(condition: Callable[[], Any], name: str, timeout: float = 400) -> Any:
    """The result of `condition` as soon as it is true."""
    end = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < end, f"{name} did not come in {timeout} s"
        time.sleep(0.2)
    return result
