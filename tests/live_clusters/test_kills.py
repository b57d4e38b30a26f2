"""A node dies, as by kill -9 of its raylet, under each kind of job, with room on other nodes: the
job ends with the same results.
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.store.artifacts import Artifact, Storage

from .lab import HEAD, PORT, Lab, Place, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SMALL = """model.size=10k model.members=1 model.context=8 model.base_steps=20 train.batch=8
    model.head_steps=20 train.lr=3e-3"""
STEPS = "train.workers=2 train.steps=240 train.checkpoint_every=20 train.validate_every=60"
TRAINING = ["pretrain", "data.datasets=[cart]", *SMALL.split(), *STEPS.split()]
WORKER = "ray::RayTrainWorker"


def submit(lab: Lab, *arguments: str) -> str:
    return str(lab.report(*arguments, "--cluster", "test")["id"])


def result_of(lab: Lab, id: str) -> dict[str, Any]:
    """The job's status and log at its end."""
    log = lab.mesocosm("jobs", "logs", id, "--follow", timeout=900).stdout
    return lab.report("jobs", "status", id) | {"log": log}


def kill(lab: Lab, node: Place) -> None:
    """Kill the node's raylet, which takes its workers with it."""
    (raylet,) = node.pids("raylet")
    os.kill(raylet, signal.SIGKILL)
    lab.nodes.pop(node.name)


def busy_node(lab: Lab, *processes: str) -> Place:
    """A node other than the head that runs one of the processes."""
    nodes = [node for node in lab.nodes.values() if node.name != "head"]
    return next(node for node in nodes if any(node.pids(name) for name in processes))


def losses(folder: Path) -> dict[int, list[float]]:
    """By step, the losses of every time that it was trained, of the run in `folder`."""
    losses: dict[int, list[float]] = defaultdict(list)
    path = folder / "metrics.jsonl"
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        if "train/loss" in line:
            losses[line["step"]].append(line["train/loss"])
    return losses


@pytest.fixture
def spare(lab: Lab, cart_root: Callable[..., str]) -> Iterator[Lab]:
    """The lab with all its nodes, and the dataset `cart` in its root and in one of this machine."""
    lab.add_nodes(3 - len(lab.nodes))
    for name in ("remote", "local"):
        if not (lab.base / name).exists():
            cart_root(lab.base / name)
    lab.cluster("test", str(lab.base / "remote" / "root"))
    yield lab


def run_locally(lab: Lab, *arguments: str) -> dict[str, Any]:
    """The same job on this machine alone, undisturbed."""
    root = f"storage.root={lab.base / 'local' / 'root'}"
    report: dict[str, Any] = lab.report(*arguments, root, "ray.cpus=3")
    return report


def artifacts(lab: Lab, kind: str, ref: str) -> list[Artifact]:
    """The artifact as the cluster and as the user's machine made it."""
    roots = [Storage(str(lab.base / name / "root")) for name in ("remote", "local")]
    return [root.artifact(kind, ref) for root in roots]


def test_training_continues_on_another_node(spare: Lab) -> None:
    id = submit(spare, *TRAINING)
    folder = spare.base / "remote" / "root" / "runs" / "pretrain" / id
    until(lambda: max(losses(folder), default=0) > 50, "step 50")
    node, before, began = busy_node(spare, WORKER), max(losses(folder)), time.monotonic()
    kill(spare, node)
    until(lambda: max(losses(folder), default=0) > before + 20, "training after the kill")
    print(f"training went on {time.monotonic() - began:.1f} s after the kill")
    result = result_of(spare, id)
    assert result["state"] == "SUCCEEDED", result["log"]
    local_run = run_locally(spare, *TRAINING)
    remote, local = artifacts(spare, "worlds", local_run["artifact"])
    assert result["artifact"] == local_run["artifact"] == remote.name
    undisturbed = losses(spare.base / "local" / "root" / "runs" / local_run["run"])
    trained = losses(folder)
    assert sorted(trained) == sorted(undisturbed) == list(range(1, 241))
    for step, values in trained.items():  # twice after the last checkpoint
        assert values == pytest.approx([undisturbed[step][0]] * len(values), rel=1e-5), step
    valid = [world.meta["metrics"]["valid/loss"] for world in (remote, local)]
    assert valid[0] == pytest.approx(valid[1], rel=1e-5)


