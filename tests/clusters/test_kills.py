"""A node dies, as by kill -9 of its raylet, under each kind of job, with room elsewhere: what was to come comes, and is the same."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.storage import Storage

from .lab import Lab, Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SMALL = ("model.size=10k", "model.members=1", "model.context=8", "model.base_steps=20", "train.batch=8", "train.events=12", "train.lr=3e-3")
TRAINING = ("pretrain", "data.datasets=[cart]", *SMALL, "train.workers=2", "train.steps=240", "train.checkpoint_every=20", "train.validate_every=60")
WORKER = "ray::RayTrainWorker"


def until(what: Callable[[], Any], said: str, timeout: float = 400) -> Any:
    """What `what` gives as soon as it is true."""
    end = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < end, f"{said} did not come in {timeout} s"
        time.sleep(0.2)
    return found


def submitted(lab: Lab, *arguments: str) -> str:
    done = lab.mesocosm(*arguments, "--cluster", "test", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["id"])


def over(lab: Lab, id: str) -> dict[str, Any]:
    """The job's status at its end."""
    followed = lab.mesocosm("jobs", "logs", id, "--follow", timeout=900)
    found: dict[str, Any] = json.loads(lab.mesocosm("jobs", "status", id, "--json").stdout)
    return found | {"log": followed.stdout}


def kill(lab: Lab, node: Place) -> None:
    """The node's raylet, which takes its workers with it."""
    (raylet,) = node.pids("raylet")
    os.kill(raylet, signal.SIGKILL)
    lab.nodes.pop(node.name)


def losses(folder: Path) -> dict[int, list[float]]:
    """By step, every time it was trained; of the run in `folder`."""
    found: dict[int, list[float]] = {}
    path = folder / "metrics.jsonl"
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        if "train/loss" in line:
            found.setdefault(line["step"], []).append(line["train/loss"])
    return found


@pytest.fixture
def spare(lab: Lab, cart_root: Callable[..., str]) -> Iterator[Lab]:
    """The lab with all its nodes, and the dataset `cart` in both of its roots: the cluster's and that of this machine."""
    missing = 3 - len(lab.nodes)
    for _ in range(missing):
        lab.add("node")
    lab.ready()
    for name in ("there", "here"):
        if not (lab.base / name).exists():
            cart_root(lab.base / name)
    lab.cluster("test", str(lab.base / "there" / "root"))
    yield lab


def here(lab: Lab, *arguments: str) -> dict[str, Any]:
    """The same job on this machine alone, undisturbed."""
    done = lab.mesocosm(*arguments, f"storage.root={lab.base / 'here' / 'root'}", "ray.cpus=3", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_training_goes_on_elsewhere(spare: Lab) -> None:
    id = submitted(spare, *TRAINING)
    folder = spare.base / "there" / "root" / "runs" / "pretrain" / id
    until(lambda: max(losses(folder), default=0) > 50, "step 50")
    node = next(place for place in list(spare.nodes.values())[1:] if place.pids(WORKER))
    before = max(losses(folder))
    began = time.monotonic()
    kill(spare, node)
    again = until(lambda: max(losses(folder), default=0) > before + 20 and time.monotonic(), "training after the kill")
    print(f"training went on {again - began:.1f} s after the kill")
    found = over(spare, id)
    assert found["state"] == "SUCCEEDED", found["log"]

    own = here(spare, *TRAINING)
    there, alone = (Storage(str(spare.base / name / "root")).artifact("worlds", own["artifact"]) for name in ("there", "here"))
    assert found["artifact"] == own["artifact"] == there.name
    undisturbed = losses(spare.base / "here" / "root" / "runs" / own["run"])
    trained = losses(folder)
    assert sorted(trained) == sorted(undisturbed) == list(range(1, 241)) and max(map(len, trained.values())) > 1, "some steps were trained again"
    for step, values in trained.items():
        assert values == pytest.approx([undisturbed[step][0]] * len(values), rel=1e-5), step
    assert there.meta["metrics"]["valid/loss"] == pytest.approx(alone.meta["metrics"]["valid/loss"], rel=1e-5)
