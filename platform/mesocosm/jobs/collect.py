"""The job `collect`: metered real steps by a mix of behaviours, in parallel lanes -> a dataset.

The same config and seed give the same episodes for any number of workers. Episodes are stored as
they end (`segments`). A collection that was killed continues after them when it is run again, and
makes the same dataset.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from mesocosm.cluster import ray_session
from mesocosm.config import fingerprint, identity
from mesocosm.data.collecting.acts import build_act
from mesocosm.data.collecting.config import CollectConfig, check
from mesocosm.data.collecting.ray_workers import run_on_ray
from mesocosm.data.collecting.workers import CollectTask, Lane, Report, run_here, split
from mesocosm.datasets.manifest import Environment
from mesocosm.datasets.spaces import check_spaces
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.envs.amounts import time_price
from mesocosm.envs.config import PAID, ROUNDING, check_affordable
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of
from mesocosm.envs.memory import GIB
from mesocosm.envs.segments import Attempt
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError
from mesocosm.job import Job, Plan, Resources
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.user_code import source_hash


@dataclass(frozen=True, kw_only=True)
class Collection(Plan[CollectConfig]):
    """The collection: the environment, and the behaviours with their policies' full names."""

    environment: EnvFacts
    behaviours: list[BehaviourConfig]


class Collect(Job[CollectConfig, Collection]):
    """Collect `steps` real steps, or find the dataset of the same config.

    If other jobs spend the same budget first, the dataset is shorter and its meta's `short` is set.

    Raises:
        BudgetSpent: No episode was collected.
        MesocosmError: The environment keeps failing, or a behaviour raises.
    """

    name, kind, config = "collect", "datasets", CollectConfig

    def resolve(self, config: CollectConfig, storage: Storage) -> Collection:
        check(config)
        budget = config.reality.budget.steps
        if budget is not None and config.steps > budget:
            raise UsageError(f"steps must be <= reality.budget.steps={budget}, got {config.steps}")
        check_affordable(config.reality, config.steps)
        environment = facts_of(config.reality)
        check_spaces(*environment.spaces)
        behaviours, sources = _resolve(config.behaviours, storage, *environment.spaces)
        facts = identity(config, without=["workers", "ledger", *PAID])
        facts["behaviours"] = [asdict(b) for b in behaviours]
        policies = [b.policy for b in behaviours if b.policy is not None]
        agents = {policy.removeprefix("agents/").partition("@")[0] for policy in policies}
        return Collection(
            config=config,
            inputs={"agents": sorted(agents)},
            facts={**identity(config), "behaviours": facts["behaviours"]},
            id=self.hash(facts, sources, environment.version),
            environment=environment,
            behaviours=behaviours,
        )

    def summary(self, plan: Collection) -> dict[str, Any]:
        cfg, price = plan.config, plan.config.reality.price
        return {
            "environment": cfg.reality.env,
            "observation space": str(plan.environment.observation_space),
            "action space": str(plan.environment.action_space),
            "real steps": cfg.steps,
            "budget": cfg.reality.budget.steps,
            "budget of money": cfg.reality.budget.money,
            "price": f"{cfg.steps * price.per_step:g} {price.currency}"
            + time_price(price, cfg.steps),
            "price of a reset": f"{price.per_reset:g} {price.currency}",
            "behaviours": [acting.label(b) for b in cfg.behaviours],
        }

    def resources(self, plan: Collection) -> Resources:
        config = plan.config
        return {f"workers={config.workers}": (min(config.workers, config.lanes), 0)}

    def make(self, plan: Collection, run: Run) -> Artifact:
        cfg, id = plan.config, plan.id
        ledger = Ledger(run.storage, cfg.ledger or id, cfg.reality.budget, cfg.reality.price)
        task = CollectTask(
            reality=cfg.reality,
            behaviours=plan.behaviours,
            seed=cfg.seed,
            root=cfg.storage.root,
            ledger=ledger.id,
            dataset=id,
            run=f"{run.id}-{uuid.uuid4().hex[:8]}",
            imports=os.getcwd(),
        )
        segments = task.segments()
        attempts, tally = _collect(cfg, task, ledger, run)
        dropped = [
            {"index": a.index, "behaviour": a.behaviour, "steps": a.steps, "reason": a.reason}
            for a in attempts
            if a.reason is not None
        ]
        episodes = [a for a in attempts if a.length is not None]
        refusals = [a.spent for a in attempts if a.spent is not None]
        if not episodes and refusals:
            raise BudgetSpent(refusals[-1])
        if not episodes:
            segments.remove()  # the next run tries them again
            raise MesocosmError(
                f"all {len(dropped)} episodes were dropped, the last because"
                f" {dropped[-1]['reason']}; correct reality.env={cfg.reality.env!r}"
            )
        for a in episodes:
            metrics = {"collect/return": a.total_reward, "collect/length": a.length or 0}
            run.log(metrics, step=a.index)
        counts, totals, short = _counts(attempts), ledger.totals().to_json(), None
        # The ledger may now have the steps that it refused to an earlier run.
        if refusals and counts["steps"] < cfg.steps:
            short = f"{counts['steps']} of steps={cfg.steps} were taken: {refusals[-1]}"
            run.say(f"warning: {short}")

        def fill(folder: Path) -> None:
            writer = DatasetWriter(
                folder,
                id=id,
                environment=_environment(plan),
                observation_space=plan.environment.observation_space,
                action_space=plan.environment.action_space,
                seed=cfg.seed,
                valid_fraction=cfg.valid_fraction,
            )
            for episode, rows in segments.episodes(cfg.lanes):
                writer.add(episode, rows)
            writer.close(dropped=len(dropped))

        meta = {"counts": counts, "short": short, "dropped": dropped, "ledger": totals}
        artifact = self.commit(plan, run, fill, **meta)
        segments.remove()
        run.record(ledger=totals, counts=counts)
        spent = totals["purposes"]["collect"]
        timed = f" of {spent['duration']:.4g} s" if spent["duration"] else ""
        texts = f", {spent['text_bytes']:,} bytes of text" if spent["text_bytes"] else ""
        used = f"{totals['spent']} steps{timed}{texts}"
        run.say(
            f"{artifact.name}: {tally}; ledger {ledger.id!r}: {used},"
            f" price {totals['price']:g} {totals['currency']}"
        )
        return artifact

    def report(self, artifact: Artifact, plan: Collection, run: Run, *, made: bool) -> None:
        if made:
            return
        short = artifact.meta.get("short")
        hint = f" ({short}; --force collects it again)" if short else ""
        transitions = artifact.meta["counts"]["transitions"]
        run.say(f"found {artifact.name}: {transitions} transitions; nothing was collected{hint}")


