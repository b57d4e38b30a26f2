"""The learning rate's course, the watch over the loss, and what a wrong config gets. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.errors import UsageError
from mesocosm.pretrain.run import plan
from mesocosm.pretrain.schedule import FACTOR, MARGIN, PATIENCE, RECENT, Watch, lr_factor


def test_warm_up_stable_decay() -> None:
    course = [lr_factor(step, 100, 0.1, 0.4) for step in range(1, 101)]
    assert course[0] == pytest.approx(0.1) and course[9] == 1.0
    assert all(factor == 1.0 for factor in course[9:60])
    assert course[60] == 1.0 and course[80] == pytest.approx(0.5) and 0 < course[99] == pytest.approx(1 / 40)


def test_neither_warm_up_nor_decay() -> None:
    assert {lr_factor(step, 7, 0.0, 0.0) for step in range(1, 8)} == {1.0}


def test_a_single_step_is_taken() -> None:
    assert lr_factor(1, 1, 0.05, 0.4) == 1.0


def test_what_is_not_finite_is_named_with_its_step() -> None:
    assert Watch().check(3, loss=float("nan")) == "the loss is nan at step 3"
    assert Watch().check(4, gradient_norm=float("inf")) == "the gradient norm is inf at step 4"


def test_an_explosion_must_last() -> None:
    watch = Watch()
    for step in range(RECENT):
        assert watch.check(step, loss=2.0) is None
    high = FACTOR * 2.0 + MARGIN + 1
    for step in range(PATIENCE - 1):
        assert watch.check(step, loss=high) is None
    assert watch.check(99, loss=2.0) is None, "one good step clears it"
    told = [watch.check(100 + step, loss=high) for step in range(PATIENCE)]
    assert told[:-1] == [None] * (PATIENCE - 1)
    assert "exploded" in str(told[-1]) and f"step {100 + PATIENCE - 1}" in str(told[-1])


def test_the_watch_resumes_where_it_stood() -> None:
    watch = Watch()
    for step in range(RECENT):
        watch.check(step, loss=1.0)
    watch.check(RECENT, loss=1e6)
    again = Watch(list(watch.recent), watch.high)
    assert [w.check(0, loss=1e6) for w in (watch, again) for _ in range(PATIENCE - 1)][PATIENCE - 2 :: PATIENCE - 1] == [
        f"the loss exploded: 1e+06 nats a transition at step 0, after a median of {1:.4g}"
    ] * 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.datasets=[]", "data.datasets"),
        ("train.batch=9", "train.batch=9 cannot be divided among train.workers=2 x train.accumulate=1; use a multiple of 2"),
        ("train.zero_stage=4", "train.zero_stage=4"),
        ("train.precision=bf61", "did you mean 'bf16'"),
        ("train.lr=0", "train.lr=0"),
        ("train.epochs=1", "train.steps=5 and train.epochs=1"),
        ("train.warmup=0.7", "train.warmup=0.7"),
        ("train.workers=0", "train.workers=0"),
        ("model.size=31k", "model.size"),
        ("data.datasets=[carp]", "carp"),
    ],
)
def test_wrong_use_is_said_before_anything_starts(tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any], override: str, said: str) -> None:
    given = load(cart_root(tmp_path, 20), "train.steps=5", "train.workers=2", override)
    with pytest.raises(UsageError) as error:
        plan(given)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_plan_counts_without_doing(tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any]) -> None:
    told = plan(load(cart_root(tmp_path, 100), "train.epochs=2"))
    assert told["params"] > 1000 and told["flops"] > 0
    assert 2 <= told["epochs"] < 2.5 and 2 * told["unique"] <= told["transitions"] < 2.5 * told["unique"]
