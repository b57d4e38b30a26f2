"""Nothing touches reality around the meter: blocks are reserved before, confirmed after, and never
exceeded.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mesocosm.envs.config import BudgetConfig, DrawnOption, PriceConfig, RealityConfig
from mesocosm.envs.episode import EpisodeError, episode_seed
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import make_env
from mesocosm.envs.meter import Meter, MeteredEnv, make_metered_vector
from mesocosm.errors import BudgetSpent, MesocosmError
from mesocosm.store.artifacts import Storage

LINE = RealityConfig(env="ownenvs:Line", kwargs={"stretch": 0.0})
STILL = np.zeros(1, np.float32)


def opened(root: str, **bounds: int) -> Ledger:
    return Ledger(Storage(root), "x", BudgetConfig(bounds.pop("budget", None)), bounds=bounds)


def test_every_step_is_reserved_before_and_confirmed_on_close(own: Path, root: str) -> None:
    env, eye = MeteredEnv(make_env(LINE), Meter(opened(root), "collect", block=10)), opened(root)
    env.reset(seed=0)
    for taken in range(1, 26):
        env.step(STILL)
        totals = eye.totals().purposes["collect"]
        assert totals.steps >= taken and totals.steps <= 10 * -(-taken // 10)
    assert totals.unconfirmed_steps == 10
    env.close()
    totals = eye.totals().purposes["collect"]
    assert (totals.steps, totals.resets, totals.unconfirmed_steps, totals.unconfirmed_resets) == (
        25,
        1,
        0,
        0,
    )
    assert 0 < totals.seconds < 5


def test_the_budget_is_met_exactly_and_never_passed(own: Path, root: str) -> None:
    env = MeteredEnv(make_env(LINE), Meter(opened(root, budget=37), "collect", block=10))
    env.reset(seed=0)
    for _ in range(37):
        env.step(STILL)
    at = env.unwrapped.t
    with pytest.raises(BudgetSpent, match=r"reality.budget.steps=37 is spent"):
        env.step(STILL)
    assert env.unwrapped.t == at == 37
    totals = opened(root, budget=37).totals()
    assert totals.spent == 37 and totals.remaining == 0 and totals.unconfirmed == ()
    with pytest.raises(BudgetSpent):
        env.reset(seed=1)


def test_the_limit_of_a_meter_reserves_no_more(own: Path, root: str) -> None:
    ledger = opened(root)
    env = MeteredEnv(make_env(LINE), Meter(ledger, "collect", limit=5))
    env.reset(seed=0)
    assert ledger.totals().steps == 5
    for _ in range(5):
        env.step(STILL)
    with pytest.raises(BudgetSpent, match="limit of 5"):
        env.step(STILL)
    env.close()
    assert ledger.totals().steps == 5


def test_a_step_that_crashes_stays_spent(own: Path, root: str) -> None:
    ledger = opened(root)
    env = MeteredEnv(
        make_env(RealityConfig(env="ownenvs:Line", kwargs={"trouble": {"7": "crash"}})),
        Meter(ledger, "collect"),
    )
    env.reset(seed=7)
    for _ in range(2):
        env.step(STILL)
    with pytest.raises(RuntimeError):
        env.step(STILL)
    env.close()
    assert ledger.totals().steps == 3


def test_a_hanging_step_is_counted_and_the_meter_frozen(own: Path, root: str) -> None:
    ledger = opened(root)
    env = MeteredEnv(make_env(LINE), Meter(ledger, "collect"))
    gate = threading.Event()
    env.reset(seed=0)
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
    while env.meter.busy_s() < 0.05:
        time.sleep(0.01)
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


def test_a_step_that_comes_back_after_all_is_confirmed_once(own: Path, root: str) -> None:
    """Frozen in the middle of a step; who froze it never reads the answer."""
    ledger = opened(root)
    env = MeteredEnv(
        make_env(RealityConfig(env="ownenvs:Line", kwargs={"trouble": {"0": "hang"}, "nap": 2.0})),
        Meter(ledger, "collect"),
    )
    env.reset(seed=0)
    for _ in range(2):
        env.step(STILL)
    asked = threading.Timer(0.3, lambda: env.meter.stop(0.1))
    asked.start()
    with pytest.raises(EpisodeError, match="stopped"):
        env.step(STILL)
    late = env.meter.stop()
    assert late is not None and late.steps == 3 and 0.1 < late.seconds < 2.0
    env.close()
    env.close()
    totals = ledger.totals()
    assert (
        totals.steps == 3
        and totals.unconfirmed == ()
        and totals.purposes["collect"].seconds == pytest.approx(late.seconds, abs=1e-5)
    )
    assert len(ledger.storage.list("ledgers/x")) == 2


def _step_until_killed(root: str, ready: str) -> None:
    env = MeteredEnv(make_env(LINE), Meter(opened(root), "collect", block=16))
    env.reset(seed=0)
    for _ in range(20):
        env.step(STILL)
    Path(ready).write_text("")
    time.sleep(600)


def test_a_kill_mid_block_is_not_under_counted(own: Path, root: str, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_step_until_killed, args=(root, str(tmp_path / "ready"))
    )
    process.start()
    while not (tmp_path / "ready").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    totals = opened(root).totals().purposes["collect"]
    assert (totals.steps, totals.unconfirmed_steps, totals.unconfirmed_resets) == (32, 16, 8)


def _collect_in_parallel(root: str, out: str) -> None:
    env = MeteredEnv(make_env(LINE), Meter(opened(root, budget=301), "collect", block=8))
    taken = 0
    try:
        env.reset(seed=0)
        while True:
            env.step(STILL)
            taken += 1
    except BudgetSpent:
        env.close()
        Path(out).write_text(str(taken))


def test_parallel_environments_take_exactly_the_budget(
    own: Path, root: str, tmp_path: Path
) -> None:
    started = [
        multiprocessing.get_context("fork").Process(
            target=_collect_in_parallel, args=(root, str(tmp_path / str(i)))
        )
        for i in range(4)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert (
        sum(int((tmp_path / str(i)).read_text()) for i in range(4))
        == 301
        == opened(root, budget=301).totals().spent
    )


def test_a_vector_counts_steps_and_resets_apart(root: str) -> None:
    config = RealityConfig(env="CartPole-v1", price=PriceConfig(per_step=1.0, per_reset=100.0))
    vector = make_metered_vector(pickle.loads(pickle.dumps(config)), root, "x", "baseline", 3)
    inner = vector.env.envs  # type: ignore[attr-defined]
    count = {"step": 0, "reset": 0}
    for env in inner:
        for name in count:
            call = getattr(env, name)
            setattr(
                env,
                name,
                lambda *a, _name=name, _call=call, **k: (
                    count.__setitem__(_name, count[_name] + 1),
                    _call(*a, **k),
                )[1],
            )
    vector.action_space.seed(0)
    vector.reset(seed=1)
    ended = 0
    for _ in range(120):
        _, _, terminated, truncated, _ = vector.step(vector.action_space.sample())
        ended += int((terminated | truncated).sum())
    mask = np.array([True, False, False])
    vector.reset(options={"reset_mask": mask})
    vector.close()
    totals = Ledger(Storage(root), "x", price=config.price).totals().purposes["baseline"]
    assert ended > 5
    assert (totals.steps, totals.resets) == (count["step"], count["reset"])
    assert totals.steps + totals.resets == 3 * 120 + 3 + 1 and totals.unconfirmed_steps == 0
    assert totals.price == totals.steps + 100 * totals.resets


def test_a_vector_never_passes_a_bound(root: str) -> None:
    vector = make_metered_vector(
        RealityConfig(env="Pendulum-v1"), root, "x", "baseline", 4, {"baseline": 102}
    )
    vector.reset(seed=0)
    taken = 0
    with pytest.raises(
        BudgetSpent,
        match=r"leaves 2 real steps for baseline, fewer than the 4|the bound of baseline=102",
    ):
        while True:
            vector.step(vector.action_space.sample())
            taken += 4
    vector.close()
    totals = Ledger(Storage(root), "x").totals()
    assert taken == 100 == totals.purposes["baseline"].steps and totals.unconfirmed == ()


def test_a_vector_draws_reset_options(own: Path, root: str) -> None:
    config = RealityConfig(
        env="ownenvs:Windy",
        task=["wind", "side"],
        task_options={"wind": DrawnOption(low=0, high=1), "side": DrawnOption(choices=["east"])},
        horizon=4,
    )
    vector = make_metered_vector(config, root, "x", "baseline", 2)
    vector.reset(seed=episode_seed(0, 0))
    winds = set()
    for _ in range(20):
        vector.step(np.zeros((2, 1), np.float32))
        winds |= {env.unwrapped.env.unwrapped.options["wind"] for env in vector.env.envs}  # type: ignore[attr-defined]
    vector.close()
    assert len(winds) >= 6


def test_an_environment_is_collected_by_a_thread_that_waits_for_nothing(
    own: Path, root: str
) -> None:
    """The garbage collector may run in the thread that a holder of the ledger's lock waits for."""
    book = opened(root)
    env = MeteredEnv(make_env(LINE), Meter(book, "collect", block=10))
    env.reset(seed=0)
    env.step(STILL)
    with book._lock:
        collector = threading.Thread(target=env._finalizer, daemon=True)
        collector.start()
        collector.join(timeout=60)
        assert not collector.is_alive()
    until = time.monotonic() + 60
    while book.totals().unconfirmed and time.monotonic() < until:
        time.sleep(0.01)
    totals = book.totals()
    assert not totals.unconfirmed and totals.purposes["collect"].steps == 1