def _environment(plan: Collection) -> Environment:
    reality = plan.config.reality
    return Environment(
        id=reality.env,
        version=plan.environment.version,
        kwargs=dict(reality.kwargs),
        task=list(reality.task),
        max_episode_steps=plan.environment.max_episode_steps,
        success=reality.success,
    )


def _resolve(
    configs: Sequence[BehaviourConfig],
    storage: Storage,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
) -> tuple[list[BehaviourConfig], list[str]]:
    """The behaviours with full policy ids, and the hash of each one's code.

    Builds each behaviour once, so that an invalid one fails before any step.
    """
    chosen, sources = [], []
    for config in configs:
        policy = None if config.policy is None else acting.full_name(storage, config.policy)
        config = replace(config, policy=policy)
        build_act(config, observation_space, action_space, storage)
        chosen.append(config)
        source = ""
        if config.function is not None:
            source = source_hash(acting.load_function(config.function))
        elif policy is not None:
            source = _candidates_hash(policy, storage)
        sources.append(source)
    return chosen, sources


def _candidates_hash(policy: str, storage: Storage) -> str:
    """The hash of how a policy lists its candidates; "" for one that has none."""
    from mesocosm.policies.stored import candidates_of  # imports torch: only where a policy acts

    candidates = candidates_of(storage, [policy])
    return fingerprint(candidates) if candidates else ""


def _check_budget(cfg: CollectConfig, ledger: Ledger, used: int, run: Run) -> None:
    """Raise UsageError if the budget is smaller than the steps that are missing.

    `used` steps are in storage already.
    """
    totals = ledger.totals()
    earlier = totals.purposes["collect"].steps - used
    if cfg.ledger is None and earlier > 0:
        run.say(
            f"ledger {ledger.id!r} already counts {earlier} steps of an earlier collection of this"
            " dataset whose episodes are not in storage; they stay spent"
        )
    left, missing = ledger.remaining("collect"), cfg.steps - used
    money, least = totals.remaining_money, cfg.reality.price.of(missing, int(missing > 0), 0.0)
    if money is not None and least > money * (1 + ROUNDING):
        raise UsageError(
            f"reality.budget.money={cfg.reality.budget.money:g} leaves {money:g}"
            f" {totals.currency} in ledger {ledger.id!r} ({totals.spent_money:g} spent), less than"
            f" the {missing} steps to take and a reset cost ({least:g} without their time); lower"
            " steps, raise the budget, or name another ledger"
        )
    if left is not None and left < missing:
        apart = sum(r.steps for r in totals.unconfirmed)
        raise UsageError(
            f"reality.budget.steps={cfg.reality.budget.steps} leaves {left} real steps in ledger"
            f" {ledger.id!r} ({totals.spent} spent, {apart} of them unconfirmed), fewer than the"
            f" {missing} to take (steps={cfg.steps}); lower steps, raise the budget, or name"
            " another ledger"
        )


