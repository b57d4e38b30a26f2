"""Measurements beyond fidelity on held-out data: policy values, off-policy errors and the task
distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.encoders import tokenizers_of
from mesocosm.agents.rollout import imagined_episodes
from mesocosm.data.analysis.evidence import Evidence, evidence
from mesocosm.data.loading.text_batch import AnyBatchCodec
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.horizon import Horizon, horizon_of
from mesocosm.datasets.manifest import Manifest
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts
from mesocosm.errors import UsageError
from mesocosm.evaluate import gain, policy_set
from mesocosm.evaluate.config import EvaluateConfig, facts_for, members_of
from mesocosm.evaluate.imagine import starts_of
from mesocosm.evaluate.judge import JudgeResult, JudgeStore, check_spaces, judge
from mesocosm.evaluate.metrics.known import known_parts
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.evaluate.metrics.off_policy import off_policy
from mesocosm.evaluate.metrics.ranking import FEWEST
from mesocosm.evaluate.metrics.starts import task_distribution
from mesocosm.evaluate.policy_set import ComparedPolicy
from mesocosm.evaluate.policy_value import Value, imagining, policy_value, success_by_return
from mesocosm.model.any_world import AnyWorld
from mesocosm.model.world import World
from mesocosm.policies.images import check_tokenizer
from mesocosm.policies.policy import Acts
from mesocosm.policies.stored import policy_of
from mesocosm.runs.tracking import Run
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Artifact, Storage

MOST_BEHAVIOURS = 8
"""The most rows of the off-policy table: adversary, agent, then those of the config."""
ADVERSARY = "adversary"
STARTS = 64
"""Logged states of each behaviour to start from, for each horizon."""


class TooFewPolicies(UsageError):
    """Fewer policies can be compared than a ranking needs."""


@dataclass(frozen=True)
class Prepared:
    """An evaluation in reality, checked before the first real step."""

    cfg: EvaluateConfig
    """The config with the full names of its policies."""
    facts: EnvFacts
    horizon: Horizon
    """Steps of an episode at most, real or imagined."""
    agent: Artifact | None
    start: ComparedPolicy | None
    """The policy that the agent's training began with; None without `gain`."""
    candidates: list[ComparedPolicy]
    most_policies: int
    most_episodes: int

    @property
    def limit(self) -> int:
        """Steps of an episode at most, real or imagined."""
        return self.horizon.steps


def most_episodes(cfg: EvaluateConfig, snapshots: int) -> tuple[int, int]:
    """(policies, real episodes) to judge, at most. `snapshots` counts the agent; 0 without one."""
    policies = 0
    if cfg.compares:
        policies = len(cfg.policies) + snapshots + cfg.graded + bool(cfg.adversary)
    judged = cfg.episodes * (1 + cfg.gain) if snapshots else 0
    return policies, judged + policies * cfg.policy_episodes


def check_steps(cfg: EvaluateConfig, snapshots: int, limit: int) -> None:
    """Raise UsageError where judging might take more than `judge_steps`."""
    episodes = most_episodes(cfg, snapshots)[1]
    if cfg.judge_steps is not None and episodes * limit > cfg.judge_steps:
        raise UsageError(
            f"judge_steps must be >= {episodes * limit}, the real steps that {episodes} episodes of"
            f" at most {limit} steps may take, got {cfg.judge_steps}; raise it, or lower episodes,"
            " policy_episodes or graded"
        )


