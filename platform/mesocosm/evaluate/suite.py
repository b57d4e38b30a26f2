"""What an evaluation measures beyond fidelity on held-out data: policy value, errors away from the
data, the task distribution.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.rollout import imagined_episodes
from mesocosm.data.analysis.evidence import Evidence, evidence
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.episode import Episode
from mesocosm.data.format.horizon import Horizon, horizon_of
from mesocosm.data.format.manifest import Manifest
from mesocosm.data.loading.codec import Codec
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of, source_hash
from mesocosm.errors import UsageError
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.evaluate.imagine import starts_of
from mesocosm.evaluate.judge import JudgeResult, check_spaces
from mesocosm.evaluate.judge_store import JudgeStore
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.evaluate.metrics.off_policy import OffPolicy, off_policy
from mesocosm.evaluate.metrics.open_loop import Progress
from mesocosm.evaluate.metrics.policy_value import (
    PolicyValue,
    Value,
    imagining,
    policy_value,
    success_by_return,
)
from mesocosm.evaluate.metrics.ranking import FEWEST
from mesocosm.evaluate.metrics.starts import task_distribution
from mesocosm.evaluate.policy_set import Candidate
from mesocosm.model.world import World
from mesocosm.policies import behaviours
from mesocosm.policies.policy import Acts, policy_of
from mesocosm.runs.tracking import Run
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.store.artifacts import Artifact, Storage

MOST_BEHAVIOURS = 8
"""Of the off-policy table: the adversary's, the agent's own, then those of the config."""
ADVERSARY = "adversary"
STARTS = 64
"""Logged states of each behaviour to start from, for each horizon."""


class TooFewPolicies(UsageError):
    """Fewer policies can be compared than a ranking needs."""


@dataclass(frozen=True)
class Prepared:
    """What an evaluation that asks reality will ask it, looked at before it does."""

    cfg: EvaluateConfig
    """With the full names of its policies"""
    facts: EnvFacts
    horizon: Horizon
    """Steps of an episode at most, real or imagined."""
    agent: Artifact | None
    candidates: list[Candidate]
    agents: list[str]
    """Ids of the agents among `policies`"""
    sources: list[str]
    """Hashes of scripted policies' code"""
    most_policies: int
    most_episodes: int

    @property
    def limit(self) -> int:
        """Steps of an episode at most, real or imagined."""
        return self.horizon.steps


def most_episodes(cfg: EvaluateConfig, own: int) -> tuple[int, int]:
    """(policies, real episodes) that will be judged, at most; `own`: the agent and its snapshots, 0
    without an agent.
    """
    policies = len(cfg.policies) + own + cfg.graded + bool(cfg.adversary) if cfg.compares else 0
    return policies, (cfg.episodes if own else 0) + policies * cfg.policy_episodes


def check_steps(cfg: EvaluateConfig, own: int, limit: int) -> None:
    """Raise UsageError where judging might take more than `judge_steps`."""
    episodes = most_episodes(cfg, own)[1]
    if cfg.judge_steps is not None and episodes * limit > cfg.judge_steps:
        raise UsageError(
            f"judge_steps={cfg.judge_steps} is less than the {episodes * limit} real steps that"
            f" {episodes} episodes of at most {limit} steps may take; raise it, or lower episodes,"
            " policy_episodes or graded"
        )


def prepare(
    cfg: EvaluateConfig, storage: Storage, world: Artifact, codec: Codec, agent: Artifact | None
) -> Prepared:
    """Raises UsageError, before a real step is spent, for a reality of other spaces than the
    world's, a policy that is missing, of other spaces or of the world's own data, and where judging
    might take more than `judge_steps`. `cfg.reality` is filled in.
    """
    facts = facts_of(cfg.reality)
    for what, theirs, own in zip(
        ("observation", "action"),
        facts.spaces,
        (codec.observation_space, codec.action_space),
        strict=True,
    ):
        if theirs != own:
            raise UsageError(
                f"reality.env={cfg.reality.env!r} has the {what} space {theirs}, and {world.name}"
                f" {own}; judge it in its own environment"
            )
    if (
        cfg.adversary
        and json.loads((world.path / "world.json").read_text())["config"]["members"] == 1
    ):
        raise UsageError(
            f"adversary={cfg.adversary} seeks disagreement, and {world.name} has one member; set"
            " adversary=0, or pretrain with model.members"
        )
    _check_options(cfg, codec)
    cfg = replace(cfg, policies=[policy_set.full(config, storage) for config in cfg.policies])
    horizon = horizon_of(storage, world, facts.max_episode_steps, "reality.horizon")
    data = [storage.artifact("datasets", id) for id in world.meta["inputs"]["datasets"]]
    logged = (
        {
            behaviour.name
            for artifact in data
            for behaviour in Manifest.read(artifact.path).behaviours
        }
        if cfg.policies
        else set()
    )
    candidates = [
        replace(
            policy_set.named(config, storage, *facts.spaces),
            held_out=behaviours.label(config) not in logged,
        )
        for config in cfg.policies
    ]
    refs = [config.policy for config in cfg.policies if config.policy is not None]
    mine = [] if agent is None else policy_set.snapshots(agent, storage)
    for candidate in [*candidates, *mine]:
        check_spaces(candidate.policy, facts, cfg.reality)
    check_steps(cfg, len(mine), horizon.steps)
    if cfg.compares:
        candidates += mine
        policy_set.held_out([*refs, *([] if agent is None else [agent.name])], storage, data)
        most = (
            sum(candidate.held_out for candidate in candidates) + cfg.graded + bool(cfg.adversary)
        )
        if most < FEWEST:
            raise TooFewPolicies(
                f"{most} policies whose data the world was not trained on cannot be compared: that"
                f" takes {FEWEST}; add policies, or graded"
            )
    ids = sorted({ref.removeprefix("agents/").partition("@")[0] for ref in refs})
    sources = [
        source_hash(behaviours.load_function(config.function))
        for config in cfg.policies
        if config.function is not None
    ]
    return Prepared(
        cfg, facts, horizon, agent, candidates, ids, sources, *most_episodes(cfg, len(mine))
    )


