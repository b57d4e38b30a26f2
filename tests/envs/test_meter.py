"""Nothing touches reality around the meter: blocks are reserved before, confirmed after, and never
exceeded.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar, cast

import gymnasium
import numpy as np
import pytest
from factories import wait_until

from mesocosm.envs.amounts import Reservation
from mesocosm.envs.config import BudgetConfig, DrawnOption, PriceConfig, RealityConfig
from mesocosm.envs.episode import EpisodeError, episode_seed
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import make_env
from mesocosm.envs.meter import Meter
from mesocosm.envs.metered import MeteredEnv, make_metered_vector
from mesocosm.errors import BudgetSpent, MesocosmError
from mesocosm.store.artifacts import Storage

fork = multiprocessing.get_context("fork")
STILL = np.zeros(1, np.float32)


def line(**kwargs: Any) -> RealityConfig:
    return RealityConfig(env="ownenvs:Line", kwargs={"stretch": 0.0, **kwargs})


def opened(root: str, budget: int | None = None) -> Ledger:
    return Ledger(Storage(root), "x", BudgetConfig(budget))


def metered(
    ledger: Ledger, config: RealityConfig | None = None, seed: int = 0, **options: Any
) -> MeteredEnv:
    """An environment that was reset, with a meter for `collect`."""
    env = MeteredEnv(make_env(config or line()), Meter(ledger, "collect", **options))
    env.reset(seed=seed)
    return env


def take(env: MeteredEnv, steps: int) -> None:
    for _ in range(steps):
        env.step(STILL)


def test_every_step_is_reserved_before_and_confirmed_on_close(user_module: None, root: str) -> None:
    env, reader = metered(opened(root), block=10), opened(root)
    for taken in range(1, 26):
        env.step(STILL)
        totals = reader.totals().purposes["collect"]
        assert taken <= totals.steps <= 10 * -(-taken // 10)
    assert totals.unconfirmed_steps == 10
    env.close()
    totals = reader.totals().purposes["collect"]
    assert (totals.steps, totals.resets) == (25, 1)
    assert totals.unconfirmed_steps == totals.unconfirmed_resets == 0
    assert 0 < totals.seconds < 5


def test_the_budget_is_met_exactly_and_never_passed(user_module: None, root: str) -> None:
    env = metered(opened(root, 37), block=10)
    take(env, 37)
    with pytest.raises(BudgetSpent, match=r"reality.budget.steps=37 is spent"):
        env.step(STILL)
    assert env.unwrapped.t == 37
    totals = opened(root, 37).totals()
    assert totals.spent == 37 and totals.remaining == 0 and totals.unconfirmed == ()
    with pytest.raises(BudgetSpent):
        env.reset(seed=1)


def test_steps_count_once_when_ctrl_c_comes_while_a_block_is_reserved(
    user_module: None, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(root)
    env, reserve = metered(ledger, block=4), ledger.reserve
    take(env, 4)

    def interrupted(*words: Any, **options: Any) -> Reservation:
        signal.raise_signal(signal.SIGINT)
        return reserve(*words, **options)

    monkeypatch.setattr(ledger, "reserve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        env.step(STILL)
    env.close()
    assert ledger.totals().steps == env.meter.steps == 4 and ledger.totals().unconfirmed == ()


def test_the_limit_of_a_meter_reserves_no_more(user_module: None, root: str) -> None:
    ledger = opened(root)
    env = metered(ledger, limit=5)
    assert ledger.totals().steps == 5
    take(env, 5)
    with pytest.raises(BudgetSpent, match="limit of 5"):
        env.step(STILL)
    env.close()
    assert ledger.totals().steps == 5


def test_a_step_that_crashes_stays_spent(user_module: None, root: str) -> None:
    ledger = opened(root)
    env = metered(ledger, line(trouble={"7": "crash"}), seed=7)
    take(env, 2)
    with pytest.raises(RuntimeError):
        env.step(STILL)
    env.close()
    assert ledger.totals().steps == 3


def test_a_hanging_step_is_counted_and_the_meter_frozen(user_module: None, root: str) -> None:
    ledger = opened(root)
    env = metered(ledger)
    gate = threading.Event()
    env.step(STILL)
    inner = env.env.step
    env.env.step = lambda action: (gate.wait(30), inner(action))[1]  # type: ignore[method-assign]
    raised: list[BaseException] = []

    def work() -> None:
        try:
            env.step(STILL)
        except MesocosmError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: env.meter.busy_s() >= 0.05)
    assert env.meter.stop(10.0) is None
    usage = env.meter.stop(0.04)
    assert usage is not None and usage.steps == 2 and usage.seconds >= 0.05
    ledger.confirm(usage)
    gate.set()
    thread.join()
    with pytest.raises(EpisodeError, match="stopped"):
        env.step(STILL)
    env.close()
    assert len(raised) == 1 and ledger.totals().steps == 2 and ledger.totals().unconfirmed == ()


@pytest.mark.integration
def test_a_step_that_comes_back_after_all_is_confirmed_once(user_module: None, root: str) -> None:
    """Frozen in the middle of a step, by a thread that does not confirm."""
    ledger = opened(root)
    env = metered(ledger, line(trouble={"0": "hang"}, nap=2.0))
    take(env, 2)
    threading.Timer(0.3, lambda: env.meter.stop(0.1)).start()
    with pytest.raises(EpisodeError, match="stopped"):
        env.step(STILL)
    late = env.meter.stop()
    assert late is not None and late.steps == 3 and 0.1 < late.seconds < 2.0
    env.close()
    env.close()
    totals = ledger.totals()
    assert totals.steps == 3 and totals.unconfirmed == ()
    assert totals.purposes["collect"].seconds == pytest.approx(late.seconds, abs=1e-5)
    assert len(ledger.storage.list("ledgers/x")) == 2


def _step_until_killed(root: str, ready: Path) -> None:
    env = metered(opened(root), block=16)
    take(env, 20)
    ready.write_text("")
    time.sleep(600)


def test_a_kill_mid_block_is_not_under_counted(
    user_module: None, root: str, tmp_path: Path
) -> None:
    process = fork.Process(target=_step_until_killed, args=(root, tmp_path / "ready"))
    process.start()
    wait_until((tmp_path / "ready").exists)
    process.kill()
    process.join()
    totals = opened(root).totals().purposes["collect"]
    assert (totals.steps, totals.unconfirmed_steps, totals.unconfirmed_resets) == (32, 16, 8)


def _step_until_spent(root: str, out: Path) -> None:
    env = MeteredEnv(make_env(line()), Meter(opened(root, 301), "collect", block=8))
    taken = 0
    try:
        env.reset(seed=0)
        while True:
            env.step(STILL)
            taken += 1
    except BudgetSpent:
        env.close()
        out.write_text(str(taken))


def test_parallel_environments_take_exactly_the_budget(
    user_module: None, root: str, tmp_path: Path
) -> None:
    files = [tmp_path / str(i) for i in range(4)]
    processes = [fork.Process(target=_step_until_spent, args=(root, file)) for file in files]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sum(int(file.read_text()) for file in files) == 301 == opened(root, 301).totals().spent


class Counting(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Counts the calls of all instances."""

    calls: ClassVar = {"step": 0, "reset": 0}

    def step(self, action: Any) -> Any:
        self.calls["step"] += 1
        return super().step(action)

    def reset(self, **kwargs: Any) -> Any:
        self.calls["reset"] += 1
        return super().reset(**kwargs)