def prepare(
    cfg: EvaluateConfig,
    storage: Storage,
    world: Artifact,
    codec: AnyBatchCodec,
    agent: Artifact | None,
) -> Prepared:
    """Check an evaluation whose `cfg.reality` is complete. Takes no real step.

    Raises:
        UsageError: Reality has other spaces than the world; a policy is missing, has other spaces
            or collected the world's own data; judging might take more than `judge_steps`.
        TooFewPolicies: The policies make no ranking.
    """
    facts = facts_for(cfg.reality, world.name, codec)
    if cfg.adversary and members_of(world) == 1:
        raise UsageError(
            f"adversary must be 0 for {world.name}, whose one member cannot disagree, got"
            f" {cfg.adversary}; set adversary=0, or pretrain with model.members"
        )
    for option in codec.options:
        drawn = cfg.reality.task_options.get(option.name)
        if option.values is None or drawn is None or drawn.choices is None:
            continue
        unseen = [value for value in drawn.choices if value not in option.values]
        if unseen:
            key = f"reality.task_options.{option.name}.choices"
            fix = "collect episodes of it first, or leave it out"
            raise UsageError(f"{key} holds {unseen[0]!r}, which the world has not seen; {fix}")
    cfg = replace(cfg, policies=[policy_set.full(config, storage) for config in cfg.policies])
    horizon = horizon_of(storage, world, facts.max_episode_steps, "reality.horizon")
    data = [storage.artifact("datasets", id) for id in world.meta["inputs"]["datasets"]]
    manifests = [Manifest.read(artifact.path) for artifact in data if cfg.policies]
    logged = {behaviour.name for manifest in manifests for behaviour in manifest.behaviours}
    named = [policy_set.named(config, storage, *facts.spaces) for config in cfg.policies]
    candidates = [replace(policy, held_out=policy.name not in logged) for policy in named]
    snapshots = [] if agent is None else policy_set.snapshots(agent, storage)
    start = None if agent is None or not cfg.gain else gain.start_of(agent, storage)
    tokenizers = tokenizers_of(codec)
    for candidate in [*candidates, *snapshots, *([] if start is None else [start])]:
        check_spaces(candidate.policy, facts, cfg.reality)
        check_tokenizer(candidate.policy, tokenizers, candidate.name, world.name)
    check_steps(cfg, len(snapshots), horizon.steps)
    refs = [config.policy for config in cfg.policies if config.policy is not None]
    if cfg.compares:
        candidates += snapshots
        policy_set.held_out([*refs, *([] if agent is None else [agent.name])], storage, data)
        most = sum(c.held_out for c in candidates) + cfg.graded + bool(cfg.adversary)
        if most < FEWEST:
            raise TooFewPolicies(
                f"{most} policies whose data the world was not trained on cannot be compared: that"
                f" takes {FEWEST}; add policies, or graded"
            )
    most_judged = most_episodes(cfg, len(snapshots))
    return Prepared(cfg, facts, horizon, agent, start, candidates, *most_judged)


