"""Untrained worlds over any spaces, and one behind an HTTP ingress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import requests
import torch
from gymnasium import spaces

from mesocosm.config import StorageConfig
from mesocosm.data.loading.codec import Codec, Scaling
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.world import World
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import LISTENERS, deploy, undeploy
from mesocosm.store.artifacts import Artifact, Storage

Space = gymnasium.Space[Any]
BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
TWO = spaces.Discrete(2)


def scaling(n: int) -> Scaling:
    return Scaling(np.zeros(n), np.ones(n), np.full(n, 1e-4))


def untrained(
    observation: Space = BOX,
    action: Space = TWO,
    family: str = "ensemble",
    *,
    task: tuple[str, ...] = (),
    terminal: float = 0.05,
    rewards: tuple[float, ...] | None = None,
    seed: int = 0,
    **model: Any,
) -> World:
    """A world with random weights, whose episodes end with probability `terminal` per step.

    `model` holds keys of ModelConfig.
    """
    o, a = SpaceCodec(observation), SpaceCodec(action, "action")
    environment = {
        "id": "Test-v0",
        "version": "0",
        "kwargs": {},
        "task": list(task),
        "max_episode_steps": None,
        "success": None,
    }
    rest = {
        "reward_values": rewards,
        "reward_mean": 0.0,
        "reward_scale": 1.0,
        "reward_bin": 1e-3,
        "durations": False,
        "duration_mean": 0.0,
    }
    rest |= {"duration_scale": 1.0, "duration_bin": 1e-3, "terminal_rate": terminal}
    scalings = {
        "observation": scaling(o.numbers),
        "action": scaling(a.numbers),
        "options": scaling(0),
    }
    codec = Codec(o, a, environment, [], scalings, np.ones(o.numbers), rest)
    torch.manual_seed(seed)
    config = ModelConfig(
        family=family, **({"size": "10k", "members": 3, "base": False, "context": 6} | model)
    )
    net = build(codec.spec, config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return World(net, Base(codec.spec, config), codec.to_json())


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    return untrained


@pytest.fixture
def store(root: str) -> Callable[[str, World], Artifact]:
    """Commits a world under an id."""

    def commit(id: str, world: World) -> Artifact:
        return Storage(root).make("worlds", id, {}, world.save)

    return commit


TOKEN = "planted-token-4f1c9a0b7d"
OBSERVATION = spaces.Dict(
    {
        "place": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        "room": spaces.Discrete(4, start=1),
        "say": spaces.Text(4, min_length=0, charset='a"\\]'),
        "pair": spaces.Tuple([spaces.Box(-5, 5, (2, 1), np.int64), spaces.MultiBinary(2)]),
    }
)
ACTION = spaces.Dict(
    {
        "push": spaces.Box(np.array([-1, -0.7], np.float32), np.array([1, 0.7], np.float32)),
        "turn": spaces.Discrete(3, start=-1),
        "hands": spaces.MultiDiscrete([2, 3]),
        "say": spaces.Text(3, charset="ab-"),
    }
)


class Client:
    """An HTTP client of an ingress, with its token."""

    token = TOKEN

    def __init__(self, url: str, token: str = TOKEN):
        self.url = url
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def __call__(self, method: str, path: str, **arguments: Any) -> requests.Response:
        return self.session.request(method, self.url + path, timeout=90, **arguments)

    def begin(self, num_envs: int = 1, seed: int = 0) -> str:
        reply = self("POST", "/v1/reset", json={"num_envs": num_envs, "seed": seed})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["session"])


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with the world `rich`."""
    root = str(tmp_path_factory.mktemp("ingress"))
    Storage(root).make(
        "worlds",
        "rich",
        {},
        untrained(OBSERVATION, ACTION, "sequence", task=("room",), terminal=0.1).save,
    )
    return root


@pytest.fixture(scope="module")
def client(rich: str, ray_local: None) -> Iterator[Client]:
    """A client of two replicas behind an ingress on a free port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
        deploy(
            ServeConfig(
                world="rich", name="web", replicas=2, cpus=0.5, http=0, storage=StorageConfig(rich)
            )
        )
        yield Client(LISTENERS["web"].url)
    undeploy("web")
