"""Autoscaling by the requests on lines, and its config keys."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from mesocosm.config import StorageConfig
from mesocosm.errors import UsageError
from mesocosm.serve.autoscaling import METRIC, OngoingRequests, desired_replicas
from mesocosm.serve.config import ServeConfig, check, first_replicas
from mesocosm.serve.connection import Served
from mesocosm.serve.world_env import WorldVectorEnv

from .worlds import local, played, untrained


def test_the_mean_of_ongoing_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ongoing = OngoingRequests()
    with ongoing:
        now[0] = 1.0
        with ongoing:
            now[0] = 2.0
        now[0] = 3.0
    now[0] = 4.0
    assert ongoing.mean() == 1.0, "1, 2, 1 and 0 requests for a second each"
    now[0] = 5.0
    assert ongoing.mean() == 0.0


@pytest.mark.parametrize(
    ("metrics", "desired"),
    [({}, 2), ({METRIC: {"a": 3.0, "b": 5.0}}, 4.5), ({METRIC: {"a": 0.0}}, 0.5)],
)
def test_the_policy(metrics: dict[str, Any], desired: float) -> None:
    config = SimpleNamespace(target_ongoing_requests=2.0)
    numbers = {"total_num_requests": 1.0, "target_num_replicas": 2}
    context = SimpleNamespace(aggregated_metrics=metrics, config=config, **numbers)
    assert desired_replicas(context) == (desired, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_replica": 2}, r"serve.autoscaling.max_replica is not .*did you mean 'max_replicas'"),
        ({"policy": "x:y"}, r"serve.autoscaling.policy is not a field"),
        ({"max_replicas": 0}, r"serve.autoscaling.max_replicas is refused .*, got 0"),
        ({"min_replicas": 3, "max_replicas": 2}, r"serve.autoscaling is refused .*, got \{"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        check(ServeConfig(autoscaling=fields))
    assert "\n" not in str(error.value)


def test_replicas_and_autoscaling() -> None:
    with pytest.raises(UsageError, match=r"serve.replicas must be 1 with serve.autoscaling, got 2"):
        check(ServeConfig(replicas=2, autoscaling={"max_replicas": 3}))
    fields: dict[str, Any] = {"min_replicas": 2, "max_replicas": 3}
    assert first_replicas(ServeConfig(autoscaling=fields)) == 2
    assert first_replicas(ServeConfig(autoscaling=fields | {"initial_replicas": 3})) == 3
    assert first_replicas(ServeConfig(replicas=4)) == 4


@pytest.mark.slow
def test_replicas_follow_the_clients(
    ray_local: None, store: Any, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four busy clients a second replica starts, and takes some of them, bit for bit."""
    from mesocosm.serve import connection
    from mesocosm.serve.deployment import deploy, undeploy

    monkeypatch.setattr(connection, "REROUTE_S", 0.5)
    store("w", untrained(family="sequence", terminal=0.1))
    fields: dict[str, Any] = {"max_replicas": 2, "target_ongoing_requests": 0.2}
    fields |= {"upscale_delay_s": 0.0, "look_back_period_s": 2.0, "metrics_interval_s": 1.0}
    config = ServeConfig(world="w", name="grows", cpus=0.1, storage=StorageConfig(root))
    config.autoscaling = fields
    deploy(config)
    pids: dict[int, set[int]] = {i: set() for i in range(4)}
    results: dict[int, bytes] = {}
    over = threading.Event()
    handles: list[Any] = []

    def client(i: int) -> None:
        env = WorldVectorEnv(3, app="grows", horizon=9, first_env=3 * i)
        assert isinstance(env._connection, Served)
        handles.append(env._connection._handle)

        def note(step: int) -> None:
            served = env._connection
            assert isinstance(served, Served)
            if served.replica is not None:
                pids[i].add(served.replica["pid"])

        while not over.is_set():
            results[i] = played(env, 50, before=note)
        env.close()

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in pids]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 300.0
        while len(set.union(*pids.values())) < 2:
            assert time.monotonic() < deadline, "no client has moved to a second replica"
            time.sleep(0.1)
    finally:
        over.set()
        for thread in threads:
            thread.join(60.0)
        undeploy("grows")
    for i, data in results.items():
        assert data == played(local("w", root, horizon=9, first_env=3 * i), 50)
    # One that went on to report would start Ray again once it is shut down.
    assert all(h._router._asyncio_router._metrics_manager._shutdown for h in handles)
