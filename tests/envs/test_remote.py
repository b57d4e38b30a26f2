"""Environments behind OpenEnv's protocol: `reality.env=openenv:URL`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from factories import free_port, wait_until
from openenv_server import LENGTH, TEXT, EchoServer

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of, make_env
from mesocosm.envs.remote import TOKEN
from mesocosm.errors import UsageError

pytestmark = pytest.mark.integration
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(scope="module")
def server() -> Iterator[EchoServer]:
    with EchoServer() as running:
        yield running


def remote(url: str, **config: Any) -> Any:
    return make_env(RealityConfig(env=f"openenv:{url}", **config))


def test_an_episode(server: EchoServer) -> None:
    env = remote(server.url, kwargs={"reset": {"split": "train"}})
    first, info = env.reset(seed=3, options={"level": 2})
    assert (first, info) == ("seed 3", {"admissible_commands": ["a", "b"], "success": False})
    sent = {"type": "reset", "data": {"seed": 3, "split": "train", "level": 2}}
    assert server.messages[-1] == sent
    results = [env.step(text) for text in ("go", "look", "é\n\u4e2d", "open", "good")]
    assert [result[0] for result in results] == ["go", "look", "?\n?", "open", "good"]
    assert [result[1] for result in results] == [2.0, 4.0, 3.0, 4.0, 4.0]
    assert [result[2:4] for result in results] == [(False, False)] * (LENGTH - 1) + [(True, False)]
    assert results[-1][4]["success"]
    assert env.reset(seed=4)[0] == "seed 4" and env.step("cut")[2:4] == (False, True)
    env.close()
    wait_until(lambda: server.open == 0)


def test_facts(server: EchoServer) -> None:
    """The server's own version counts, and looking at it leaves no session behind."""
    facts = facts_of(RealityConfig(env=f"openenv:{server.url}/", horizon=3))
    assert (facts.version, facts.max_episode_steps) == ("openenv echo 7", 3)
    assert facts.observation_space.contains("a text,\n2 lines") and facts.action_space.contains(
        "go"
    )
    wait_until(lambda: server.open == 0)
    env = remote(server.url, horizon=2, kwargs={"longest": 3, "characters": "é"})
    env.reset(seed=1)
    assert env.step("é" * 9)[0] == "ééé" and env.step("a")[2:4] == (False, True)
    env.close()


def test_other_schemas() -> None:
    """An action of one field that is no text, or of several, is JSON; so is an observation without
    a text.
    """
    with EchoServer({"action": NUMBER, "observation": {}}, json=True) as server:
        env = remote(server.url)
        assert env.reset(seed=1)[0] == '{"echo": "seed 1", "steps": 0, "commands": ["a", "b"]}'
        env.step("7")
        assert server.messages[-1]["data"] == {"n": 7}
        with pytest.raises(ValueError, match="the action 'seven' must be JSON"):
            env.step("seven")
        env.close()
    several = {"type": "object", "properties": {}, "required": []}
    schema = {"properties": {"echo": {"type": "string"}}}
    with EchoServer({"action": several, "observation": schema}, json=True) as server:
        env = remote(server.url, kwargs={"field": "echo"})
        assert env.reset(seed=1)[0] == "seed 1" and env.step('{"text": "hi"}')[0] == "hi"
        with pytest.raises(ValueError, match="the action '7' must be the JSON of an object"):
            env.step("7")
        env.close()
        with pytest.raises(UsageError, match=r"field must be a field .* \(echo\), got 'text'"):
            remote(server.url, kwargs={"field": "text"})


def test_a_lost_connection(server: EchoServer) -> None:
    """The step fails, and the next episode has a new connection. An error of the server fails the
    step alone.
    """
    env = remote(server.url)
    env.reset(seed=1)
    with pytest.raises(RuntimeError, match=r"refused step \(VALIDATION_ERROR\): no such command"):
        env.step("wrong")
    assert env.step("on")[0] == "on"
    with pytest.raises(ConnectionError, match="the server ended the connection at step"):
        env.step("crash")
    assert env.reset(seed=2)[0] == "seed 2"
    with pytest.raises(ConnectionError, match="ended the session at step: unused for long"):
        env.step("evict")
    assert env.reset(seed=3)[0] == "seed 3"
    env.unwrapped._connection.close()  # as a server does with a silent client
    assert env.reset(seed=3)[0] == "seed 3"
    env.close()


WRONG_SCHEMAS: list[Any] = [[], {"action": TEXT}, {"action": [], "observation": {}}]


def test_refused_before_work(server: EchoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence names the address, the problem and the fix."""

    def refused(url: str, message: str, **kwargs: Any) -> None:
        with pytest.raises(UsageError, match=message) as error:
            remote(url, kwargs=kwargs)
        assert "SECRET" not in str(error.value)

    monkeypatch.delenv(TOKEN, raising=False)
    rule = "reality.env must be openenv:http://HOST:PORT or openenv:https://HOST, got "
    for url in ("", "127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://a/?x=1"):
        refused(url, rule)
    refused("http://user:SECRET@127.0.0.1:1", f"must not name a user .* variable {TOKEN}")
    port = free_port()
    refused(f"http://127.0.0.1:{port}", f"{port}': no server answers there .*refused.*; start it")
    refused(f"{server.url}/elsewhere", "GET /schema gave HTTP 404; give the address of an OpenEnv")
    refused(server.url, "cannot be made with reality.kwargs=.*unexpected keyword", lenght=3)
    refused(server.url, "reality.kwargs.longest must be >= 1, got 0", longest=0)
    for schema in WRONG_SCHEMAS:
        with EchoServer(schema) as wrong:
            refused(wrong.url, "GET /schema has no 'action' and 'observation'")
    with EchoServer(token="SECRET") as guarded:
        refused(guarded.url, rf"refused GET /schema \(HTTP 401\); set .* {TOKEN} to its token")
        monkeypatch.setenv(TOKEN, "another")
        refused(guarded.url, rf"\(HTTP 401\); correct the environment variable {TOKEN}")
        monkeypatch.setenv(TOKEN, "SECRET")
        env = remote(guarded.url)
        assert env.reset(seed=5)[0] == "seed 5"
        env.close()
    refused("http://example.com", f"must be https, .*{TOKEN} would travel unencrypted")
