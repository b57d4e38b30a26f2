"""A small loop whose processes are killed at random ends with the ids and digits of a calm one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesocosm.envs.ledger import Ledger
from mesocosm.store.artifacts import Storage

KILLS = 10
LONGEST_S = 600.0
"""No attempt takes longer: a job whose parts were killed goes on or ends, it does not hang."""
LOOP = """loop reality.env=CartPole-v1 reality.budget.steps=4000 rounds=2 collect.steps=400
    collect.workers=2 collect.lanes=2 explore.steps=200
    pretrain.model.family=ensemble pretrain.model.size=10k pretrain.model.members=2
    pretrain.model.base_steps=50 pretrain.model.head_steps=50 pretrain.train.steps=60
    pretrain.train.batch=16 pretrain.train.checkpoint_every=10 agent.backend=local
    agent.iterations=4 agent.num_envs=16 evaluate.episodes=2 evaluate.starts=8
    evaluate.samples=2 evaluate.horizons=[1,5] evaluate.full=false tracking.uri=none"""


def start(root: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mesocosm", *LOOP.split(), f"storage.root={root}"]
    with open(log, "ab") as file:
        file.write(b"\n==== start\n")
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The driver, and the processes of its Ray."""
    with suppress(psutil.NoSuchProcess):
        driver = psutil.Process(process.pid)
        return [driver, *driver.children(recursive=True)]
    return []


def victims(process: subprocess.Popen[bytes]) -> Iterator[tuple[str, psutil.Process]]:
    """The driver, busy workers, and the daemons of Ray, with their names."""
    for member in tree(process):
        with suppress(psutil.NoSuchProcess):
            line = " ".join(member.cmdline())
            program = Path(line.split()[0] if line else "").name
            if member.pid == process.pid:
                yield "driver", member
            elif line.startswith("ray::") and "IDLE" not in line and "Agent" not in line:
                yield line.split("(")[0].split()[0], member
            elif program in ("raylet", "gcs_server"):
                yield program, member


def artifacts(root: str) -> dict[str, dict[str, Any]]:
    """Every artifact's COMMIT.json, by kind/id."""
    return {
        f"{path.parts[-3]}/{path.parts[-2]}": json.loads(path.read_text())
        for path in Path(root).glob("*/*/COMMIT.json")
    }


def digits(root: str) -> dict[str, Any]:
    """What kills must not change: bytes of data and policies, digits of losses and returns."""
    result: dict[str, Any] = {}
    for name, commit in artifacts(root).items():
        files = {file: entry["sha256"] for file, entry in commit["files"].items()}
        kind, id = name.split("/")
        if kind == "datasets":
            result[name] = files
        elif kind == "worlds":
            speeds = ("mfu", "positions", "transitions")
            metrics = commit["meta"]["metrics"].items()
            result[name] = {key: value for key, value in metrics if not key.startswith(speeds)}
        elif kind == "agents":
            result[name] = files["policy.safetensors"]
        else:
            summary = json.loads((Path(root) / kind / id / "summary.json").read_text())
            points = [p["returns"] for c in summary["curves"]["world"] for p in c["points"]]
            result[name] = [points, summary["losses"]]
    return result


class Chaos:
    """Kills on a seeded schedule, of one loop after the other."""

    def __init__(self, kills: int) -> None:
        self.left, self.killed, self.attempts = kills, list[str](), 0
        self._dice = random.Random(0)

    def loop(self, root: str, log: Path) -> None:
        """Run a loop again and again until it ends, and kill its processes meanwhile."""
        process, since, attempts = start(root, log), time.monotonic(), 1
        while True:
            pause = self._dice.uniform(2, 25) if self.left else LONGEST_S
            with suppress(subprocess.TimeoutExpired):
                process.wait(pause)
            if process.poll() is None:
                hangs = f"hangs after {self.killed[-3:]}: {log.read_text()[-3000:]}"
                assert time.monotonic() - since < LONGEST_S, hangs
                self._kill(process, log)
                continue
            assert process.returncode in (0, 1, -signal.SIGKILL), log.read_text()[-3000:]
            if process.returncode == 0:
                self.attempts += attempts
                return
            attempts += 1
            assert attempts < 4 * KILLS, log.read_text()[-3000:]
            process, since = start(root, log), time.monotonic()

    def _kill(self, process: subprocess.Popen[bytes], log: Path) -> None:
        choices = list(victims(process))
        if not self.left or not choices:
            return
        working = [choice for choice in choices if choice[0].startswith("ray::")]
        prefer_workers = bool(working) and self._dice.random() < 0.5
        name, victim = self._dice.choice(working if prefer_workers else choices)
        workers = [worker for _, worker in working] if name == "driver" else []
        with suppress(psutil.NoSuchProcess):
            victim.kill()
            self.left -= 1
            self.killed.append(name)
        with log.open("a") as file:
            file.write(f"\n==== killed {name}\n")
        psutil.wait_procs(workers, timeout=60)  # they go when their driver is gone


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_loop_whose_processes_are_killed_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Loops are run until all kills are dealt."""
    calm, log = str(tmp_path / "calm"), tmp_path / "log"
    assert start(calm, log).wait(1800) == 0, log.read_text()[-3000:]
    expected, chaos, loops = digits(calm), Chaos(KILLS), 0
    while chaos.left:
        loops += 1
        wild = str(tmp_path / f"wild{loops}")
        chaos.loop(wild, log)
        assert digits(wild) == expected
        check_ledger(wild)
    counts = ", ".join(f"{n} {name}" for name, n in Counter(chaos.killed).most_common())
    print(f"{KILLS} kills ({counts}) of {loops} loops in {chaos.attempts} attempts")


def check_ledger(root: str) -> None:
    """Every confirmed step has its transition, and no process holds a lease."""
    for name, commit in artifacts(root).items():
        if name.startswith("datasets/"):
            counts = commit["meta"]["counts"]
            assert counts["steps"] == counts["transitions"] + counts["dropped_steps"]
    (ledger,) = (name for name in Storage(root).list("ledgers") if name.startswith("loop-"))
    totals = Ledger(Storage(root), ledger).totals().purposes["collect"]
    assert totals.steps - totals.unconfirmed_steps == 600
    assert not [name for name in os.listdir(Path(root) / "leases") if name.endswith(".json")]
