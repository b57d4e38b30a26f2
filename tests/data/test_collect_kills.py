"""Killed collections lose no confirmed step, and give the dataset of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesocosm.envs.amounts import LedgerTotals
from mesocosm.envs.ledger import Ledger
from mesocosm.store.artifacts import Storage

pytestmark = pytest.mark.integration

OWN = Path(__file__).parent.parent / "sample_envs"


class Collection:
    """`mesocosm collect` in a storage root of its own, in processes that can be killed."""

    def __init__(self, base: Path, steps: int, pace: float, workers: int):
        base.mkdir()
        self.base, self.steps, self.pace, self.root = base, steps, pace, str(base / "root")
        self._arguments = [
            "collect",
            "reality.env=ownenvs:Counted",
            "reality.horizon=20",
            f"steps={steps}",
            f"workers={workers}",
            "lanes=2",
            "ledger=one",
            f"storage.root={self.root}",
            "tracking.uri=none",
        ]

    def start(self) -> subprocess.Popen[bytes]:
        env = os.environ | {"STEPS_FILE": str(self.base / "steps"), "STEP_S": str(self.pace)}
        with open(self.base / "log", "ab") as log:
            command = [sys.executable, "-m", "mesocosm", *self._arguments]
            return subprocess.Popen(command, cwd=OWN, env=env, stdout=log, stderr=log)

    def asked(self) -> int:
        """Steps that the environment has taken."""
        path = self.base / "steps"
        return path.stat().st_size if path.exists() else 0

    def wait_for(self, steps: int, process: subprocess.Popen[bytes]) -> bool:
        """Wait for so many more steps. False if the collection ended first."""
        target = self.asked() + steps
        while self.asked() < target:
            if process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def finish(self) -> None:
        assert self.start().wait(600) == 0, (self.base / "log").read_text()

    def totals(self) -> LedgerTotals:
        return Ledger(Storage(self.root), "one").totals()

    def commit(self) -> dict[str, Any]:
        (marker,) = Path(self.root).glob("datasets/*/COMMIT.json")
        commit: dict[str, Any] = json.loads(marker.read_text())
        return commit


def actors(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Ray actors that run lanes."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
        return [child for child in tree if "LaneRunner" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def compare(disturbed: Collection, undisturbed: Collection, lost: int) -> None:
    """`lost`: steps whose transitions may be lost."""
    one, other = disturbed.commit(), undisturbed.commit()
    assert one["id"] == other["id"] and one["files"] == other["files"]
    totals, counts = disturbed.totals(), one["meta"]["counts"]
    unconfirmed = sum(r.steps for r in totals.unconfirmed)
    # Every confirmed step has its transition, and every step is counted that reality was asked for.
    assert (
        totals.steps - unconfirmed
        == counts["transitions"] + counts["dropped_steps"]
        == disturbed.steps
    )
    assert disturbed.asked() <= totals.steps
    assert unconfirmed <= lost, (unconfirmed, disturbed.asked())
    assert not Storage(disturbed.root).list("runs/episodes")


def test_a_killed_collection_goes_on_and_makes_the_same_dataset(tmp_path: Path) -> None:
    undisturbed = Collection(tmp_path / "undisturbed", 400, 0.0, workers=0)
    undisturbed.finish()
    assert undisturbed.asked() == 400 == undisturbed.totals().steps
    disturbed = Collection(tmp_path / "disturbed", 400, 0.01, workers=0)
    process = disturbed.start()
    assert disturbed.wait_for(90, process)
    process.kill()
    process.wait()
    stored = Storage(disturbed.root).list("runs/episodes/" + undisturbed.commit()["id"])
    disturbed.finish()
    assert stored and "going on after them" in (disturbed.base / "log").read_text()
    compare(disturbed, undisturbed, lost=100)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_ten_kills_at_random_times(tmp_path: Path, victim: str) -> None:
    """Each kill costs a lane at most its current episode (20 steps), the episodes that ended within
    the last 0.1 s, and 0.1 s of steps reserved ahead; on average half of that.
    """
    undisturbed = Collection(tmp_path / "undisturbed", 6000, 0.01, workers=2)
    undisturbed.finish()
    assert undisturbed.asked() == 6000 == undisturbed.totals().steps
    disturbed, random_times = (
        Collection(tmp_path / "disturbed", 6000, 0.01, workers=2),
        random.Random(0),
    )
    process, kills = disturbed.start(), 0
    while kills < 10 and disturbed.wait_for(random_times.randint(50, 450), process):
        if victim == "driver":
            process.kill()
            process.wait()
            process = disturbed.start()
        else:
            alive = actors(process)
            if not alive:
                continue
            random_times.choice(alive).send_signal(signal.SIGKILL)
        kills += 1
    assert kills == 10 and process.wait(600) == 0, (disturbed.base / "log").read_text()
    lanes = 2 if victim == "driver" else 1
    print(
        f"{victim}: ten kills cost {disturbed.asked() - 6000} steps,"
        f" {disturbed.totals().steps - 6000} with those reserved"
    )
    compare(disturbed, undisturbed, lost=10 * lanes * (20 + 10 + 16 + 10))
    assert disturbed.asked() - 6000 <= 0.05 * 6000
