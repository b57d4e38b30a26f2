"""The job `baseline`: model-free training in reality, with which a world's agent is compared.

The ledger counts every step. The curve's real steps are those of training and of the episodes that
confirm the target, not those of judging.
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mesocosm import checks
from mesocosm.agents import rllib, settings
from mesocosm.agents.config import BaselineConfig
from mesocosm.agents.encoders import Spaces, seen_spaces, stored_encoder
from mesocosm.agents.env import AgentEnv
from mesocosm.agents.learner_access import module_of
from mesocosm.agents.rllib import check_agent
from mesocosm.agents.settings import Setup
from mesocosm.cluster import ray_session
from mesocosm.config import identity
from mesocosm.datasets.images import image_spaces
from mesocosm.envs.amounts import price_of, time_price
from mesocosm.envs.config import PAID, BudgetConfig, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of
from mesocosm.envs.metered import MeteredVectorEnv, make_metered_vector
from mesocosm.errors import BudgetSpent, UsageError
from mesocosm.evaluate.judge import JudgeResult, judge, judging
from mesocosm.job import Job, Plan
from mesocosm.policies.candidates import Candidates
from mesocosm.policies.images import ImageEncoder
from mesocosm.policies.stored import StoredPolicy
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage

CURVE = "curve.json"


def check(config: BaselineConfig) -> None:
    """Raise UsageError at the first invalid value."""
    rllib.check(config)
    checks.at_least(config, 1, "num_envs", "rollout", "window", "iteration_steps")
    checks.at_least(config, 1, "judge_every", "judge_episodes")
    checks.at_least(config, 0, "select_episodes", "select_every")
    if config.steps < _iteration(config):
        least = f"{_iteration(config)}, the real steps of one iteration"
        fix = "raise it, or lower num_envs or rollout"
        raise UsageError(f"steps must be >= {least}, got {config.steps}; {fix}")


def prepared(config: BaselineConfig, spaces: Spaces, storage: Storage) -> tuple[Setup, list[str]]:
    """The setup of training between (observation, action) spaces, and the id of the tokenizer, if
    any. Takes no real step.

    Raises:
        UsageError: The algorithm cannot be trained on the spaces, or images and `tokenizer` do not
            fit (`encoders.stored_encoder`).
        ArtifactError: The tokenizer is damaged.
    """
    if config.algo == "SAC" and image_spaces(spaces[0]):
        raise UsageError(
            "algo must be PPO, APPO, IMPALA or DQN on images, got SAC, which cannot train in worlds"
            " of images, so that there is nothing to compare it with; use PPO"
        )
    encoder, tokenizers = stored_encoder(config.tokenizer, spaces[0], storage)
    seen = seen_spaces(spaces, encoder)
    setup = dataclasses.replace(settings.real(config), spaces=seen, encoder=encoder)
    check_agent(setup, seen)
    return setup, tokenizers


def _iteration(config: BaselineConfig) -> int:
    """The most real steps of one `train()`. The last vector step of a sample may overshoot."""
    setup = settings.real(config)
    batch = setup.num_envs * setup.rollout
    steps = setup.iteration_steps or int(setup.params.get("train_batch_size_per_learner", batch))
    return -(-steps // batch) * (batch + setup.num_envs - 1)


def judged(config: BaselineConfig) -> int:
    """The most episodes that judge the policy during training."""
    every = config.judge_every
    return 0 if every is None else config.judge_episodes * -(-config.steps // every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselinePlan(Plan[BaselineConfig]):
    environment: EnvFacts
    setup: Setup


class Baseline(Job[BaselineConfig, BaselinePlan]):
    """Train until the target is confirmed or the steps are spent. The artifact holds curve.json and
    policy/.

    curve.json: {"points": [{"steps", "price" of them, "return", "kind": "train" | "select" |
    "judge", "seconds"; of a judgement also "returns" and "judge_steps", what it took], "target",
    "reached": real steps at which the target was confirmed or null, "reached_in_training": where
    the training episodes' own mean first was there, or null, "steps", "train_steps",
    "select_steps", "judge_steps", "dropped": why episodes were cut (a crash, a hang, NaN), "cap",
    "censored": not reached, "algo", "seconds", "ledger"}.
    """

    name, kind, config = "baseline", "evaluations", BaselineConfig

    def resolve(self, config: BaselineConfig, storage: Storage) -> BaselinePlan:
        check(config)
        environment = facts_of(config.reality)
        setup, tokenizers = prepared(config, environment.spaces, storage)
        inputs = {"tokenizers": tokenizers} if tokenizers else {}
        facts = identity(config, without=["ledger", "tokenizer", *PAID]) | {
            "params": setup.params,
            "model": setup.model,
            "shape": [setup.num_envs, setup.rollout],
        }
        facts |= settings.candidate_facts(config)
        id = self.hash("baseline", facts, environment.version, *([inputs] if inputs else []))
        return BaselinePlan(
            config=config, inputs=inputs, facts=facts, id=id, environment=environment, setup=setup
        )

    def summary(self, plan: BaselinePlan) -> dict[str, Any]:
        config, price = plan.config, plan.config.reality.price
        return {
            "environment": config.reality.env,
            "algo": config.algo,
            "params": plan.setup.params,
            "real steps": f"at most {config.steps}",
            "price": f"at most {config.steps * price.per_step:g} {price.currency}"
            f"{time_price(price, config.steps)} and the resets",
            **judging(config.reality, judged(config)),
            "target": config.target,
        }

    def make(self, plan: BaselinePlan, run: Run) -> Artifact:
        config = plan.config
        id = config.ledger or f"baseline-{plan.id}-{run.id}"
        ledger = Ledger(run.storage, id, price=config.reality.price)
        ray_session.ensure(config.ray)

        def fill(folder: Path) -> None:
            curve, policy = _RealTraining(config, run, ledger, plan.setup).train()
            (folder / CURVE).write_text(json.dumps(curve, indent=1))
            if dropped := curve["dropped"]:
                run.say(f"{len(dropped)} real episodes were cut; the last: {dropped[-1]}")
            (folder / "policy").mkdir()
            policy.save(folder / "policy")

        artifact = self.commit(plan, run, fill, ledger=id)
        run.record(ledger=ledger.totals().to_json())
        return artifact


class _RealTraining:
    """The state of one run."""

    def __init__(self, config: BaselineConfig, run: Run, ledger: Ledger, setup: Setup):
        self.config, self.run, self.ledger, self.setup = config, run, ledger, setup
        self.points: list[dict[str, Any]] = []
        self.returns: list[float] = []
        self.train_steps = self.select_steps = self.judge_steps = 0
        self.select_price = 0.0
        self.began = time.monotonic()
        self.selected_at, self.judged_at = -config.select_every, 0
        # `reality.budget.steps` bounds the data of a world, not this job.
        reality = dataclasses.replace(config.reality, budget=BudgetConfig())
        about = reality, run.storage.root, ledger.id, config.steps, setup.candidates, setup.encoder
        self.algorithm = rllib.build(setup, partial(_make_env, *about), run.folder / "rllib")
        runner: Any = self.algorithm.env_runner
        self.vector: MeteredVectorEnv = runner.env.unwrapped.env

    @property
    def steps(self) -> int:
        return self.train_steps + self.select_steps

    def train(self) -> tuple[dict[str, Any], StoredPolicy]:
        config = self.config
        reached = reached_in_training = None
        try:
            with self.run.progress(f"baseline {config.algo}", config.steps) as update:
                while reached is None and self.steps + _iteration(config) <= config.steps:
                    mean = self._iterate()
                    if mean is not None:
                        update(self.steps, f"{self.steps} real steps, return {mean:.1f}")
                    at_target = self._reaches(mean)
                    if at_target:
                        reached_in_training = reached_in_training or self.steps
                    if config.judge_every is not None:
                        at_target = self._judged(config.judge_every)
                    elif at_target and config.select_episodes:
                        at_target = self._confirmed()
                    if at_target:
                        reached = self.steps
            policy, dropped = self._policy(), self.vector.dropped
        finally:
            self.algorithm.stop()
            self.vector.meter.close()
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
            "ledger": self.ledger.id,
        }
        return curve, policy

    def _reaches(self, mean: float | None) -> bool:
        target = self.config.target
        return target is not None and mean is not None and mean >= target

    def _iterate(self) -> float | None:
        """Run one RLlib iteration.

        Returns:
            The mean return of the last `window` training episodes; None if there are fewer.
        """
        meter, window = self.vector.meter, self.config.window
        meter.limit = self.config.steps - self.select_steps
        rllib.train(self.algorithm)
        self.train_steps = meter.steps
        self.returns += rllib.statistics(self.algorithm).returns
        if len(self.returns) < window:
            return None
        mean = float(np.mean(self.returns[-window:]))
        self._point(mean, "train")
        return mean

    def _policy(self) -> StoredPolicy:
        """The current policy."""
        assert self.setup.spaces is not None
        module = module_of(self.algorithm)
        return rllib.export(self.algorithm, module, self.setup.spaces, self.setup.encoder)

    def _judge(self, purpose: str, episodes: int, seed: int) -> JudgeResult:
        policy, reality = self._policy(), self.config.reality
        return judge(policy, reality, self.ledger, episodes=episodes, seed=seed, purpose=purpose)

    def _confirmed(self) -> bool:
        """True if greedy real episodes reach the target too. Their steps count.

        If the steps run out in them, the target is not confirmed.
        """
        config = self.config
        if self.train_steps - self.selected_at < config.select_every:
            return False
        self.selected_at = self.train_steps
        before = self.ledger.totals().purposes["select"]
        self.ledger.bounds["select"] = before.steps + config.steps - self.steps
        try:
            mean = self._judge("select", config.select_episodes, config.seed + self.steps).mean
        except BudgetSpent:
            mean = None
        after = self.ledger.totals().purposes["select"]
        self.select_steps += after.steps - before.steps
        self.select_price += after.price - before.price
        if mean is not None:
            self._point(mean, "select")
        return self._reaches(mean)

    def _judged(self, every: int) -> bool:
        """Judge the greedy policy if it is due; True if it reaches the target."""
        config = self.config
        last = self.steps + _iteration(config) > config.steps
        if self.train_steps - self.judged_at < every and not last:
            return False
        self.judged_at = self.train_steps
        result = self._judge("judge", config.judge_episodes, config.seed)
        self.judge_steps += result.steps
        self._point(result.mean, "judge", returns=list(result.returns), judge_steps=result.steps)
        return self._reaches(result.mean)

    def _point(self, mean: float, kind: str, **more: Any) -> None:
        seconds = round(time.monotonic() - self.began, 2)
        price = price_of(self.config.reality.price, self.vector.meter.total) + self.select_price
        point = {"steps": self.steps, "price": round(price, 9), "return": mean, "kind": kind}
        point |= {"seconds": seconds, **more}
        self.points.append(point)
        self.run.log(
            {f"baseline/{kind}_return": mean, "baseline/real_steps": self.steps}, step=self.steps
        )


def _make_env(
    reality: RealityConfig,
    root: str,
    ledger: str,
    limit: int,
    candidates: Candidates | None,
    encoder: ImageEncoder | None,
    num_envs: int,
) -> AgentEnv:
    vector = make_metered_vector(reality, root, ledger, "baseline", num_envs, limit=limit)
    return AgentEnv(vector, candidates, encoder)


JOB = Baseline()
