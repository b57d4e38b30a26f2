"""The job `train-agent`: train an RLlib agent inside a world. After a kill, the same command
continues from the last checkpoint and ends with the same policy.

An `agents` artifact is policy.json and policy.safetensors, which act, value.json and
value.safetensors, with which a planner values the ends of its plans, and training.safetensors, from
which another training can start.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.rllib.algorithms.algorithm import Algorithm

from mesocosm.agents import learner_state, mbpo, rllib, settings, validation
from mesocosm.agents.checkpoint import AgentProgress, Checkpoints
from mesocosm.agents.choice import choose_best, explain
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.encoders import encoder_for, tokenizers_of
from mesocosm.agents.env import head_spaces, make_env
from mesocosm.agents.export import save_agent
from mesocosm.agents.gate import check_passed
from mesocosm.agents.settings import Setup
from mesocosm.agents.validation import SAC_KEYS, starts_of
from mesocosm.cluster import ray_session
from mesocosm.config import identity
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.text_batch import AnyBatchCodec, batch_codec, start_texts
from mesocosm.data.loading.windows import observation_parts, start_parts
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.horizon import Horizon, horizon_of
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.job import Job, Plan, Resources
from mesocosm.model.any_world import is_text
from mesocosm.policies.policy import SNAPSHOTS
from mesocosm.runs.tracking import Run
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import deploy, undeploy
from mesocosm.store.artifacts import Artifact, Storage

LOST_RUNNERS = 3
"""How often a training may lose an environment runner."""
MAX_STARTS = 50_000
"""The most observations of the datasets that serve as logged starts."""


@dataclass(frozen=True, kw_only=True)
class TrainAgentPlan(Plan[AgentConfig]):
    world: Artifact
    codec: AnyBatchCodec
    data: Dataset | None
    """The data of logged starts and of SAC's real transitions."""
    former: Artifact | None
    """The earlier agent: `init` or `rival`."""
    horizon: Horizon
    setup: Setup

    @property
    def initial(self) -> Artifact | None:
        """The initial agent of the training."""
        return None if self.config.init is None else self.former


class TrainAgent(Job[AgentConfig, TrainAgentPlan]):
    """Train an agent and export it.

    The artifact is the policy with the highest return of greedy imagined episodes, among the last
    policy, the snapshots and the earlier agent (`init` or `rival`). Its metrics are
    `greedy_return` (of the last), `best_return`, `kept_iteration`, `former_return` and
    `kept_former`.
    """

    name, kind, config = "train-agent", "agents", AgentConfig

    def __init__(self, gated: bool = True):
        """`gated` refuses text worlds that no evaluation has passed."""
        self.gated = gated

    def resolve(self, config: AgentConfig, storage: Storage) -> TrainAgentPlan:
        validation.check(config)
        if not config.world:
            raise UsageError("world is not set; give the world to train in, as in world=worlds/ID")
        world = storage.artifact("worlds", config.world)
        codec = batch_codec(json.loads((world.path / "codec.json").read_text()))
        validation.check_world(config, world)
        datasets, data = validation.datasets_of(config, storage, world, codec)
        if config.horizon is not None:
            horizon = Horizon(config.horizon, "as configured")
        else:
            limit = codec.environment["max_episode_steps"]
            horizon = horizon_of(storage, world, limit, "horizon")
        name = config.init or config.rival
        former = None if name is None else storage.artifact("agents", name)
        spaces = codec.observation_space, codec.action_space
        encoder = encoder_for(config.algo, spaces[0], tokenizers_of(codec))
        seen = validation.check_spaces(config, spaces, former, encoder)
        inputs = {
            "worlds": [world.id],
            "datasets": datasets,
            "agents": [] if former is None else [former.id],
        }
        head = head_spaces(seen, settings.candidates_of(config))[1]
        setup = settings.imagined(config, codec.spec.reward_size, head)
        setup = replace(setup, spaces=seen, encoder=encoder)
        left_out = ["world", "backend", "app", "datasets", "init", "rival", "learners"]
        if not setup.branches:
            left_out += SAC_KEYS
        facts = identity(config, without=left_out)
        facts |= {"horizon": horizon.steps, "params": setup.params, "model": setup.model}
        facts |= settings.candidate_facts(config)
        facts["starts"] = starts_of(config, codec)
        if config.rival is not None:
            facts["rival"] = True
        if config.learners:
            facts["learners"] = config.learners
        id = self.hash(facts, inputs)
        gated = self.gated and not config.force and config.objective == "return"
        if gated and is_text(world.path):
            # A run that was begun with --force continues, and its artifact is found, without
            # --force.
            begun = Checkpoints(storage, id).latest() or storage.find(self.kind, id)
            if begun is None:
                check_passed(storage, world)
        return TrainAgentPlan(
            config=config,
            inputs=inputs,
            facts=facts,
            id=id,
            world=world,
            codec=codec,
            data=data,
            former=former,
            horizon=horizon,
            setup=setup,
        )

    def summary(self, plan: TrainAgentPlan) -> dict[str, Any]:
        config = plan.config
        rollout = config.rollout
        if plan.setup.branches:
            rollout = mbpo.rounds(config) * config.branch
        steps = config.iterations * config.num_envs * rollout * max(config.runners, 1)
        learning: dict[str, Any] = {"params": plan.setup.params}
        if plan.setup.branches:
            learning |= {key: getattr(config, key) for key in SAC_KEYS}
        return {
            "world": plan.world.name,
            "algo": config.algo,
            **learning,
            "horizon": f"{plan.horizon.steps} steps: {plan.horizon.source}",
            "imagined steps": steps,
            "real steps": 0,
            "price": 0.0,
        }

    def resources(self, plan: TrainAgentPlan) -> Resources:
        config = plan.config
        serves = config.backend == "serve" and config.ray.address is None
        cpus = config.runners + config.learners + int(serves)
        return {_actors(config): (cpus, 0)}

    def make(self, plan: TrainAgentPlan, run: Run) -> Artifact:
        config, horizon = plan.config, plan.horizon
        if horizon.inferred:
            run.say(f"imagined episodes end after {horizon.steps} steps: {horizon.source}")
        checkpoints = Checkpoints(run.storage, plan.id)
        if config.force:
            checkpoints.remove()
        progress = checkpoints.latest()
        ray_session.ensure(config.ray)
        if actors := config.runners + config.learners:
            ray_session.preflight(cpus=actors, key=_actors(config))
        arguments = _arguments(plan, run)
        metrics: dict[str, float] = {}
        verdicts: dict[str, str] = {}

        def fill(folder: Path) -> None:
            with _served(config, plan.world):
                metrics.update(_train(plan, run, arguments, checkpoints, progress, folder))
                whole = _of_whole_episodes(plan, arguments)
                metrics.update(choose_best(config, run, whole, plan.former, folder))
                verdicts.update(explain(config, run, whole, plan.world, folder))

        artifact = self.commit(plan, run, fill, metrics=metrics, checks=verdicts)
        checkpoints.remove()
        return artifact