SWEEP = """sweep data.datasets=[cart] model.members=1 model.context=8 grid.sizes=[10k]
    grid.data=[8000,16000,80000] grid.seeds=[0,1] train.batch=8 train.warmup=5 concurrent=2"""
TRIALS = ("ray::ResourceTrainable", "ray::TrunkTrial")


def test_a_sweep_has_all_cells_in_the_end(spare: Lab) -> None:
    id = submit(spare, *SWEEP.split())
    root = Storage(str(spare.base / "remote" / "root"))
    until(lambda: root.list("cells/results"), "the first cell")
    kill(spare, busy_node(spare, *TRIALS))
    began = time.monotonic()
    result = result_of(spare, id)
    print(f"the sweep was {result['state']} {time.monotonic() - began:.1f} s after the kill")
    if result["state"] == "FAILED":
        assert "run the same command again" in result["log"]
        finished = len(root.list("cells/results"))
        id = submit(spare, *SWEEP.split())
        assert id.endswith("-2")
        result = result_of(spare, id)
        assert f"{finished} of 6 cells were finished before" in result["log"] and finished
    assert result["state"] == "SUCCEEDED", result["log"]
    local_run = run_locally(spare, *SWEEP.split())
    assert result["artifact"] == local_run["artifact"]
    remote, local = (table(law.path) for law in artifacts(spare, "laws", local_run["artifact"]))
    assert len(local) == 6 and remote.keys() == local.keys()
    assert remote == pytest.approx(local, rel=1e-5)


def table(folder: Path) -> dict[tuple[str, str, str], float]:
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    return {(row["size"], row["data"], row["seed"]): float(row["loss"]) for row in rows}


def test_a_served_world_answers_from_another_node(spare: Lab) -> None:
    local_run = run_locally(spare, *TRAINING, "train.steps=5", "train.workers=1")
    name, steps = local_run["artifact"], 300
    world = name.removeprefix("worlds/")
    local, remote = (spare.base / place / "root" for place in ("local", "remote"))
    shutil.copytree(local / name, remote / name)
    id = submit(spare, "serve", f"world={world}", "replicas=2", "cpus=1", "name=survivor")
    until(lambda: "is served as" in spare.mesocosm("jobs", "logs", id).stdout, "the served world")
    undisturbed = [line["digest"] for line in stepped(spare, world, "", str(local), steps)]
    lines: list[dict[str, Any]] = []
    for line in stepped(spare, world, "survivor", f"{HEAD}:{PORT}", steps):
        lines.append(line)
        if line["step"] == 40:
            nodes = spare.nodes.values()
            kill(spare, next(node for node in nodes if node.address == line["host"]))
    assert [line["digest"] for line in lines] == undisturbed and len(undisturbed) == steps + 1
    assert len({line["host"] for line in lines} - {""}) >= 2, "before and after"
    longest = max(after["at"] - before["at"] for before, after in itertools.pairwise(lines))
    print(f"the world answered again after {longest:.1f} s")
    stopped = spare.report("jobs", "stop", id)
    assert stopped["state"] in ("STOPPED", "SUCCEEDED")


def stepped(lab: Lab, world: str, app: str, address: str, steps: int) -> Iterator[dict[str, Any]]:
    """The lines of `client.py` on the head, as they come."""
    script = str(Path(__file__).with_name("client.py"))
    arguments = (script, world, app, address, str(steps), HEAD)
    command = lab.nodes["head"].command(sys.executable, *arguments)
    with subprocess.Popen(command, env=lab.node_env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # other lines are Ray's
                yield json.loads(line)
    assert process.returncode == 0
