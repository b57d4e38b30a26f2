"""A user with nothing but the address, the token and the package, on a cluster of several nodes
whose storage is S3 and whose MLflow is a server.

The same jobs on this machine alone are what theirs are held against.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesocosm.store.artifacts import COMMIT, Storage

from . import servers
from .lab import DASHBOARD, HEAD, Lab, logs, permitted, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
COLLECT = ("collect", "reality.env=CartPole-v1", "steps=400", "seed=3")
SMALL = ("model.size=10k", "model.members=1", "model.context=8", "model.base_steps=20")
PRETRAIN = (
    "pretrain",
    *SMALL,
    "train.batch=8",
    "train.events=12",
    "train.workers=2",
    "train.steps=60",
    "train.checkpoint_every=30",
)
SWEEP = (
    "sweep",
    "model.members=1",
    "model.context=8",
    "grid.sizes=[10k]",
    "grid.data=[2000,4000]",
    "train.batch=8",
    "train.warmup=5",
)
LOOP = (
    *(
        "loop",
        "reality.env=CartPole-v1",
        "rounds=1",
        "collect.steps=300",
        "pretrain.train.steps=30",
        "pretrain.train.batch=16",
        "pretrain.model.size=10k",
    ),
    *(
        "pretrain.model.family=ensemble",
        "pretrain.model.members=2",
        "pretrain.model.base_steps=50",
        "agent.iterations=2",
        "agent.num_envs=16",
    ),
    *(
        "evaluate.episodes=4",
        "evaluate.starts=8",
        "evaluate.samples=2",
        "evaluate.horizons=[1,5]",
        "evaluate.full=false",
    ),
)
JOBS = """
import json, sys, urllib.request
HEADERS = {"Authorization": "Bearer " + open(sys.argv[2]).read()}
def get(path):
    request = urllib.request.Request(sys.argv[1] + path, headers=HEADERS)
    return urllib.request.urlopen(request).read().decode()
jobs = get("/api/jobs/")
print(jobs)
for id in filter(None, (job["submission_id"] for job in json.loads(jobs))):
    print(get(f"/api/jobs/{id}") + get(f"/api/jobs/{id}/logs"))
"""
RUNS = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
experiments = [experiment.experiment_id for experiment in client.search_experiments()]
print(json.dumps([run.to_dictionary() for run in client.search_runs(experiments)]))
"""


@dataclass
class Done:
    """What a job made here, what it made there, and all that the user was told."""

    there: dict[str, str]
    """By job: its artifact"""
    here: dict[str, str]
    folder: Path
    """What the bucket holds"""
    said: str


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not permitted():
        pytest.skip(
            "making network and PID namespaces is not permitted here: run as root, or in a"
            " container with CAP_SYS_ADMIN"
        )
    made = Lab.make(tmp_path_factory.mktemp("second"), servers.credentials())
    try:
        servers.start(made)
        for _ in range(3):
            made.add("node")
        made.ready()
        made.cluster("lab", servers.BUCKET, servers.MLFLOW)
        yield made
    finally:
        print(logs(list(made.nodes.values())))
        made.end()


@pytest.fixture(scope="module")
def done(lab: Lab) -> Done:
    there: dict[str, str] = {}
    here: dict[str, str] = {}
    said = []

    def run(*arguments: str) -> None:
        job = arguments[0]
        sent = lab.mesocosm(*arguments, "--cluster", "lab", "--json")
        assert sent.returncode == 0, sent.stderr
        id = json.loads(sent.stdout)["id"]
        followed = lab.mesocosm("jobs", "logs", id, "--follow", timeout=900)
        status = lab.mesocosm("jobs", "status", id, "--json")
        said.extend(
            [
                sent.stdout,
                sent.stderr,
                followed.stdout,
                followed.stderr,
                status.stdout,
                status.stderr,
            ]
        )
        assert followed.returncode == 0 and json.loads(status.stdout)["state"] == "SUCCEEDED", (
            "\n".join(said[-4:])
        )
        there[job] = next(
            line for line in reversed(followed.stdout.splitlines()) if line.startswith(KINDS)
        ).split()[0]
        own = lab.mesocosm(*arguments, f"storage.root={lab.base / 'alone'}", "ray.cpus=3", "--json")
        assert own.returncode == 0, own.stderr
        here[job] = json.loads(own.stdout)["artifact"]

    run(*COLLECT)
    data = f"data.datasets=[{there['collect'].removeprefix('datasets/')}]"
    run(*PRETRAIN, data)
    run(*SWEEP, data)
    run(*LOOP)
    return Done(there, here, servers.fetched(lab), "\n".join(said))


KINDS = ("datasets/", "worlds/", "laws/", "evaluations/")


