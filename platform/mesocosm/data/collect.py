"""The job `collect`: metered real steps by a mix of behaviours, in parallel lanes -> a dataset.

The same config and seed make the same episodes, whatever the number of workers. A collection that was killed is simply run
again: it starts anew, and the ledger keeps counting the steps that were spent.
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

from mesocosm import __version__, cluster
from mesocosm.config import JobConfig, fingerprint, identity
from mesocosm.data import behaviours as acting
from mesocosm.data.behaviours import BehaviourConfig
from mesocosm.data.lanes import Attempt, Plan, run_here, run_on_ray, split
from mesocosm.data.manifest import Environment
from mesocosm.data.spaces import check_spaces
from mesocosm.data.writer import write_dataset
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError
from mesocosm.reality.config import PAID, RealityConfig
from mesocosm.reality.env import EnvFacts, facts_of, source_hash
from mesocosm.reality.ledger import Ledger
from mesocosm.storage import SCHEMA, Artifact, Storage
from mesocosm.tracking import Run


@dataclass
class CollectConfig(JobConfig):
    reality: RealityConfig = field(default_factory=RealityConfig)
    steps: int = 1000
    """Real steps to take, those of dropped episodes included."""
    lanes: int = 2
    """The steps are shared out to so many sequences of episodes: part of what is collected."""
    workers: int = 1
    """Ray actors that run the lanes; 0 runs them in this process (where a step that hangs cannot be ended)."""
    behaviours: list[BehaviourConfig] = field(default_factory=lambda: [BehaviourConfig()])
    valid_fraction: float = 0.1
    """Share of the episodes held out for validation; 0 holds none out. Fewer than 5 episodes may all be trained on."""
    ledger: str | None = None
    """The ledger that counts the steps; None is one named as the dataset."""


def check(cfg: CollectConfig) -> None:
    """Raise UsageError on the first value that cannot be meant. Makes no environment."""
    for name, least in (("steps", 1), ("lanes", 1), ("workers", 0)):
        if getattr(cfg, name) < least:
            raise UsageError(f"{name}={getattr(cfg, name)} cannot be; give at least {least}")
    if cfg.lanes > cfg.steps:
        raise UsageError(f"lanes={cfg.lanes} are more than steps={cfg.steps}; give each lane at least one step")
    if not 0 <= cfg.valid_fraction < 1:
        raise UsageError(f"valid_fraction={cfg.valid_fraction} is no share; give a number from 0 to below 1")
    acting.check(cfg.behaviours)
    acting.check_tasks(cfg.behaviours, cfg.reality)


def plan(cfg: CollectConfig) -> dict[str, Any]:
    """What `run` would spend. Makes the environment, to see that it exists; takes no real step and writes nothing."""
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

    Raises UsageError before any step: a wrong config, no such environment, an unsupported space, too small a budget, more
    workers than the cluster has. MesocosmError after: an environment that keeps failing, a behaviour that raises. Where others
    spend the same budget meanwhile, what was collected until then is the dataset, and its meta's `short` says so; BudgetSpent if
    that is nothing.
    """
    check(cfg)
    storage = run.storage
    known = facts_of(cfg.reality)
    check_spaces(*known.spaces)
    chosen, sources = _resolve(cfg.behaviours, storage, *known.spaces)
    what = identity(cfg, without=["workers", "ledger", *PAID])
    what["behaviours"] = [asdict(b) for b in chosen]
    id = fingerprint("datasets", what, sources, known.version, __version__, SCHEMA)
    if not cfg.force and (found := storage.find("datasets", id)) is not None:
        hint = f" ({found.meta['short']}; --force collects it anew)" if found.meta.get("short") else ""
        run.say(f"found {found.name}: {found.meta['counts']['transitions']} transitions; nothing was collected{hint}")
        run.record(artifact=found.name, inputs=found.meta["inputs"])
        return found
    ledger = Ledger(storage, cfg.ledger or id, cfg.reality.budget, cfg.reality.price)
    _check_budget(cfg, ledger, run)
    plan = Plan(cfg.reality, chosen, cfg.seed, cfg.storage.root, ledger.id, f"{run.id}-{uuid.uuid4().hex[:8]}", os.getcwd())
    attempts = _collect(cfg, plan, run)
    episodes = [a.episode for a in attempts if a.episode is not None]
    dropped = [{"index": a.index, "behaviour": a.behaviour, "steps": a.steps, "reason": a.reason} for a in attempts if a.reason is not None]
    refusals = [a.spent for a in attempts if a.spent is not None]
    if refusals and not episodes:
        raise BudgetSpent(refusals[-1])
    if not episodes:
        raise MesocosmError(f"all {len(dropped)} episodes were dropped, the last because {dropped[-1]['reason']}; correct reality.env={cfg.reality.env!r}")
    for episode in episodes:
        run.log({"collect/return": episode.total_reward, "collect/length": len(episode)}, step=episode.index)
    totals = ledger.totals().to_json()
    counts = _counts(attempts)
    short = f"{counts['steps']} of steps={cfg.steps} were taken: {refusals[-1]}" if refusals else None
    if short is not None:
        run.say(f"warning: {short}")
    meta = {
        "inputs": {"agents": sorted({b.policy.removeprefix("agents/").partition("@")[0] for b in chosen if b.policy is not None})},
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

    def fill(folder: Path) -> None:
        write_dataset(
            folder,
            episodes,
            dropped=len(dropped),
            id=id,
            environment=environment,
            observation_space=known.observation_space,
            action_space=known.action_space,
            seed=cfg.seed,
            valid_fraction=cfg.valid_fraction,
        )

    artifact = storage.make("datasets", id, meta, fill, force=cfg.force)
    run.record(artifact=artifact.name, inputs=meta["inputs"], ledger=totals, counts=counts)
    run.say(f"{artifact.name}: {_sentence(counts)}; ledger {ledger.id!r}: {totals['spent']} steps, price {totals['price']:g} {totals['currency']}")
    return artifact


def _resolve(
    configs: Sequence[BehaviourConfig], storage: Storage, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]
) -> tuple[list[BehaviourConfig], list[str]]:
    """The behaviours with their policies' full ids, and the hash of each one's code; each is built once, to refuse it before any step."""
    chosen, sources = [], []
    for config in configs:
        policy = None if config.policy is None else acting.full_name(storage, config.policy)
        config = replace(config, policy=policy)
        acting.build(config, observation_space, action_space, storage)
        chosen.append(config)
        sources.append("" if config.function is None else source_hash(acting.load_function(config.function)))
    return chosen, sources


