"""The job `collect`: metered real steps by a mix of behaviours, in parallel lanes -> a dataset.

The same config and seed make the same episodes, whatever the number of workers. Episodes go to
storage as they end (`segments`): a collection that was killed is run again, goes on after them, and
makes the same dataset.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig, fingerprint, identity
from mesocosm.data.collecting.ray_workers import run_on_ray
from mesocosm.data.collecting.workers import Lane, Plan, Report, run_here, split
from mesocosm.data.format.manifest import Environment
from mesocosm.data.format.spaces import check_spaces
from mesocosm.data.format.writer import DatasetWriter
from mesocosm.envs.config import PAID, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of, source_hash
from mesocosm.envs.segments import Attempt
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.versions import VERSIONS


@dataclass
class CollectConfig(JobConfig):
    reality: RealityConfig = field(default_factory=RealityConfig)
    steps: int = 1000
    """Real steps to take, those of dropped episodes included."""
    lanes: int = 2
    """The steps are shared out to so many sequences of episodes: part of what is collected."""
    workers: int = 1
    """Ray actors that run the lanes; 0 runs them in this process (where a step that hangs cannot be
    ended).
    """
    behaviours: list[BehaviourConfig] = field(default_factory=lambda: [BehaviourConfig()])
    valid_fraction: float = 0.1
    """Share of the episodes held out for validation; 0 holds none out. Fewer than 5 episodes may
    all be trained on.
    """
    ledger: str | None = None
    """The ledger that counts the steps; None is one named as the dataset."""


def check(cfg: CollectConfig) -> None:
    """Raise UsageError on the first value that cannot be meant. Makes no environment."""
    for name, least in (("steps", 1), ("lanes", 1), ("workers", 0)):
        if getattr(cfg, name) < least:
            raise UsageError(f"{name}={getattr(cfg, name)} cannot be; give at least {least}")
    if cfg.lanes > cfg.steps:
        raise UsageError(
            f"lanes={cfg.lanes} are more than steps={cfg.steps}; give each lane at least one step"
        )
    if not 0 <= cfg.valid_fraction < 1:
        raise UsageError(
            f"valid_fraction={cfg.valid_fraction} is no share; give a number from 0 to below 1"
        )
    acting.check(cfg.behaviours)
    acting.check_tasks(cfg.behaviours, cfg.reality)


def plan(cfg: CollectConfig) -> dict[str, Any]:
    """What `run` would spend. Makes the environment, to see that it exists; takes no real step and
    writes nothing.
    """
    check(cfg)
    known = check_environment(cfg, Storage(cfg.storage.root))
    budget = cfg.reality.budget.steps
    if budget is not None and cfg.steps > budget:
        raise UsageError(f"steps={cfg.steps} must be at most reality.budget.steps={budget}")
    price = cfg.reality.price
    return {
        "environment": cfg.reality.env,
        "observation space": str(known.observation_space),
        "action space": str(known.action_space),
        "real steps": cfg.steps,
        "budget": cfg.reality.budget.steps,
        "price": f"{cfg.steps * price.per_step:g} {price.currency}",
        "price of a reset": f"{price.per_reset:g} {price.currency}",
        "behaviours": [acting.label(b) for b in cfg.behaviours],
    }


def resources(cfg: CollectConfig) -> dict[str, tuple[float, float]]:
    """(CPUs, GPUs) that the job needs, by key."""
    return {f"workers={cfg.workers}": (min(cfg.workers, cfg.lanes), 0)}


def check_environment(cfg: CollectConfig, storage: Storage) -> EnvFacts:
    """The environment's facts. Takes no real step.

    Raises:
        UsageError: no such environment, a space that a world cannot hold, a behaviour whose
            policy or function is missing or of other spaces.
    """
    known = facts_of(cfg.reality)
    check_spaces(*known.spaces)
    _resolve(cfg.behaviours, storage, *known.spaces)
    return known


def run(cfg: CollectConfig, run: Run) -> Artifact:
    """Collect `cfg.steps` real steps, or find the dataset that was collected so before.

    Raises UsageError before any step: a wrong config, no such environment, an unsupported space,
    too small a budget, more workers than the cluster has. MesocosmError after: an environment that
    keeps failing, a behaviour that raises. Where others spend the same budget meanwhile, what was
    collected until then is the dataset, and its meta's `short` says so; BudgetSpent if that is
    nothing.
    """
    check(cfg)
    storage = run.storage
    known = facts_of(cfg.reality)
    check_spaces(*known.spaces)
    chosen, sources = _resolve(cfg.behaviours, storage, *known.spaces)
    what = identity(cfg, without=["workers", "ledger", *PAID])
    what["behaviours"] = [asdict(b) for b in chosen]
    id = fingerprint("datasets", what, sources, known.version, VERSIONS["collect"], SCHEMA)
    with run.making("datasets", id, cfg) as artifact:
        if artifact is None:
            return _make(cfg, run, id, known, chosen, what)
        short = artifact.meta.get("short")
        hint = f" ({short}; --force collects it anew)" if short else ""
        transitions = artifact.meta["counts"]["transitions"]
        run.say(f"found {artifact.name}: {transitions} transitions; nothing was collected{hint}")
        run.record(artifact=artifact.name, inputs=artifact.meta["inputs"])
        return artifact


def _make(
    cfg: CollectConfig,
    run: Run,
    id: str,
    known: EnvFacts,
    chosen: list[BehaviourConfig],
    what: dict[str, Any],
) -> Artifact:
    storage = run.storage
    ledger = Ledger(storage, cfg.ledger or id, cfg.reality.budget, cfg.reality.price)
    plan = Plan(
        reality=cfg.reality,
        behaviours=chosen,
        seed=cfg.seed,
        root=cfg.storage.root,
        ledger=ledger.id,
        dataset=id,
        run=f"{run.id}-{uuid.uuid4().hex[:8]}",
        imports=os.getcwd(),
    )
    attempts = _collect(cfg, plan, ledger, run)
    episodes = [a for a in attempts if a.length is not None]
    dropped = [
        {"index": a.index, "behaviour": a.behaviour, "steps": a.steps, "reason": a.reason}
        for a in attempts
        if a.reason is not None
    ]
    refusals = [a.spent for a in attempts if a.spent is not None]
    if refusals and not episodes:
        raise BudgetSpent(refusals[-1])
    if not episodes:
        plan.segments().remove()  # so that the next run tries them again
        raise MesocosmError(
            f"all {len(dropped)} episodes were dropped, the last because {dropped[-1]['reason']};"
            f" correct reality.env={cfg.reality.env!r}"
        )
    for episode in episodes:
        metrics = {"collect/return": episode.total_reward, "collect/length": episode.length or 0}
        run.log(metrics, step=episode.index)
    totals = ledger.totals().to_json()
    tally = Tally()
    tally.add(attempts)
    counts = tally.counts()
    short = None
    if (
        refusals and counts["steps"] < cfg.steps
    ):  # an earlier run's refusal may have been made up for
        short = f"{counts['steps']} of steps={cfg.steps} were taken: {refusals[-1]}"
    if short is not None:
        run.say(f"warning: {short}")
    meta = {
        "inputs": {
            "agents": sorted(
                {
                    b.policy.removeprefix("agents/").partition("@")[0]
                    for b in chosen
                    if b.policy is not None
                }
            )
        },
        "config": {**identity(cfg), "behaviours": what["behaviours"]},
        "job": "collect",
        "run": run.id,
        "counts": counts,
        "short": short,
        "dropped": dropped,
        "ledger": totals,
    }
    environment = Environment(
        id=cfg.reality.env,
        version=known.version,
        kwargs=dict(cfg.reality.kwargs),
        task=list(cfg.reality.task),
        max_episode_steps=known.max_episode_steps,
        success=cfg.reality.success,
    )

    segments = plan.segments()

    def fill(folder: Path) -> None:
        writer = DatasetWriter(
            folder,
            id=id,
            environment=environment,
            observation_space=known.observation_space,
            action_space=known.action_space,
            seed=cfg.seed,
            valid_fraction=cfg.valid_fraction,
        )
        for episode, rows in segments.episodes(cfg.lanes):
            writer.add(episode, rows)
        writer.close(dropped=len(dropped))

    artifact = storage.make("datasets", id, meta, fill, force=cfg.force)
    segments.remove()
    run.record(artifact=artifact.name, inputs=meta["inputs"], ledger=totals, counts=counts)
    run.say(
        f"{artifact.name}: {tally.sentence()}; ledger {ledger.id!r}: {totals['spent']} steps, price"
        f" {totals['price']:g} {totals['currency']}"
    )
    return artifact


def _resolve(
    configs: Sequence[BehaviourConfig],
    storage: Storage,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
) -> tuple[list[BehaviourConfig], list[str]]:
    """The behaviours with their policies' full ids, and the hash of each one's code; each is built
    once, to refuse it before any step.
    """
    chosen, sources = [], []
    for config in configs:
        policy = None if config.policy is None else acting.full_name(storage, config.policy)
        config = replace(config, policy=policy)
        acting.build(config, observation_space, action_space, storage)
        chosen.append(config)
        sources.append(
            "" if config.function is None else source_hash(acting.load_function(config.function))
        )
    return chosen, sources


def _check_budget(cfg: CollectConfig, ledger: Ledger, used: int, run: Run) -> None:
    """Raise UsageError where the budget leaves fewer steps than are to be taken beside the `used`
    ones in storage.
    """
    totals = ledger.totals()
    earlier = totals.purposes["collect"].steps - used
    if cfg.ledger is None and earlier > 0:
        run.say(
            f"ledger {ledger.id!r} already counts {earlier} steps of an earlier collection of this"
            " dataset whose episodes are not in storage; they stay spent"
        )
    left, wanted = ledger.remaining("collect"), cfg.steps - used
    if left is not None and left < wanted:
        apart = sum(r.steps for r in totals.unconfirmed)
        raise UsageError(
            f"reality.budget.steps={cfg.reality.budget.steps} leaves {left} real steps in ledger"
            f" {ledger.id!r} ({totals.spent} spent, {apart} of them unconfirmed), fewer than the"
            f" {wanted} to take (steps={cfg.steps}); lower steps, raise the budget, or name another"
            " ledger"
        )


def _collect(cfg: CollectConfig, plan: Plan, ledger: Ledger, run: Run) -> list[Attempt]:
    """Every attempt, by index: those that an earlier run has stored, and those of this one."""
    lanes, segments = split(cfg.steps, cfg.lanes), plan.segments()
    attempts, tally = list[Attempt](), Tally()
    for lane in lanes:
        stored = segments.attempts(lane.index, 0, ledger)
        lane.record(stored)
        lane.check(segments, stored[-1].reason if stored else None)
        lane.refused = False  # the budget may have been raised since
        attempts += stored
    tally.add(attempts)
    used = sum(lane.used for lane in lanes)
    if attempts:
        run.say(
            f"an earlier run paid {used} real steps and stored {tally.sentence()}; going on after"
            " them"
        )
    _check_budget(cfg, ledger, used, run)
    if cfg.workers > cfg.lanes:
        run.say(f"workers={cfg.workers}: only lanes={cfg.lanes} can work at once")
    with run.progress(f"collect {cfg.reality.env}", cfg.steps) as update:

        def report(new: Sequence[Attempt], steps: int) -> None:
            attempts.extend(new)
            tally.add(new)
            update(steps, f"{steps}/{cfg.steps} real steps, {tally.sentence()}")

        _run_lanes(cfg, plan, lanes, report)
        report([], sum(lane.used for lane in lanes))
    return sorted(attempts, key=lambda attempt: attempt.index)


def _run_lanes(cfg: CollectConfig, plan: Plan, lanes: list[Lane], report: Report) -> None:
    if cfg.workers == 0 or not any(lane.left for lane in lanes):
        run_here(plan, lanes, report)
        return
    ray_session.ensure(cfg.ray)
    workers = min(cfg.workers, cfg.lanes)
    ray_session.preflight(cpus=workers, what=f"workers={cfg.workers}")
    run_on_ray(plan, lanes, workers, report)


class Tally:
    """Counts of attempts, kept as they come."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._behaviours: Counter[str] = Counter()
        self._returns: list[float] = []
        self._successes: list[bool] = []
        self._return = 0.0

    def add(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            self._sums["steps"] += attempt.steps
            if attempt.reason is not None:
                self._sums["dropped"] += 1
                self._sums["dropped_steps"] += attempt.steps
            if attempt.length is None:
                continue
            self._sums["episodes"] += 1
            self._sums["transitions"] += attempt.length
            self._outcomes[attempt.outcome] += 1
            self._behaviours[attempt.behaviour] += 1
            if attempt.outcome != "unfinished":
                self._returns.append(attempt.total_reward)
                self._return += attempt.total_reward
                if attempt.success is not None:
                    self._successes.append(attempt.success)

    def counts(self) -> dict[str, Any]:
        """`mean_return` and `success_rate` are of the episodes that came to their end, None where
        none did: one that the budget of steps cut (`unfinished`) has no return yet.
        """
        keys = ("steps", "transitions", "episodes", "dropped", "dropped_steps")
        outcomes = ("terminated", "truncated", "unfinished")
        return {
            **{key: self._sums[key] for key in keys},
            "outcomes": {outcome: self._outcomes[outcome] for outcome in outcomes},
            "behaviours": dict(sorted(self._behaviours.items())),
            "mean_return": float(np.mean(self._returns)) if self._returns else None,
            "success_rate": float(np.mean(self._successes)) if self._successes else None,
        }

    def sentence(self) -> str:
        """One line, in a time that does not depend on the number of episodes."""
        ended = len(self._returns)
        mean = f", mean return {self._return / ended:.4g}" if ended else ""
        dropped = f", {self._sums['dropped']} dropped" if self._sums["dropped"] else ""
        episodes, transitions = self._sums["episodes"], self._sums["transitions"]
        plural = "" if episodes == 1 else "s"
        return f"{episodes} episode{plural} of {transitions} transitions{dropped}{mean}"