def run(
    cfg: EvaluateConfig,
    run: Run,
    world: World,
    artifact: Artifact,
    dataset: Dataset,
    plan: Prepared | None,
    ledger: Ledger | None,
    store: JudgeStore,
    judged: JudgeResult | None,
) -> dict[str, Any]:
    """Measure everything that the config asks for.

    Args:
        cfg: The config.
        run: Receives the progress.
        world: The world of `artifact`.
        artifact: Of the world.
        dataset: Its validation split is held out.
        plan: None without judging in reality, and so `ledger`.
        ledger: Counts the real steps.
        store: Holds the judged episodes.
        judged: The agent's own episodes, which are not bought twice.

    Returns:
        {"starts", "known", "evidence", "policy_value", "off_policy"} as JSON, as far as measured.
    """
    more = None if judged is None else starts_of(world, judged.episodes)
    with run.progress("starts", None) as update:
        starts = task_distribution(world, dataset, seed=cfg.seed, more=more)
        update(1, "" if starts.auc is None else f"AUC {starts.auc:.2f}")
    measured: dict[str, Any] = {"starts": asdict(starts)}
    parts = known_parts(world, dataset)
    if parts is not None:
        measured["known"] = asdict(parts)
    shown = evidence_of(run.storage, artifact, cfg.seed)
    if shown is not None:
        measured["evidence"] = shown.to_json()
    if plan is None or ledger is None or not cfg.compares:
        return measured
    with run.progress("policy value", plan.most_policies) as update:
        values = policy_value(
            world,
            plan.candidates,
            cfg,
            ledger,
            store=store,
            agent=judged,
            more=_grading(cfg, run.storage, plan.agent, world),
            horizon=plan.limit,
            progress=update,
        )
        r = values.ranking.pearson
        text = f"{len(values.values)} policies, r {'undefined' if r is None else f'{r:.2f}'}"
        update(plan.most_policies, f"{text}, {values.steps} real steps")
    measured["policy_value"] = values.to_json()
    data = [run.storage.artifact("datasets", id) for id in artifact.meta["inputs"]["datasets"]]
    chosen = [(v.candidate, v.judged.episodes) for v in behaviours_of(values.values)]
    with run.progress("off-policy", None) as update:
        errors = off_policy(
            world,
            Dataset([artifact.path for artifact in data]),
            # Renumbered: judged episodes of different policies have the same numbers.
            [(c.name, [replace(e, index=k) for k, e in enumerate(es)]) for c, es in chosen],
            horizons=cfg.horizons,
            starts=min(cfg.starts, STARTS),
            samples=cfg.samples,
            seed=cfg.seed,
            progress=partial(update, 0),
        )
        update(1, "" if errors.auroc is None else f"AUROC of disagreement {errors.auroc:.2f}")
    logged = {candidate.name for candidate, _ in chosen if not candidate.held_out}
    rows = tuple(replace(row, logged=row.name in logged) for row in errors.behaviours)
    return measured | {"off_policy": asdict(replace(errors, behaviours=rows))}


def evidence_of(storage: Storage, world: Artifact, seed: int) -> Evidence | None:
    """The evidence of the world's logs, which pretraining recorded, or from its datasets; None
    without them.
    """
    recorded = world.meta.get("evidence")
    if recorded is not None:
        return Evidence(**recorded)
    try:
        data = [storage.artifact("datasets", id).path for id in world.meta["inputs"]["datasets"]]
    except UsageError:  # a copied world, without the datasets that it was trained on
        return None
    return evidence(Dataset(data), seed=seed) if data else None


