"""A small loop whose processes are killed at random: run again, it ends with the ids and digits of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesocosm.reality.ledger import Ledger
from mesocosm.storage import Storage

KILLS = 30
LONGEST_S = 600.0
"""No attempt takes longer than this: a job whose parts were killed goes on or ends, it does not hang."""
LOOP = [
    "loop",
    "reality.env=CartPole-v1",
    "reality.budget.steps=4000",
    "rounds=2",
    "collect.steps=400",
    "collect.workers=2",
    "collect.lanes=2",
    "explore.steps=200",
    "pretrain.model.family=ensemble",
    "pretrain.model.size=10k",
    "pretrain.model.members=2",
    "pretrain.model.base_steps=50",
    "pretrain.train.steps=60",
    "pretrain.train.batch=16",
    "pretrain.train.checkpoint_every=10",
    "agent.backend=local",
    "agent.iterations=4",
    "agent.num_envs=16",
    "evaluate.episodes=2",
    "evaluate.starts=8",
    "evaluate.samples=2",
    "evaluate.horizons=[1,5]",
    "evaluate.full=false",
]


def start(root: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mesocosm.cli", *LOOP, f"storage.root={root}"]
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
    """What may be killed: the driver, workers that work, and the daemons of Ray."""
    for one in tree(process):
        with suppress(psutil.NoSuchProcess):
            line = " ".join(one.cmdline())
            if one.pid == process.pid:
                yield "driver", one
            elif line.startswith("ray::") and "IDLE" not in line:
                yield line.split("(")[0].split()[0], one
            elif Path(line.split()[0] if line else "").name in ("raylet", "gcs_server"):
                yield Path(line.split()[0]).name, one


def end(process: subprocess.Popen[bytes]) -> None:
    """End what an attempt has left, which Ray does by itself within a while."""
    for one in tree(process)[1:]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def artifacts(root: str) -> dict[str, dict[str, Any]]:
    """Every artifact's COMMIT.json, by kind/id."""
    return {f"{path.parts[-3]}/{path.parts[-2]}": json.loads(path.read_text()) for path in Path(root).glob("*/*/COMMIT.json")}


def digits(root: str) -> dict[str, Any]:
    """What may not depend on kills: data and policies to the byte, losses and returns to the last digit."""
    result: dict[str, Any] = {}
    for name, commit in artifacts(root).items():
        files = {file: entry["sha256"] for file, entry in commit["files"].items()}
        kind, id = name.split("/")
        if kind == "datasets":
            result[name] = files
        elif kind == "worlds":
            metrics = commit["meta"]["metrics"]
            result[name] = {k: v for k, v in metrics.items() if not k.startswith(("mfu", "positions", "transitions"))}
        elif kind == "agents":
            result[name] = files["policy.safetensors"]
        else:
            summary = json.loads((Path(root) / kind / id / "summary.json").read_text())
            points = [p["returns"] for c in summary["curves"]["world"] for p in c["points"]]
            result[name] = [points, summary["losses"]]
    return result


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_loop_whose_processes_are_killed_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    calm, wild = str(tmp_path / "calm"), str(tmp_path / "wild")
    assert start(calm, tmp_path / "calm.log").wait(1800) == 0, (tmp_path / "calm.log").read_text()[-3000:]
    dice, kills, attempts = random.Random(0), list[str](), 0
    log = tmp_path / "wild.log"
    process, since, done = start(wild, log), time.monotonic(), False
    while not done or len(kills) < KILLS:
        if done:  # it came through before all kills were dealt: once more, from nothing but its ledger
            pytest.fail(f"only {len(kills)} kills before the end: {kills}")
        pause = dice.uniform(2, 30) if len(kills) < KILLS else LONGEST_S
        with suppress(subprocess.TimeoutExpired):
            process.wait(pause)
        if process.poll() is not None:
            attempts += 1
            assert process.returncode in (0, 1, -signal.SIGKILL), log.read_text()[-3000:]
            done = process.returncode == 0
            if not done:
                assert attempts < 4 * KILLS
                process, since = start(wild, log), time.monotonic()
            continue
        assert time.monotonic() - since < LONGEST_S, f"hangs after {kills[-3:]}: " + log.read_text()[-3000:]
        if len(kills) < KILLS and (choices := list(victims(process))):
            name, victim = dice.choice(choices)
            children = tree(process)[1:] if name == "driver" else []
            with suppress(psutil.NoSuchProcess):
                victim.kill()
                kills.append(name)
            with log.open("a") as file:
                file.write(f"\n==== killed {name}\n")
            psutil.wait_procs(children, timeout=60)  # Ray's processes go when their driver is gone
    print(f"{KILLS} kills in {attempts} attempts: {sorted(kills)}")
    assert digits(wild) == digits(calm)
    for name, commit in artifacts(wild).items():
        if name.startswith("datasets/"):
            counts = commit["meta"]["counts"]
            assert counts["steps"] == counts["transitions"] + counts["dropped_steps"]
    (ledger,) = (name for name in Storage(wild).list("ledgers") if name.startswith("loop-"))
    totals = Ledger(Storage(wild), ledger).totals().purposes["collect"]
    assert totals.steps - totals.unconfirmed_steps == 600
    assert not [name for name in os.listdir(Path(wild) / "leases") if name.endswith(".json")]
