"""Agents that see images, with real RLlib."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coin_grid import played
from factories import fit_world
from gymnasium import spaces

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.env import AgentEnv
from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import load
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.pixels import CoinGrid
from mesocosm.errors import UsageError
from mesocosm.evaluate.judge import judge
from mesocosm.jobs import train_agent
from mesocosm.model.config import ModelConfig
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.model.tokenizer.fsq import PatchFSQ, PatchNetworks
from mesocosm.model.world import World
from mesocosm.policies.image_policy import ImagePolicy
from mesocosm.policies.images import FRAMES, ImageEncoder, ImageMemory, check_tokenizer
from mesocosm.policies.policy import Layout, Policy, RandomPolicy
from mesocosm.policies.stored import load_policy
from mesocosm.runs import tracking
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Artifact, Storage

TINY = "backend=local iterations=2 num_envs=8 rollout=8 horizon=6 snapshots=1"
ENV = "mesocosm.envs.pixels:CoinGrid"


@pytest.fixture(scope="module")
def world(games: Dataset, dictionary: PatchDictionary) -> World:
    model = ModelConfig(size="10k", members=2, context=4, base=False)
    return fit_world(games.tokenized([dictionary]), model, steps=3)


@pytest.fixture
def root_with_world(root: str, games: Dataset, world: World) -> str:
    """A storage with the games `d0` and their world `w0`."""

    def copied(folder: Path) -> None:
        shutil.copytree(games.paths[0], folder, dirs_exist_ok=True)

    Storage(root).make("datasets", "d0", {}, copied)
    Storage(root).make("worlds", "w0", {"inputs": {"datasets": ["d0"]}}, world.save)
    return root


def encoder_of_games(dictionary: PatchDictionary) -> ImageEncoder:
    return ImageEncoder(CoinGrid().observation_space, [dictionary])


def policy_of_games(encoder: ImageEncoder, seed: int = 0) -> ImagePolicy:
    """A policy with random weights."""
    width = FRAMES * encoder.widths[0]
    layout = Layout("categorical", [{"kind": "linear", "in": width, "out": 3}])
    policy = Policy("PPO", encoder.space, spaces.Discrete(3), layout)
    for parameter in policy.network.parameters():
        values = np.random.default_rng(seed).standard_normal(parameter.shape)
        parameter.data.copy_(parameter.new_tensor(values))
    return ImagePolicy(policy, encoder)


def run_agent(root: str, *words: str) -> Artifact:
    keys = [f"storage.root={root}", "tracking.uri=none", "world=w0", *TINY.split(), *words]
    config = load(AgentConfig, [], keys)
    with tracking.start("train-agent", config, quiet=True) as run:
        return train_agent.JOB.run(config, run)


def test_a_memory_holds_the_last_frames(dictionary: PatchDictionary) -> None:
    encoder = encoder_of_games(dictionary)
    frames = np.concatenate([np.stack(played(k).observations) for k in range(6)])
    first, second = frames[:5], frames[5:10]
    memory = ImageMemory(encoder, 2)
    each = [encoder.features(frames)[0] for frames in (first, second)]
    for t in range(4):
        if t == 2:  # the second environment begins a new episode
            memory.restart(np.array([False, True]))
        seen = memory.see(np.stack([first[t], second[t]]))
        assert seen.shape == (2, FRAMES, encoder.widths[0])
        for row, (features, begun) in enumerate(zip(each, (0, 2 if t >= 2 else 0), strict=True)):
            for back in range(FRAMES):
                np.testing.assert_array_equal(seen[row, back], features[max(t - back, begun)])
        np.testing.assert_array_equal(encoder.of_episode(first)[t], seen[0])
    again = ImageMemory(encoder, 2)
    again.restore(memory.state())
    last = np.stack([first[4], second[4]])
    np.testing.assert_array_equal(again.see(last), memory.see(last))


def test_frames_and_their_codes_are_seen_alike(dictionary: PatchDictionary) -> None:
    """Also beside numbers, in the order of the space."""
    frames = np.concatenate([np.stack(played(k).observations) for k in range(4)])[:5]
    numbers = np.arange(10, dtype=np.float32).reshape(5, 2)
    space = spaces.Dict(
        [
            ("b", spaces.Box(-9, 9, (2,), np.float32)),
            ("a", spaces.Tuple([CoinGrid().observation_space, spaces.Discrete(3)])),
        ]
    )
    encoder = ImageEncoder(space, [dictionary])
    batch = {"b": numbers, "a": (frames, np.zeros(5, np.int64))}
    coded = {"b": numbers, "a": (dictionary.encode(frames), np.zeros(5, np.int64))}
    seen, of_codes = (ImageMemory(encoder, 5).see(each) for each in (batch, coded))
    np.testing.assert_array_equal(seen["a"][0], of_codes["a"][0])
    assert list(encoder.space.spaces) == ["b", "a"] and encoder.space.contains(
        {"b": seen["b"][0], "a": (seen["a"][0][0], seen["a"][1][0])}
    )
    np.testing.assert_array_equal(encoder.frames(coded)["a"][0], frames)


@pytest.mark.parametrize("kind", ["few", "many", "single pixels", "fsq"])
def test_features_of_codes_tell_them_apart(kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "fsq":
        tokenizer: Any = PatchFSQ((8, 8, 1), 4, PatchNetworks(16, (8, 8)))
    else:
        side, count = {"few": (4, 5), "many": (4, 40), "single pixels": (1, 40)}[kind]
        table = np.unique(rng.integers(0, 256, (count, side * side * 3)).astype(np.uint8), axis=0)
        tokenizer = PatchDictionary((4 * side, 4 * side, 3), side, table)
    codes = np.stack([np.arange(size) for size in tokenizer.sizes], 1)
    features = tokenizer.features(codes)
    assert features.dtype == np.float32 and np.abs(features).max() <= 1
    assert len(np.unique(features, axis=0)) == len(codes)
    assert tokenizer.features(codes[:1]).shape == (1, features.shape[1])


@pytest.mark.integration
def test_an_imagined_environment_gives_codes_and_continues(
    world: World, dictionary: PatchDictionary
) -> None:
    encoder = encoder_of_games(dictionary)
    whole, first, second = (
        AgentEnv(WorldVectorEnv(2, world, horizon=4), None, encoder) for _ in range(3)
    )
    assert whole.single_observation_space.shape == (FRAMES * encoder.widths[0],)

    def play(env: AgentEnv, steps: range) -> list[Any]:
        lines = []
        for step in steps:
            rows, rewards, *_ = env.step(np.array([step, step + 1]) % 3)
            lines.append((rows.tolist(), rewards.tolist()))
        return lines

    whole.reset(seed=5)
    expected = play(whole, range(11))
    first.reset(seed=5)
    before = play(first, range(6))
    second.restore(first.state())
    assert before + play(second, range(6, 11)) == expected


def test_policies_of_images_and_others_play_in_one_world(
    world: World, dictionary: PatchDictionary, tmp_path: Path
) -> None:
    class Follows:
        """Reads frames."""

        def act(self, observations: Any, explore: bool = False, rng: Any = None) -> Any:
            assert observations.shape[1:] == (40, 40, 3)
            return np.ones(len(observations), np.int64)

    policy = policy_of_games(encoder_of_games(dictionary))
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    assert isinstance(again, ImagePolicy) and again.encoder.id == policy.encoder.id
    players = [policy, Follows(), RandomPolicy(spaces.Discrete(3)), again]
    env = WorldVectorEnv(12, world, horizon=5, seed=1)
    returns, lengths = imagined_episodes(players, env, seed=1)
    assert lengths.max() <= 5 and np.isfinite(returns).all()


def test_a_policy_of_another_tokenizer_is_refused(dictionary: PatchDictionary) -> None:
    policy = policy_of_games(encoder_of_games(dictionary))
    check_tokenizer(policy, [dictionary], "agent", "worlds/w0")
    other = PatchDictionary((40, 40, 3), 8, dictionary.table[:-1])
    with pytest.raises(
        UsageError, match=r"agent sees images by another tokenizer than .*worlds/w0"
    ):
        check_tokenizer(policy, [other], "agent", "worlds/w0")


@pytest.mark.usefixtures("ray_local")
def test_an_agent_trains_on_codes_and_acts_on_frames(
    root_with_world: str, world: World, tmp_path: Path
) -> None:
    agent = run_agent(root_with_world)
    assert agent.meta["inputs"] == {"worlds": ["w0"], "datasets": ["d0"], "agents": []}
    alone = tmp_path / "alone"
    shutil.copytree(agent.path, alone)
    shutil.rmtree(Path(root_with_world) / "worlds")
    policy = load_policy(alone)
    assert isinstance(policy, ImagePolicy) and policy.algo == "PPO"
    reality = RealityConfig(env=ENV)
    reality.kwargs = {"steps": 12}
    ledger = Ledger(Storage(root_with_world), "judged")
    result = judge(policy, reality, ledger, episodes=3, seed=0)
    again = judge(policy, reality, ledger, episodes=3, seed=0)
    assert result.returns == again.returns and result.steps > 3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_later_agents_begin_with_an_earlier_one_of_the_same_tokenizer(
    root_with_world: str, games: Dataset, dictionary: PatchDictionary
) -> None:
    first = run_agent(root_with_world)
    second = run_agent(root_with_world, f"init={first.name}", "algo=PPO", "iterations=1")
    assert second.meta["inputs"]["agents"] == [first.id]
    other = PatchDictionary((40, 40, 3), 8, dictionary.table[::-1].copy())
    model = ModelConfig(size="10k", members=1, context=4, base=False)
    changed = fit_world(games.tokenized([other]), model, steps=1)
    facts = {"inputs": {"datasets": ["d0"]}}
    Storage(root_with_world).make("worlds", "w1", facts, changed.save)
    for key in ("init", "rival"):
        with pytest.raises(UsageError, match=f"{key}={first.name} sees images by another"):
            run_agent(root_with_world, "world=w1", f"{key}={first.name}")
    with pytest.raises(UsageError, match=r"algo must be PPO, APPO, IMPALA or DQN .* got SAC"):
        run_agent(root_with_world, "algo=SAC")


def test_the_codec_of_a_world_gives_frames_again(world: World) -> None:
    """`keep_codes` is of one client."""
    first, second = (WorldVectorEnv(2, world, horizon=3) for _ in range(2))
    first.keep_codes()
    assert first.reset(seed=0)[0].shape == (2, 25)
    assert second.reset(seed=0)[0].shape == (2, 40, 40, 3)
    assert not Codec.from_json(json.loads(json.dumps(world.codec))).codes
