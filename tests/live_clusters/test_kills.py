"""A node dies, as by kill -9 of its raylet, under each kind of job, with room elsewhere: what was
to come comes, and is the same.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.store.artifacts import Storage

from .lab import HEAD, PORT, Lab, Place, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SMALL = (
    "model.size=10k",
    "model.members=1",
    "model.context=8",
    "model.base_steps=20",
    "train.batch=8",
    "train.events=12",
    "train.lr=3e-3",
)
TRAINING = (
    "pretrain",
    "data.datasets=[cart]",
    *SMALL,
    "train.workers=2",
    "train.steps=240",
    "train.checkpoint_every=20",
    "train.validate_every=60",
)
WORKER = "ray::RayTrainWorker"


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
    """The lab with all its nodes, and the dataset `cart` in both of its roots: the cluster's and
    that of this machine.
    """
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
    done = lab.mesocosm(
        *arguments, f"storage.root={lab.base / 'here' / 'root'}", "ray.cpus=3", "--json"
    )
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
    again = until(
        lambda: max(losses(folder), default=0) > before + 20 and time.monotonic(),
        "training after the kill",
    )
    print(f"training went on {again - began:.1f} s after the kill")
    found = over(spare, id)
    assert found["state"] == "SUCCEEDED", found["log"]

    own = here(spare, *TRAINING)
    there, alone = (
        Storage(str(spare.base / name / "root")).artifact("worlds", own["artifact"])
        for name in ("there", "here")
    )
    assert found["artifact"] == own["artifact"] == there.name
    undisturbed = losses(spare.base / "here" / "root" / "runs" / own["run"])
    trained = losses(folder)
    assert sorted(trained) == sorted(undisturbed) == list(range(1, 241)), (
        "those since the last checkpoint perhaps twice"
    )
    for step, values in trained.items():
        assert values == pytest.approx([undisturbed[step][0]] * len(values), rel=1e-5), step
    assert there.meta["metrics"]["valid/loss"] == pytest.approx(
        alone.meta["metrics"]["valid/loss"], rel=1e-5
    )


SWEEP = (
    "sweep",
    "data.datasets=[cart]",
    "model.members=1",
    "model.context=8",
    "grid.sizes=[10k]",
    "grid.data=[8000,16000,80000]",
    "grid.seeds=[0,1]",
)
SWEEPING = (*SWEEP, "train.batch=8", "train.warmup=5", "concurrent=2")
TRIALS = ("ray::ResourceTrainable", "ray::TrunkTrial")


def test_a_sweep_is_whole_in_the_end(spare: Lab) -> None:
    id = submitted(spare, *SWEEPING)
    root = Storage(str(spare.base / "there" / "root"))
    until(lambda: root.list("cells/results"), "the first cell")
    node = next(
        place
        for place in list(spare.nodes.values())[1:]
        if any(place.pids(name) for name in TRIALS)
    )
    kill(spare, node)
    began = time.monotonic()
    found = over(spare, id)
    print(f"the sweep was {found['state']} {time.monotonic() - began:.1f} s after the kill")
    if found["state"] == "FAILED":
        assert "run the same command again" in found["log"]
        finished = len(root.list("cells/results"))
        id = submitted(spare, *SWEEPING)
        assert id.endswith("-2")
        found = over(spare, id)
        assert f"{finished} of 6 cells were finished before" in found["log"] and finished
    assert found["state"] == "SUCCEEDED", found["log"]
    own = here(spare, *SWEEPING)
    assert found["artifact"] == own["artifact"]
    there, alone = (
        table(Storage(str(spare.base / name / "root")).artifact("laws", own["artifact"]).path)
        for name in ("there", "here")
    )
    assert len(alone) == 6 and there.keys() == alone.keys()
    assert there == pytest.approx(alone, rel=1e-5)


def table(folder: Path) -> dict[tuple[str, str, str], float]:
    with open(folder / "table.csv") as file:
        return {
            (row["size"], row["data"], row["seed"]): float(row["loss"])
            for row in csv.DictReader(file)
        }


def test_a_served_world_answers_from_another_node(spare: Lab) -> None:
    own = here(spare, *TRAINING, "train.steps=5", "train.workers=1")
    world = own["artifact"].removeprefix("worlds/")
    shutil.copytree(
        spare.base / "here" / "root" / own["artifact"],
        spare.base / "there" / "root" / own["artifact"],
    )
    id = submitted(spare, "serve", f"world={world}", "replicas=2", "cpus=1", "name=kept")
    until(lambda: "is served as" in spare.mesocosm("jobs", "logs", id).stdout, "the served world")
    steps = 300
    undisturbed = stepped(spare, world, "", str(spare.base / "here" / "root"), steps)
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(
        client(spare, world, "kept", f"{HEAD}:{PORT}", steps),
        env=spare.node_env,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                continue  # what Ray says
            lines.append(json.loads(line))
            if lines[-1]["step"] == 40:
                kill(
                    spare,
                    next(
                        place
                        for place in spare.nodes.values()
                        if place.address == lines[-1]["host"]
                    ),
                )
    assert [line["digest"] for line in lines] == undisturbed and len(undisturbed) == steps + 1
    assert len({line["host"] for line in lines} - {""}) == 2, "before and after"
    longest = max(after["at"] - before["at"] for before, after in itertools.pairwise(lines))
    print(f"the world answered again after {longest:.1f} s")
    assert longest < 30
    stopped = json.loads(spare.mesocosm("jobs", "stop", id, "--json").stdout)
    assert stopped["state"] in ("STOPPED", "SUCCEEDED")


def client(lab: Lab, world: str, app: str, address: str, steps: int) -> list[str]:
    script = Path(__file__).with_name("client.py")
    return lab.nodes["head"].command(
        sys.executable, str(script), world, app, address, str(steps), HEAD
    )


def stepped(lab: Lab, *arguments: Any) -> list[str]:
    done = subprocess.run(
        client(lab, *arguments), env=lab.node_env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["digest"] for line in done.stdout.splitlines() if line.startswith("{")]
