"""OpenEnv's protocol for a served text world: many clients at once, in one batch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from mesocosm.config import StorageConfig
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import LISTENERS, deploy, undeploy
from mesocosm.serve.http_sessions import HttpSessions
from mesocosm.store.artifacts import Storage

from .conftest import Client
from .openenv_client import Socket
from .test_text_world import WORDS, text_world
from .worlds import TOKEN

pytestmark = pytest.mark.usefixtures("ray_local")
CLIENTS, STEPS = 64, 6


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[Client]:
    """A client of one replica of a text world."""
    root = str(tmp_path_factory.mktemp("texts"))
    Storage(root).make("worlds", "texts", {}, text_world().save)
    config = ServeConfig(world="texts", name="texts", cpus=0.5, http=0)
    config.storage = StorageConfig(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
        deploy(config)
        yield Client(LISTENERS["texts"].url)
    undeploy("texts")


def sessions() -> HttpSessions:
    served = LISTENERS["texts"].sessions
    assert served is not None
    return served


def steps(socket: Socket, first: int, count: int) -> list[Any]:
    """The replies to steps until the episode's end."""
    replies: list[Any] = []
    for step in range(first, first + count):
        if replies and replies[-1]["done"]:
            break
        replies.append(socket.step(WORDS[step % len(WORDS)]))
    return replies


def test_texts(texts: Client) -> None:
    """Observations and actions are the texts themselves, of any characters; a number that a client
    has parsed is the text that it was parsed from.
    """
    with Socket(texts) as socket:
        first = socket.reset(seed=3)["observation"]
        assert isinstance(first["text"], str) and not first["text"].startswith('"')
        assert isinstance(first["commands"], list)
        for action in ("take mug", "🙂 nimm 杯子", "", 42, [1, "two"], None):
            reply = socket.step(action)
            assert isinstance(reply["observation"]["text"], str)
            if reply["done"]:
                socket.reset(seed=4)
        code, message = socket.error({"type": "step", "data": {"text": "word " * 500}})
        assert code == "VALIDATION_ERROR" and "an action must have at most" in message
        state = socket.state()["step_count"]
        socket.step("look")
        assert socket.state()["step_count"] == state + 1
    schema = texts("GET", "/schema").json()["action"]
    assert schema["properties"]["text"]["description"] == "the action"


@pytest.mark.slow
def test_many_clients(texts: Client) -> None:
    """64 clients share batches, as many as their machine lets arrive together, equal ones have
    equal episodes, and all continue with the same texts when the replica dies.
    """
    from ray import serve

    seeds = range(8)
    expected = {}
    for seed in seeds:
        with Socket(texts) as socket:
            first = socket.reset(seed=seed)
            expected[seed] = [first, *steps(socket, 0, 2 * STEPS)]
    handle = serve.get_app_handle("texts")
    before = handle.batches.remote().result()
    begun, half = threading.Barrier(CLIENTS), threading.Barrier(CLIENTS + 1)
    measured: list[Any] = []

    def play(number: int) -> bool:
        seed = number % len(seeds)
        with Socket(texts) as socket:
            replies = [socket.reset(seed=seed)]
            begun.wait(240)
            replies += steps(socket, 0, STEPS)
            half.wait(240)
            half.wait(240)
            if not replies[-1]["done"]:
                replies += steps(socket, STEPS, STEPS)
            return replies == expected[seed]

    with ThreadPoolExecutor(CLIENTS) as pool:
        results = [pool.submit(play, number) for number in range(CLIENTS)]
        half.wait(240)
        after = handle.batches.remote().result()
        measured = [after[name] - before[name] for name in ("steps", "batches")]
        slot = next(iter(sessions().sessions._slots.values()))
        assert slot.value is not None
        connection: Any = slot.value._connection
        os.kill(connection.replica["pid"], signal.SIGKILL)
        half.wait(240)
        assert all(result.result(240) for result in results)
    mean = measured[0] / measured[1]
    print(f"{measured[0]} steps of {CLIENTS} clients in {measured[1]} batches: mean {mean:.1f}")
    assert mean > 1