def _actors(config: AgentConfig) -> str:
    return f"runners={config.runners} and learners={config.learners}"


@contextmanager
def _served(config: AgentConfig, world: Artifact) -> Iterator[None]:
    """Serve the world on the private Ray of this job. A world served already, or on another Ray,
    stays as it is.
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


def _arguments(plan: TrainAgentPlan, run: Run) -> dict[str, Any]:
    """Arguments of every WorldVectorEnv of this job."""
    config = plan.config
    starts: Any = None
    if starts_of(config, plan.codec) == "logged":
        assert plan.data is not None
        if isinstance(plan.codec, Codec):
            starts = observation_parts(plan.data, plan.codec, "train", MAX_STARTS, config.seed)
        else:  # a text depends on those before it, so that an episode begins with its first one
            starts = start_texts(plan.data, plan.codec.codec, "train", MAX_STARTS)
    return {
        "world": plan.world.id,
        "root": run.storage.root,
        "backend": config.backend,
        "app": config.app,
        "address": config.ray.address,
        "horizon": plan.horizon.steps,
        "starts": starts,
        "seed": config.seed,
        "penalty": config.penalty,
        "max_disagreement": config.max_disagreement,
        "adversary": config.objective == "disagreement",
        "disagreement_every": settings.DISAGREEMENT_EVERY,
    }


def _of_whole_episodes(plan: TrainAgentPlan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of comparisons. Where SAC's branches begin anywhere in the logs, whole episodes
    begin as the logged ones did.
    """
    if not plan.setup.branches or arguments["starts"] is None:
        return dict(arguments)
    assert plan.data is not None
    assert isinstance(plan.codec, Codec), "SAC does not act in texts"
    starts = start_parts(plan.data, plan.codec, "train")
    return {**arguments, "starts": starts}


def _build(plan: TrainAgentPlan, run: Run, arguments: Mapping[str, Any]) -> Algorithm:
    config, folder = plan.config, run.folder / "rllib"
    if not plan.setup.branches:
        make = partial(make_env, arguments, plan.setup.candidates, plan.setup.encoder)
        return rllib.build(plan.setup, make, folder)
    branches = partial(mbpo.make_env, arguments, config.gamma)
    algorithm = rllib.build(plan.setup, branches, folder)
    learned = [] if plan.initial is None else plan.initial.meta["inputs"]["datasets"]
    assert plan.data is not None
    mbpo.prepare(algorithm, config, plan.data, learned)
    return algorithm


