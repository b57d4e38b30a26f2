"""A store of worlds, and a world behind an HTTP ingress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import requests
from gymnasium import spaces

from mesocosm.config import StorageConfig
from mesocosm.model.world import World
from mesocosm.serve import http_sessions
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import LISTENERS, deploy, undeploy
from mesocosm.store.artifacts import Artifact, Storage

from .worlds import DICT, TOKEN, untrained

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


@pytest.fixture(scope="package", autouse=True)
def patient() -> Iterator[None]:
    """A replica of a very busy machine takes long to start again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_sessions, "DEADLINE_S", 4 * http_sessions.DEADLINE_S)
        yield


@pytest.fixture
def store(root: str) -> Callable[[str, World], Artifact]:
    """Commits a world under an id."""

    def commit(id: str, world: World) -> Artifact:
        return Storage(root).make("worlds", id, {}, world.save)

    return commit


class Client:
    """An HTTP client of an ingress, with its token."""

    def __init__(self, url: str, token: str = TOKEN):
        self.url, self.token = url, token
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def __call__(self, method: str, path: str, **arguments: Any) -> requests.Response:
        return self.session.request(method, self.url + path, timeout=300, **arguments)

    def post(self, path: str, body: Any = None, kind: str = "json") -> requests.Response:
        """POST JSON of `body`, or the bytes themselves as application/`kind`."""
        if not isinstance(body, bytes):
            return self("POST", path, json=body)
        return self("POST", path, data=body, headers={"Content-Type": f"application/{kind}"})

    def begin(self, num_envs: int = 1, seed: int = 0) -> str:
        reply = self.post("/v1/reset", {"num_envs": num_envs, "seed": seed})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["session"])


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with the world `rich`."""
    root = str(tmp_path_factory.mktemp("ingress"))
    world = untrained(OBSERVATION, ACTION, "sequence", task=("room",), terminal=0.1)
    Storage(root).make("worlds", "rich", {}, world.save)
    return root


@pytest.fixture(scope="module")
def client(rich: str, ray_local: None) -> Iterator[Client]:
    """A client of two replicas behind an ingress on a free port."""
    storage = StorageConfig(rich)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
        deploy(ServeConfig(world="rich", name="web", replicas=2, cpus=0.5, http=0, storage=storage))
        yield Client(LISTENERS["web"].url)
    undeploy("web")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[str]:
    """A storage root with a world of each family, which the application `two` serves."""
    root = str(tmp_path_factory.mktemp("served"))
    for family in ("ensemble", "sequence"):
        world = untrained(DICT, family=family, terminal=0.1)
        Storage(root).make("worlds", family, {}, world.save)
    deploy(ServeConfig(world="ensemble", name="two", replicas=2, storage=StorageConfig(root)))
    yield root
    undeploy("two")
