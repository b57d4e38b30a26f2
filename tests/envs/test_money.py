"""The price of time, and a budget of money: reserved before, stopped before it is exceeded."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mesocosm.envs.amounts import Amount, Usage
from mesocosm.envs.config import BudgetConfig, PriceConfig, RealityConfig, check, check_affordable
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.meter import Meter, Report
from mesocosm.envs.metered import MeteredEnv, MeteredVectorEnv
from mesocosm.errors import BudgetSpent, UsageError
from mesocosm.store.artifacts import Storage

BY_TIME = PriceConfig(per_second=2.0, longest_s=3.0)


def opened(root: str, money: float | None, price: PriceConfig, steps: int | None = None) -> Ledger:
    return Ledger(Storage(root), "x", BudgetConfig(steps, money), price)


class Job(gymnasium.Env):
    """A step takes as long as its action names; negative: it fails, and nan: it has no duration."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 100, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        seconds = float(action[0])
        if seconds < 0:
            raise RuntimeError("the run failed")
        info = {} if math.isnan(seconds) else {"duration": seconds}
        return np.zeros(1, np.float32), 0.0, False, seconds > 50, info


def metered(ledger: Ledger, **options: Any) -> MeteredEnv:
    env = MeteredEnv(Job(), Meter(ledger, "collect", **options))
    env.reset()
    return env


def take(env: MeteredEnv, seconds: float) -> None:
    env.step(np.array([seconds], np.float32))


def test_money_buys_exactly_the_steps_it_pays_for(root: str) -> None:
    price = PriceConfig(per_step=0.1, per_reset=0.1)
    ledger = opened(root, 1.0, price)
    held = ledger.reserve("collect", 64, 8, least_resets=1)
    assert (held.steps, held.resets) == (9, 1)
    with pytest.raises(BudgetSpent, match=r"reality.budget.money=1 USD is spent .* raise it"):
        ledger.reserve("select", 1)
    ledger.confirm(Usage(held, 4, 1))
    assert ledger.totals().remaining_money == pytest.approx(0.5)
    assert ledger.reserve("judge", 100).steps == 100  # judging has bounds of its own
    assert opened(root, 2.0, price).reserve("collect", 100).steps == 15


@pytest.mark.parametrize("deferred", [False, True])
def test_a_declared_longest_duration_keeps_the_budget(root: str, deferred: bool) -> None:
    """12 USD are 6 seconds. A reset reports none; each step reserves 3."""
    ledger = opened(root, 12.0, BY_TIME)
    env = metered(ledger, block=10, deferred=deferred)
    for seconds in (1.0, 0.5, 1.5):
        take(env, seconds)
        assert ledger.totals().price <= 12
    take(env, 3.0)
    with pytest.raises(BudgetSpent, match="less than the next step may cost"):
        take(env, 0.1)
    if deferred:
        assert env.meter.settle(4, 1, lambda usage, beyond: usage.duration == 6.0)
    env.close()
    totals = ledger.totals()
    collect = totals.purposes["collect"]
    assert (collect.steps, collect.resets, collect.duration, collect.price) == (4, 1, 6.0, 12.0)
    assert totals.unconfirmed == () and totals.remaining_money == 0.0


def test_without_a_bound_the_longest_seen_is_reserved(root: str) -> None:
    """The first step may take any time, and a longer one than all before counts in full."""
    ledger = opened(root, 10.0, PriceConfig(per_second=1.0))
    env = metered(ledger, block=10)
    held = ledger.totals().unconfirmed[0]
    assert (held.steps, held.resets) == (1, 1)
    take(env, 2.0)
    take(env, 1.0)
    assert ledger.totals().purposes["collect"].price <= 10
    take(env, 4.0)
    with pytest.raises(BudgetSpent):  # 3 are left
        take(env, 0.5)
    env.close()
    assert ledger.totals().price == 7.0
    assert opened(root, 11.0, PriceConfig(per_second=1.0)).reserve("select", 9).duration == 4.0


def test_a_step_longer_than_declared_counts_in_full(root: str) -> None:
    ledger = opened(root, 12.0, BY_TIME)
    env = metered(ledger)
    take(env, 7.0)
    with pytest.raises(BudgetSpent):
        take(env, 0.0)
    env.close()
    assert ledger.totals().price == 14.0 and ledger.totals().remaining_money == 0.0


def test_a_failed_step_is_charged_the_longest_duration(root: str) -> None:
    ledger = opened(root, None, BY_TIME)
    env = metered(ledger)
    with pytest.raises(RuntimeError):
        take(env, -1.0)
    env.close()
    assert ledger.totals().purposes["collect"].duration == 3.0