def _check_options(cfg: EvaluateConfig, codec: Codec) -> None:
    """Raise UsageError where reality draws a reset option's value that the world has not seen."""
    for option in codec.options:
        drawn = cfg.reality.task_options.get(option.name)
        if option.values is None or drawn is None or drawn.choices is None:
            continue
        unseen = [value for value in drawn.choices if value not in option.values]
        if unseen:
            key = f"reality.task_options.{option.name}.choices"
            fix = "collect episodes of it first, or leave it out"
            raise UsageError(f"{key} holds {unseen[0]!r}, which the world has not seen; {fix}")


def run(
    cfg: EvaluateConfig,
    run: Run,
    world: World,
    made: Artifact,
    dataset: Dataset,
    plan: Prepared | None,
    ledger: Ledger | None,
    store: JudgeStore,
    judged: JudgeResult | None,
) -> dict[str, Any]:
    """{"starts", "policy_value", "off_policy"} as JSON, of what was asked for. `judged`: the
    agent's own episodes, which are not bought twice.
    """
    with run.progress("starts", None) as update:
        starts = task_distribution(
            world,
            dataset,
            seed=cfg.seed,
            more=None if judged is None else starts_of(world, judged.episodes),
        )
        update(1, "" if starts.auc is None else f"AUC {starts.auc:.2f}")
    found: dict[str, Any] = {"starts": starts.to_json()}
    shown = evidence_of(run.storage, made, cfg.seed)
    if shown is not None:
        found["evidence"] = shown.to_json()
    if plan is None or ledger is None or not cfg.compares:
        return found
    with run.progress("policy value", plan.most_policies) as update:
        values = policy_value(
            world,
            plan.candidates,
            cfg.reality,
            ledger,
            store=store,
            known={} if judged is None else {policy_set.AGENT: judged},
            more=_grading(cfg, run.storage, plan.agent, world),
            episodes=cfg.policy_episodes,
            imagined=cfg.imagined,
            horizon=plan.limit,
            seed=cfg.seed,
            progress=update,
        )
        r = values.ranking.pearson
        update(
            plan.most_policies,
            f"{len(values.values)} policies, r {'undefined' if r is None else f'{r:.2f}'},"
            f" {values.steps} real steps",
        )
    found["policy_value"] = values.to_json()
    logs = Dataset(
        [run.storage.artifact("datasets", id).path for id in made.meta["inputs"]["datasets"]]
    )
    with run.progress("off-policy", None) as update:

        def report(text: str) -> None:
            update(0, text)

        away = _off_policy(cfg, world, logs, values, report)
        update(1, "" if away.auroc is None else f"AUROC of disagreement {away.auroc:.2f}")
    return found | {"off_policy": away.to_json()}


def evidence_of(storage: Storage, world: Artifact, seed: int) -> Evidence | None:
    """What the world's logs show, as pretraining recorded it or from its datasets; None without
    them.
    """
    recorded = world.meta.get("evidence")
    if recorded is not None:
        return Evidence(**recorded)
    try:
        data = [storage.artifact("datasets", id).path for id in world.meta["inputs"]["datasets"]]
    except UsageError:  # a copied world, without the datasets that it was trained on
        return None
    return evidence(Dataset(data), seed=seed) if data else None


