"""The job `baseline`: model-free training in reality, which a world must beat.

The ledger counts every step. The curve's real steps are those of training and of the episodes that
confirm the target. With `judge_every` the policy is also judged during training, as agents of
worlds are. Neither curve counts the steps of judging.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm

from mesocosm import checks
from mesocosm.agents import rllib, settings
from mesocosm.agents.config import BaselineConfig
from mesocosm.agents.env import AgentEnv
from mesocosm.agents.rllib import check_agent
from mesocosm.cluster import ray_session
from mesocosm.config import identity
from mesocosm.envs.config import PAID, BudgetConfig, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of
from mesocosm.envs.meter import Meter, MeteredVectorEnv, make_metered_vector
from mesocosm.errors import BudgetSpent, UsageError
from mesocosm.evaluate.judge import judge, judging
from mesocosm.job import Job, Plan
from mesocosm.policies.policy import Policy
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage

CURVE = "curve.json"


def check(config: BaselineConfig) -> None:
    """Raise UsageError at the first invalid value."""
    rllib.check("", config.algo, config.params, config.model)
    checks.at_least(config, 1, "num_envs", "rollout", "window", "iteration_steps")
    checks.at_least(config, 1, "judge_every", "judge_episodes")
    checks.at_least(config, 0, "select_episodes", "select_every")
    if config.steps < _iteration(config):
        least = f"{_iteration(config)}, the real steps of one iteration"
        fix = "raise it, or lower num_envs or rollout"
        raise UsageError(f"steps must be >= {least}, got {config.steps}; {fix}")


def check_spaces(config: BaselineConfig, spaces: tuple[Any, Any]) -> None:
    """Raise UsageError where the algorithm cannot be trained on (observation, action) spaces."""
    network = settings.model(config.algo, config.model)
    check_agent(config.algo, _params(config), network, spaces, shape(config))


def shape(config: BaselineConfig) -> tuple[int, int]:
    """(environments, steps of each between updates)"""
    num_envs, rollout = settings.SHAPE[config.algo]
    return (
        num_envs if config.num_envs is None else config.num_envs,
        rollout if config.rollout is None else config.rollout,
    )


def _iteration(config: BaselineConfig) -> int:
    """The most real steps of one `train()`. The last vector step of a sample may overshoot."""
    num_envs, rollout = shape(config)
    batch = num_envs * rollout
    samples = (
        config.iteration_steps
        if config.algo in settings.REPLAY
        else int(config.params.get("train_batch_size_per_learner", batch))
    )
    return -(-samples // batch) * (batch + num_envs - 1)


def judged(config: BaselineConfig) -> int:
    """The most episodes that judge the policy during training."""
    return (
        0
        if config.judge_every is None
        else config.judge_episodes * -(-config.steps // config.judge_every)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselinePlan(Plan[BaselineConfig]):
    environment: EnvFacts


class Baseline(Job[BaselineConfig, BaselinePlan]):
    """Train until the target is confirmed or the steps are spent. The artifact holds curve.json and
    policy/.

    curve.json: {"points": [{"steps", "return", "kind": "train" | "select" | "judge", "seconds"; of
    a judgement also "returns" and "judge_steps", what it took], "target", "reached": real steps at
    which the target was confirmed or null, "reached_in_training": where the training episodes' own
    mean first was there, or null, "steps", "train_steps", "select_steps", "judge_steps", "dropped":
    why episodes were cut (a crash, a hang, NaN), "cap", "censored": not reached, "algo", "seconds",
    "ledger"}.
    """

    name, kind, config = "baseline", "evaluations", BaselineConfig

    def resolve(self, config: BaselineConfig, storage: Storage) -> BaselinePlan:
        check(config)
        environment = facts_of(config.reality)
        check_spaces(config, environment.spaces)
        settled = {
            "params": _params(config),
            "model": settings.model(config.algo, config.model),
            "shape": list(shape(config)),
        }
        facts = identity(config, without=["ledger", *PAID]) | settled
        return BaselinePlan(
            config=config,
            inputs={},
            facts=facts,
            id=self.hash("baseline", facts, environment.version),
            environment=environment,
        )

    def summary(self, plan: BaselinePlan) -> dict[str, Any]:
        config, price = plan.config, plan.config.reality.price
        most = f"at most {config.steps * price.per_step:g} {price.currency} and the resets"
        return {
            "environment": config.reality.env,
            "algo": config.algo,
            "params": _params(config),
            "real steps": f"at most {config.steps}",
            "price": most,
            **judging(config.reality, judged(config)),
            "target": config.target,
        }

    def make(self, plan: BaselinePlan, run: Run) -> Artifact:
        config = plan.config
        ledger = config.ledger or f"baseline-{plan.id}-{run.id}"
        ray_session.ensure(config.ray)

        def fill(folder: Path) -> None:
            curve, policy = _Training(config, run, ledger, plan.environment.spaces).train()
            (folder / CURVE).write_text(json.dumps(curve, indent=1))
            if dropped := curve["dropped"]:
                run.say(f"{len(dropped)} real episodes were cut; the last: {dropped[-1]}")
            (folder / "policy").mkdir()
            policy.save(folder / "policy")

        artifact = self.commit(plan, run, fill, ledger=ledger)
        totals = Ledger(run.storage, ledger, BudgetConfig(), config.reality.price).totals()
        run.record(ledger=totals.to_json())
        return artifact


class _Training:
    """The state of one run."""

    def __init__(self, config: BaselineConfig, run: Run, ledger: str, spaces: tuple[Any, Any]):
        self.config, self.run, self.ledger, self.spaces = config, run, ledger, spaces
        self.points: list[dict[str, Any]] = []
        self.returns: list[float] = []
        self.train_steps = self.select_steps = self.judge_steps = 0
        self.began = time.monotonic()
        self.selected_at = -config.select_every
        self.judged_at = 0

    @property
    def steps(self) -> int:
        return self.train_steps + self.select_steps

    def train(self) -> tuple[dict[str, Any], Policy]:
        config = self.config
        reached = reached_in_training = None
        num_envs, rollout = shape(config)
        algorithm = rllib.build(
            config.algo,
            _params(config),
            settings.model(config.algo, config.model),
            partial(
                _make_env, _own_reality(config), self.run.storage.root, self.ledger, config.steps
            ),
            folder=self.run.folder / "rllib",
            seed=config.seed,
            gamma=config.gamma,
            num_envs=num_envs,
            rollout=rollout,
            steps_per_iteration=config.iteration_steps if config.algo in settings.REPLAY else None,
        )
        self.meter = _meter(algorithm)
        try:
            with self.run.progress(f"baseline {config.algo}", config.steps) as update:
                while reached is None and self.steps + _iteration(config) <= config.steps:
                    mean = self._iterate(algorithm, update)
                    at_target = (
                        config.target is not None and mean is not None and mean >= config.target
                    )
                    if at_target:
                        reached_in_training = reached_in_training or self.steps
                    if config.judge_every is not None:
                        at_target = self._judged(algorithm)
                    elif at_target and config.select_episodes:
                        at_target = self._confirmed(algorithm)
                    if at_target:
                        reached = self.steps
            policy = rllib.export(algorithm, config.algo, *self.spaces)
            dropped = _vector(algorithm).dropped
        finally:
            algorithm.stop()
            self.meter.close()
        curve = {
            "algo": config.algo,
            "points": self.points,
            "target": config.target,
            "reached": reached,
            "reached_in_training": reached_in_training,
            "censored": config.target is not None and reached is None,
            "steps": self.steps,
            "train_steps": self.train_steps,
            "select_steps": self.select_steps,
            "judge_steps": self.judge_steps,
            "dropped": dropped,
            "cap": config.steps,
            "seconds": round(time.monotonic() - self.began, 1),
            "ledger": self.ledger,
        }
        return curve, policy

    def _iterate(self, algorithm: Algorithm, update: Callable[[float, str], None]) -> float | None:
        """Run one RLlib iteration.

        Returns:
            The mean return of the last `window` training episodes; None if there are fewer.
        """
        self.meter.limit = self.config.steps - self.select_steps
        rllib.train(algorithm)
        self.train_steps = self.meter.steps
        self.returns += rllib.statistics(algorithm).returns
        if len(self.returns) < self.config.window:
            return None
        mean = float(np.mean(self.returns[-self.config.window :]))
        self._point(mean, "train")
        update(self.steps, f"{self.steps} real steps, return {mean:.1f}")
        return mean

    def _confirmed(self, algorithm: Algorithm) -> bool:
        """True if greedy real episodes reach the target too. Their steps count.

        If the steps run out in them, the target is not confirmed.
        """
        config = self.config
        if self.train_steps - self.selected_at < config.select_every:
            return False
        self.selected_at = self.train_steps
        policy = rllib.export(algorithm, config.algo, *self.spaces)
        ledger = Ledger(self.run.storage, self.ledger, BudgetConfig(), config.reality.price)
        before = ledger.totals().purposes["select"].steps
        ledger = Ledger(
            self.run.storage,
            self.ledger,
            BudgetConfig(),
            config.reality.price,
            {"select": before + config.steps - self.steps},
        )
        try:
            mean = judge(
                policy,
                config.reality,
                ledger,
                episodes=config.select_episodes,
                seed=config.seed + self.steps,
                purpose="select",
            ).mean
        except BudgetSpent:
            mean = None
        self.select_steps += ledger.totals().purposes["select"].steps - before
        if mean is None:
            return False
        self._point(mean, "select")
        assert config.target is not None
        return mean >= config.target

    def _judged(self, algorithm: Algorithm) -> bool:
        """Judge the greedy policy if it is due; True if it reaches the target."""
        config = self.config
        assert config.judge_every is not None
        last = self.steps + _iteration(config) > config.steps
        if self.train_steps - self.judged_at < config.judge_every and not last:
            return False
        self.judged_at = self.train_steps
        ledger = Ledger(self.run.storage, self.ledger, BudgetConfig(), config.reality.price)
        result = judge(
            rllib.export(algorithm, config.algo, *self.spaces),
            config.reality,
            ledger,
            episodes=config.judge_episodes,
            seed=config.seed,
        )
        self.judge_steps += result.steps
        self._point(result.mean, "judge", returns=list(result.returns), judge_steps=result.steps)
        return config.target is not None and result.mean >= config.target

    def _point(self, mean: float, kind: str, **more: Any) -> None:
        self.points.append(
            {
                "steps": self.steps,
                "return": mean,
                "kind": kind,
                "seconds": round(time.monotonic() - self.began, 2),
                **more,
            }
        )
        self.run.log(
            {f"baseline/{kind}_return": mean, "baseline/real_steps": self.steps}, step=self.steps
        )


def _params(config: BaselineConfig) -> dict[str, Any]:
    num_envs, rollout = shape(config)
    return settings.params(settings.REAL, config.algo, config.params, num_envs * rollout)


def _make_env(
    reality: RealityConfig, root: str, ledger: str, limit: int, num_envs: int
) -> AgentEnv:
    return AgentEnv(make_metered_vector(reality, root, ledger, "baseline", num_envs, limit=limit))


def _meter(algorithm: Algorithm) -> Meter:
    """The meter of the single environment runner, in this process."""
    return _vector(algorithm).meter


def _vector(algorithm: Algorithm) -> MeteredVectorEnv:
    runner: Any = algorithm.env_runner
    vector: MeteredVectorEnv = runner.env.unwrapped.env
    return vector


def _own_reality(config: BaselineConfig) -> RealityConfig:
    """Reality without a budget. `reality.budget.steps` bounds the world's data, not this job."""
    return dataclasses.replace(config.reality, budget=BudgetConfig())


JOB = Baseline()
