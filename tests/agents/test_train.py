"""Agents trained in worlds: real RLlib, real worlds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from factories import fit_world
from gymnasium import spaces
from safetensors.torch import load_file

from mesocosm.agents import mbpo, training
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.training import JOB
from mesocosm.config import load
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.model.config import ModelConfig
from mesocosm.policies.policy import TRAINING_STATE, Policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

pytestmark = pytest.mark.integration

LENGTH = 12
SMALL = (
    "world=seek backend=local starts=logged num_envs=32 rollout=16 horizon=12 gamma=0.9"
    " model.fcnet_hiddens=[32]"
)
BRANCHES = "algo=SAC starts=null iterations=8 rollout=10 snapshots=2"


class Seek(gym.Env[Any, Any]):
    """Walk to the goal, +1 or -1, by half steps; the reward is minus the distance."""

    observation_space = spaces.Dict(
        {"goal": spaces.Discrete(2), "position": spaces.Box(-np.inf, np.inf, (1,), np.float64)}
    )
    action_space = spaces.Discrete(3, start=-1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.goal, self.t = int(self.np_random.integers(2)), 0
        self.position = float(self.np_random.normal())
        return self._observe(), {}

    def _observe(self) -> dict[str, Any]:
        return {"goal": np.int64(self.goal), "position": np.array([self.position])}

    def step(self, action: Any) -> Any:
        self.position, self.t = self.position + 0.5 * int(action), self.t + 1
        reward = -abs(self.position - (2 * self.goal - 1))
        return self._observe(), reward, False, self.t >= LENGTH, {}


gym.register("Seek-v0", entry_point=Seek)


@pytest.fixture(scope="module")
def seek(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Artifact]:
    """A root with random episodes of Seek and a world trained on them."""
    root = str(tmp_path_factory.mktemp("seek"))
    storage, env, rng = Storage(root), Seek(), np.random.default_rng(0)
    episodes = []
    for k in range(80):
        observations, rewards = [env.reset(seed=k)[0]], []
        actions = [np.int64(rng.integers(-1, 2)) for _ in range(LENGTH)]
        for action in actions:
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(reward)
        episodes.append(
            Episode(k, k, "random", observations, actions, np.array(rewards), "truncated")
        )

    def write(folder: Path) -> None:
        write_dataset(
            folder,
            episodes,
            id="seek",
            seed=0,
            valid_fraction=0.1,
            environment=Environment(id="Seek-v0", max_episode_steps=LENGTH),
            observation_space=Seek.observation_space,
            action_space=Seek.action_space,
        )

    data = Dataset([storage.make("datasets", "seek", {}, write).path])
    model = ModelConfig(family="ensemble", size="10k", members=2, base=False)
    world = fit_world(data, model, steps=300, batch=32, lr=2e-3)
    meta = {"inputs": {"datasets": ["seek"]}}
    return root, storage.make("worlds", "seek", meta, world.save)


def copy_world(world: Artifact, root: str, id: str, meta: dict[str, Any], **files: str) -> None:
    """Store a copy of the world with other metadata and JSON files."""

    def fill(folder: Path) -> None:
        shutil.copytree(world.path, folder, dirs_exist_ok=True)
        (folder / "COMMIT.json").unlink()
        for name, text in files.items():
            (folder / f"{name}.json").write_text(text)

    Storage(root).make("worlds", id, meta, fill)


def agent_config(root: str, overrides: str) -> AgentConfig:
    return load(AgentConfig, [], [f"storage.root={root}", *SMALL.split(), *overrides.split()])


def train_agent(config: AgentConfig) -> tuple[Artifact, list[dict[str, Any]], Path]:
    """The artifact, the logged iterations and the run's folder."""
    with tracking.start("train-agent", config, quiet=True) as run:
        artifact = JOB.run(config, run)
    path = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return artifact, [line for line in lines if "agent/imagined_steps" in line], run.folder


def real_return(policy: Policy, episodes: int = 40) -> float:
    env, total = Seek(), 0.0
    for k in range(episodes):
        observation, over = env.reset(seed=10_000 + k)[0], False
        while not over:
            observation, reward, _, over, _ = env.step(policy.act_one(observation))
            total += reward
    return total / episodes


