"""Collecting: exact in steps, the same for any workers, and robust to crashes and budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mesocosm.config import StorageConfig, load
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import Manifest
from mesocosm.envs.config import BudgetConfig, DrawnOption, PriceConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

from .logs import checksums
from .reality import config, scripted, spent, troubled

Collect = Callable[[CollectConfig], Artifact]


@pytest.mark.integration
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "InvertedPendulum-v5"])
def test_steps_are_exact_and_a_second_time_is_free(root: str, collect: Collect, env: str) -> None:
    cfg = config(root, env, steps=301, lanes=3)
    result = collect(cfg)
    counts = result.meta["counts"]
    assert counts["steps"] == counts["transitions"] == 301 and counts["dropped"] == 0
    assert sum(counts["outcomes"].values()) == counts["episodes"]
    assert counts["outcomes"]["unfinished"] <= 3
    totals = spent(cfg, result)
    purpose = totals.purposes["collect"]
    assert (purpose.steps, purpose.resets) == (301, counts["episodes"])
    assert totals.unconfirmed == ()
    assert result.meta["ledger"]["purposes"]["collect"]["steps"] == 301
    assert len(pq.read_table(result.path / "episodes")) == 301 + counts["episodes"]
    before = checksums(result)
    assert collect(cfg).id == result.id and spent(cfg, result).steps == 301
    forced = collect(replace(cfg, force=True))
    assert forced.id == result.id and checksums(forced) == before
    assert spent(cfg, result).steps == 602


def test_the_same_dataset_whatever_the_workers(
    tmp_path: Path, user_module: None, collect: Collect, ray_local: None, golden: Any
) -> None:
    behaviours = [
        BehaviourConfig(),
        BehaviourConfig("noisy", weight=2, noise=0.3, function="ownenvs:push_left"),
    ]
    results = []
    for workers in (0, 1, 2):
        reality = troubled({4: "crash", 9: "nan"}, task=["goal"])
        cfg = config(
            str(tmp_path / str(workers)),
            "ownenvs:Reach",
            workers=workers,
            lanes=3,
            seed=0,
            reality=reality,
            behaviours=behaviours,
        )
        results.append(collect(cfg))
        totals = spent(cfg, results[-1])
        assert totals.steps == 200 and totals.unconfirmed == ()
    first = results[0]
    for other in results:
        assert other.id == first.id and checksums(other) == checksums(first)
    golden.check("collect", {"shards": golden.of_files(first.path, "shards/*/*.npy")})
    dropped, counts = first.meta["dropped"], first.meta["counts"]
    assert [(row["index"], row["steps"]) for row in dropped] == [(4, 3), (9, 3)]
    assert "the arm fell off" in dropped[0]["reason"]
    assert counts["steps"] == 200 and counts["transitions"] == 194
    assert set(counts["behaviours"]) == {"random", "noisy ownenvs:push_left 0.3"}
    reality = troubled({}, task=["goal"])
    cfg = config(str(tmp_path / "other"), "ownenvs:Reach", lanes=2, reality=reality)
    assert collect(cfg).id != first.id


def test_a_hang_and_a_death_cost_their_episodes(
    root: str, user_module: None, collect: Collect, ray_local: None
) -> None:
    reality = troubled({2: "hang", 5: "die", 8: "reset"}, step_timeout_s=3.0)
    cfg = config(root, "ownenvs:Line", workers=2, lanes=2, reality=reality, steps=150)
    result = collect(cfg)
    dropped = {row["index"]: row for row in result.meta["dropped"]}
    for k, words in ((2, "longer than reality.step_timeout_s=3"), (5, "process died"), (8, "")):
        assert words in dropped.pop(k)["reason"]
    assert not dropped
    steps = {row["index"]: row["steps"] for row in result.meta["dropped"]}
    assert steps[2] == 3 and steps[8] == 0
    # The hanging step was counted and the rest of its block given back. What the dead processes had
    # reserved stays spent, apart: three of them, since only then the episode is taken to kill them.
    totals, counts = spent(cfg, result), result.meta["counts"]
    assert counts["steps"] == 150 == counts["transitions"] + counts["dropped_steps"]
    (death,) = [row["reason"] for row in result.meta["dropped"] if row["index"] == 5]
    assert "3 times" in death
    lost = totals.purposes["collect"].unconfirmed_steps
    assert totals.steps == 150 + lost and lost == sum(r.steps for r in totals.unconfirmed) >= 9
    episodes = set(pq.read_table(result.path / "episodes")["episode"].to_pylist())
    assert episodes >= {0, 1, 3, 4, 6, 7} and not episodes & {2, 5, 8}


def test_an_environment_that_always_fails_ends_the_job(
    root: str, user_module: None, collect: Collect
) -> None:
    reality = troubled(dict.fromkeys(range(40), "crash"))
    message = r"5 episodes in a row failed .*the arm fell off.*steps stay spent"
    with pytest.raises(MesocosmError, match=message):
        collect(config(root, "ownenvs:Line", reality=reality, ledger="mine"))
    assert Storage(root).list("datasets") == []
    totals = Ledger(Storage(root), "mine").totals()
    assert totals.steps == 15 and totals.unconfirmed == ()


def test_a_value_outside_its_space_costs_its_episode(
    root: str, user_module: None, collect: Collect
) -> None:
    trouble = {1: "at", 3: "count", 5: "mode", 8: "word", 10: "list"}
    result = collect(config(root, "ownenvs:Odd", reality=troubled(trouble)))
    reasons = {row["index"]: row["reason"] for row in result.meta["dropped"]}
    assert reasons.keys() == trouble.keys()
    for k, words in (
        (1, "observation.at: every value must have shape"),
        (3, "beyond 2**53"),
        (5, "value 7 is outside"),
        (8, "'z' is not in the charset"),
        (10, "holds NaN"),
    ):
        assert f"episode {k}" in reasons[k] and words in reasons[k]
    counts = result.meta["counts"]
    assert counts["steps"] == 200 == counts["transitions"] + counts["dropped_steps"]
    assert counts["dropped"] == 5 and spent(config(root), result).steps == 200
    always = troubled(dict.fromkeys(range(40), "mode"))
    with pytest.raises(MesocosmError, match=r"5 episodes in a row failed .*value 7 is outside"):
        collect(config(root, "ownenvs:Odd", reality=always))


def test_a_budget_that_others_spend_meanwhile_keeps_what_was_collected(
    root: str,
    user_module: None,
    collect: Collect,
    a_run: tracking.Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ownenvs  # type: ignore[import-not-found]

    def cfg(seed: int, budget: int) -> CollectConfig:
        reality = {
            "horizon": 12,
            "budget": BudgetConfig(budget),
            "kwargs": {"stretch": 0.0},
            "success": "info.won",
        }
        keys = {"seed": seed, "ledger": "ours", "behaviours": scripted("beside")}
        return config(root, "ownenvs:Line", reality=reality, **keys)

    def spend_in(episode: int | None, budget: int) -> Callable[[int], None]:
        """Spend all of the budget, in one episode or in any."""

        def meanwhile(k: int) -> None:
            if episode in (None, k):
                Ledger(Storage(root), "ours", BudgetConfig(budget)).reserve("collect", 10**6)

        return meanwhile

    monkeypatch.setattr(ownenvs.beside, "meanwhile", spend_in(4, 300))  # the lane's third episode
    result = collect(cfg(0, 300))
    counts = result.meta["counts"]
    # What the lane had reserved: two episodes of twelve at least, and part of another; the other
    # lane is refused its first reset.
    taken = counts["steps"]
    assert 24 < taken == counts["transitions"] < 100
    assert counts["outcomes"]["truncated"] == taken // 12
    assert counts["outcomes"]["unfinished"] == int(taken % 12 > 0)
    assert counts["dropped"] == 0 == counts["dropped_steps"] and result.meta["dropped"] == []
    short = f"{taken} of steps=200 were taken: ledger 'ours': reality.budget.steps=300 is spent"
    assert result.meta["short"].startswith(short)
    log = a_run.folder / "log.txt"
    assert f"warning: {taken} of steps=200" in log.read_text()
    episodes = Dataset([result.path]).iter_episodes()
    returns = [e.total_reward for e in episodes if e.outcome == "truncated"]
    assert counts["mean_return"] == pytest.approx(np.mean(returns)) and counts["success_rate"] == 0
    totals = Ledger(Storage(root), "ours", BudgetConfig(300)).totals()
    assert totals.spent == 300 and sum(r.steps for r in totals.unconfirmed) == 300 - taken
    assert collect(cfg(0, 300)).id == result.id
    assert "--force collects it again" in log.read_text().splitlines()[-1]

    monkeypatch.setattr(ownenvs.beside, "meanwhile", spend_in(None, 600))
    with pytest.raises(BudgetSpent, match=r"reality.budget.steps=600 is spent"):
        collect(cfg(1, 600))
    assert Storage(root).list("datasets") == [result.id]


def test_a_budget_of_money_ends_a_collection_before_it_is_exceeded(
    root: str, user_module: None, collect: Collect
) -> None:
    """Steps of 0.25 to 1 s at 2 USD a second, of which 20 USD pay for ten seconds."""
    price = PriceConfig(per_second=2.0, longest_s=1.0)
    reality = {"horizon": 4, "kwargs": {"stretch": 0.0}, "price": price}
    cfg = config(root, "ownenvs:Reach", reality=reality | {"budget": BudgetConfig(money=20.0)})
    result = collect(cfg)
    episodes = list(Dataset([result.path]).iter_episodes())
    seconds = sum(float(e.durations.sum()) for e in episodes if e.durations is not None)
    totals = Ledger(Storage(root), result.id, cfg.reality.budget, price).totals()
    assert 18 < totals.spent_money <= 20 and totals.spent_money == pytest.approx(2 * seconds)
    assert totals.unconfirmed == () and totals.steps == result.meta["counts"]["steps"] < cfg.steps
    assert "reality.budget.money=20 USD is spent" in result.meta["short"]
    assert result.meta["ledger"]["purposes"]["collect"]["duration"] == pytest.approx(seconds)
    assert result.meta["ledger"]["remaining_money"] == pytest.approx(20 - 2 * seconds)

    steps = PriceConfig(per_step=1.0, per_reset=5.0)
    priced = reality | {"budget": BudgetConfig(money=204.0), "price": steps}
    with pytest.raises(UsageError, match=r"reality.budget.money must be >= 205 USD, the price of"):
        collect(config(root, "ownenvs:Reach", reality=priced, seed=1))


def test_returns_and_successes_are_of_ended_episodes(
    root: str, user_module: None, collect: Collect
) -> None:
    reality = {"horizon": 12, "success": "return <= 0", "kwargs": {"stretch": 0.0}}

    def counts(steps: int) -> tuple[dict[str, Any], list[float]]:
        behaviours = scripted("beside")
        cfg = config(root, "ownenvs:Line", steps=steps, reality=reality, behaviours=behaviours)
        result = collect(cfg)
        episodes = Dataset([result.path]).iter_episodes()
        return result.meta["counts"], [
            episode.total_reward for episode in episodes if episode.outcome != "unfinished"
        ]

    short, _ = counts(20)
    assert short["outcomes"]["unfinished"] == 2
    assert short["mean_return"] is None is short["success_rate"]
    longer, returns = counts(30)
    assert len(returns) == 2 == longer["episodes"] - 2
    assert longer["mean_return"] == pytest.approx(np.mean(returns)) and longer["success_rate"] == 1


def test_a_budget_is_refused_before_anything_starts(
    root: str, user_module: None, collect: Collect
) -> None:
    def cfg(seed: int, steps: int) -> CollectConfig:
        reality = {"budget": BudgetConfig(250), "horizon": 12}
        keys = {"seed": seed, "steps": steps, "ledger": "mine"}
        return config(root, "ownenvs:Line", reality=reality, **keys)

    collect(cfg(0, 200))
    message = (
        r"reality.budget.steps=250 leaves 50 real steps in ledger 'mine' \(200 spent, 0 of them"
        r" unconfirmed\), fewer than the 51 to take"
    )
    with pytest.raises(UsageError, match=message):
        collect(cfg(1, 51))
    collect(cfg(1, 50))
    assert Ledger(Storage(root), "mine").totals().steps == 250


@pytest.mark.integration
def test_a_collection_that_failed_goes_on_after_its_stored_episodes(
    root: str, tmp_path: Path, user_module: None, collect: Collect, a_run: tracking.Run
) -> None:
    import ownenvs

    reality = {"horizon": 12, "budget": BudgetConfig(390)}
    cfg = config(root, "ownenvs:Line", reality=reality, behaviours=scripted("sometimes"))
    ownenvs.FAIL = 4
    message = "behaviour 'scripted ownenvs:sometimes' raised ValueError"
    with pytest.raises(MesocosmError, match=message):
        collect(cfg)
    (ledger,) = Storage(root).list("ledgers")
    before = Ledger(Storage(root), ledger).totals()
    lost = sum(r.steps for r in before.unconfirmed)  # of the episode that was under way, exactly
    stored = before.steps - lost
    assert 0 < before.steps < 190 and 0 < lost < 12 and stored > 0 and stored % 12 == 0
    result = collect(cfg)
    totals = spent(cfg, result)
    assert result.id == ledger and totals.steps == 200 + lost
    confirmed = totals.steps - sum(r.steps for r in totals.unconfirmed)
    assert confirmed == result.meta["counts"]["transitions"]
    text = (a_run.folder / "log.txt").read_text()
    assert f"an earlier run paid {stored} real steps and stored" in text
    assert f"counts {lost} steps of an" in text
    undisturbed = collect(replace(cfg, storage=StorageConfig(str(tmp_path / "undisturbed"))))
    assert checksums(undisturbed) == checksums(result) and undisturbed.id == result.id
    assert Storage(root).list("runs/episodes") == []


def test_reset_options_are_the_datasets_task(
    root: str, user_module: None, collect: Collect
) -> None:
    options = {
        "wind": DrawnOption(low=0.0, high=0.1),
        "side": DrawnOption(choices=["east", "west"]),
        "mass": DrawnOption(choices=[1, 1, 1, 1, 2.5]),
    }
    reality = {"task": ["wind", "side", "mass"], "task_options": options, "horizon": 9}
    manifest = Manifest.read(collect(config(root, "ownenvs:Windy", reality=reality)).path)
    values = {option.name: option.values for option in manifest.task_options}
    assert values == {"wind": None, "side": ["east", "west"], "mass": None}
    assert manifest.environment.max_episode_steps == 9
    assert manifest.environment.version.startswith("ownenvs ")
    few = collect(config(root, "ownenvs:Windy", reality=reality, steps=18, lanes=1, seed=3))
    masses = {episode.task["mass"] for episode in Dataset([few.path]).iter_episodes()}
    assert masses == {1.0}, "an option whose float was not drawn"
    assert Manifest.read(few.path).task_options[2].values is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["reality.env=CartPol-v1"], "did you mean 'CartPole-v1'"),
        (["steps=0"], "steps must be >= 1, got 0"),
        (["lanes=0"], "lanes must be >= 1, got 0"),
        (["workers=-1"], "workers must be >= 0, got -1"),
        (["lanes=2000"], "lanes must be <= steps=1000, got 2000"),
        (["valid_fraction=1"], r"valid_fraction must be in \[0, 1\), got 1"),
        (["behaviours=[]"], "behaviours must list at least one"),
        (["behaviours=[{kind: randm}]"], "did you mean 'random'"),
        (["behaviours=[{weight: -1}]"], r"behaviours\[0\].weight must be .* got -1"),
        (["behaviours=[{policy: agents/x}]"], "policy must be null .*'random', got 'agents/x'"),
        (["behaviours=[{kind: noisy}]"], "function or behaviours.*policy"),
        (["behaviours=[{kind: scripted, function: 'ownenvs:push_lef'}]"], "did you mean 'push_lef"),
        (["behaviours=[{kind: scripted, function: ownenvs}]"], "must have the form module:func"),
        (["behaviours=[{kind: trained, policy: agents/none}]"], "no artifact agents/none"),
        (["reality.success=win"], "reality.success must be 'return >= NUMBER'"),
        (["ledger=a/b"], "got 'a/b'"),
        (["workers=4000", "lanes=1000", "steps=1000"], "workers=4000 asks for"),
    ],
)
def test_wrong_configs_are_refused(
    root: str,
    user_module: None,
    collect: Collect,
    ray_local: None,
    changes: list[str],
    message: str,
) -> None:
    overrides = ["reality.env=CartPole-v1", f"storage.root={root}", "workers=0", *changes]
    with pytest.raises(UsageError, match=message):
        collect(load(CollectConfig, overrides=overrides))
    assert Storage(root).list("ledgers") == Storage(root).list("datasets") == []
