"""The job `train-agent`: an RLlib agent trained wholly inside a world, and its policy as an
artifact.

Running the same command again after a kill continues from the last checkpoint and ends with the
same policy.

An `agents` artifact is policy.json and policy.safetensors (what acts) and training.safetensors
(what another training can begin with).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm

from mesocosm.agents import learner_state, rllib, settings
from mesocosm.agents.checkpoint import Checkpoints, Progress
from mesocosm.agents.choice import choose_best, explain
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.feasible import check_agent, check_init
from mesocosm.cluster import ray_session
from mesocosm.config import fingerprint, identity
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.horizon import Horizon, horizon_of
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.parts import observation_parts
from mesocosm.errors import UsageError, nearest
from mesocosm.model.spec import Parts
from mesocosm.policies.policy import SNAPSHOTS, Policy
from mesocosm.runs.tracking import Run
from mesocosm.serve.client import BACKENDS, WorldVectorEnv
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import deploy, undeploy
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.versions import VERSIONS

STARTS = ("logged", "generated")
OBJECTIVES = ("return", "disagreement")
MAX_STARTS = 50_000
"""Logged starts are a sample of so many of the datasets' observations at most."""


def check(config: AgentConfig) -> None:
    """Raise UsageError on the first value that cannot be meant. Reads no storage, starts nothing."""
    rllib.check("", config.algo, config.params, config.model)
    for key in ("iterations", "num_envs", "rollout", "horizon"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UsageError(f"{key}={value} must be at least 1")
    if config.snapshots < 0:
        raise UsageError(f"snapshots={config.snapshots} must be at least 0; 0 keeps none")
    if config.runners < 0:
        raise UsageError(
            f"runners={config.runners} must be at least 0; 0 is one in the job's own process"
        )
    if config.starts not in STARTS:
        raise UsageError(
            f"starts={config.starts!r} is not one of"
            f" {', '.join(STARTS)}{nearest(config.starts, STARTS)}"
        )
    if config.backend not in BACKENDS:
        raise UsageError(
            f"backend={config.backend!r} is not one of"
            f" {', '.join(BACKENDS)}{nearest(config.backend, BACKENDS)}"
        )
    if config.objective not in OBJECTIVES:
        raise UsageError(
            f"objective={config.objective!r} is not one of"
            f" {', '.join(OBJECTIVES)}{nearest(config.objective, OBJECTIVES)}"
        )
    if not (math.isfinite(config.penalty) and config.penalty >= 0):
        raise UsageError(f"penalty={config.penalty} must be a finite number of at least 0")
    if config.max_disagreement is not None and not config.max_disagreement > 0:
        raise UsageError(
            f"max_disagreement={config.max_disagreement} would end every episode at once; give a"
            " number above 0, or null for no limit"
        )
    batch, minibatch = (
        config.num_envs * config.rollout * max(config.runners, 1),
        config.params.get("minibatch_size"),
    )
    if config.algo in settings.ON_POLICY and isinstance(minibatch, int) and minibatch > batch:
        raise UsageError(
            f"params.minibatch_size={minibatch} is more than the {batch} steps of an iteration;"
            " lower it, or raise num_envs or rollout"
        )
    if not 0 < config.gamma <= 1:
        raise UsageError(
            f"gamma={config.gamma} is no discount; give a number above 0 and at most 1"
        )


def plan(config: AgentConfig) -> dict[str, Any]:
    """What `run` would train, and on how many imagined steps. Starts nothing."""
    check(config)
    storage = Storage(config.storage.root)
    world = _world(config, storage)
    _datasets(config, storage, world)
    _members(config, world)
    codec = Codec.from_json(json.loads((world.path / "codec.json").read_text()))
    cut = _horizon(config, storage, world, codec)
    former = None if config.init is None else storage.artifact("agents", config.init)
    check_spaces(config, (codec.observation_space, codec.action_space), former)
    steps = config.iterations * config.num_envs * config.rollout * max(config.runners, 1)
    return {
        "world": world.name,
        "algo": config.algo,
        "params": _params(config),
        "horizon": f"{cut.steps} steps: {cut.source}",
        "imagined steps": steps,
        "real steps": 0,
        "price": 0.0,
    }


def resources(config: AgentConfig) -> dict[str, tuple[float, float]]:
    """(CPUs, GPUs) that the job needs, by key."""
    serves = config.backend == "serve" and config.ray.address is None
    return {f"runners={config.runners}": (config.runners + int(serves), 0)}


def check_spaces(config: AgentConfig, spaces: tuple[Any, Any], former: Artifact | None) -> None:
    """Raise UsageError where an agent cannot be trained on (observation, action) spaces.

    `former` is the agent that training begins with.
    """
    shape = config.num_envs, config.rollout if config.algo in settings.ON_POLICY else 1
    network = settings.model(config.algo, config.model)
    module = check_agent(config.algo, _params(config), network, spaces, shape, config.runners)
    if former is None:
        return
    policy = Policy.load(former.path)
    if (policy.observation_space, policy.action_space) != spaces:
        fix = "use an agent of this environment"
        raise UsageError(f"init={former.name} was trained on other spaces; {fix}")
    check_init(module, former.path, former.name)


def _world(config: AgentConfig, storage: Storage) -> Artifact:
    """The world to train in. Raises UsageError where none is named."""
    if not config.world:
        raise UsageError("world is not set; give the world to train in, as in world=worlds/ab12")
    return storage.artifact("worlds", config.world)


def run(config: AgentConfig, run: Run) -> Artifact:
    """Train and export. Raises UsageError for wrong settings, a missing world, dataset or agent,
    and weights of another network.

    The artifact is what earns most in this world, by greedy imagined episodes, of the last policy,
    the snapshots and, with `init`, the agent it began with: its metrics say `greedy_return` (of the
    last), `best_return`, `kept_iteration`, `former_return` and `kept_former`.
    """
    check(config)
    world = _world(config, run.storage)
    codec = Codec.from_json(json.loads((world.path / "codec.json").read_text()))
    datasets = _datasets(config, run.storage, world)
    _members(config, world)
    former = None if config.init is None else run.storage.artifact("agents", config.init)
    inputs = {
        "worlds": [world.id],
        "datasets": [d.id for d in datasets],
        "agents": [] if former is None else [former.id],
    }
    cut = _horizon(config, run.storage, world, codec)
    horizon = cut.steps
    if cut.inferred:
        run.say(f"imagined episodes end after {horizon} steps: {cut.source}")
    told = {
        "horizon": horizon,
        "params": _params(config),
        "model": settings.model(config.algo, config.model),
    }
    facts = identity(config, without=["world", "backend", "app", "datasets", "init"]) | told
    id = fingerprint("agents", facts, inputs, VERSIONS["train-agent"], SCHEMA)
    check_spaces(config, (codec.observation_space, codec.action_space), former)
    run.record(inputs=inputs)
    with run.making("agents", id, config) as artifact:
        if artifact is None:
            task = _Task(id, inputs, facts, world, codec, datasets, former, horizon)
            return _make(config, run, task)
        run.say(f"found {artifact.name}: it was trained before")
        run.record(artifact=artifact.name)
        return artifact


@dataclass(frozen=True)
class _Task:
    """What is to be made of what."""

    id: str
    inputs: dict[str, list[str]]
    facts: dict[str, Any]
    world: Artifact
    codec: Codec
    datasets: list[Artifact]
    former: Artifact | None
    horizon: int


def _make(config: AgentConfig, run: Run, task: _Task) -> Artifact:
    world, codec, former = task.world, task.codec, task.former
    checkpoints = Checkpoints(run.storage, task.id)
    if config.force:
        checkpoints.remove()
    progress = checkpoints.latest()
    ray_session.ensure(config.ray)
    if config.runners:
        ray_session.preflight(cpus=config.runners, what=f"runners={config.runners}")
    starts = None
    if task.datasets:
        data = Dataset([d.path for d in task.datasets])
        starts = observation_parts(data, codec, "train", MAX_STARTS, config.seed)
    seen: dict[str, float] = {}
    checks: dict[str, str] = {}

    def fill(folder: Path) -> None:
        with _served(config, world):
            arguments = _arguments(config, run, world, starts, task.horizon)
            algorithm = _build(config, run, arguments)
            try:
                if progress is not None:
                    run.say(
                        f"continuing after iteration {progress.iteration} of {config.iterations}"
                    )
                    learner_state.restore(algorithm, checkpoints.load(progress))
                    checkpoints.load_snapshots(folder / SNAPSHOTS, progress)
                elif former is not None:
                    rllib.load_training(algorithm, former.path)
                kept = _snapshots(config)

                def save(where: Path) -> None:
                    rllib.export(
                        algorithm, config.algo, codec.observation_space, codec.action_space
                    ).save(where)
                    rllib.save_training(algorithm, where)

                def snapshot(iteration: int) -> None:
                    if iteration in kept:
                        where = folder / SNAPSHOTS / str(iteration)
                        where.mkdir(parents=True)
                        save(where)
                        checkpoints.save_snapshot(where, iteration)

                seen.update(_train(config, run, algorithm, checkpoints, progress, snapshot))
                save(folder)
            finally:
                algorithm.stop()
            seen.update(choose_best(config, run, arguments, former, folder))
            checks.update(explain(config, run, arguments, world, folder))

    meta = {
        "inputs": task.inputs,
        "config": task.facts,
        "job": "train-agent",
        "run": run.id,
        "metrics": seen,
        "checks": checks,
    }
    artifact = run.storage.make("agents", task.id, meta, fill, force=config.force)
    checkpoints.remove()
    run.record(artifact=artifact.name)
    return artifact


@contextmanager
def _served(config: AgentConfig, world: Artifact) -> Iterator[None]:
    """On a Ray of this job's own nobody serves a world but this job; what is served already, or
    elsewhere, is left as it is.
    """
    from ray import serve

    if (
        config.backend != "serve"
        or config.ray.address is not None
        or config.app in serve.status().applications
    ):
        yield
        return
    deploy(ServeConfig(world=world.id, name=config.app, storage=config.storage, ray=config.ray))
    try:
        yield
    finally:
        undeploy(config.app)


def _horizon(config: AgentConfig, storage: Storage, world: Artifact, codec: Codec) -> Horizon:
    """Raises UsageError where neither the config, the environment nor the data gives one."""
    if config.horizon is not None:
        return Horizon(config.horizon, "as configured")
    return horizon_of(storage, world, codec.environment["max_episode_steps"], "horizon")


def _members(config: AgentConfig, world: Artifact) -> None:
    """Raise UsageError where what is asked rests on a disagreement that the world cannot have."""
    asked: dict[str, Any] = {
        "max_disagreement": config.max_disagreement,
        "objective": None if config.objective == "return" else config.objective,
    }
    if json.loads((world.path / "world.json").read_text())["config"]["members"] == 1:
        for key, value in asked.items():
            if value is not None:
                raise UsageError(
                    f"{key}={value} needs members that can disagree, and {world.name} has one;"
                    f" pretrain with model.members=4, or leave {key} out"
                )


def _datasets(config: AgentConfig, storage: Storage, world: Artifact) -> list[Artifact]:
    if config.starts != "logged":
        return []
    names = config.datasets or world.meta.get("inputs", {}).get("datasets", [])
    if not names:
        raise UsageError(
            f"starts='logged' needs the data that {world.name} was trained on, which it does not"
            " name; set datasets or starts=generated"
        )
    return [storage.artifact("datasets", name) for name in names]


def _arguments(
    config: AgentConfig, run: Run, world: Artifact, starts: tuple[Parts, Parts] | None, horizon: int
) -> dict[str, Any]:
    """Of every WorldVectorEnv of this job."""
    return {
        "world": world.id,
        "root": run.storage.root,
        "backend": config.backend,
        "app": config.app,
        "address": config.ray.address,
        "horizon": horizon,
        "starts": starts,
        "seed": config.seed,
        "penalty": config.penalty,
        "max_disagreement": config.max_disagreement,
        "adversary": config.objective == "disagreement",
    }


def _build(config: AgentConfig, run: Run, arguments: Mapping[str, Any]) -> Algorithm:
    return rllib.build(
        config.algo,
        _params(config),
        settings.model(config.algo, config.model),
        partial(_make_env, arguments),
        folder=run.folder / "rllib",
        seed=config.seed,
        gamma=config.gamma,
        num_envs=config.num_envs,
        rollout=config.rollout if config.algo in settings.ON_POLICY else 1,
        runners=config.runners,
        steps_per_iteration=config.num_envs * config.rollout,
    )


def _params(config: AgentConfig) -> dict[str, Any]:
    return settings.params(
        settings.IMAGINED, config.algo, config.params, config.num_envs * config.rollout
    )


def _make_env(arguments: Mapping[str, Any], num_envs: int) -> rllib.AgentEnv:
    """RLlib resets each runner's environment with a seed of its own, so that no two runners imagine
    the same episodes.
    """
    return rllib.AgentEnv(WorldVectorEnv(num_envs, **arguments))


def _snapshots(config: AgentConfig) -> set[int]:
    """Iterations after which the policy is kept: from the first on, and not the last, which is the
    agent's own.
    """
    return {round(i * config.iterations / config.snapshots) for i in range(config.snapshots)}


def _train(
    config: AgentConfig,
    run: Run,
    algorithm: Algorithm,
    checkpoints: Checkpoints,
    progress: Progress | None,
    snapshot: Callable[[int], None],
) -> dict[str, float]:
    """All iterations after those of `progress`; the metrics of the last one.

    `snapshot` is called with the number of finished iterations: 0 at the start, never at the end.
    """
    began_at = 0 if progress is None else progress.iteration
    metrics: dict[str, float] = {} if progress is None else dict(progress.metrics)
    total, diverged = (int(metrics.get(name, 0)) for name in ("imagined_steps", "diverged"))
    if progress is None:
        snapshot(0)
    with run.progress(f"train-agent {config.algo}", config.iterations) as update:
        for iteration in range(began_at, config.iterations):
            began = time.monotonic()
            learner_state.reseed(algorithm, config.seed, iteration)
            result = rllib.train(algorithm)
            seen = rllib.statistics(algorithm)
            total, diverged = total + seen.steps, diverged + seen.diverged
            metrics = {
                "imagined_steps": total,
                "steps_per_s": seen.steps / (time.monotonic() - began),
                "disagreement": seen.disagreement / max(seen.steps, 1),
                "diverged": diverged,
                **rllib.learned(result),
            }
            if seen.returns:
                metrics |= {
                    "imagined_return": float(np.mean(seen.returns)),
                    "imagined_length": float(np.mean(seen.lengths)),
                }
            run.log({f"agent/{name}": value for name, value in metrics.items()}, step=iteration)
            if iteration + 1 < config.iterations:
                snapshot(iteration + 1)
            if checkpoints.due():
                checkpoints.save(iteration + 1, learner_state.capture(algorithm), metrics)
            shown = f"return {metrics['imagined_return']:.1f}  " if seen.returns else ""
            update(
                iteration + 1,
                f"imagined {shown}disagreement {metrics['disagreement']:.3f} "
                f" {metrics['steps_per_s']:,.0f} steps/s",
            )
    if diverged:
        run.say(
            f"{diverged} imagined episodes were cut where the world's numbers left all bounds; a"
            " shorter horizon or starts=logged keeps nearer to its data"
        )
    return metrics