def agent_told(
    measured: dict[str, Any],
    judged: JudgeResult,
    world: World,
    policy: Acts,
    cfg: EvaluateConfig,
    limit: int,
    run: Run,
) -> dict[str, Any]:
    """{"real", "world": mean returns of the judged agent, "success": {"real", "world"} shares of
    episodes, or None where `reality.success` is not set, "unexplained": a sentence where the logs
    cannot explain its return in the world, or None}. The world's are its row's among the compared
    policies, or of `cfg.imagined` episodes.
    """
    env = WorldVectorEnv(cfg.imagined, world, horizon=limit)
    with run.progress("imagine the agent", limit) as update:

        def report(steps: int) -> None:
            update(steps, f"step {steps} of at most {limit}")

        (returns,), (lengths,) = imagined_episodes([policy], env, imagining(cfg.seed), report)
    for row in measured.get("policy_value", {"policies": []})["policies"]:
        if row["name"] == policy_set.AGENT:
            imagined, met = (
                float(row["world"]["mean"]),
                None if row["success"] is None else row["success"]["world"],
            )
            break
    else:
        imagined, met = float(returns.mean()), success_by_return(cfg.reality.success, returns)
    success = (
        None
        if judged.successes is None
        else {"real": judged.successes / len(judged.returns), "world": met}
    )
    shown = measured.get("evidence")
    unexplained = None
    if shown is not None:
        unexplained = Evidence(**shown).unexplained(float(returns.mean()), float(lengths.mean()))
    return {"real": judged.mean, "world": imagined, "success": success, "unexplained": unexplained}


def with_adversary(plan: Prepared, run: Run, world: Artifact) -> Prepared:
    adversary = _adversary(plan.cfg, run, world, plan.limit)
    return replace(plan, candidates=[*plan.candidates, adversary])


def _grading(cfg: EvaluateConfig, storage: Storage, agent: Artifact | None, world: World) -> Any:
    def more(judged: Sequence[tuple[Candidate, float]]) -> Candidate | None:
        if (
            agent is None
            or sum(candidate.noise is not None for candidate, _ in judged) >= cfg.graded
        ):
            return None
        space = codec_of(world).action_space
        noises = {
            candidate.noise: mean for candidate, mean in judged if candidate.noise is not None
        }
        noises[0.0] = next(mean for candidate, mean in judged if candidate.name == policy_set.AGENT)
        noise = policy_set.next_noise(
            noises, [mean for _, mean in judged], policy_set.most_noise(space)
        )
        return (
            None
            if noise is None
            else policy_set.graded(policy_of(storage, agent.name), space, noise)
        )

    return more


def _adversary(cfg: EvaluateConfig, run: Run, world: Artifact, limit: int) -> Candidate:
    """A policy trained in the world to go where its members do not agree; it learns to avoid an
    early end, too, and takes no real step.
    """
    from mesocosm.jobs import train_agent as agents  # imports RLlib: only where it trains

    config = AgentConfig(
        seed=cfg.seed,
        storage=cfg.storage,
        tracking=cfg.tracking,
        ray=cfg.ray,
        world=world.id,
        backend="local",
        iterations=cfg.adversary,
        horizon=limit,
        snapshots=0,
        objective="disagreement",
        params={"minibatch_size": 256, "num_epochs": 8},
    )
    with run.child("train-agent", config) as child:
        artifact = agents.run(config, child)
    return Candidate(ADVERSARY, policy_of(run.storage, artifact.name))


def _off_policy(
    cfg: EvaluateConfig, world: World, logs: Dataset, found: PolicyValue, progress: Progress
) -> OffPolicy:
    """Adversarial, trained, half-trained, noisy, random, then those of the config, as far as they
    are there: the judged episodes are the data.
    """
    chosen = behaviours_of(found.values)
    episodes = [(v.candidate.name, _some(v)) for v in chosen]
    away = off_policy(
        world,
        logs,
        episodes,
        horizons=cfg.horizons,
        starts=min(cfg.starts, STARTS),
        samples=cfg.samples,
        seed=cfg.seed,
        progress=progress,
    )
    logged = {v.candidate.name for v in chosen if not v.candidate.held_out}
    return replace(
        away, behaviours=tuple(replace(row, logged=row.name in logged) for row in away.behaviours)
    )


def behaviours_of(values: Sequence[Value]) -> list[Value]:
    """At most MOST_BEHAVIOURS, none twice."""
    own = [v for v in values if v.candidate.iteration is not None]
    graded = sorted(
        (v for v in values if v.candidate.noise is not None), key=lambda v: v.candidate.noise or 0.0
    )
    rest = [v for v in values if v not in own and v not in graded]
    first = [v for v in rest if v.candidate.name == ADVERSARY]
    wanted = [
        *first,
        *own[-1:],
        *own[len(own) // 2 : len(own) // 2 + 1],
        *graded[len(graded) // 2 : len(graded) // 2 + 1],
        *graded[-1:],
        *rest,
    ]
    return list({v.candidate.name: v for v in wanted}.values())[:MOST_BEHAVIOURS]


def _some(value: Value) -> list[Episode]:
    """Numbered anew: the judged episodes of different policies have the same numbers."""
    return [replace(episode, index=k) for k, episode in enumerate(value.judged.episodes)]