def agent_summary(
    measured: dict[str, Any],
    judged: JudgeResult,
    world: AnyWorld,
    policy: Acts,
    plan: Prepared,
    ledger: Ledger,
    store: JudgeStore,
    run: Run,
) -> dict[str, Any]:
    """The judged agent in reality and in the world.

    Its values in the world are those of its row among the compared policies, or of `cfg.imagined`
    episodes.

    Returns:
        {"real", "world": mean returns, "success": {"real", "world"} shares of episodes or None
        where `reality.success` is not set, "unexplained": a sentence where the logs cannot explain
        its return in the world, or None, "gain": a `Gain` as JSON, or None}.
    """
    cfg, limit = plan.cfg, plan.limit

    def imagine(name: str, policy: Acts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        env = WorldVectorEnv(cfg.imagined, world, horizon=limit)
        with run.progress(f"imagine the {name}", limit) as update:

            def report(steps: int) -> None:
                update(steps, f"step {steps} of at most {limit}")

            returns, lengths = imagined_episodes([policy], env, imagining(cfg.seed), report)
            return returns[0], lengths[0]

    returns, lengths = imagine("agent", policy)
    mean = float(returns.mean())
    imagined, success = mean, success_by_return(cfg.reality.success, returns)
    for row in measured.get("policy_value", {"policies": []})["policies"]:
        if row["name"] == policy_set.AGENT:
            imagined = float(row["world"]["mean"])
            success = None if row["success"] is None else row["success"]["world"]
    shares = None
    if judged.successes is not None:
        shares = {"real": judged.successes / len(judged.returns), "world": success}
    unexplained = None
    if "evidence" in measured:
        logs = Evidence(**measured["evidence"])
        unexplained = logs.unexplained(mean, float(lengths.mean()))
    gained = None
    if (start := plan.start) is not None:
        before = judge_one("start", start.policy, plan, ledger, store, run, "judge its start")
        pair = returns, imagine("start", start.policy)[0]
        gained = gain.gain(start.name, (judged, before), pair).to_json()
    return {
        "real": judged.mean,
        "world": imagined,
        "success": shares,
        "unexplained": unexplained,
        "gain": gained,
    }


def judge_one(
    name: str,
    policy: Acts,
    plan: Prepared,
    ledger: Ledger,
    store: JudgeStore,
    run: Run,
    title: str = "judge",
) -> JudgeResult:
    """Judge a policy in reality, in the episodes of the agent. `name` is its own in `store`."""
    cfg, limit = plan.cfg, plan.limit
    segments = store.segments(name, policy, seed=cfg.seed, limit=limit)
    with run.progress(title, cfg.episodes) as update:
        return judge(
            policy,
            cfg.reality,
            ledger,
            episodes=cfg.episodes,
            seed=cfg.seed,
            max_episode_steps=limit,
            progress=update,
            segments=segments,
        )


def with_adversary(
    plan: Prepared, run: Run, world: Artifact, train: Callable[[AgentConfig, Run], Artifact]
) -> Prepared:
    """Add a policy that `train`, the job train-agent, trains in the world to seek disagreement.

    It also learns to avoid an early end, and takes no real step.
    """
    cfg = plan.cfg
    common = {key: getattr(cfg, key) for key in ("seed", "storage", "tracking", "ray")}
    config = AgentConfig(
        **common,
        world=world.id,
        backend="local",
        iterations=cfg.adversary,
        horizon=plan.limit,
        snapshots=0,
        objective="disagreement",
        params={"minibatch_size": 256, "num_epochs": 8},
    )
    with run.child("train-agent", config) as child:
        artifact = train(config, child)
    adversary = ComparedPolicy(ADVERSARY, policy_of(run.storage, artifact.name))
    return replace(plan, candidates=[*plan.candidates, adversary])


def _grading(
    cfg: EvaluateConfig, storage: Storage, agent: Artifact | None, world: World
) -> Callable[[Sequence[tuple[ComparedPolicy, float]]], ComparedPolicy | None]:
    def more(judged: Sequence[tuple[ComparedPolicy, float]]) -> ComparedPolicy | None:
        """The next noisy version of the agent to judge; None if there are enough."""
        noises = {c.noise: mean for c, mean in judged if c.noise is not None}
        if agent is None or len(noises) >= cfg.graded:
            return None
        space = codec_of(world).action_space
        noises[0.0] = next(mean for c, mean in judged if c.name == policy_set.AGENT)
        returns = [mean for _, mean in judged]
        noise = policy_set.next_noise(noises, returns, policy_set.most_noise(space))
        if noise is None:
            return None
        return policy_set.graded(policy_of(storage, agent.name), space, noise)

    return more


def behaviours_of(values: Sequence[Value]) -> list[Value]:
    """At most MOST_BEHAVIOURS values, each name once: the adversary, the trained agent, the
    half-trained one, middle and most noise, then the others.
    """
    snapshots = [v for v in values if v.candidate.iteration is not None]
    graded = [v for v in values if v.candidate.noise is not None]
    graded.sort(key=lambda value: value.candidate.noise or 0.0)
    rest = [v for v in values if v not in snapshots and v not in graded]
    adversary = [v for v in rest if v.candidate.name == ADVERSARY]
    halves = [some[len(some) // 2 :][:1] for some in (snapshots, graded)]
    chosen = [*adversary, *snapshots[-1:], *halves[0], *halves[1], *graded[-1:], *rest]
    return list({value.candidate.name: value for value in chosen}.values())[:MOST_BEHAVIOURS]
