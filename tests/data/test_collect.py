"""Collecting: exact in steps, the same for any workers, and robust to crashes and hangs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mesocosm.config import StorageConfig, load
from mesocosm.data.collecting import ray_workers
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.collecting.ray_workers import run_on_ray
from mesocosm.data.collecting.workers import CollectTask, split
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import Manifest
from mesocosm.envs.config import BudgetConfig, DrawnOption, RealityConfig
from mesocosm.envs.episode import episode_seed
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of
from mesocosm.envs.segments import Attempt
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError
from mesocosm.jobs.collect import JOB
from mesocosm.policies.behaviours import BehaviourConfig, build, choose
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

OWN = Path(__file__).parent.parent / "sample_envs"


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tracking.Run]:
    config = CollectConfig()
    config.storage.root = str(tmp_path_factory.mktemp("run"))
    with tracking.start("collect", config, quiet=True) as started:
        yield started


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the folder of a user's module, `ownenvs`."""
    monkeypatch.chdir(OWN)
    monkeypatch.syspath_prepend(str(OWN))


def config(root: str, env: str = "CartPole-v1", **changes: Any) -> CollectConfig:
    cfg = CollectConfig(
        reality=RealityConfig(env=env, **changes.pop("reality", {})),
        steps=changes.pop("steps", 200),
        workers=changes.pop("workers", 0),
        **changes,
    )
    cfg.storage.root = root
    return cfg


def collect(cfg: CollectConfig, a_run: tracking.Run) -> Artifact:
    a_run.storage = Storage(cfg.storage.root)
    return JOB.run(cfg, a_run)


def checksums(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "COMMIT.json").read_text())["files"]


def spent(cfg: CollectConfig, artifact: Artifact) -> Any:
    return Ledger(Storage(cfg.storage.root), cfg.ledger or artifact.id).totals()


def troubled(trouble: dict[int, str], **more: Any) -> dict[str, Any]:
    """Reality's config, with trouble in episodes of seed 0."""
    return {
        "kwargs": {"trouble": {str(episode_seed(0, k)): what for k, what in trouble.items()}},
        "horizon": 12,
        **more,
    }


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "InvertedPendulum-v5"])
def test_steps_are_exact_and_a_second_time_is_free(
    root: str, a_run: tracking.Run, env: str
) -> None:
    cfg = config(root, env, steps=301, lanes=3)
    result = collect(cfg, a_run)
    counts = result.meta["counts"]
    assert counts["steps"] == counts["transitions"] == 301 and counts["dropped"] == 0
    assert (
        sum(counts["outcomes"].values()) == counts["episodes"]
        and counts["outcomes"]["unfinished"] <= 3
    )
    totals = spent(cfg, result)
    assert (
        totals.purposes["collect"].steps == 301
        and totals.purposes["collect"].resets == counts["episodes"]
        and totals.unconfirmed == ()
    )
    assert result.meta["ledger"]["purposes"]["collect"]["steps"] == 301
    rows = pq.read_table(result.path / "episodes").to_pylist()
    assert len(rows) == 301 + counts["episodes"]
    again = collect(cfg, a_run)
    assert again.id == result.id and spent(cfg, result).steps == 301
    forced = collect(config(root, env, steps=301, lanes=3, force=True), a_run)
    assert (
        forced.id == result.id
        and checksums(forced) == checksums(result)
        and spent(cfg, result).steps == 602
    )


