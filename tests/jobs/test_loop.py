"""The whole circle on real components: Ray, DeepSpeed, Serve, RLlib, MLflow, Gymnasium."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gymnasium.spaces import Discrete
from mlflow.tracking import MlflowClient

from mesocosm import config
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts
from mesocosm.errors import UsageError
from mesocosm.jobs.loop import JOB, LoopConfig, LoopPlan, _Loop
from mesocosm.jobs.loop_checks import check
from mesocosm.jobs.loop_preflight import Ready
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

pytestmark = pytest.mark.timeout(1200)

TINY = [
    "rounds=2",
    "collect.steps=300",
    "explore.steps=100",
    "pretrain.train.steps=20",
    "pretrain.train.batch=16",
    "pretrain.model.base_steps=50",
    "pretrain.model.head_steps=50",
    "pretrain.model.members=2",
    "pretrain.model.size=10k",
    "agent.iterations=2",
    "agent.num_envs=16",
    "evaluate.episodes=2",
    "evaluate.starts=8",
    "evaluate.samples=2",
    "evaluate.horizons=[1,5]",
    "evaluate.full=false",
]


def _load(root: str, *overrides: str) -> LoopConfig:
    return config.load(LoopConfig, [], [f"storage.root={root}", *TINY, *overrides])


def _run(cfg: LoopConfig) -> tuple[Any, dict[str, Any]]:
    with tracking.start("loop", cfg, quiet=True) as started:
        artifact = JOB.run(cfg, started)
    return artifact, json.loads((artifact.path / "summary.json").read_text())


def _check_golden(golden: Any, storage: Storage, summary: dict[str, Any]) -> None:
    (agent,) = storage.list("agents")
    weights = golden.of_weights(storage.artifact("agents", agent).path / "policy.safetensors")
    golden.check("train-agent", {"weights": weights}, tolerance=golden.TRAINED)
    losses = {"losses": golden.of_numbers(summary["losses"])}
    golden.check("evaluate", losses, tolerance=golden.TRAINED)
    points = summary["curves"]["world"][0]["points"]
    golden.check("loop", {"real_steps": [point["real_steps"] for point in points]})
    (curve,) = Path(storage.root).glob("evaluations/*/curve.json")
    returns = [point["return"] for point in json.loads(curve.read_text())["points"]]
    golden.check("baseline", {"returns": returns})


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_round_and_round_through_serve_and_found_again(
    rounds: int, root: str, ray_local: None, golden: Any
) -> None:
    spent = [300, 400][:rounds]
    baseline = (
        "baselines=[{algo: PPO, steps: 300, num_envs: 2, rollout: 32, window: 2, params:"
        " {minibatch_size: 32}}]"
    )
    overrides = [
        "reality.env=CartPole-v1",
        "reality.price.per_step=0.5",
        "reality.budget.steps=400",
        "pretrain.model.family=sequence",
        "target=475",
    ]
    cfg = _load(root, *overrides, baseline, f"rounds={rounds}")
    artifact, summary = _run(cfg)
    points = summary["curves"]["world"][0]["points"]
    assert [p["real_steps"] for p in points] == spent
    purposes = {row["purpose"]: row for row in summary["real_steps"]["purposes"]}
    assert (
        purposes["collect"]["steps"] == spent[-1] and purposes["collect"]["price"] == spent[-1] / 2
    )
    assert purposes["judge"]["steps"] == sum(
        sum(p["returns"]) for p in points
    )  # CartPole pays 1 a step
    assert 0 < purposes["baseline"]["steps"] <= 300
    assert summary["curves"]["model_free"][0]["points"]
    if rounds == 1:
        _check_golden(golden, Storage(root), summary)
    page = (artifact.path / "report.html").read_text()
    assert (
        "<svg" in page
        and "http://" not in page.replace("http://www.w3.org", "")
        and "May the last round" in page
    )

    ledger = Ledger(
        Storage(root), artifact.meta["ledger"]["ledger"], cfg.reality.budget, cfg.reality.price
    )
    before = ledger.totals()
    again, _ = _run(cfg)
    assert again.id == artifact.id and ledger.totals() == before

    client = MlflowClient(tracking_uri=tracking.uri_of(cfg))
    experiment = client.get_experiment_by_name(cfg.tracking.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    jobs = sorted({r.data.tags["mesocosm.run"].split("/")[0] for r in runs})
    assert jobs == ["baseline", "collect", "evaluate", "loop", "pretrain", "train-agent"]
    assert all(r.info.status == "FINISHED" for r in runs)
    by_job = {r.data.tags["mesocosm.run"].split("/")[0]: r for r in runs}
    parent = by_job["loop"].info.run_id
    assert all(
        r.data.tags["mlflow.parentRunId"] == parent
        for r in runs
        if r.info.run_id != parent and r.info.start_time < by_job["baseline"].info.start_time
    )
    world = by_job["train-agent"].data.tags
    assert "worlds" in world["mesocosm.inputs"] and all(
        "spent" in by_job[job].data.tags["mesocosm.ledger"]
        for job in ("collect", "evaluate", "baseline")
    )
    assert client.search_model_versions("name = 'mesocosm-world'")


@pytest.mark.slow
def test_a_dict_observation_from_config_alone(
    root: str, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "sample_envs")
    cfg = _load(
        root,
        "reality.env=reach:Reach-v0",
        "reality.task=[target]",
        "agent.backend=local",
        "pretrain.model.family=ensemble",
        "rounds=1",
        "collect.workers=0",
    )
    artifact, summary = _run(cfg)
    assert summary["curves"]["world"][0]["points"][0]["real_steps"] == 300
    assert "task" in summary["losses"][0]["parts"]

    offline = _load(
        root,
        "reality.env=reach:Reach-v0",
        "reality.task=[target]",
        "agent.backend=local",
        "rounds=1",
        "reality.budget.steps=0",
    )
    offline.pretrain.model.family = "ensemble"
    with pytest.raises(UsageError, match=r"reality\.budget\.steps=0 is less than the 300 steps"):
        check(offline)
    offline.datasets = artifact.meta["inputs"]["datasets"]
    offline.evaluate.episodes = 3
    second, summary = _run(offline)
    assert (
        second.id != artifact.id
        and second.meta["inputs"]["worlds"] == artifact.meta["inputs"]["worlds"]
    ), "of the same data, the same world"
    spent = {row["purpose"]: row["steps"] for row in summary["real_steps"]["purposes"]}
    assert (
        list(spent) == ["judge"] and summary["curves"]["world"][0]["points"][0]["real_steps"] == 300
    ), "what the logs cost is said"


@pytest.mark.integration
def test_what_is_wrong_is_said_before_anything_starts(root: str) -> None:
    with pytest.raises(UsageError, match=r"reality\.budget\.steps=350 is less than the 400 steps"):
        check(_load(root, "reality.env=CartPole-v1", "reality.budget.steps=350"))
    with pytest.raises(UsageError, match=r"collect\.seed is set by the loop"):
        check(_load(root, "reality.env=CartPole-v1", "collect.seed=3"))
    with pytest.raises(UsageError, match=r"agent\.world is set by the loop; leave it out"):
        check(_load(root, "reality.env=CartPole-v1", "agent.world=w0"))
    with pytest.raises(UsageError, match="warm_start must be true, false or auto, got 'both'"):
        check(_load(root, "reality.env=CartPole-v1", "warm_start=both"))
    with pytest.raises(UsageError, match="'warm_start' must be true, false or text, got 3"):
        _load(root, "warm_start=3")
    with pytest.raises(UsageError, match=r"agent\.rival is set by the loop; leave it out"):
        check(_load(root, "reality.env=CartPole-v1", "agent.rival=a0"))
    with pytest.raises(UsageError, match="stop_at_target"):
        check(_load(root, "reality.env=CartPole-v1", "stop_at_target=true"))
    with pytest.raises(UsageError, match=r"reality\.env must be a Gymnasium id"):
        JOB.plan(_load(root))


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_says_stopped(root: str, tmp_path: Path) -> None:
    """SIGINT to the whole foreground group in the middle of pretraining, as a terminal sends it."""
    mark = f"MESOCOSM_TEST_MARK={uuid.uuid4().hex}"
    arguments = [
        f"storage.root={root}",
        *TINY,
        "reality.env=CartPole-v1",
        "pretrain.train.steps=1000000",
        "collect.workers=0",
    ]
    job = subprocess.Popen(
        [sys.executable, "-m", "mesocosm", "loop", *arguments],
        env=os.environ | dict([mark.split("=")]),
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait(
            lambda: any(
                "train/loss" in path.read_text()
                for path in Path(root).glob("runs/pretrain/*/metrics.jsonl")
            ),
            240,
            job,
        )
        assert len(_marked(mark)) > 3, "Ray's processes are there"
        os.killpg(job.pid, signal.SIGINT)
        _, message = job.communicate(timeout=600)
        assert job.returncode == 130 and "run the same command again" in message
        _wait(lambda: not _marked(mark), 30)
        states = {
            path.parent.parent.name: json.loads(path.read_text())["state"]
            for path in Path(root).glob("runs/*/*/status.json")
        }
        assert states == {"loop": "stopped", "collect": "done", "pretrain": "stopped"}
    finally:
        for pid in _marked(mark):
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Pids of the processes, without zombies, whose environment holds `mark`."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if (
                mark.encode() in path.read_bytes()
                and (path.parent / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            ):
                pids.append(int(path.parent.name))
    return pids


def _wait(
    condition: Callable[[], bool], seconds: float, job: subprocess.Popen[str] | None = None
) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and (job is None or job.poll() is None), "waited in vain"
        time.sleep(0.2)


@pytest.mark.integration
def test_an_agent_that_was_kept_and_has_collected_is_judged_and_not_compared(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data are in the world by now: values there are no test, and what was paid for is not lost
    to an error.
    """
    storage = Storage(root)
    for name, inputs in (
        ("first", {}),
        ("second", {"agents": ["first"]}),
        ("kept", {"agents": ["first"]}),
    ):
        meta = {"inputs": inputs, "metrics": {"kept_former": name == "kept"}}
        storage.make("agents", name, meta, lambda folder: (folder / "x").write_text("x") and None)
    for name, inputs in (("random", {}), ("explored", {"agents": ["first"]})):
        storage.make(
            "datasets",
            name,
            {"inputs": inputs},
            lambda folder: (folder / "x").write_text("x") and None,
        )
    cfg = _load(
        root,
        "reality.env=CartPole-v1",
        "evaluate.graded=5",
        "evaluate.adversary=2",
        "evaluate.policies=[{kind: random}]",
    )
    configs: list[Any] = []
    monkeypatch.setattr(_Loop, "_stage", lambda self, job, config, round: configs.append(config))
    with tracking.start("loop", cfg, quiet=True) as started:
        loop = _Loop(JOB, _plan(cfg), started)
        for data, agent in (
            (["random"], "first"),
            (["random", "explored"], "second"),
            (["random", "explored"], "kept"),
        ):
            loop.inputs["datasets"] = data
            loop.evaluate(
                0, storage.artifact("datasets", "random"), storage.artifact("agents", agent)
            )
    compared = [
        (config.agent, bool(config.policies), config.graded, config.adversary) for config in configs
    ]
    assert compared == [("first", True, 5, 2), ("second", True, 5, 2), ("kept", False, 0, 0)]
    assert "collected some of this world's data" in (started.folder / "log.txt").read_text()


def _plan(cfg: LoopConfig) -> LoopPlan:
    facts = EnvFacts(Discrete(2), Discrete(2), "version", 100)
    return LoopPlan(config=cfg, inputs={}, facts={}, id="id", ready=Ready([], facts, None))
