"""Checks of the stages of a loop against the environment, before a real step.

They take no real step. A loop that fails later has wasted the steps of a round.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gymnasium import Space

from mesocosm.agents import validation as agents
from mesocosm.agents.encoders import encoder_for
from mesocosm.data.collecting.acts import build_act
from mesocosm.data.tokens.reading import stored_tokenizers
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.horizon import MAX_EPISODE_STEPS, UNKNOWN, Horizon, logged_horizon
from mesocosm.datasets.manifest import Manifest, current_id
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.envs.config import BudgetConfig
from mesocosm.envs.make import EnvFacts
from mesocosm.errors import UsageError
from mesocosm.evaluate import policy_set, suite
from mesocosm.evaluate.judge import check_spaces
from mesocosm.evaluate.metrics.ranking import FEWEST
from mesocosm.evaluate.report.page import money
from mesocosm.jobs import baseline as model_free
from mesocosm.jobs import collect
from mesocosm.jobs.loop_checks import check
from mesocosm.jobs.loop_config import LoopConfig, acting, fill, stage, with_tokenizer
from mesocosm.model.tokenizer.frames import FrameTokenizer
from mesocosm.policies import behaviours
from mesocosm.serve.config import first_replicas
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train import known, prepare

KNOWN = "reality.known."
"""The keys of known parts in a loop."""


@dataclass(frozen=True)
class Ready:
    """The results of the checks."""

    datasets: list[Artifact]
    """The datasets that the loop begins with."""
    facts: EnvFacts
    horizon: Horizon | None
    """None if it is known only from the loop's data."""
    known: known.Functions = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """The most steps of a judged episode."""
        return MAX_EPISODE_STEPS if self.horizon is None else self.horizon.steps

    @property
    def warning(self) -> str | None:
        """A warning about a horizon that is not known yet."""
        if self.horizon is not None:
            return None
        fallback = f"or uses {UNKNOWN} steps if there are none; set reality.horizon to be sure"
        inferred = "the loop infers it from the truncated episodes of its data"
        return f"reality.env registers no time limit: {inferred}, {fallback}"


def preflight(cfg: LoopConfig, storage: Storage) -> Ready:
    """Check every stage of the loop. Takes no real step and starts nothing.

    Raises:
        UsageError: a stage would refuse its config, the environment's spaces, or an artifact.
    """
    check(cfg)
    datasets = [storage.artifact("datasets", name) for name in cfg.datasets]
    facts = _check_collection(cfg, storage)
    _check_datasets(cfg, datasets, facts)
    _check_task(cfg, facts)
    if cfg.pretrain.model.family == "language":
        raise UsageError(
            "pretrain.model.family must be ensemble or sequence in a loop, got language: its agent"
            " would train in a world that no evaluation has passed; run pretrain, evaluate and"
            " train-agent one by one"
        )
    observation, action = facts.spaces
    tokenizers = _tokenizers(cfg, storage, observation)
    codecs = SpaceCodec(observation, "observation", tokenizers), SpaceCodec(action, "action")
    prepare.check_leaves(*codecs, cfg.pretrain.model)
    horizon = None
    if facts.max_episode_steps is not None:
        horizon = Horizon(facts.max_episode_steps, "time limit of the environment")
    elif datasets:
        horizon = logged_horizon(storage, [artifact.id for artifact in datasets])
    functions = known.load(cfg.reality.known, KNOWN)
    known.check_spaces(functions, *facts.spaces, KNOWN)
    ready = Ready(datasets, facts, horizon, functions)
    _check_pretraining(cfg, datasets)
    _check_agent(cfg, storage, facts, tokenizers)
    _check_evaluation(cfg, storage, ready)
    for i, block in enumerate(cfg.baselines):
        with stage(f"baselines[{i}]"):
            model_free.prepared(with_tokenizer(block, cfg), facts.spaces, storage)
    return ready


def stage_resources(cfg: LoopConfig) -> dict[str, tuple[float, float]]:
    """(CPUs, GPUs) that each stage needs, by key."""
    train, agent = cfg.pretrain.train, cfg.agent
    replicas = first_replicas(cfg.serve) if agent.backend == "serve" else 0
    cpus = replicas * cfg.serve.cpus + agent.runners + agent.learners
    gpus = replicas if cfg.serve.device == "cuda" else 0
    resources: dict[str, tuple[float, float]] = {
        f"pretrain.train.workers={train.workers}": (
            train.workers,
            train.workers * (train.gpus_per_worker or 0),
        ),
        f"serve.replicas with agent.runners and agent.learners={cpus:g}": (cpus, gpus),
    }
    collections = {"collect": cfg.collect} | ({"explore": cfg.explore} if cfg.rounds > 1 else {})
    for name, block in collections.items():
        resources[f"{name}.workers={block.workers}"] = (min(block.workers, block.lanes), 0)
    return resources


