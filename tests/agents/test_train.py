"""Agents trained in worlds, and the model-free baseline: real RLlib, real worlds, a real ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from factories import fit_world
from gymnasium import spaces

from mesocosm.agents import training as train
from mesocosm.agents.config import AgentConfig, BaselineConfig
from mesocosm.config import load
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import ArtifactError, MesocosmError, UsageError
from mesocosm.jobs import baseline
from mesocosm.model.config import ModelConfig
from mesocosm.policies.policy import Policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

pytestmark = pytest.mark.integration

OBSERVATIONS = spaces.Dict(
    {"goal": spaces.Discrete(2), "position": spaces.Box(-np.inf, np.inf, (1,), np.float64)}
)
ACTIONS = spaces.Discrete(3, start=-1)
LENGTH = 12
SMALL = [
    "backend=local",
    "starts=logged",
    "num_envs=32",
    "rollout=16",
    "horizon=12",
    "gamma=0.9",
    "model.fcnet_hiddens=[32]",
    "params.minibatch_size=128",
]


class Seek(gym.Env[Any, Any]):
    """Walk to the goal, +1 or -1, by half steps; the reward is minus the distance."""

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.goal, self.position, self.t = (
            int(self.np_random.integers(2)),
            float(self.np_random.normal()),
            0,
        )
        return self._observe(), {}

    def _observe(self) -> dict[str, Any]:
        return {"goal": np.int64(self.goal), "position": np.array([self.position])}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.position, self.t = self.position + 0.5 * int(action), self.t + 1
        return (
            self._observe(),
            -abs(self.position - (2 * self.goal - 1)),
            False,
            self.t >= LENGTH,
            {},
        )


gym.register("Seek-v0", entry_point=Seek)


@pytest.fixture(scope="module")
def seek(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Artifact]:
    """A root with random episodes of Seek and a world trained on them."""
    root = str(tmp_path_factory.mktemp("seek"))
    storage, env, rng = Storage(root), Seek(), np.random.default_rng(0)
    episodes = []
    for k in range(80):
        observations, actions, rewards = [env.reset(seed=k)[0]], [], []
        for _ in range(LENGTH):
            actions.append(np.int64(rng.integers(-1, 2)))
            observation, reward, *_ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        episodes.append(
            Episode(k, k, "random", observations, actions, np.array(rewards), "truncated")
        )
    facts: dict[str, Any] = {
        "environment": Environment(id="Seek-v0", max_episode_steps=LENGTH),
        "observation_space": OBSERVATIONS,
        "action_space": ACTIONS,
    }
    storage.make(
        "datasets",
        "seek",
        {},
        lambda folder: write_dataset(
            folder, episodes, id="seek", seed=0, valid_fraction=0.1, **facts
        ),
    )
    data = Dataset([storage.artifact("datasets", "seek").path])
    model = ModelConfig(family="ensemble", size="10k", members=2, base=False)
    world = fit_world(data, model, steps=300, batch=32, lr=2e-3)
    return root, storage.make("worlds", "seek", {"inputs": {"datasets": ["seek"]}}, world.save)


def test_horizon_from_the_logs_or_the_config(seek: tuple[str, Artifact]) -> None:
    root, world = seek
    storage = Storage(root)
    codec = json.loads((world.path / "codec.json").read_text())
    codec["environment"]["max_episode_steps"] = None

    def fill(folder: Path) -> None:
        shutil.copytree(world.path, folder, dirs_exist_ok=True)
        (folder / "COMMIT.json").unlink()
        (folder / "codec.json").write_text(json.dumps(codec))

    storage.make("worlds", "untimed", {"inputs": {"datasets": ["seek"]}}, fill)
    storage.make("worlds", "alone", {"inputs": {}}, fill)
    plan = train.JOB.plan(agent_config(root, "world=untimed", "horizon=null"))
    assert plan["horizon"].startswith(f"{LENGTH} steps: all 80 truncated episodes")
    alone = ["world=alone", "starts=generated"]
    with pytest.raises(UsageError, match="horizon must be set for worlds/alone"):
        train.JOB.plan(agent_config(root, *alone, "horizon=null"))
    plan = train.JOB.plan(agent_config(root, *alone, "horizon=7"))
    assert plan["horizon"] == "7 steps: as configured"


def agent_config(root: str, *overrides: str) -> AgentConfig:
    return load(AgentConfig, [], [f"storage.root={root}", "world=seek", *SMALL, *overrides])


def train_agent(config: AgentConfig) -> tuple[Artifact, list[dict[str, Any]], Path]:
    with tracking.start("train-agent", config, quiet=True) as run:
        artifact = train.JOB.run(config, run)
    path = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return artifact, [line for line in lines if "agent/imagined_steps" in line], run.folder


def real_return(policy: Policy, episodes: int = 40) -> float:
    env, totals = Seek(), []
    for k in range(episodes):
        observation, over, total = env.reset(seed=10_000 + k)[0], False, 0.0
        while not over:
            observation, reward, _, over, _ = env.step(policy.act_one(observation))
            total += reward
        totals.append(total)
    return float(np.mean(totals))


@pytest.mark.slow
def test_ppo_trained_in_the_world_gains_in_reality(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    """On a Dict observation, from config alone."""
    root, _ = seek
    artifact, lines, folder = train_agent(
        agent_config(root, "iterations=14", "params.lr=5e-3", "params.num_epochs=8")
    )
    returns = [line["agent/imagined_return"] for line in lines]
    assert len(lines) == 14 and returns[-1] > returns[0] + 5, returns
    assert all(
        abs(line["agent/disagreement"]) <= np.log(2) + 0.1 and line["agent/entropy"] > 0
        for line in lines
    ), "two members"
    assert abs(lines[-1]["agent/imagined_steps"] - 14 * 32 * 16) <= 14 * 32
    policy = Policy.load(artifact.path)
    # staying put at best costs 12 x the mean distance, about -14; walking straight to the goal
    # about -4
    assert real_return(policy) > -6
    assert policy.observation_space == OBSERVATIONS and policy.action_space == ACTIONS
    assert artifact.meta["inputs"] == {"worlds": ["seek"], "datasets": ["seek"], "agents": []}
    assert (folder / "rllib").is_dir(), "and not ~/ray_results"

    again, lines, _ = train_agent(
        agent_config(root, "iterations=14", "params.lr=5e-3", "params.num_epochs=8")
    )
    assert again.id == artifact.id and not lines

    warm, lines, _ = train_agent(agent_config(root, "iterations=1", f"init={artifact.name}"))
    assert lines[0]["agent/imagined_return"] > returns[0] + 5, "begins where the former agent was"
    assert warm.meta["inputs"]["agents"] == [artifact.id]
    assert warm.meta["metrics"]["former_return"] > returns[0]
    assert sorted(int(p.name) for p in (artifact.path / "snapshots").glob("*")) == [
        0,
        2,
        4,
        5,
        7,
        9,
        10,
        12,
    ]
    metrics = artifact.meta["metrics"]
    assert (
        metrics["best_return"] >= metrics["greedy_return"]
        and metrics["best_return"] > returns[0]
        and metrics["kept_iteration"] > 0
    )

    ruined, _, _ = train_agent(
        agent_config(root, "iterations=1", f"init={artifact.name}", "params.lr=10")
    )
    metrics = ruined.meta["metrics"]
    assert metrics["kept_former"] and metrics["former_return"] > metrics["greedy_return"]
    for name in ("policy.json", "policy.safetensors", "training.safetensors"):
        assert (ruined.path / name).read_bytes() == (artifact.path / name).read_bytes(), (
            "training failed: the whole earlier agent is best_iteration"
        )
    collapsed, _, _ = train_agent(agent_config(root, "iterations=3", "snapshots=3", "params.lr=10"))
    metrics, best_iteration = (
        collapsed.meta["metrics"],
        int(collapsed.meta["metrics"]["kept_iteration"]),
    )
    assert best_iteration < 3 and metrics["best_return"] > metrics["greedy_return"], (
        "the last policy is not the best, and not the agent"
    )
    for name in ("policy.safetensors", "training.safetensors"):
        assert (collapsed.path / name).read_bytes() == (
            collapsed.path / "snapshots" / str(best_iteration) / name
        ).read_bytes()
    with pytest.raises(ArtifactError, match="does not hold weights of this network"):
        train_agent(
            agent_config(root, "iterations=1", f"init={artifact.name}", "model.fcnet_hiddens=[16]")
        )


def test_dqn_trains_from_generated_starts_with_a_penalty(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    root, _ = seek
    overrides = [
        "algo=DQN",
        "starts=generated",
        "horizon=null",
        "iterations=3",
        "penalty=0.5",
        "model={fcnet_hiddens: [32]}",
        "rollout=4",
    ]
    config = agent_config(
        root,
        *overrides,
        "params={num_steps_sampled_before_learning_starts: 64, train_batch_size_per_learner: 32}",
    )
    config.params.pop("minibatch_size", None)
    artifact, lines, _ = train_agent(config)
    assert artifact.meta["inputs"]["datasets"] == [] and len(lines) == 3
    assert artifact.meta["config"]["horizon"] == LENGTH == lines[-1]["agent/imagined_length"], (
        "the environment's own time limit"
    )
    assert -40 < real_return(Policy.load(artifact.path), 5) < 0


def test_a_return_that_the_logs_cannot_explain_is_a_warning(
    ray_local: None, seek: tuple[str, Artifact]
) -> None:
    root, world = seek
    evidence = {
        "transitions": 900,
        "free": {"action": 0.02},
        "fixed": ["action"],
        "best_return": -99.0,
        "low_rate": -9.0,
        "high_rate": -8.0,
    }

    def copy(folder: Path) -> None:
        shutil.copytree(world.path, folder, dirs_exist_ok=True)
        (folder / "COMMIT.json").unlink()

    meta = {"inputs": {"datasets": ["seek"]}, "evidence": evidence}
    Storage(root).make("worlds", "blind", meta, copy)
    short = ["iterations=1", "snapshots=0", "world=blind"]
    artifact, _, folder = train_agent(agent_config(root, *short))
    assert "2.0% of its variance is free" in artifact.meta["checks"]["actions"]
    assert (
        "no 10 consecutive steps of the logs average more than -8"
        in artifact.meta["checks"]["return"]
    )
    assert (folder / "log.txt").read_text().count("warning: ") == 2
    plain, _, folder = train_agent(agent_config(root, "iterations=1", "snapshots=0"))
    assert plain.meta["checks"] == {} and "warning" not in (folder / "log.txt").read_text()


WRONG = [
    ("algo=PP0", "algo must be one of .*got 'PP0'; did you mean 'PPO'"),
    (
        "params.learning_rat=1",
        "params.learning_rat is not a parameter of RLlib's PPO; did you mean",
    ),
    (
        "params.minibatch_size=100000",
        "params.minibatch_size must be <= the 512 steps of an iteration, got 100000",
    ),
    ("model.fcnet_hidden=[3]", "model.fcnet_hidden is not a field .*did you mean 'fcnet_hiddens'"),
    ("model.use_lstm=true", "cannot be exported"),
    ("horizon=0", "horizon must be >= 1, got 0"),
    ("starts=loged", "starts must be one of .* got 'loged'; did you mean 'logged'"),
    ("backend=remote", "backend must be one of .* got 'remote'"),
    ("penalty=-1", "penalty must be .* got -1"),
    ("world=nothere", "no artifact worlds/nothere"),
    ("init=nothere", "no artifact agents/nothere"),
    ("datasets=[nothere]", "no artifact datasets/nothere"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_wrong_config(seek: tuple[str, Artifact], override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        train_agent(agent_config(seek[0], override))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_settings_that_rllib_refuses(ray_local: None, seek: tuple[str, Artifact]) -> None:
    with pytest.raises(UsageError, match=r"RLlib's PPO refuses its settings: .*train_batch_size"):
        train_agent(agent_config(seek[0], "params.train_batch_size_per_learner=64"))


# -- the baseline


def baseline_config(root: str, *overrides: str) -> BaselineConfig:
    return load(
        BaselineConfig,
        [],
        [f"storage.root={root}", "reality.env=CartPole-v1", "model.fcnet_hiddens=[32]", *overrides],
    )


def run_baseline(config: BaselineConfig) -> tuple[Artifact, dict[str, Any]]:
    with tracking.start("baseline", config, quiet=True) as run:
        artifact = baseline.JOB.run(config, run)
    return artifact, json.loads((artifact.path / baseline.CURVE).read_text())


def test_every_real_step_of_a_baseline_is_in_the_ledger(ray_local: None, root: str) -> None:
    config = baseline_config(
        root,
        "num_envs=4",
        "rollout=32",
        "steps=700",
        "target=5",
        "select_episodes=2",
        "select_every=100",
        "params.minibatch_size=64",
    )
    artifact, curve = run_baseline(config)
    totals = Ledger(Storage(root), curve["ledger"]).totals()
    spent = {name: purpose.steps for name, purpose in totals.purposes.items()}
    assert spent == {
        "collect": 0,
        "baseline": curve["train_steps"],
        "select": curve["select_steps"],
        "judge": 0,
    }
    assert (
        not totals.unconfirmed
        and curve["steps"] == curve["train_steps"] + curve["select_steps"] <= 700
    )
    # any policy survives 5 steps in CartPole: the target is reached, and confirming it was paid for
    assert (
        curve["reached"] == curve["steps"] and curve["select_steps"] > 0 and not curve["censored"]
    )
    kinds = [point["kind"] for point in curve["points"]]
    assert kinds[-1] == "select" and "train" in kinds
    assert [p["steps"] for p in curve["points"]] == sorted(p["steps"] for p in curve["points"])
    Policy.load(artifact.path / "policy")
    assert run_baseline(config)[0].id == artifact.id
    assert Ledger(Storage(root), curve["ledger"]).totals().steps == curve["steps"], (
        "the finished artifact is reused"
    )


def test_judging_does_not_count_as_baseline_steps(ray_local: None, root: str) -> None:
    shape = ["num_envs=2", "rollout=50", "judge_every=150", "judge_episodes=2"]
    _, curve = run_baseline(baseline_config(root, "steps=500", "target=500", *shape))
    totals = Ledger(Storage(root), curve["ledger"]).totals()
    judged = [point for point in curve["points"] if point["kind"] == "judge"]
    assert [point["steps"] // 50 * 50 for point in judged] == [200, 400] and all(
        len(point["returns"]) == 2 for point in judged
    )
    assert (
        curve["steps"] == curve["train_steps"] == totals.purposes["baseline"].steps <= 500
        and curve["select_steps"] == 0
    )
    assert (
        totals.purposes["judge"].steps
        == curve["judge_steps"]
        == sum(sum(point["returns"]) for point in judged)
    ), "one reward a step in CartPole"


@pytest.mark.parametrize("algo", ["PPO", pytest.param("DQN", marks=pytest.mark.slow)])
def test_a_baseline_never_exceeds_its_cap_and_ends_censored(
    ray_local: None, root: str, algo: str
) -> None:
    shape = (
        ["num_envs=3", "rollout=40", "params.minibatch_size=60"]
        if algo == "PPO"
        else ["num_envs=2", "rollout=1", "iteration_steps=60"]
    )
    learning = [] if algo == "PPO" else ["params.num_steps_sampled_before_learning_starts=50"]
    config = baseline_config(
        root,
        f"algo={algo}",
        "steps=400",
        "target=500",
        "ledger=shared",
        "reality.budget.steps=10",
        *shape,
        *learning,
    )
    _, curve = run_baseline(config)
    totals = Ledger(Storage(root), "shared").totals()
    assert curve["reached"] is None and curve["censored"] and 250 < curve["steps"] <= 400
    assert totals.purposes["baseline"].steps == curve["steps"] and not totals.unconfirmed


@pytest.mark.slow
def test_a_larger_batch_is_counted_before_it_is_taken(ray_local: None, root: str) -> None:
    shape = [
        "num_envs=3",
        "rollout=40",
        "params.train_batch_size_per_learner=240",
        "params.minibatch_size=60",
    ]
    _, curve = run_baseline(baseline_config(root, "steps=400", "target=500", *shape))
    assert 240 <= curve["steps"] <= 244 and curve["censored"], (
        "a second iteration would have passed the cap"
    )


@pytest.mark.slow
def test_an_environment_that_always_crashes(
    ray_local: None, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sample_envs"))
    config = baseline_config(
        root,
        "reality.env=ownenvs:Line",
        "reality.kwargs.trouble={None: crash}",
        "reality.horizon=20",
        "num_envs=2",
        "rollout=64",
    )
    with pytest.raises(
        MesocosmError,
        match=r"reality.env='ownenvs:Line' failed 5 times in a row .*the arm fell off",
    ):
        run_baseline(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=100", r"steps must be >= .* one iteration, got 100"),
        ("reality.env=CartPol-v1", "CartPol-v1"),
    ],
)
def test_a_wrong_baseline(root: str, override: str, message: str) -> None:
    config = load(BaselineConfig, [], [f"storage.root={root}", "reality.env=CartPole-v1", override])
    with pytest.raises(UsageError, match=message):
        run_baseline(config)