def test_the_same_dataset_whatever_the_workers(
    root: str, tmp_path: Path, user_module: None, a_run: tracking.Run, ray_local: None, golden: Any
) -> None:
    result = []
    for workers in (0, 1, 2):
        cfg = config(
            str(tmp_path / str(workers)),
            "ownenvs:Reach",
            workers=workers,
            lanes=3,
            seed=0,
            reality=troubled({4: "crash", 9: "nan"}, task=["goal"]),
        )
        cfg.behaviours = [
            BehaviourConfig(),
            BehaviourConfig("noisy", weight=2, noise=0.3, function="ownenvs:push_left"),
        ]
        result.append(collect(cfg, a_run))
        totals = spent(cfg, result[-1])
        assert totals.steps == 200 and totals.unconfirmed == ()
    assert len({artifact.id for artifact in result}) == 1
    assert checksums(result[0]) == checksums(result[1]) == checksums(result[2])
    golden.check("collect", {"shards": golden.of_files(result[0].path, "shards/*/*.npy")})
    dropped = result[0].meta["dropped"]
    assert [(d["index"], d["steps"]) for d in dropped] == [
        (4, 3),
        (9, 3),
    ] and "the arm fell off" in dropped[0]["reason"]
    counts = result[0].meta["counts"]
    assert (
        counts["steps"] == 200
        and counts["transitions"] == 194
        and set(counts["behaviours"]) == {"random", "noisy ownenvs:push_left 0.3"}
    )
    other = collect(
        config(
            str(tmp_path / "other"), "ownenvs:Reach", lanes=2, reality=troubled({}, task=["goal"])
        ),
        a_run,
    )
    assert other.id != result[0].id