def _check_collection(cfg: LoopConfig, storage: Storage) -> EnvFacts:
    """The environment, its spaces, and every behaviour that does not wait for an agent."""
    with stage("collect"):
        block = fill(cfg.collect, cfg, 0)
        # `check` has compared the budget with the steps that will be collected.
        block.reality = replace(block.reality, budget=BudgetConfig())
        facts = collect.JOB.resolve(block, storage).environment
    if cfg.rounds > 1:
        named = [b for b in acting(cfg.explore, "?").behaviours if b.policy != "?"]
        with stage("explore"):
            for behaviour in named:
                build_act(policy_set.full(behaviour, storage), *facts.spaces, storage)
    return facts


def _check_datasets(cfg: LoopConfig, datasets: list[Artifact], facts: EnvFacts) -> None:
    """Check that the datasets match each other, and the environment if the loop collects more."""
    if not datasets:
        return
    data, first = Dataset([artifact.path for artifact in datasets]), datasets[0].name
    if (data.observation_space, data.action_space) != facts.spaces:
        spaces = f"{data.observation_space}, {data.action_space}"
        env = f"reality.env={cfg.reality.env!r}"
        message = f"{first} has the spaces {spaces}, and {env} others"
        raise UsageError(f"{message}; use data of that environment")
    if cfg.rounds == 1:
        return
    logged = data.environment.model_copy(update={"id": current_id(data.environment.id)})
    expected = {
        "id": current_id(cfg.reality.env),
        "kwargs": dict(cfg.reality.kwargs),
        "task": list(cfg.reality.task),
        "max_episode_steps": facts.max_episode_steps,
        "version": facts.version if logged.version else "",
    }
    for name, value in expected.items():
        if getattr(logged, name) != value:
            message = f"{first} is of an environment with {name}={getattr(logged, name)!r}"
            fix = "correct reality, import the logs again, or set rounds=1"
            raise UsageError(
                f"{message}, and rounds={cfg.rounds} would add data with {value!r}; {fix}"
            )


def _check_task(cfg: LoopConfig, facts: EnvFacts) -> None:
    """Check that the observation has parts other than the task, for the world to predict."""
    codec = SpaceCodec(facts.observation_space, "observation")
    task = {leaf.name for name in cfg.reality.task for leaf in codec.matching(name)}
    if task and all(leaf.name in task for leaf in codec.leaves):
        names = list(cfg.reality.task)
        message = f"reality.task={names} names every key of the observation"
        raise UsageError(f"{message}; leave at least one to predict")


def _check_pretraining(cfg: LoopConfig, datasets: list[Artifact]) -> None:
    unique = cfg.pretrain.data.unique
    if unique is None:
        return
    # An estimate: the held-out episodes are not known before the collection.
    collected = round(cfg.collect.steps * (1 - cfg.collect.valid_fraction))
    first = Dataset([a.path for a in datasets]).count("train") if datasets else collected
    if unique > first:
        most = f"the {first} training transitions of the first round"
        message = f"pretrain.data.unique must be at most {most}, got {unique}"
        raise UsageError(f"{message}; lower it, or collect more")


def _check_spaces_of(datasets: list[str], storage: Storage, facts: EnvFacts) -> None:
    for name in datasets:
        data = Dataset([storage.artifact("datasets", name).path])
        if (data.observation_space, data.action_space) != facts.spaces:
            raise UsageError(f"datasets: {name} has other spaces than reality.env")


def _tokenizers(
    cfg: LoopConfig, storage: Storage, observation: Space[Any]
) -> tuple[FrameTokenizer, ...]:
    """The tokenizers of images, which are fitted before the loop: by data that it begins with, or
    by an earlier collection of the environment.
    """
    ref = cfg.pretrain.data.tokenizer
    if ref is None:
        return ()
    with stage("pretrain"):
        images = SpaceCodec(observation, "observation").image_leaves
        return stored_tokenizers(storage, ref, images, "pretrain.data.tokenizer")[1].each


def _check_agent(
    cfg: LoopConfig, storage: Storage, facts: EnvFacts, tokenizers: Sequence[FrameTokenizer]
) -> None:
    block = cfg.agent
    former = None if block.init is None else storage.artifact("agents", block.init)
    with stage("agent"):
        encoder = encoder_for(block.algo, facts.observation_space, tokenizers)
        agents.check_spaces(block, facts.spaces, former, encoder)
        _check_spaces_of(block.datasets, storage, facts)
    needs = {
        "agent.max_disagreement": block.max_disagreement is not None,
        "agent.objective": block.objective != "return",
        "evaluate.adversary": cfg.evaluate.adversary > 0,
    }
    for key, needed in needs.items():
        if needed and cfg.pretrain.model.members == 1:
            fix = f"raise it, or leave {key} out"
            message = f"{key} needs members that can disagree, got pretrain.model.members=1"
            raise UsageError(f"{message}; {fix}")