def _train(
    plan: TrainAgentPlan,
    run: Run,
    arguments: Mapping[str, Any],
    checkpoints: Checkpoints,
    progress: AgentProgress | None,
    folder: Path,
) -> dict[str, float]:
    """Write the trained agent and its snapshots to `folder`.

    Where a runner is lost, training continues from the last checkpoint, as it does after a kill.

    Returns:
        The metrics of the last iteration.
    """
    for left in reversed(range(LOST_RUNNERS + 1)):
        try:
            return _train_from(progress, plan, run, arguments, checkpoints, folder)
        except RayActorError as error:
            lost = "an environment runner was lost: " + " ".join(str(error).split())
            if not left:
                raise MesocosmError(f"{lost}; run the same command again to continue") from error
            run.say(f"warning: {lost}; training continues from its last checkpoint")
            shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)
            progress = checkpoints.latest()
    raise AssertionError


def _train_from(
    progress: AgentProgress | None,
    plan: TrainAgentPlan,
    run: Run,
    arguments: Mapping[str, Any],
    checkpoints: Checkpoints,
    folder: Path,
) -> dict[str, float]:
    config = plan.config
    algorithm = _build(plan, run, arguments)
    snapshots = {round(i * config.iterations / config.snapshots) for i in range(config.snapshots)}

    def snapshot(iteration: int) -> None:
        if iteration in snapshots:
            _save(algorithm, plan, to := folder / SNAPSHOTS / str(iteration))
            checkpoints.save_snapshot(to, iteration)

    try:
        if progress is not None:
            run.say(f"continuing after iteration {progress.iteration} of {config.iterations}")
            learner_state.restore(algorithm, checkpoints.load(progress))
            checkpoints.load_snapshots(folder / SNAPSHOTS, progress)
        else:
            if plan.initial is not None:
                rllib.load_training(algorithm, plan.initial.path)
            snapshot(0)
        metrics = _iterate(config, run, algorithm, checkpoints, progress, snapshot)
        _save(algorithm, plan, folder)
    finally:
        algorithm.stop()
    return metrics


def _save(algorithm: Algorithm, plan: TrainAgentPlan, folder: Path) -> None:
    assert plan.setup.spaces is not None
    save_agent(algorithm, plan.setup.spaces, folder, plan.setup.encoder)


def _iterate(
    config: AgentConfig,
    run: Run,
    algorithm: Algorithm,
    checkpoints: Checkpoints,
    progress: AgentProgress | None,
    snapshot: Callable[[int], None],
) -> dict[str, float]:
    """Run the iterations after those of `progress`; return the metrics of the last one.

    `snapshot` is called with the number of finished iterations, except at the end.
    """
    began_at = 0 if progress is None else progress.iteration
    metrics: dict[str, float] = {} if progress is None else dict(progress.metrics)
    total, diverged = (int(metrics.get(name, 0)) for name in ("imagined_steps", "diverged"))
    seconds, tokens = metrics.get("imagined_seconds", 0.0), metrics.get("imagined_tokens", 0)
    with run.progress(f"train-agent {config.algo}", config.iterations) as update:
        for iteration in range(began_at, config.iterations):
            began = time.monotonic()
            learner_state.reseed(algorithm, config.seed, iteration)
            result = rllib.train(algorithm)
            seen = rllib.statistics(algorithm)
            total, diverged = total + seen.steps, diverged + seen.diverged
            seconds, tokens = seconds + seen.seconds, tokens + seen.tokens
            # A short iteration may measure no disagreement: the last known value remains.
            disagreement = {n: v for n, v in metrics.items() if n == "disagreement"}
            disagreement |= seen.mean_disagreement()
            metrics = {
                "imagined_steps": total,
                "imagined_seconds": round(seconds, 3),
                **({"imagined_tokens": tokens} if tokens else {}),
                "steps_per_s": seen.steps / (time.monotonic() - began),
                "diverged": diverged,
                **disagreement,
                **rllib.learned(result),
            }
            shown = "".join(f"disagreement {value:.3f}  " for value in disagreement.values())
            if seen.returns:
                metrics["imagined_return"] = float(np.mean(seen.returns))
                metrics["imagined_length"] = float(np.mean(seen.lengths))
                shown = f"return {metrics['imagined_return']:.1f}  {shown}"
            run.log({f"agent/{name}": value for name, value in metrics.items()}, step=iteration)
            if iteration + 1 < config.iterations:
                snapshot(iteration + 1)
            if checkpoints.due():
                checkpoints.save(iteration + 1, learner_state.capture(algorithm), metrics)
            update(iteration + 1, f"imagined {shown}{metrics['steps_per_s']:,.0f} steps/s")
    if diverged:
        run.say(
            f"{diverged} imagined episodes were cut where the world's numbers left all bounds; a"
            " shorter horizon or starts=logged keeps nearer to its data"
        )
    return metrics


JOB = TrainAgent()
