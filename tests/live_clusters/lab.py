"""A Ray cluster of several nodes on one machine, each as apart from the others as a machine of its
own.

A node is a process tree in its own network, PID, mount and UTS namespaces: an address on a bridge,
a loopback, a host name, a disk, and an init whose death ends everything in it. The bridge lies in
one more such place, the hub, where the user's terminal, storage and MLflow are. Nothing is made in
the machine's own namespaces, and all of it dies with the process that made it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

NETWORK = "10.77.0"
HUB = f"{NETWORK}.1"
HEAD = f"{NETWORK}.2"
PORT, DASHBOARD = 6379, 8265
STARTED = "Ray runtime started."
PATIENCE = 900.0
"""Seconds that a cluster may take to start."""
DISK, TMP = "/srv", "/srv/tmp"
"""What every place calls its own folder, with Ray's files and temporary ones; a folder that any
Linux has, so that none need be made.
"""
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
        there = await asyncio.open_connection(sys.argv[2], int(sys.argv[1]))
    except OSError:
        return writer.close()
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

async def main():
    async with await asyncio.start_server(relay, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(main())
"""
"""The near end of a tunnel to the head's dashboard: a port of loopback, passed on."""


def permitted() -> bool:
    """Whether this machine lets us make namespaces."""
    try:
        return not subprocess.run(
            [
                "unshare",
                "--net",
                "--pid",
                "--fork",
                "--mount-proc",
                "ip",
                "link",
                "set",
                "lo",
                "up",
            ],
            capture_output=True,
        ).returncode
    except OSError:
        return False


