"""`train-agent` killed by SIGKILL: the same command continues and ends with the same bits."""

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

import numpy as np
import pytest
from factories import fit_world
from gymnasium import spaces

from mesocosm.agents import checkpoint, rllib
from mesocosm.agents import training as train
from mesocosm.agents.config import AgentConfig
from mesocosm.config import load
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.make import EnvFacts
from mesocosm.errors import UsageError
from mesocosm.jobs.loop import JOB as LOOP
from mesocosm.jobs.loop import LoopConfig, LoopPlan, _Loop
from mesocosm.jobs.loop_preflight import Ready
from mesocosm.model.config import ModelConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

LENGTH = 12
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (2,), np.float32)
DISCRETE, CONTINUOUS = spaces.Discrete(3), spaces.Box(-1.0, 1.0, (1,), np.float32)
SMALL = ["world=w", "backend=local", "starts=logged", "num_envs=8", "horizon=20", "snapshots=3"]
NETWORK = "model.fcnet_hiddens=[16]"
PPO = ["rollout=32", NETWORK, "params.minibatch_size=64"]
PPO += ["params.entropy_coeff=[[0,0.02],[4000,0.0]]", "params.lr=[[0,0.003],[4000,0.0001]]"]
REPLAY = ["rollout=16", NETWORK, "params.num_steps_sampled_before_learning_starts=200"]
REPLAY += ["params.train_batch_size_per_learner=32", "params.training_intensity=4"]
DQN = ["algo=DQN", *REPLAY, "params.target_network_update_freq=100"]
SAC = [
    "algo=SAC",
    "rollout=15",
    "model.fcnet_hiddens=[16]",
    "params.train_batch_size_per_learner=32",
    "updates_per_real_step=0.4",
]


def make_root(root: str, actions: Any = DISCRETE, family: str = "ensemble") -> str:
    """A root with a dataset of random walks and an untrained world `w` of it, always the same."""
    storage, rng = Storage(root), np.random.default_rng(0)
    episodes = []
    for k in range(30):
        walk = rng.normal(size=(LENGTH + 1, 2)).cumsum(0).astype(np.float32)
        actions.seed(k)
        taken = [actions.sample() for _ in range(LENGTH)]
        rewards = -np.abs(walk[1:, 0]).astype(np.float64)
        episodes.append(Episode(k, k, "random", list(walk), taken, rewards, "truncated"))
    facts: dict[str, Any] = {
        "environment": Environment(id="Walk-v0", max_episode_steps=LENGTH),
        "observation_space": OBSERVATIONS,
        "action_space": actions,
    }

    def write(to: Path) -> None:
        write_dataset(to, episodes, id="d", seed=0, valid_fraction=0.1, **facts)

    data = Dataset([storage.make("datasets", "d", {}, write).path])
    model = ModelConfig(family=family, size="10k", members=2, base=False)
    storage.make("worlds", "w", {"inputs": {"datasets": ["d"]}}, fit_world(data, model).save)
    return root