def _collect(
    cfg: CollectConfig, task: CollectTask, ledger: Ledger, run: Run
) -> tuple[list[Attempt], Tally]:
    """The attempts of earlier runs and of this one, by index, and their tally."""
    lanes, segments = split(cfg.steps, cfg.lanes), task.segments()
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
        run.say(f"an earlier run paid {used} real steps and stored {tally}; going on after them")
    _check_budget(cfg, ledger, used, run)
    if cfg.workers > cfg.lanes:
        run.say(f"workers={cfg.workers}: only lanes={cfg.lanes} can work at once")
    with run.progress(f"collect {cfg.reality.env}", cfg.steps) as update:

        def report(new: Sequence[Attempt], steps: int) -> None:
            attempts.extend(new)
            tally.add(new)
            update(steps, f"{steps}/{cfg.steps} real steps, {tally}")

        _run_lanes(cfg, task, lanes, report)
        report([], sum(lane.used for lane in lanes))
    return sorted(attempts, key=lambda attempt: attempt.index), tally


def _run_lanes(cfg: CollectConfig, task: CollectTask, lanes: list[Lane], report: Report) -> None:
    if cfg.workers == 0 or not any(lane.left for lane in lanes):
        run_here(task, lanes, report)
        return
    ray_session.ensure(cfg.ray)
    workers = min(cfg.workers, cfg.lanes, _fitting(cfg))
    ray_session.preflight(cpus=workers, key=f"workers={cfg.workers}")
    run_on_ray(task, lanes, workers, report)


def _fitting(cfg: CollectConfig) -> int:
    """The number of workers that fit into the cluster's memory."""
    limit = cfg.reality.memory_gb
    if limit is None:
        return cfg.workers
    have = ray_session.most().get("memory", 0.0) / GIB
    if limit > have:
        raise UsageError(
            f"reality.memory_gb must be at most the {have:.3g} GiB that Ray has, got {limit:g};"
            " lower it, or use a larger cluster"
        )
    return int(have / limit)


@dataclass
class Tally:
    """Running counts of attempts, for the line of progress."""

    episodes: int = 0
    transitions: int = 0
    dropped: int = 0
    ended: int = 0
    total_return: float = 0.0

    def add(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            self.dropped += attempt.reason is not None
            if attempt.length is not None:
                self.episodes += 1
                self.transitions += attempt.length
                if attempt.outcome != "unfinished":
                    self.ended += 1
                    self.total_return += attempt.total_reward

    def __str__(self) -> str:
        mean = f", mean return {self.total_return / self.ended:.4g}" if self.ended else ""
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        plural = "" if self.episodes == 1 else "s"
        return f"{self.episodes} episode{plural} of {self.transitions} transitions{dropped}{mean}"


def _counts(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The counts, with `mean_return` and `success_rate` over finished episodes (None if none).

    An episode that the budget cut (`unfinished`) has no return.
    """
    dropped = [a for a in attempts if a.reason is not None]
    episodes = [a for a in attempts if a.length is not None]
    finished = [a for a in episodes if a.outcome != "unfinished"]
    successes = [a.success for a in finished if a.success is not None]
    outcomes = Counter(a.outcome for a in episodes)
    return {
        "steps": sum(a.steps for a in attempts),
        "transitions": sum(a.length or 0 for a in episodes),
        "episodes": len(episodes),
        "dropped": len(dropped),
        "dropped_steps": sum(a.steps for a in dropped),
        "outcomes": {name: outcomes[name] for name in ("terminated", "truncated", "unfinished")},
        "behaviours": dict(sorted(Counter(a.behaviour for a in episodes).items())),
        "mean_return": float(np.mean([a.total_reward for a in finished])) if finished else None,
        "success_rate": float(np.mean(successes)) if successes else None,
    }


JOB = Collect()
