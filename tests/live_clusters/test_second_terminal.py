"""A user with nothing but the address, the token and the package, on a cluster of several nodes
with S3 and an MLflow server. Results are compared with the same jobs on this machine alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesocosm.store.artifacts import COMMIT

from . import servers
from .lab import DASHBOARD, HEAD, Lab, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SMALL = "model.size=10k model.members=1 model.context=8 model.base_steps=20"
COLLECT = "collect reality.env=CartPole-v1 steps=400 seed=3"
PRETRAIN = f"""pretrain {SMALL} train.batch=8 model.head_steps=20 train.workers=2 train.steps=60
    train.checkpoint_every=30"""
SWEEP = """sweep model.members=1 model.context=8 grid.sizes=[10k] grid.data=[2000,4000]
    train.batch=8 train.warmup=5"""
LOOP = """loop reality.env=CartPole-v1 rounds=1 collect.steps=300 pretrain.train.steps=30
    pretrain.train.batch=16 pretrain.model.size=10k pretrain.model.family=ensemble
    pretrain.model.members=2 pretrain.model.base_steps=50 pretrain.model.head_steps=50
    agent.iterations=2 agent.num_envs=16 evaluate.episodes=4 evaluate.starts=8 evaluate.samples=2
    evaluate.horizons=[1,5] evaluate.full=false"""
KINDS = ("datasets/", "worlds/", "laws/", "evaluations/")
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
class Results:
    """The artifacts of the cluster and of this machine by job, and all that the user read."""

    remote: dict[str, str]
    local: dict[str, str]
    bucket: Path
    """A copy of the bucket"""
    alone: Path
    """The root of the jobs on this machine"""
    printed: str

    def commits(self, job: str) -> list[dict[str, Any]]:
        """COMMIT.json of what the job made on the cluster and on this machine."""
        paths = self.bucket / self.remote[job], self.alone / self.local[job]
        return [json.loads((path / COMMIT).read_text()) for path in paths]

    def folders(self, job: str) -> tuple[Path, Path]:
        """The folders of their files."""
        folder = self.commits(job)[0]["folder"]
        return self.bucket / self.remote[job] / folder, self.alone / self.local[job]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running(tmp_path_factory.mktemp("second"), servers.credentials()) as lab:
        servers.start(lab)
        lab.add_nodes(3)
        lab.tracking_uri = servers.MLFLOW
        lab.cluster("lab", servers.BUCKET)
        yield lab


@pytest.fixture(scope="module")
def results(lab: Lab) -> Results:
    remote, local = dict[str, str](), dict[str, str]()
    printed, alone = list[str](), lab.base / "alone"

    def mesocosm(*arguments: str) -> str:
        done = lab.mesocosm(*arguments, timeout=900)
        printed.extend([done.stdout, done.stderr])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(words: str) -> None:
        job = words.split()[0]
        id = json.loads(mesocosm(*words.split(), "--cluster", "lab", "--json"))["id"]
        log = mesocosm("jobs", "logs", id, "--follow").splitlines()
        assert json.loads(mesocosm("jobs", "status", id, "--json"))["state"] == "SUCCEEDED"
        remote[job] = [line for line in log if line.startswith(KINDS)][-1].split()[0]
        report = lab.report(*words.split(), f"storage.root={alone}", "ray.cpus=3")
        local[job] = report["artifact"]

    run(COLLECT)
    data = f"data.datasets=[{remote['collect'].removeprefix('datasets/')}]"
    for words in (f"{PRETRAIN} {data}", f"{SWEEP} {data}", LOOP):
        run(words)
    return Results(remote, local, servers.fetch(lab), alone, "\n".join(printed))


def test_ids_do_not_depend_on_the_place(results: Results) -> None:
    assert results.remote == results.local and len(results.local) == 4


def test_a_dataset_is_the_same_bytes(results: Results) -> None:
    remote, local = results.folders("collect")
    names = [path.relative_to(local) for path in local.rglob("*") if path.is_file()]
    names.remove(Path(COMMIT))
    assert len(names) > 3
    for name in names:
        assert (remote / name).read_bytes() == (local / name).read_bytes(), name


def test_a_world_has_the_same_losses(results: Results) -> None:
    remote, local = (
        {name: x for name, x in commit["meta"]["metrics"].items() if name.startswith("valid/")}
        for commit in results.commits("pretrain")
    )
    assert "valid/loss" in local and remote == pytest.approx(local, rel=1e-5)


def test_a_sweep_has_the_same_table(results: Results) -> None:
    tables = []
    for folder in results.folders("sweep"):
        rows = csv.DictReader((folder / "table.csv").read_text().splitlines())
        tables.append({row["data"]: float(row["loss"]) for row in rows})
    assert len(tables[1]) == 2 and tables[0] == pytest.approx(tables[1], rel=1e-5)


def test_an_agent_has_the_same_return(results: Results) -> None:
    (remote,), (local,) = (
        json.loads((folder / "summary.json").read_text())["curves"]["world"][0]["points"]
        for folder in results.folders("loop")
    )
    assert remote["real_steps"] == local["real_steps"] == 300
    low, high = local["interval"]
    assert low <= remote["mean"] <= high


def test_mlflow_has_the_runs(results: Results, lab: Lab) -> None:
    runs = json.loads(servers.run_in_hub(lab, RUNS, servers.MLFLOW))
    assert {run["info"]["status"] for run in runs} == {"FINISHED"}
    jobs = {run["info"]["run_name"].split("-")[0].split("/")[0] for run in runs}
    assert jobs >= {"collect", "pretrain", "sweep", "loop"}


def test_a_stop_needs_no_credentials(results: Results, lab: Lab) -> None:
    """The user cannot write the request to storage, so Ray passes it on; a checkpoint is saved."""
    data = f"data.datasets=[{results.remote['collect'].removeprefix('datasets/')}]"
    long = ("train.steps=100000", "train.checkpoint_every=1000000", "--cluster", "lab")
    id = lab.report(*PRETRAIN.split(), data, *long)["id"]
    until(lambda: "loss" in lab.mesocosm("jobs", "logs", id).stdout, "the first loss")
    assert lab.report("jobs", "stop", id) == {"id": id, "state": "STOPPED"}
    checkpoints = servers.fetch(lab) / "runs" / "checkpoints"
    (progress,) = checkpoints.glob("*/checkpoint_*/progress.json")
    assert 0 < json.loads(progress.read_text())["step"] < 100000


def test_secrets_are_written_nowhere(results: Results, lab: Lab) -> None:
    doctor = lab.mesocosm("doctor", "--cluster", "lab")
    assert "with its token" in doctor.stderr and servers.BUCKET in doctor.stderr
    dashboard = f"http://{HEAD}:{DASHBOARD}"
    jobs = servers.run_in_hub(lab, JOBS, dashboard, str(lab.token_file))
    assert jobs.count('"submission_id"') >= 8, "of each list and each job"
    texts = {
        "printed": results.printed,
        "doctor": doctor.stdout + doctor.stderr,
        "the Jobs API": jobs,
        "MLflow": servers.run_in_hub(lab, RUNS, servers.MLFLOW),
    }
    folders = [results.bucket, lab.user, lab.base / "home", lab.base / "mlflow"]
    folders += [lab.base / place.name / "disk" for place in lab.nodes.values()]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files.append(lab.base / "mlflow.db")
    assert len(files) > 100
    for secret in (lab.env["AWS_SECRET_ACCESS_KEY"], lab.token):
        for name, text in texts.items():
            assert secret not in text, name
        for path in files:
            assert secret.encode() not in path.read_bytes(), path