def test_behaviours_have_their_shares_of_few_episodes_too() -> None:
    """Of any run of episodes, to within two; and who begins is drawn by the seed."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        weights = rng.exponential(size=rng.integers(2, 8)) + 0.02
        behaviours = [BehaviourConfig(weight=float(weight)) for weight in weights]
        seed, first = int(rng.integers(2**31)), int(rng.integers(10**9))
        chosen = [choose(behaviours, seed, first + k) for k in range(100)]
        for episodes in (5, 20, 100):
            counts = np.bincount(chosen[:episodes], minlength=len(weights))
            assert np.abs(counts - episodes * weights / weights.sum()).max() < 2
    even = [BehaviourConfig() for _ in range(5)]
    assert {choose(even, seed, 0) for seed in range(40)} == set(range(5))


def test_a_hang_and_a_death_cost_their_episodes(
    root: str, user_module: None, a_run: tracking.Run, ray_local: None
) -> None:
    cfg = config(
        root,
        "ownenvs:Line",
        workers=2,
        lanes=2,
        reality=troubled({2: "hang", 5: "die", 8: "reset"}, step_timeout_s=3.0),
        steps=150,
    )
    result = collect(cfg, a_run)
    dropped = {d["index"]: d for d in result.meta["dropped"]}
    assert set(dropped) == {2, 5, 8}
    assert (
        "step took longer than reality.step_timeout_s=3" in dropped[2]["reason"]
        and dropped[2]["steps"] == 3
    )
    assert "process died" in dropped[5]["reason"] and dropped[8]["steps"] == 0
    totals, counts = spent(cfg, result), result.meta["counts"]
    # The hanging step was counted and the rest of its block given back. What the dead processes had
    # reserved stays
    # spent, apart: they are three, for only then the episode is taken to be what kills them.
    assert (
        counts["steps"] == 150 == counts["transitions"] + counts["dropped_steps"]
        and "3 times" in dropped[5]["reason"]
    )
    lost = totals.purposes["collect"].unconfirmed_steps
    assert totals.steps == 150 + lost and lost == sum(r.steps for r in totals.unconfirmed) >= 9
    episodes = set(pq.read_table(result.path / "episodes")["episode"].to_pylist())
    assert episodes >= {0, 1, 3, 4, 6, 7} and not episodes & {2, 5, 8}


def test_an_environment_that_always_fails_ends_the_job(
    root: str, user_module: None, a_run: tracking.Run
) -> None:
    cfg = config(
        root, "ownenvs:Line", reality=troubled(dict.fromkeys(range(40), "crash")), ledger="mine"
    )
    with pytest.raises(
        MesocosmError, match=r"5 episodes in a row failed .*the arm fell off.*steps stay spent"
    ):
        collect(cfg, a_run)
    assert Storage(root).list("datasets") == []
    totals = Ledger(Storage(root), "mine").totals()
    assert totals.steps == 15 and totals.unconfirmed == ()


def test_a_value_outside_its_space_costs_its_episode(
    root: str, user_module: None, a_run: tracking.Run
) -> None:
    trouble = {1: "at", 3: "count", 5: "mode", 8: "word", 10: "list"}
    result = collect(config(root, "ownenvs:Odd", reality=troubled(trouble)), a_run)
    reasons = {d["index"]: d["reason"] for d in result.meta["dropped"]}
    assert reasons.keys() == trouble.keys()
    message = {
        1: "observation.at: every value must have shape",
        3: "beyond 2**53",
        5: "value 7 is outside",
        8: "'z' is not in the charset",
        10: "holds NaN",
    }
    assert all(
        f"episode {k}" in reasons[k] and words in reasons[k] for k, words in message.items()
    ), reasons
    counts = result.meta["counts"]
    assert (
        counts["steps"] == 200 == counts["transitions"] + counts["dropped_steps"]
        and counts["dropped"] == 5
    )
    assert spent(config(root), result).steps == 200
    with pytest.raises(MesocosmError, match=r"5 episodes in a row failed .*value 7 is outside"):
        collect(
            config(root, "ownenvs:Odd", reality=troubled(dict.fromkeys(range(40), "mode"))), a_run
        )


class Busy:
    """A driver with much to do between two looks at its workers: it asks after 2 s, and reads the
    answer after 4.
    """

    def __init__(self, naps: int = 0) -> None:
        self.attempts: list[Attempt] = []
        self.naps = naps

    def __call__(self, attempts: Sequence[Attempt], steps: int) -> None:
        self.attempts += attempts
        if not self.attempts and self.naps:
            self.naps -= 1
            time.sleep(2.0)

    def outcomes(self) -> list[tuple[int, int, bool]]:
        return [(a.index, a.steps, a.length is None) for a in self.attempts]


def a_plan(root: str, trouble: dict[int, str], **kwargs: Any) -> CollectTask:
    seeded = {str(episode_seed(0, k)): what for k, what in trouble.items()}
    reality = RealityConfig(
        env="ownenvs:Line",
        kwargs={"trouble": seeded, "stretch": 0.0, **kwargs},
        horizon=10,
        step_timeout_s=0.3,
    )
    return CollectTask(reality, [BehaviourConfig()], 0, root, "x", "d", "r", str(OWN))


@pytest.mark.slow
def test_a_step_that_comes_back_too_late_costs_its_episode(
    root: str, user_module: None, ray_local: None
) -> None:
    """The meter is frozen, and the step returns before the driver has read so."""
    plan, lanes = a_plan(root, {1: "hang"}, nap=3.1), split(30, 1)
    report = Busy(naps=2)
    run_on_ray(plan, lanes, 1, report)
    assert report.outcomes() == [(0, 10, False), (1, 3, True), (2, 10, False), (3, 7, False)]
    assert (
        report.attempts[1].reason == "episode 1: a step took longer than reality.step_timeout_s=0.3"
    )
    totals = plan.open_ledger().totals()
    assert totals.steps == 30 and totals.unconfirmed == ()


@pytest.mark.slow
def test_a_close_that_hangs_costs_nothing(
    root: str, user_module: None, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "SILENCE_S", 0.5)
    plan, lanes = a_plan(root, {0: "crash"}, closing=3600.0), split(20, 1)
    report = Busy()
    run_on_ray(plan, lanes, 1, report)
    assert report.outcomes() == [(0, 3, True), (1, 10, False), (2, 7, False)]
    totals = plan.open_ledger().totals()
    assert totals.steps == 20 and totals.unconfirmed == ()


def test_a_budget_that_others_spend_meanwhile_keeps_what_was_collected(
    root: str, user_module: None, a_run: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ownenvs

    def cfg(seed: int, budget: int) -> CollectConfig:
        reality = {
            "horizon": 12,
            "budget": BudgetConfig(budget),
            "kwargs": {"stretch": 0.0},
            "success": "info.won",
        }
        return config(
            root,
            "ownenvs:Line",
            seed=seed,
            ledger="ours",
            reality=reality,
            behaviours=[BehaviourConfig("scripted", function="ownenvs:beside")],
        )

    def meanwhile(k: int) -> None:
        if k == 4:  # the lane's third episode
            Ledger(Storage(root), "ours", BudgetConfig(300)).reserve("collect", 10**6)

    monkeypatch.setattr(ownenvs.beside, "meanwhile", meanwhile)
    result = collect(cfg(0, 300), a_run)
    counts = result.meta["counts"]
    # What the lane had reserved: two episodes of twelve at least, and part of another; the other
    # lane is refused its first reset.
    taken = counts["steps"]
    assert (
        24 < taken == counts["transitions"] < 100 and counts["outcomes"]["truncated"] == taken // 12
    )
    assert counts["outcomes"]["unfinished"] == int(taken % 12 > 0)
    assert counts["dropped"] == 0 == counts["dropped_steps"] and result.meta["dropped"] == []
    assert result.meta["short"].startswith(
        f"{taken} of steps=200 were taken: ledger 'ours': reality.budget.steps=300 is spent"
    )
    assert f"warning: {taken} of steps=200" in (a_run.folder / "log.txt").read_text()
    ended = [
        e.total_reward for e in Dataset([result.path]).iter_episodes() if e.outcome == "truncated"
    ]
    assert counts["mean_return"] == pytest.approx(np.mean(ended)) and counts["success_rate"] == 0
    totals = Ledger(Storage(root), "ours", BudgetConfig(300)).totals()
    assert totals.spent == 300 and sum(r.steps for r in totals.unconfirmed) == 300 - taken
    assert collect(cfg(0, 300), a_run).id == result.id
    assert "--force collects it anew" in (a_run.folder / "log.txt").read_text().splitlines()[-1]

    monkeypatch.setattr(
        ownenvs.beside,
        "meanwhile",
        lambda k: Ledger(Storage(root), "ours", BudgetConfig(600)).reserve("collect", 10**6),
    )
    with pytest.raises(BudgetSpent, match=r"reality.budget.steps=600 is spent"):
        collect(cfg(1, 600), a_run)
    assert Storage(root).list("datasets") == [result.id]


def test_returns_and_successes_are_of_ended_episodes(
    root: str, user_module: None, a_run: tracking.Run
) -> None:
    behaviours = [BehaviourConfig("scripted", function="ownenvs:beside")]
    reality = {"horizon": 12, "success": "return <= 0", "kwargs": {"stretch": 0.0}}
    result = collect(
        config(root, "ownenvs:Line", steps=20, reality=reality, behaviours=behaviours), a_run
    )
    assert (
        result.meta["counts"]["outcomes"]["unfinished"] == 2
        and result.meta["counts"]["mean_return"] is None is result.meta["counts"]["success_rate"]
    )
    result = collect(
        config(root, "ownenvs:Line", steps=30, reality=reality, behaviours=behaviours), a_run
    )
    ended = [
        e.total_reward for e in Dataset([result.path]).iter_episodes() if e.outcome != "unfinished"
    ]
    assert len(ended) == 2 == result.meta["counts"]["episodes"] - 2
    assert (
        result.meta["counts"]["mean_return"] == pytest.approx(np.mean(ended))
        and result.meta["counts"]["success_rate"] == 1
    )


def test_a_budget_is_refused_before_anything_starts(
    root: str, user_module: None, a_run: tracking.Run
) -> None:
    def cfg(seed: int, steps: int) -> CollectConfig:
        return config(
            root,
            "ownenvs:Line",
            seed=seed,
            steps=steps,
            ledger="mine",
            reality={"budget": BudgetConfig(250), "horizon": 12},
        )

    collect(cfg(0, 200), a_run)
    with pytest.raises(
        UsageError,
        match=(
            r"reality.budget.steps=250 leaves 50 real steps in ledger 'mine' \(200 spent, 0 of them"
            r" unconfirmed\), fewer than the 51 to take"
        ),
    ):
        collect(cfg(1, 51), a_run)
    collect(cfg(1, 50), a_run)
    assert Ledger(Storage(root), "mine").totals().steps == 250


def test_a_collection_that_failed_goes_on_after_its_stored_episodes(
    root: str, tmp_path: Path, user_module: None, a_run: tracking.Run
) -> None:
    cfg = config(
        root,
        "ownenvs:Line",
        reality={"horizon": 12, "budget": BudgetConfig(390)},
        behaviours=[BehaviourConfig("scripted", function="ownenvs:sometimes")],
    )
    import ownenvs  # type: ignore[import-not-found]

    ownenvs.FAIL = 4
    with pytest.raises(
        MesocosmError, match="behaviour 'scripted ownenvs:sometimes' raised ValueError"
    ):
        collect(cfg, a_run)
    ledger = Storage(root).list("ledgers")[0]
    before = Ledger(Storage(root), ledger).totals()
    lost = sum(r.steps for r in before.unconfirmed)  # of the episode that was under way, exactly
    stored = before.steps - lost
    assert 0 < before.steps < 190 and 0 < lost < 12 and stored > 0 and stored % 12 == 0
    result = collect(cfg, a_run)
    totals = spent(cfg, result)
    assert result.id == ledger and totals.steps == 200 + lost
    assert (
        totals.steps - sum(r.steps for r in totals.unconfirmed)
        == result.meta["counts"]["transitions"]
    )
    text = (a_run.folder / "log.txt").read_text()
    assert (
        f"an earlier run paid {stored} real steps and stored" in text
        and f"counts {lost} steps of an" in text
    )
    undisturbed = collect(replace(cfg, storage=StorageConfig(str(tmp_path / "undisturbed"))), a_run)
    assert checksums(undisturbed) == checksums(result) and undisturbed.id == result.id
    assert Storage(root).list("runs/episodes") == []


def test_reset_options_are_the_datasets_task(
    root: str, user_module: None, a_run: tracking.Run
) -> None:
    options = {
        "wind": DrawnOption(low=0.0, high=0.1),
        "side": DrawnOption(choices=["east", "west"]),
        "mass": DrawnOption(choices=[1, 1, 1, 1, 2.5]),
    }
    reality = {"task": ["wind", "side", "mass"], "task_options": options, "horizon": 9}
    result = collect(config(root, "ownenvs:Windy", reality=reality), a_run)
    manifest = Manifest.read(result.path)
    assert [(o.name, o.values) for o in manifest.task_options] == [
        ("wind", None),
        ("side", ["east", "west"]),
        ("mass", None),
    ]
    few = collect(config(root, "ownenvs:Windy", reality=reality, steps=18, lanes=1, seed=3), a_run)
    assert {e.task["mass"] for e in Dataset([few.path]).iter_episodes()} == {1.0}, (
        "the test is of an option whose float was not drawn"
    )
    assert Manifest.read(few.path).task_options[2].values is None
    assert manifest.environment.max_episode_steps == 9 and manifest.environment.version.startswith(
        "ownenvs "
    )


def test_the_mixture_is_a_function_of_seed_and_episode() -> None:
    mix = [
        BehaviourConfig(weight=1),
        BehaviourConfig("noisy", weight=3, function="a:b"),
        BehaviourConfig("scripted", weight=6, function="a:b"),
    ]
    drawn = [choose(mix, 3, k) for k in range(1500)]
    assert (
        drawn[:200]
        == [choose(mix, 3, k) for k in range(200)]
        != [choose(mix, 4, k) for k in range(200)]
    )
    share = Counter(drawn)
    assert [round(share[i] / 1500, 1) for i in range(3)] == [0.1, 0.3, 0.6]


def test_noise(root: str, user_module: None) -> None:
    spaces = facts_of(RealityConfig(env="Pendulum-v1")).spaces
    act = build(
        BehaviourConfig("noisy", noise=0.1, function="ownenvs:push_left"), *spaces, Storage(root)
    )
    rng = np.random.default_rng(0)
    drawn = np.array([act(np.zeros(3, np.float32), rng) for _ in range(2000)])
    assert (
        drawn.dtype == np.float32
        and abs(drawn.mean() + 0.5) < 0.02
        and abs(drawn.std() - 0.2) < 0.02
    )
    wild = build(
        BehaviourConfig("noisy", noise=5.0, function="ownenvs:push_left"), *spaces, Storage(root)
    )
    assert all(spaces[1].contains(wild(np.zeros(3, np.float32), rng)) for _ in range(200))
    spaces = facts_of(RealityConfig(env="CartPole-v1")).spaces
    act = build(
        BehaviourConfig("noisy", noise=0.4, function="ownenvs:always_one"), *spaces, Storage(root)
    )
    act.start(0, rng)  # type: ignore[attr-defined]
    assert abs(np.mean([act(np.zeros(4, np.float32), rng) for _ in range(2000)]) - 0.8) < 0.04


def test_a_trained_policy_acts(root: str, a_run: tracking.Run) -> None:
    from mesocosm.policies.policy import Layout, Policy

    spaces = facts_of(RealityConfig(env="CartPole-v1")).spaces
    torch.manual_seed(0)
    policy = Policy(
        "PPO", *spaces, Layout("categorical", [{"kind": "linear", "in": 4, "out": 2, "bias": True}])
    )
    with torch.no_grad():  # push towards the side to which the pole falls: far better than chance
        policy.network.trunk[0].weight.copy_(torch.tensor([[0.0, 0, -9, -9], [0, 0, 9, 9]]))
        policy.network.trunk[0].bias.zero_()
    agent = Storage(root).make("agents", "feed0123feed0123", {}, policy.save)
    result = collect(
        config(root, steps=600, behaviours=[BehaviourConfig("trained", policy="agents/feed")]),
        a_run,
    )
    assert result.meta["inputs"] == {"agents": [agent.id]} and result.meta["counts"][
        "behaviours"
    ].keys() == {f"trained {agent.name}"}
    assert 600 / result.meta["counts"]["episodes"] > 60
    best = collect(
        config(
            root, steps=600, behaviours=[BehaviourConfig("noisy", noise=0.0, policy="agents/feed")]
        ),
        a_run,
    )
    assert best.id != result.id and 600 / best.meta["counts"]["episodes"] > 60
    with pytest.raises(UsageError, match="needs the observation space"):
        collect(
            config(
                root, "Pendulum-v1", behaviours=[BehaviourConfig("trained", policy="agents/feed")]
            ),
            a_run,
        )
    with pytest.raises(UsageError, match="no artifact agents/beef"):
        collect(config(root, behaviours=[BehaviourConfig("trained", policy="agents/beef")]), a_run)


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
        (
            ["behaviours=[{policy: agents/x}]"],
            r"behaviours\[0\].policy must be null for kind 'random', got 'agents/x'",
        ),
        (["behaviours=[{kind: noisy}]"], "function or behaviours.*policy"),
        (
            ["behaviours=[{kind: scripted, function: 'ownenvs:push_lef'}]"],
            "did you mean 'push_left'",
        ),
        (
            ["behaviours=[{kind: scripted, function: ownenvs}]"],
            "must have the form module:function",
        ),
        (["behaviours=[{kind: trained, policy: agents/none}]"], "no artifact agents/none"),
        (["reality.success=win"], "reality.success must be 'return >= NUMBER'"),
        (["ledger=a/b"], "got 'a/b'"),
        (["workers=4000", "lanes=1000", "steps=1000"], "workers=4000 asks for"),
    ],
)
def test_what_bad_input_gets(
    root: str,
    user_module: None,
    a_run: tracking.Run,
    ray_local: None,
    changes: list[str],
    message: str,
) -> None:
    cfg = load(
        CollectConfig,
        overrides=["reality.env=CartPole-v1", f"storage.root={root}", "workers=0", *changes],
    )
    with pytest.raises(UsageError, match=message):
        collect(cfg, a_run)
    assert Storage(root).list("ledgers") == Storage(root).list("datasets") == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_far", r"returned the action array\(\[7.\].*not in the action space"),
        ("broken", "raised KeyError"),
    ],
)
def test_a_behaviour_that_is_wrong(
    root: str, user_module: None, a_run: tracking.Run, function: str, message: str
) -> None:
    with pytest.raises(MesocosmError, match=message):
        collect(
            config(
                root,
                "ownenvs:Line",
                behaviours=[BehaviourConfig("scripted", function=f"ownenvs:{function}")],
            ),
            a_run,
        )