def train_agent(root: str, overrides: list[str]) -> tuple[Artifact, list[dict[str, Any]]]:
    """Train in this process; the artifact and the logged iterations."""
    config = load(AgentConfig, [], [f"storage.root={root}", *SMALL, *overrides])
    with tracking.start("train-agent", config, quiet=True) as run:
        artifact = train.JOB.run(config, run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return artifact, [line for line in lines if "agent/imagined_steps" in line]


def progress_of(root: str) -> tuple[str, int]:
    """(agent id, finished iterations) of the checkpoint under `root`; ("", 0) without one."""
    storage = Storage(root)
    for id in storage.list("runs/checkpoints"):
        data = storage.read(f"runs/checkpoints/{id}/{checkpoint.PROGRESS}")
        if data is not None:
            return id, json.loads(data)["iteration"]
    return "", 0


def kill_after(
    root: str, overrides: list[str], output: Path, iteration: int, delay: float = 0.0
) -> str:
    """Train in another process and SIGKILL it at the checkpoint of `iteration`."""
    command = [
        sys.executable,
        "-m",
        "mesocosm",
        "train-agent",
        f"storage.root={root}",
        "tracking.uri=none",
    ]
    with open(output, "ab") as log:
        process = subprocess.Popen([*command, *SMALL, *overrides], stdout=log, stderr=log)
    while progress_of(root)[1] < iteration:
        assert process.poll() is None, output.read_text()
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training ended before it was killed"
    return progress_of(root)[0]


def files_of(artifact: Artifact) -> dict[str, bytes]:
    """The artifact's files, without COMMIT.json, which has times."""
    paths = (p for p in artifact.path.rglob("*") if p.is_file() and p.name != "COMMIT.json")
    return {str(p.relative_to(artifact.path)): p.read_bytes() for p in paths}


def same_after_kills(
    undisturbed: str,
    disturbed: str,
    overrides: list[str],
    kills: list[tuple[int, float]],
    output: Path,
) -> None:
    """Train in two equal roots, in one with kills: equal files, and no checkpoint is left."""
    whole, lines = train_agent(undisturbed, overrides)
    for iteration, delay in kills:
        id = kill_after(disturbed, overrides, output, iteration, delay)
    finished = progress_of(disturbed)[1]
    assert id == whole.id
    again, rest = train_agent(disturbed, overrides)
    assert Storage(disturbed).list("runs/checkpoints") == []
    assert [line["step"] for line in rest] == list(range(finished, len(lines)))
    expected, actual = files_of(whole), files_of(again)
    assert expected.keys() == actual.keys() and any("snapshots" in name for name in expected)
    for name, data in expected.items():
        assert actual[name] == data, f"{name} differs"
    for name in ("imagined_steps", "imagined_return", "total_loss", "qf_loss"):
        values = [[line.get(f"agent/{name}") for line in part] for part in (rest, lines[finished:])]
        assert values[0] == values[1], name


def test_an_interrupted_training_ends_with_the_same_policy(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [make_root(str(tmp_path / name)) for name in ("whole", "interrupted")]
    overrides = [*PPO, "iterations=4"]
    whole, _ = train_agent(roots[0], overrides)
    save = checkpoint.Checkpoints.save

    def interrupted(self: Any, iteration: int, *arguments: Any) -> None:
        save(self, iteration, *arguments)
        if iteration == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Checkpoints, "due", lambda self: True)
        patch.setattr(checkpoint.Checkpoints, "save", interrupted)
        train_agent(roots[1], overrides)
    assert progress_of(roots[1]) == (whole.id, 2)
    again, rest = train_agent(roots[1], overrides)
    assert [line["step"] for line in rest] == [2, 3] and files_of(again) == files_of(whole)


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_policy(ray_local: None, tmp_path: Path) -> None:
    """PPO, with schedules of the learning rate and the entropy bonus, and an adapted KL
    coefficient.
    """
    roots = [make_root(str(tmp_path / name)) for name in ("whole", "killed")]
    same_after_kills(*roots, [*PPO, "iterations=12"], [(3, 0.0)], tmp_path / "output")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "overrides", "actions", "family"),
    [
        ("sac", [*SAC, "iterations=10"], CONTINUOUS, "ensemble"),
        ("sac, discrete, two runners", [*SAC, "runners=2", "iterations=10"], DISCRETE, "ensemble"),
        ("dqn", [*DQN, "iterations=14"], DISCRETE, "ensemble"),
        ("two runners", [*PPO, "runners=2", "iterations=10"], DISCRETE, "ensemble"),
        ("history", [*PPO, "iterations=8"], CONTINUOUS, "sequence"),
        ("served", [*PPO, "backend=serve", "iterations=10"], DISCRETE, "ensemble"),
    ],
)
def test_killed_three_times(
    ray_local: None, tmp_path: Path, case: str, overrides: list[str], actions: Any, family: str
) -> None:
    rng = random.Random(case)
    kills = [(i, rng.uniform(0.0, 0.5)) for i in (1, 2, 3)]
    roots = [make_root(str(tmp_path / name), actions, family) for name in ("whole", "killed")]
    same_after_kills(*roots, overrides, kills, tmp_path / "output")


@pytest.mark.slow
def test_a_lost_runner_does_not_change_the_policy(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLlib by itself goes on without the runner's samples."""
    overrides = [*PPO, "runners=2", "iterations=6"]
    whole, lost = (make_root(str(tmp_path / name), DISCRETE) for name in ("whole", "lost"))
    expected = files_of(train_agent(whole, overrides)[0])
    original, calls = rllib.train, 0

    def train_and_kill(algorithm: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls in (2, 5):
            pid = algorithm.env_runner_group.foreach_env_runner(
                lambda runner: os.getpid(), local_env_runner=False
            )[0]
            os.kill(pid, signal.SIGKILL)
        return original(algorithm)

    monkeypatch.setattr(rllib, "train", train_and_kill)
    artifact, lines = train_agent(lost, overrides)
    assert calls > 6 and lines[-1]["step"] == 5
    assert files_of(artifact) == expected


@pytest.mark.slow
def test_another_machine_continues_from_a_bucket(ray_local: None, s3: str, tmp_path: Path) -> None:
    roots = [make_root(f"{s3}/{name}") for name in ("whole", "killed")]
    same_after_kills(*roots, [*PPO, "iterations=12"], [(2, 0.1)], tmp_path / "output")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["algo=APPO", "rollout=32", NETWORK], [*PPO, "learners=2"]])