def test_a_killed_worker_is_charged_what_it_reserved_and_confirmed_once(root: str) -> None:
    price, twice = (
        PriceConfig(1.0, 10.0, per_second=2.0, longest_s=3.0),
        opened(root, None, BY_TIME),
    )
    ledger = opened(root, 1000.0, price)
    held = ledger.reserve("collect", 4, 1)
    collect = ledger.totals().purposes["collect"]
    assert (collect.unconfirmed_duration, collect.unconfirmed_price) == (15.0, 4 + 10 + 30)
    usage = Usage(held, 2, 1, duration=1.5, longest=1.0)
    rest = twice.confirm(usage, keep=Amount(1, 0, duration=2.5))
    ledger.confirm(usage, keep=Amount(1, 0, duration=2.5))
    assert rest is not None and rest.duration == 2.5
    assert ledger.totals().price == 3 + 10 + 2 * 4.0


def test_the_duration_survives_a_snapshot(root: str) -> None:
    ledger, price = opened(root, None, PriceConfig(per_second=1.0)), PriceConfig(per_second=1.0)
    for _ in range(40):
        ledger.confirm(Usage(ledger.reserve("collect", 1), 1, 0, 0.1, 0.25, 0.25, 7))
    other = opened(root, None, price)
    collect = other.totals().purposes["collect"]
    assert (collect.duration, collect.text_bytes, other.longest()) == (10.0, 280, 0.25)


def test_time_with_a_price_needs_durations(root: str) -> None:
    env = metered(opened(root, None, BY_TIME))
    with pytest.raises(UsageError, match=r"reality.price.per_second needs info\['duration'\]"):
        take(env, math.nan)
    env.close()


def test_a_vector_adds_the_durations_of_its_members(root: str) -> None:
    ledger = opened(root, None, BY_TIME)
    vector = SyncVectorEnv([Job, Job], autoreset_mode=AutoresetMode.NEXT_STEP)
    env = MeteredVectorEnv(vector, Meter(ledger, "baseline"))
    env.reset()
    for seconds in ((1.0, 60.0), (2.0, 5.0), (0.5, 0.25)):  # the second member ends, and is reset
        env.step(np.array(seconds, np.float32)[:, None])
    env.close()
    totals = ledger.totals().purposes["baseline"]
    assert (totals.steps, totals.resets, totals.duration) == (5, 3, 63.75)


def test_more_steps_than_the_money_buys_are_refused_before_work_starts(root: str) -> None:
    reality = RealityConfig(env="x", price=PriceConfig(1.0, 5.0), budget=BudgetConfig(money=30.0))
    check_affordable(reality, 25)
    check_affordable(reality, 0)
    with pytest.raises(UsageError, match=r"reality.budget.money must be >= 31 USD, .* got 30"):
        check_affordable(reality, 26)


@pytest.mark.parametrize(
    ("price", "money", "message"),
    [
        (PriceConfig(), 5.0, "reality.budget.money=5 has no effect if reality is free"),
        (PriceConfig(1.0), 0.0, "reality.budget.money must be above 0 and finite, got 0"),
        (PriceConfig(1.0), math.nan, "reality.budget.money must be above 0"),
        (PriceConfig(per_second=-1.0), None, "reality.price.per_second must be in"),
        (PriceConfig(1.0, longest_s=3.0), None, "longest_s must be null unless .* got 3"),
        (PriceConfig(per_second=1.0, longest_s=0.0), None, "reality.price.longest_s must be above"),
    ],
)
def test_wrong_prices_are_refused(price: PriceConfig, money: float | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(RealityConfig(env="x", price=price, budget=BudgetConfig(money=money)))


def test_money_for_resets_alone_buys_all_of_them(root: str) -> None:
    """Where a step is free, the budget is spent reset by reset."""
    env = metered(opened(root, 70.0, PriceConfig(per_reset=10.0)))
    for _ in range(6):
        env.reset()
        take(env, 1.0)
    with pytest.raises(BudgetSpent, match=r"reality.budget.money=70 USD is spent"):
        env.reset()


def test_resets_reserved_ahead_starve_no_other_meter(root: str) -> None:
    ledger = opened(root, 200.0, PriceConfig(per_step=0.1, per_reset=10.0))
    for env in [metered(ledger) for _ in range(4)]:
        for _ in range(5):
            take(env, 1.0)


def test_a_step_without_a_duration_is_seen_wherever_it_is_in_a_vector() -> None:
    for infos in ([{}, {"duration": 1.0}], [{"duration": 1.0}, {}]):
        report = Report(missing=2)
        for info in infos:
            report.step(info)
        assert report.lacks


def test_a_budget_of_exactly_the_price_is_enough() -> None:
    config = RealityConfig(env="CartPole-v1", price=PriceConfig(per_step=0.1))
    config.budget = BudgetConfig(money=0.3)
    check_affordable(config, 3)
    with pytest.raises(UsageError, match=r"reality\.budget\.money must be >= 0\.4"):
        check_affordable(config, 4)