def _check_evaluation(cfg: LoopConfig, storage: Storage, ready: Ready) -> None:
    block, facts = cfg.evaluate, ready.facts
    with stage("evaluate"):
        _check_spaces_of(block.datasets, storage, facts)
        policies = [policy_set.full(policy, storage) for policy in block.policies]
        for policy in policies:
            check_spaces(
                policy_set.named(policy, storage, *facts.spaces).policy, facts, cfg.reality
            )
        suite.check_steps(block, 1 + cfg.agent.snapshots, ready.limit)
        _check_held_out(cfg, storage, ready.datasets, policies)


def _check_held_out(
    cfg: LoopConfig,
    storage: Storage,
    datasets: list[Artifact],
    policies: list[behaviours.BehaviourConfig],
) -> None:
    """Check that policies to compare have episodes that are not in the world's data."""
    block = cfg.evaluate
    if not block.compares:
        return
    refs = [policy.policy for policy in policies if policy.policy is not None]
    policy_set.held_out(refs, storage, datasets)
    stages = [] if cfg.datasets else [cfg.collect]
    stages += [cfg.explore] if cfg.rounds > 1 else []
    collecting = [policy_set.full(b, storage) for stage in stages for b in stage.behaviours]
    acts = {b.policy.partition("@")[0] for b in collecting if b.policy is not None}
    for ref in refs:
        if ref.partition("@")[0] in acts:
            message = f"policies: {ref} also collects the world's data, so its value is no test"
            raise UsageError(f"{message}; name another agent")
    logged = {b.name for artifact in datasets for b in Manifest.read(artifact.path).behaviours}
    logged |= {behaviours.label(b) for b in ([] if cfg.datasets else cfg.collect.behaviours)}
    held_out = sum(behaviours.label(policy) not in logged for policy in policies)
    most = held_out + 1 + cfg.agent.snapshots + block.graded + bool(block.adversary)
    if most < FEWEST:
        message = f"at most {most} policies that did not collect the data can be compared"
        fix = f"{FEWEST} are needed: add policies, graded or agent.snapshots"
        raise UsageError(f"{message}; {fix}")


def check_port(cfg: LoopConfig) -> None:
    """Raise UsageError if the port of the served world is taken.

    Not part of `preflight`, because a finished loop serves no world.
    """
    if cfg.agent.backend != "serve" or not cfg.serve.http:
        return
    try:
        socket.create_server(("127.0.0.1", cfg.serve.http)).close()
    except OSError as error:
        message = f"serve.http={cfg.serve.http} cannot be used ({error.strerror})"
        raise UsageError(f"{message}; set another port") from error


def stage_table(cfg: LoopConfig, limit: int) -> list[dict[str, Any]]:
    """The work of each stage and its price in reality, and their total, for a dry run."""
    price, agent, pretrain = cfg.reality.price, cfg.agent, cfg.pretrain
    trained = f"{pretrain.model.family} {pretrain.model.size}, {pretrain.train.steps} steps each"
    imagined = agent.iterations * agent.num_envs * agent.rollout
    trainings = 2 * cfg.rounds - 1 if cfg.warm_start == "auto" else cfg.rounds
    episodes = {
        "judge agents": suite.most_episodes(cfg.evaluate, 1 + agent.snapshots)[1] * cfg.rounds,
        "judge baselines": sum(map(model_free.judged, cfg.baselines)),
    }
    work = [  # stage, times, real steps, work
        ("collect", 0 if cfg.datasets else 1, cfg.collect.steps, ""),
        ("explore", cfg.rounds - 1, (cfg.rounds - 1) * cfg.explore.steps, ""),
        ("pretrain", cfg.rounds, 0, trained),
        ("train-agent", trainings, 0, f"{imagined:,} imagined steps each"),
        *((f"baseline {b.algo}", 1, b.steps, "") for b in cfg.baselines),
        *((name, int(n > 0), n * limit, f"{n} episodes") for name, n in episodes.items()),
    ]
    work = [row for row in work if row[1]]
    work.append(("total", 1, sum(row[2] for row in work), ""))
    rows = []
    for name, times, steps, text in work:
        resets = sum(episodes.values()) if name == "total" else episodes.get(name, 0)
        amount = price.of(steps, resets, (steps + resets) * (price.longest_s or 0.0))
        exact = name in ("collect", "explore") and price.longest_s is None
        at_most = "" if exact else "at most "
        cost = f"{at_most}{money(amount)} {price.currency}" if steps else "-"
        if steps and price.per_second and price.longest_s is None:
            cost += " and its time"
        rows.append(
            {"stage": name, "times": times, "real steps": steps, "price": cost, "work": text}
        )
    return rows
