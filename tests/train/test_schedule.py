"""The learning rate schedule, the detection of divergence, and errors of the config. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.errors import UsageError
from mesocosm.jobs.pretrain import JOB
from mesocosm.runs import tracking
from mesocosm.train import engine
from mesocosm.train.schedule import (
    FACTOR,
    GRACE,
    MARGIN,
    PATIENCE,
    Judgement,
    Watch,
    due,
    judged_steps,
    lr_factor,
    overtrained,
)


def test_warm_up_stable_decay() -> None:
    factors = [lr_factor(step, 100, 0.1, 0.4) for step in range(1, 101)]
    assert factors[0] == pytest.approx(0.1) and factors[9:61] == [1.0] * 52
    assert factors[80] == pytest.approx(0.5) and 0 < factors[99] == pytest.approx(1 / 40)
    assert {lr_factor(step, 7, 0.0, 0.0) for step in range(1, 8)} == {1.0}
    assert lr_factor(1, 1, 0.05, 0.4) == 1.0


def test_weights_are_judged_more_often_while_they_are_young() -> None:
    assert sorted(judged_steps(400, 0.05)) == [23, 35, 53, 79, 119, 178, 267, 400]
    assert judged_steps(1, 0.05) == {1} and judged_steps(10, 1.0) == {10}
    assert max(judged_steps(12, 0.0)) == 12 and min(judged_steps(12, 0.0)) == 1


def test_training_ends_where_held_out_data_are_predicted_worse_and_not_on_a_plateau() -> None:
    best = Judgement(100, 68.0, 60.0)
    assert overtrained(Judgement(250, 70.0, 59.0), best)
    assert not overtrained(Judgement(240, 70.0, 59.0), best), "too early to say"
    assert not overtrained(Judgement(900, 68.5, 59.0), best), "a plateau"
    assert not overtrained(Judgement(250, 70.0, 61.0), best), "the learning rate is too high"
    assert overtrained(Judgement(250, -1.9, -3.0), Judgement(100, -2.0, -2.5))


def test_a_value_that_is_not_finite_is_named_with_its_step() -> None:
    assert Watch().check(3, loss=float("nan")) == "the loss is nan at step 3"
    assert Watch().check(4, gradient_norm=float("inf")) == "the gradient norm is inf at step 4"


def problems(watch: Watch, *losses: float, start: int = 1) -> list[str | None]:
    return [watch.check(step, loss=loss) for step, loss in enumerate(losses, start)]


def test_an_explosion_must_last() -> None:
    watch, high = Watch(), FACTOR * 2.0 + MARGIN + 1
    losses = [2.0] * 64 + [high] * (PATIENCE - 1) + [2.0]
    assert not any(problems(watch, *losses)), "one good step clears it"
    *before, report = problems(watch, *[high] * PATIENCE, start=100)
    assert before == [None] * (PATIENCE - 1)
    message = f"{high:.4g} nats a transition at step {99 + PATIENCE}, after 2 at its best"
    assert report == f"the loss exploded: {message}"


@pytest.mark.parametrize("good", [1, 3, GRACE, 30])
def test_an_early_explosion_is_noticed_soon(good: int) -> None:
    reports = problems(Watch(), *[2.0] * good, *[1e6] * 20)
    assert [bool(r) for r in reports].index(True) + 1 == max(good + PATIENCE, GRACE + 1)


def test_a_slow_explosion_is_detected() -> None:
    assert any(problems(Watch(), *(2.0 * 1.02**step for step in range(400))))


def test_a_falling_and_noisy_loss_is_no_explosion() -> None:
    noise = np.random.default_rng(0).lognormal(0.0, 0.5, 2000)
    assert not any(problems(Watch(), *(noise * (1.0 + 500.0 * 0.97 ** np.arange(2000)))))


def test_the_last_step_must_not_be_high() -> None:
    watch = Watch()
    problems(watch, *[2.0] * 20)
    assert "exploded" in str(Watch(watch.best).check(21, last=True, loss=31.0))
    assert watch.check(21, last=True, loss=29.0) is None


def test_no_checkpoint_has_a_high_loss() -> None:
    """Checkpoints are due at 4, 8, 12, ...; the loss is high in 7-10 and once in 16."""
    watch, saved, checkpoints = Watch(), 0, []
    for step in range(1, 21):
        assert watch.check(step, loss=100.0 if 7 <= step <= 10 or step == 16 else 2.0) is None
        if due(step, saved, 4, watch.high):
            checkpoints.append(saved := step)
    assert checkpoints == [4, 11, 12, 17, 20]


def test_the_watch_resumes() -> None:
    watch = Watch()
    problems(watch, *[1.0] * 64, 1e6)
    again = Watch(watch.best, watch.high)
    reports = [problems(w, *[1e6] * (PATIENCE - 1), start=66) for w in (watch, again)]
    assert reports[0] == reports[1] and "exploded" in str(reports[0][-1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.datasets=[]", "data.datasets"),
        ("train.batch=9", "a multiple of 2 (train.workers=2 x train.accumulate=1), got 9"),
        ("train.zero_stage=4", "train.zero_stage must be 0, 1, 2 or 3, got 4"),
        ("model.head_steps=0", "model.head_steps must be >= 1, got 0"),
        ("train.precision=bf61", "did you mean 'bf16'"),
        ("train.lr=0", "train.lr must be > 0, got 0"),
        ("train.epochs=1", "train.steps=5 and train.epochs=1"),
        ("train.warmup=0.7", "train.warmup=0.7"),
        ("train.workers=0", "train.workers must be >= 1, got 0"),
        ("model.size=31k", "model.size"),
        ("data.datasets=[carp]", "carp"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_starts(
    tmp_path: Path,
    cart_root: Callable[..., str],
    load: Callable[..., Any],
    override: str,
    message: str,
) -> None:
    config = load(cart_root(tmp_path, 20), "train.steps=5", "train.workers=2", override)
    with pytest.raises(UsageError) as error:
        JOB.plan(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_dataset_is_a_usage_error_before_anything_starts(
    tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any]
) -> None:
    config = load(cart_root(tmp_path, 20))
    shard = next((Path(config.storage.root) / "datasets").rglob("obs_num.npy"))
    shard.write_bytes(shard.read_bytes()[:-8])
    message = r"datasets/cart: file '.*obs_num.npy' is damaged"
    with pytest.raises(UsageError, match=message):
        JOB.plan(config)
    with (
        pytest.raises(UsageError, match=message),
        tracking.start("pretrain", config, quiet=True) as started,
    ):
        JOB.run(config, started)


@pytest.mark.parametrize("hardware", [True, False])
def test_bf16_without_its_instructions_is_a_warning(
    tmp_path: Path,
    load: Callable[..., Any],
    cart_root: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    hardware: bool,
) -> None:
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: hardware)
    root = cart_root(tmp_path, 100)
    report = JOB.plan(load(root, "train.steps=2", "train.precision=bf16"))
    if hardware:
        assert "warnings" not in report
    else:
        assert "use train.precision=fp32" in report["warnings"][0]
    assert "warnings" not in JOB.plan(load(root, "train.steps=2", "train.precision=fp32"))


def test_a_plan_counts_without_training(
    tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any]
) -> None:
    report = JOB.plan(load(cart_root(tmp_path, 100), "train.epochs=2"))
    assert report["params"] > 1000 and report["flops"] > 0
    assert 2 <= report["epochs"] < 2.5
    assert 2 * report["unique"] <= report["transitions"] < 2.5 * report["unique"]