def test_a_training_without_the_same_bits_continues(
    ray_local: None, tmp_path: Path, overrides: list[str]
) -> None:
    """APPO's bits depend on its thread's timing; remote learners do not repeat theirs either."""
    root = make_root(str(tmp_path / "root"), DISCRETE)
    overrides = [*overrides, "iterations=30"]
    kill_after(root, overrides, tmp_path / "output", 2)
    finished = progress_of(root)[1]
    artifact, rest = train_agent(root, overrides)
    assert [line["step"] for line in rest] == list(range(finished, 30))
    assert {path.name for path in (artifact.path / "snapshots").iterdir()} == {"0", "10", "20"}


def test_a_loop_resumes_between_the_two_trainings_of_a_round(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """warm_start=auto continues the agent, then trains a new one that must be better."""
    root = make_root(str(tmp_path), CONTINUOUS)
    former, _ = train_agent(root, [*SAC, "iterations=1", "snapshots=0"])
    agent = [*SMALL[1:], *SAC, "iterations=1", "gamma=0.9"]
    overrides = ["warm_start=auto", "reality.env=Pendulum-v1", *(f"agent.{key}" for key in agent)]
    cfg = load(LoopConfig, [], [f"storage.root={root}", *overrides])
    facts = EnvFacts(OBSERVATIONS, CONTINUOUS, "version", 100)
    plan = LoopPlan(config=cfg, inputs={}, facts={}, id="id", ready=Ready([], facts, None))
    make, made, world = train.TrainAgent.make, [], Storage(root).artifact("worlds", "w")

    def interrupted(job: Any, plan: train.TrainAgentPlan, run: tracking.Run) -> Artifact:
        if plan.config.rival is not None and len(made) < 2:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append("continued" if plan.config.rival is None else "new")
        return make(job, plan, run)

    monkeypatch.setattr(train.TrainAgent, "make", interrupted)
    with tracking.start("loop", cfg, quiet=True) as run:
        loop = _Loop(LOOP, plan, run)
        with pytest.raises(KeyboardInterrupt):
            loop.train_agent(1, world, former)
        chosen = _Loop(LOOP, plan, run).train_agent(1, world, former)
    assert made == ["continued", "interrupted", "new"]
    (continued,) = chosen.meta["inputs"]["agents"]
    assert Storage(root).artifact("agents", continued).meta["inputs"]["agents"] == [former.id]
    assert chosen.meta["metrics"]["former_return"] <= chosen.meta["metrics"]["best_return"]


def test_a_checkpoint_is_whole_or_refused(root: str) -> None:
    storage = Storage(root)
    writer, reader = (checkpoint.Checkpoints(storage, "a") for _ in range(2))
    assert writer.latest() is None and writer.due()
    writer.save(1, {"x": np.arange(3)}, {"imagined_steps": 8.0})
    assert not writer.due(), "the next one is due after 20 times as long as this one took"
    writer.save(2, {"x": np.arange(4)}, {"imagined_steps": 16.0})
    progress = reader.latest()
    assert progress is not None and progress.iteration == 2
    assert progress.metrics == {"imagined_steps": 16.0}
    assert reader.load(progress)["x"].tolist() == [0, 1, 2, 3]
    states = [name for name in storage.list(writer.folder) if name.startswith("state")]
    assert states == [progress.file], "an earlier state is removed once the next one is named"
    path = f"{writer.folder}/{progress.file}"
    storage.write(path, b"torn")
    with pytest.raises(UsageError, match=f"agents/a cannot continue: .*{progress.file} .*--force"):
        reader.load(progress)
    storage.remove(path)
    with pytest.raises(UsageError, match=r"agents/a cannot continue"):
        reader.load(progress)
    # Pickled objects of another version may be of classes that this one does not have.
    record = {"iteration": 1, "file": "s", "sha256": ""}
    old = {**checkpoint.VERSIONS, "mesocosm": "0.2.0"}
    for text, message in (
        ("{", r"progress.json is missing or damaged"),
        (json.dumps({**record, "versions": {"ray": "1.0"}}), r"needs ray 1.0, got ray .*--force"),
        (json.dumps({**record, "versions": old}), r"needs mesocosm 0.2.0, got .*--force"),
    ):
        storage.write(f"{writer.folder}/{checkpoint.PROGRESS}", text.encode())
        with pytest.raises(UsageError, match=message):
            reader.latest()
    reader.remove()
    assert reader.latest() is None


def test_snapshots_after_the_checkpoint_are_not_loaded(root: str, tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(Storage(root), "a")
    for iteration in (0, 2, 4):
        folder = tmp_path / str(iteration)
        folder.mkdir()
        (folder / "policy.json").write_text(str(iteration))
        checkpoints.save_snapshot(folder, iteration)
    checkpoints.save(3, {}, {})
    progress, into = checkpoints.latest(), tmp_path / "into"
    assert progress is not None
    checkpoints.load_snapshots(into, progress)
    loaded = {path.name: (path / "policy.json").read_text() for path in into.iterdir()}
    assert loaded == {"0": "0", "2": "2"}