def pair(done: Done, lab: Lab, job: str) -> tuple[Path, Path]:
    """The folders of what the job made there and here; of a remote artifact the one that its COMMIT
    names.
    """
    commit = done.folder / done.there[job] / COMMIT
    holder = json.loads(commit.read_text()).get("folder", "")
    return (
        done.folder / done.there[job] / holder,
        Storage(str(lab.base / "alone"))
        .artifact(done.here[job].split("/")[0], done.here[job])
        .path,
    )


def test_a_dataset_is_the_same_bytes(done: Done, lab: Lab) -> None:
    assert done.there["collect"] == done.here["collect"]
    there, here = pair(done, lab, "collect")
    names = [
        str(path.relative_to(here))
        for path in sorted(here.rglob("*"))
        if path.is_file() and path.name != COMMIT
    ]
    assert len(names) > 3
    for name in names:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name


def test_a_world_has_the_same_losses(done: Done, lab: Lab) -> None:
    assert done.there["pretrain"] == done.here["pretrain"]
    there, here = (
        json.loads((folder / done.here["pretrain"] / COMMIT).read_text())["meta"]["metrics"]
        for folder in (done.folder, lab.base / "alone")
    )
    losses = [name for name in here if name.startswith("valid/")]
    assert "valid/loss" in losses
    assert {name: there[name] for name in losses} == pytest.approx(
        {name: here[name] for name in losses}, rel=1e-5
    )


def test_a_sweep_has_the_same_table(done: Done, lab: Lab) -> None:
    assert done.there["sweep"] == done.here["sweep"]
    there, here = (
        list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
        for folder in pair(done, lab, "sweep")
    )
    assert len(here) == 2 and [row["data"] for row in there] == [row["data"] for row in here]
    assert [float(row["loss"]) for row in there] == pytest.approx(
        [float(row["loss"]) for row in here], rel=1e-5
    )


def test_an_agent_returns_as_much(done: Done, lab: Lab) -> None:
    assert done.there["loop"] == done.here["loop"]
    there, here = (
        json.loads((folder / "summary.json").read_text())["curves"]["world"][0]["points"]
        for folder in pair(done, lab, "loop")
    )
    assert len(there) == len(here) == 1 and there[0]["real_steps"] == here[0]["real_steps"] == 300
    low, high = here[0]["interval"]
    assert low <= there[0]["mean"] <= high


def test_mlflow_has_the_runs(done: Done, lab: Lab) -> None:
    runs = json.loads(servers.inside(lab, RUNS, servers.MLFLOW))
    assert {run["info"]["status"] for run in runs} == {"FINISHED"}
    found: dict[str, Any] = {}
    for run in runs:
        found.setdefault(run["info"]["run_name"].split("-")[0].split("/")[0], run)
    assert {"collect", "pretrain", "sweep", "loop"} <= found.keys(), sorted(found)


def test_a_stop_needs_no_credentials(done: Done, lab: Lab) -> None:
    """The user cannot write the request to storage, so Ray hands it on; the checkpoint is there all
    the same.
    """
    training = [
        *PRETRAIN,
        f"data.datasets=[{done.there['collect'].removeprefix('datasets/')}]",
        "train.steps=100000",
        "train.checkpoint_every=1000000",
    ]
    id = json.loads(lab.mesocosm(*training, "--cluster", "lab", "--json").stdout)["id"]
    until(lambda: "loss" in lab.mesocosm("jobs", "logs", id).stdout, "the first loss")
    stopped = lab.mesocosm("jobs", "stop", id, "--json")
    assert json.loads(stopped.stdout) == {"id": id, "state": "STOPPED"}, stopped.stderr
    kept = list(
        (servers.fetched(lab) / "runs" / "checkpoints").glob("*/checkpoint_*/progress.json")
    )
    assert len(kept) == 1 and 0 < json.loads(kept[0].read_text())["step"] < 100000


def test_a_secret_is_nowhere(done: Done, lab: Lab) -> None:
    checked = lab.mesocosm("doctor", "--cluster", "lab")
    assert "with its token" in checked.stderr and servers.BUCKET in checked.stderr
    jobs = servers.inside(lab, JOBS, f"http://{HEAD}:{DASHBOARD}", str(lab.token_file))
    assert jobs.count('"submission_id"') >= 8, "of each list and each job"
    runs = servers.inside(lab, RUNS, servers.MLFLOW)
    folders = [
        done.folder,
        lab.user,
        lab.base / "home",
        lab.base / "mlflow",
        *(lab.base / place.name / "disk" for place in lab.nodes.values()),
    ]
    looked_at = [path for folder in folders for path in folder.rglob("*") if path.is_file()] + [
        lab.base / "mlflow.db"
    ]
    for secret in (lab.env["AWS_SECRET_ACCESS_KEY"], lab.token):
        for name, text in (
            ("what was said", done.said),
            ("doctor", checked.stdout + checked.stderr),
            ("the Jobs API", jobs),
            ("MLflow", runs),
        ):
            assert secret not in text, name
        for path in looked_at:
            assert secret.encode() not in path.read_bytes(), path
    assert len(looked_at) > 100