def _check_budget(cfg: CollectConfig, ledger: Ledger, run: Run) -> None:
    totals = ledger.totals()
    if cfg.ledger is None and totals.purposes["collect"].steps:
        run.say(f"ledger {ledger.id!r} already counts {totals.purposes['collect'].steps} steps of an earlier collection of this dataset; they stay spent")
    left = ledger.remaining("collect")
    if left is not None and left < cfg.steps:
        apart = sum(r.steps for r in totals.unconfirmed)
        raise UsageError(
            f"reality.budget.steps={cfg.reality.budget.steps} leaves {left} real steps in ledger {ledger.id!r} "
            f"({totals.spent} spent, {apart} of them unconfirmed), fewer than steps={cfg.steps}; lower steps, raise the budget, or name another ledger"
        )


def _collect(cfg: CollectConfig, plan: Plan, run: Run) -> list[Attempt]:
    """Every episode tried, by index."""
    lanes = split(cfg.steps, cfg.lanes)
    if cfg.workers > cfg.lanes:
        run.say(f"workers={cfg.workers}: only lanes={cfg.lanes} can work at once")
    with run.progress(f"collect {cfg.reality.env}", cfg.steps) as update:

        def report(attempts: Sequence[Attempt], steps: int) -> None:
            update(steps, f"{steps}/{cfg.steps} real steps, {_sentence(_counts(attempts))}")

        if cfg.workers == 0:
            attempts = run_here(plan, lanes, report)
        else:
            cluster.ensure(cfg.ray)
            workers = min(cfg.workers, cfg.lanes)
            cluster.preflight(cpus=workers, what=f"workers={cfg.workers}")
            attempts = run_on_ray(plan, lanes, workers, report)
        attempts.sort(key=lambda attempt: attempt.index)
        report(attempts, sum(lane.used for lane in lanes))
    return attempts


def _counts(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """What was collected. `mean_return` and `success_rate` are of the episodes that came to their end: one that the budget of steps cut
    (`unfinished`) has no return yet. None where no episode did."""
    episodes = [a.episode for a in attempts if a.episode is not None]
    outcomes = Counter(episode.outcome for episode in episodes)
    ended = [episode for episode in episodes if episode.outcome != "unfinished"]
    successes = [episode.success for episode in ended if episode.success is not None]
    return {
        "steps": sum(a.steps for a in attempts),
        "transitions": sum(len(episode) for episode in episodes),
        "episodes": len(episodes),
        "dropped": sum(a.reason is not None for a in attempts),
        "dropped_steps": sum(a.steps for a in attempts if a.reason is not None),
        "outcomes": {outcome: outcomes[outcome] for outcome in ("terminated", "truncated", "unfinished")},
        "behaviours": dict(sorted(Counter(episode.behaviour for episode in episodes).items())),
        "mean_return": float(np.mean([episode.total_reward for episode in ended])) if ended else None,
        "success_rate": float(np.mean(successes)) if successes else None,
    }


def _sentence(counts: dict[str, Any]) -> str:
    mean = "" if counts["mean_return"] is None else f", mean return {counts['mean_return']:.4g}"
    dropped = f", {counts['dropped']} dropped" if counts["dropped"] else ""
    return f"{counts['episodes']} episodes of {counts['transitions']} transitions{dropped}{mean}"