class Place:
    """Namespaces of their own, and the processes in them."""

    def __init__(self, base: Path, name: str, address: str, names: str = ""):
        self.name, self.address = name, address
        self._own = base / name
        (self._own / "disk" / "tmp").mkdir(parents=True, exist_ok=True)
        (self._own / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n{names}")
        script = (
            f"hostname {name} && mount --bind {self._own}/hosts /etc/hosts && mount --bind"
            f" {self._own}/disk {DISK} && mount -t tmpfs shm /dev/shm && "
            # A shell that waits reaps orphans.
            "ip link set lo up && echo ready && while :; do sleep 5; done"
        )
        apart = [
            "unshare",
            "--net",
            "--pid",
            "--uts",
            "--mount",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            script,
        ]
        self._keeper = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *apart], stdout=subprocess.PIPE, text=True
        )
        assert self._keeper.stdout is not None and self._keeper.stdout.readline() == "ready\n", (
            f"{name} did not start"
        )
        self.init = psutil.Process(self._keeper.pid).children()[0].pid

    def command(self, *command: str) -> list[str]:
        """`command`, to be run there."""
        return [
            "nsenter",
            "--target",
            str(self.init),
            "--net",
            "--pid",
            "--uts",
            "--mount",
            f"--wdns={os.getcwd()}",
            *command,
        ]

    def ip(self, command: str) -> None:
        """`ip COMMAND` in its network; processes are numbered as outside."""
        subprocess.run(
            ["nsenter", "--target", str(self.init), "--net", "ip", *command.split()],
            check=True,
            capture_output=True,
            timeout=60,
        )

    def start(
        self, *command: str, env: dict[str, str], log: str | None = None
    ) -> subprocess.Popen[bytes]:
        with open(self._own / f"{log or Path(command[0]).name}.log", "ab") as file:
            return subprocess.Popen(
                self.command(*command), env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def said(self, log: str) -> str:
        return (self._own / f"{log}.log").read_text()

    def pids(self, of: str) -> list[int]:
        """Of the processes there whose command line begins with `of`, of a program or of a title
        that it gave itself.
        """
        there = os.stat(f"/proc/{self.init}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                if (
                    Path((process.info["cmdline"] or [""])[0]).name.startswith(of)
                    and os.stat(f"/proc/{process.pid}/ns/pid").st_ino == there
                ):
                    found.append(process.pid)
            except OSError:
                continue
        return found

    def end(self) -> None:
        """The place and all that runs there."""
        self._keeper.kill()  # takes its child with it, and that its namespaces
        self._keeper.wait(30)


@dataclass
class Lab:
    """The hub, and a Ray of several nodes."""

    base: Path
    env: dict[str, str]
    """Of every node, beside the token: what credentials they have"""
    hub: Place
    token: str
    nodes: dict[str, Place] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    """On the bridge, dead nodes included"""

    @staticmethod
    def make(base: Path, env: dict[str, str] | None = None) -> Lab:
        hub = Place(base, "hub", HUB)
        for command in (
            "link add br0 type bridge",
            f"addr add {HUB}/24 dev br0",
            "link set br0 up",
        ):
            hub.ip(command)
        made = Lab(base, dict(env or {}), hub, secrets.token_hex(32))
        made.token_file.touch(mode=0o600)
        made.token_file.write_text(made.token)
        return made

    @property
    def token_file(self) -> Path:
        return self.base / "token"

    @property
    def user(self) -> Path:
        """Where the user stands."""
        return self.base / "user"

    @property
    def environment(self) -> dict[str, str]:
        """Of everybody: no secret."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "AWS_", "MESOCOSM_"))
        }
        return clean | {
            "OMP_NUM_THREADS": "1",
            "TMPDIR": TMP,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    @property
    def node_env(self) -> dict[str, str]:
        return (
            self.environment
            | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
            | self.env
        )

    def place(self, name: str) -> Place:
        """A new place on the bridge."""
        number = len(self.places) + 1
        address, pair = f"{NETWORK}.{number + 1}", f"v{number}"
        place = Place(
            self.base, name if name == "head" else f"{name}{number}", address, f"{HEAD} head\n"
        )
        self.places.append(place)
        for command in (
            f"link add {pair} type veth peer name eth0 netns {place.init}",
            f"link set {pair} master br0",
            f"link set {pair} up",
        ):
            self.hub.ip(command)
        for command in (
            f"addr add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {HUB}",
        ):
            place.ip(command)
        return place

    def add(self, name: str, *options: str, cpus: int = 1) -> Place:
        """A node; the first is the head."""
        head = not self.nodes
        place = self.place("head" if head else name)
        command = [
            str(BIN / "ray"),
            "start",
            "--block",
            "--disable-usage-stats",
            f"--node-ip-address={place.address}",
            f"--num-cpus={cpus}",
        ]
        command += ["--object-store-memory=80000000", *options]
        if head:
            command += [
                "--head",
                f"--port={PORT}",
                f"--dashboard-host={place.address}",
                f"--dashboard-port={DASHBOARD}",
                f"--temp-dir={DISK}/ray",
            ]
            self.hub.start(
                sys.executable,
                "-c",
                RELAY,
                str(DASHBOARD),
                place.address,
                env=self.environment,
                log="relay",
            )
        else:
            command += [f"--address={HEAD}:{PORT}"]
        end = time.monotonic() + PATIENCE
        process = place.start(*command, env=self.node_env, log="ray")
        while STARTED not in place.said("ray"):
            assert time.monotonic() < end, place.said("ray")
            if (
                process.poll() is not None
            ):  # Ray gives a node 30 s, which on a loaded machine are not enough
                process = place.start(*command, env=self.node_env, log="ray")
            time.sleep(0.5)
        self.nodes[place.name] = place
        return place

    def ready(self, timeout: float = PATIENCE) -> None:
        """Wait until the head counts every node."""
        head, end = next(iter(self.nodes.values())), time.monotonic() + timeout
        code = (
            "import ray; ray.init('auto', log_to_driver=False); print('ALIVE', sum(n['Alive'] for n"
            " in ray.nodes()))"
        )
        while True:
            done = subprocess.run(
                head.command(sys.executable, "-c", code),
                env=self.node_env,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            if f"ALIVE {len(self.nodes)}" in done.stdout:
                return
            assert time.monotonic() < end, f"{done.stdout} {done.stderr[-500:]}\n" + logs(
                list(self.nodes.values())
            )
            time.sleep(1)

    def cluster(
        self,
        name: str,
        storage_root: str,
        tracking_uri: str | None = None,
        count: int = 3,
        min_count: int | None = None,
    ) -> None:
        """Write clusters/NAME.yaml where the user stands."""
        where = {
            "where": "address",
            "address": f"http://127.0.0.1:{DASHBOARD}",
            "token_file": str(self.token_file),
            "storage_root": storage_root,
        }
        where |= {"tracking_uri": tracking_uri} if tracking_uri else {}
        group = {"name": "n", "count": count, "cpus": 1} | (
            {} if min_count is None else {"min_count": min_count}
        )
        (self.user / "clusters").mkdir(parents=True, exist_ok=True)
        (self.user / "clusters" / f"{name}.yaml").write_text(
            yaml.safe_dump(where | {"nodes": [group]})
        )

    def terminal(
        self, *arguments: str, cwd: Path | None = None, **env: str
    ) -> subprocess.Popen[str]:
        """`mesocosm ARGUMENTS` where the user is: in the hub, with no credentials."""
        own = {
            "HOME": str(self.base / "home"),
            "MESOCOSM_HOME": str(self.base / "home" / ".mesocosm"),
        } | env
        command = self.hub.command(sys.executable, "-m", "mesocosm", *arguments)
        command = [
            part if not part.startswith("--wdns=") else f"--wdns={cwd or self.user}"
            for part in command
        ]
        return subprocess.Popen(
            command,
            env=self.environment | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def mesocosm(
        self, *arguments: str, timeout: float = 600, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.terminal(*arguments, cwd=cwd, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def end(self) -> None:
        for place in [*self.places, self.hub]:
            place.end()


def logs(places: Sequence[Place]) -> str:
    return "\n".join(f"--- {place.name}\n{place.said('ray')[-3000:]}" for place in places)


def until(what: Callable[[], Any], said: str, timeout: float = 400) -> Any:
    """What `what` gives as soon as it is true."""
    end = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < end, f"{said} did not come in {timeout} s"
        time.sleep(0.2)
    return found