def test_horizon_from_the_logs_or_the_config(seek: tuple[str, Artifact]) -> None:
    root, world = seek
    codec = json.loads((world.path / "codec.json").read_text())
    codec["environment"]["max_episode_steps"] = None
    text = json.dumps(codec)
    copy_world(world, root, "untimed", {"inputs": {"datasets": ["seek"]}}, codec=text)
    copy_world(world, root, "alone", {"inputs": {}}, codec=text)
    plan = JOB.plan(agent_config(root, "world=untimed horizon=null"))
    assert plan["horizon"].startswith(f"{LENGTH} steps: all 80 truncated episodes")
    alone = "world=alone starts=generated"
    with pytest.raises(UsageError, match="horizon must be set for worlds/alone"):
        JOB.plan(agent_config(root, f"{alone} horizon=null"))
    plan = JOB.plan(agent_config(root, f"{alone} horizon=7"))
    assert plan["horizon"] == "7 steps: as configured"


WHOLE = ("policy.json", "policy.safetensors", "value.safetensors", "training.safetensors")


@pytest.mark.slow
def test_ppo_trained_in_the_world_gains_in_reality(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    """On a Dict observation, from config alone."""
    root, _ = seek
    learning = "params.lr=5e-3 params.num_epochs=8 params.minibatch_size=128"
    long = agent_config(root, f"iterations=14 {learning}")
    artifact, lines, folder = train_agent(long)
    returns = [line["agent/imagined_return"] for line in lines]
    assert len(lines) == 14 and returns[-1] > returns[0] + 5, returns
    for line in lines:
        assert abs(line["agent/disagreement"]) <= np.log(2) + 0.1, "of two members"
        assert line["agent/entropy"] > 0
    assert abs(lines[-1]["agent/imagined_steps"] - 14 * 32 * 16) <= 14 * 32
    policy = Policy.load(artifact.path)
    # Staying put at best costs 12 x the mean distance, about -14; walking straight to the goal -4.
    assert real_return(policy) > -6
    assert policy.observation_space == Seek.observation_space
    assert policy.action_space == Seek.action_space
    assert artifact.meta["inputs"] == {"worlds": ["seek"], "datasets": ["seek"], "agents": []}
    assert (folder / "rllib").is_dir(), "and not ~/ray_results"
    snapshots = [int(path.name) for path in (artifact.path / "snapshots").iterdir()]
    assert sorted(snapshots) == [0, 2, 4, 5, 7, 9, 10, 12]
    metrics = artifact.meta["metrics"]
    assert metrics["best_return"] >= metrics["greedy_return"] and metrics["kept_iteration"] > 0
    assert metrics["best_return"] > returns[0]

    again, lines, _ = train_agent(long)
    assert again.id == artifact.id and not lines

    init = f"iterations=1 init={artifact.name}"
    warm, lines, _ = train_agent(agent_config(root, init))
    assert lines[0]["agent/imagined_return"] > returns[0] + 5, "begins where the former agent was"
    assert warm.meta["inputs"]["agents"] == [artifact.id]
    assert warm.meta["metrics"]["former_return"] > returns[0]

    ruined, _, _ = train_agent(agent_config(root, f"{init} params.lr=10"))
    metrics = ruined.meta["metrics"]
    assert metrics["kept_former"] and metrics["former_return"] > metrics["greedy_return"]
    for name in WHOLE:  # training failed: the artifact is the earlier agent
        assert (ruined.path / name).read_bytes() == (artifact.path / name).read_bytes()

    collapsed, _, _ = train_agent(agent_config(root, "iterations=3 snapshots=3 params.lr=10"))
    metrics = collapsed.meta["metrics"]
    best = int(metrics["kept_iteration"])
    assert best < 3 and metrics["best_return"] > metrics["greedy_return"], "not the last policy"
    for name in WHOLE[1:]:
        snapshot = collapsed.path / "snapshots" / str(best) / name
        assert (collapsed.path / name).read_bytes() == snapshot.read_bytes()
    with pytest.raises(UsageError, match="is of another network"):
        train_agent(agent_config(root, f"{init} model.fcnet_hiddens=[16]"))


def test_sac_learns_from_branches_and_from_the_logs(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    """It gains in reality, and its policy reads observations as they are."""
    root, _ = seek
    artifact, lines, _ = train_agent(agent_config(root, BRANCHES))
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[-1]["agent/imagined_steps"] == 8 * 10 * 32
    assert lines[-1]["agent/qf_loss"] < lines[0]["agent/qf_loss"]
    policy = Policy.load(artifact.path)
    assert real_return(policy) > -7.5, "a random policy earns -14"
    again = artifact.meta["config"]
    assert again["starts"] == "logged" and again["branch"] == 5 and again["real_share"] == 0.1


@pytest.mark.slow
def test_sac_continues_an_agent_and_keeps_a_better_rival(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    root, _ = seek
    artifact, _, _ = train_agent(agent_config(root, BRANCHES))
    init = agent_config(root, f"algo=SAC iterations=1 rollout=5 init={artifact.id} seed=1")
    continued, _, _ = train_agent(init)
    assert continued.meta["metrics"]["former_return"] == pytest.approx(
        artifact.meta["metrics"]["best_return"], abs=2.0
    )
    bad = agent_config(root, f"algo=SAC iterations=1 rollout=5 rival={artifact.id} snapshots=1")
    bad.updates_per_real_step = 1e-3
    rival, _, _ = train_agent(bad)
    metrics = rival.meta["metrics"]
    assert metrics["kept_former"] and metrics["former_return"] > metrics["greedy_return"]
    assert rival.meta["inputs"]["agents"] == [artifact.id]
    for name in WHOLE:
        assert (rival.path / name).read_bytes() == (artifact.path / name).read_bytes()


def test_later_data_keep_the_normalization_of_the_first(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    """Also of a new agent. With `init`, only data that are new to the agent call for updates."""
    root, _ = seek
    storage = Storage(root)
    first = Dataset([storage.artifact("datasets", "seek").path])
    shifted = [
        replace(e, observations=[o | {"position": o["position"] + 9} for o in e.observations])
        for e in list(first.iter_episodes("train"))[:10]
    ]

    def write(folder: Path) -> None:
        facts = {"observation_space": first.observation_space, "action_space": first.action_space}
        environment = Environment(id="Seek-v0", max_episode_steps=LENGTH)
        write_dataset(
            folder, shifted, id="late", seed=0, valid_fraction=0.0, environment=environment, **facts
        )

    storage.make("datasets", "late", {}, write)
    sac = "algo=SAC iterations=1 rollout=5 snapshots=0 updates_per_real_step=0.1"
    agents = [train_agent(agent_config(root, sac))[0]]
    for more in ("", f"init={agents[0].id}"):
        agents.append(train_agent(agent_config(root, f"{sac} {more} datasets=[seek,late]"))[0])
    moments = [load_file(agent.path / TRAINING_STATE)["mean"] for agent in agents]
    assert torch.equal(moments[0], moments[1]) and torch.equal(moments[0], moments[2])
    data = Dataset([storage.artifact("datasets", name).path for name in ("seek", "late")])
    config = agent_config(root, "algo=SAC iterations=2 updates_per_real_step=3")
    assert mbpo.updates(config, data, ["seek"]) == 10 * LENGTH * 3 / 2
    assert mbpo.updates(config, data, ["seek", "late"]) == mbpo.updates(config, data, [])


def test_whole_episodes_of_sac_begin_as_logged_ones_did(seek: tuple[str, Artifact]) -> None:
    """Its branches begin at any logged state. Other algorithms train on whole episodes."""
    root, _ = seek
    storage = Storage(root)
    data = Dataset([storage.artifact("datasets", "seek").path])
    run: Any = SimpleNamespace(storage=storage)
    counts = []
    for algo in ("SAC", "PPO"):
        plan = JOB.resolve(agent_config(root, f"algo={algo}"), storage)
        arguments = training._arguments(plan, run)
        whole = training._of_whole_episodes(plan, arguments)
        assert whole | {"starts": None} == arguments | {"starts": None}
        counts.append(len(whole["starts"][1].numbers))
    assert counts == [data.size("train"), data.count("train")]
    plan = JOB.resolve(agent_config(root, "algo=SAC starts=generated"), storage)
    arguments = training._arguments(plan, run)
    assert training._of_whole_episodes(plan, arguments) == arguments


def test_a_dry_run_of_sac_counts_whole_branches(seek: tuple[str, Artifact]) -> None:
    root, _ = seek
    plan = JOB.resolve(agent_config(root, "algo=SAC iterations=3 rollout=16"), Storage(root))
    assert JOB.summary(plan)["imagined steps"] == 3 * 32 * 20


@pytest.mark.parametrize("algo", ["SAC", "PPO", "DQN"])
def test_data_of_other_spaces_is_refused(algo: str, seek: tuple[str, Artifact]) -> None:
    root, _ = seek
    space, zero = spaces.Box(-1.0, 1.0, (3,), np.float32), np.zeros(3, np.float32)
    episode = Episode(0, 0, "random", [zero, zero], [zero], np.zeros(1), "truncated")

    def write(folder: Path) -> None:
        write_dataset(
            folder,
            [episode],
            id="other",
            seed=0,
            valid_fraction=0.0,
            environment=Environment(id="Seek-v0", max_episode_steps=LENGTH),
            observation_space=space,
            action_space=space,
        )

    storage = Storage(root)
    if storage.find("datasets", "other") is None:
        storage.make("datasets", "other", {}, write)
    with pytest.raises(UsageError, match="datasets/other has other spaces than the world"):
        JOB.resolve(agent_config(root, f"algo={algo} branch=1 datasets=[other]"), storage)


def test_dqn_trains_from_generated_starts_with_a_penalty(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    root, _ = seek
    overrides = (
        "algo=DQN starts=generated horizon=null iterations=3 penalty=0.5 rollout=4"
        " params.num_steps_sampled_before_learning_starts=64 params.train_batch_size_per_learner=32"
    )
    artifact, lines, _ = train_agent(agent_config(root, overrides))
    assert artifact.meta["inputs"]["datasets"] == [] and len(lines) == 3
    limit = artifact.meta["config"]["horizon"]
    assert limit == LENGTH == lines[-1]["agent/imagined_length"], "the environment's time limit"
    assert -40 < real_return(Policy.load(artifact.path), 5) < 0


@pytest.mark.slow
def test_a_return_that_the_logs_cannot_explain_is_a_warning(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    root, world = seek
    evidence = {"transitions": 900, "free": {"action": 0.02}, "fixed": ["action"]}
    evidence |= {"best_return": -99.0, "low_rate": -9.0, "high_rate": -8.0}
    copy_world(world, root, "blind", {"inputs": {"datasets": ["seek"]}, "evidence": evidence})
    short = "iterations=1 snapshots=0"
    artifact, _, folder = train_agent(agent_config(root, f"{short} world=blind"))
    verdicts = artifact.meta["checks"]
    assert "2.0% of its variance is free" in verdicts["actions"]
    assert "no 10 consecutive steps of the logs average more than -8" in verdicts["return"]
    assert (folder / "log.txt").read_text().count("warning: ") == 2
    plain, _, folder = train_agent(agent_config(root, short))
    assert plain.meta["checks"] == {} and "warning" not in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo=PP0", "algo must be one of .*got 'PP0'; did you mean 'PPO'"),
        ("params.learning_rat=1", "params.learning_rat is not a .* RLlib's PPO; did you mean"),
        ("params.minibatch_size=100000", "must be <= the 512 steps of an iteration, got 100000"),
        ("model.fcnet_hidden=[3]", "model.fcnet_hidden is not .*did you mean 'fcnet_hiddens'"),
        ("model.use_lstm=true", "cannot be exported"),
        ("horizon=0", "horizon must be >= 1, got 0"),
        ("starts=loged", "starts must be one of .* got 'loged'; did you mean 'logged'"),
        ("algo=SAC branch=13", "branch must be <= 12, the longest episode of the data, got 13"),
        ("algo=SAC params.training_intensity=4", "params.training_intensity is not used by SAC"),
        ("algo=SAC params.critic_lr=[[0,0.1],[9,0]]", "params.critic_lr must be one value"),
        ("algo=SAC model.fcnet_activation=elu", "fcnet_activation must be one of .* got 'elu'"),
        ("real_share=1.5", "real_share must be .* got 1.5"),
        ("updates_per_real_step=0", "updates_per_real_step must be .* got 0"),
        ("learners=-1", "learners must be >= 0, got -1"),
        ("algo=SAC learners=2", "learners must be 0 with algo=SAC, got 2; .*use PPO, APPO"),
        ("learners=2 params.minibatch_size=300", "the 256 steps of an iteration for each learner"),
        ("backend=remote", "backend must be one of .* got 'remote'"),
        ("penalty=-1", "penalty must be .* got -1"),
        ("world=nothere", "no artifact worlds/nothere"),
        ("init=nothere", "no artifact agents/nothere"),
        ("rival=nothere", "no artifact agents/nothere"),
        ("init=a rival=b", "rival must be null with init, got b"),
        ("datasets=[nothere]", "no artifact datasets/nothere"),
    ],
)
def test_wrong_config(seek: tuple[str, Artifact], override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        train_agent(agent_config(seek[0], override))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_settings_that_rllib_refuses(ray_local: None, seek: tuple[str, Artifact]) -> None:
    with pytest.raises(UsageError, match=r"RLlib's PPO refuses its settings: .*train_batch_size"):
        train_agent(agent_config(seek[0], "params.train_batch_size_per_learner=64"))