def test_a_vector_counts_steps_and_resets_apart(root: str) -> None:
    config = RealityConfig(env="CartPole-v1", price=PriceConfig(per_step=1.0, per_reset=100.0))
    vector = make_metered_vector(pickle.loads(pickle.dumps(config)), root, "x", "baseline", 3)
    inner: Any = vector.env
    inner.envs = [Counting(env) for env in inner.envs]
    vector.action_space.seed(0)
    vector.reset(seed=1)
    ended = 0
    for _ in range(120):
        _, _, terminated, truncated, _ = vector.step(vector.action_space.sample())
        ended += int((terminated | truncated).sum())
    vector.reset(options={"reset_mask": np.array([True, False, False])})
    vector.close()
    totals = Ledger(Storage(root), "x", price=config.price).totals().purposes["baseline"]
    assert ended > 5
    assert {"step": totals.steps, "reset": totals.resets} == Counting.calls
    assert totals.steps + totals.resets == 3 * 120 + 3 + 1 and totals.unconfirmed_steps == 0
    assert totals.price == totals.steps + 100 * totals.resets


def test_a_vector_never_passes_a_bound(root: str) -> None:
    config = RealityConfig(env="Pendulum-v1")
    vector = make_metered_vector(config, root, "x", "baseline", 4, {"baseline": 102})
    vector.reset(seed=0)
    taken = 0
    with pytest.raises(BudgetSpent, match=r"the bound of baseline=102 is spent .*, 2 left"):
        while True:
            vector.step(vector.action_space.sample())
            taken += 4
    vector.close()
    totals = Ledger(Storage(root), "x").totals()
    assert taken == 100 == totals.purposes["baseline"].steps and totals.unconfirmed == ()


def test_a_vector_draws_reset_options(user_module: None, root: str) -> None:
    options = {"wind": DrawnOption(low=0, high=1), "side": DrawnOption(choices=["east"])}
    task = {"task": list(options), "task_options": options}
    config = RealityConfig(env="ownenvs:Windy", horizon=4, **task)
    vector = make_metered_vector(config, root, "x", "baseline", 2)
    vector.reset(seed=episode_seed(0, 0))
    winds, inner = set(), cast(Any, vector.env)
    for _ in range(20):
        vector.step(np.zeros((2, 1), np.float32))
        winds |= {env.unwrapped.env.unwrapped.options["wind"] for env in inner.envs}
    vector.close()
    assert len(winds) >= 6


def test_an_environment_is_collected_by_a_thread_that_waits_for_nothing(
    user_module: None, root: str
) -> None:
    """The garbage collector may run in the thread that a holder of the ledger's lock waits for."""
    ledger = opened(root)
    env = metered(ledger, block=10)
    env.step(STILL)
    with ledger._lock:
        collector = threading.Thread(target=env._finalizer, daemon=True)
        collector.start()
        collector.join(timeout=60)
        assert not collector.is_alive()
    wait_until(lambda: not ledger.totals().unconfirmed)
    assert ledger.totals().purposes["collect"].steps == 1
