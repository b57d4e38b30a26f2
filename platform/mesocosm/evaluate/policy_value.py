"""Values of policies in the world against their values in reality, metered under `judge`.

In reality each policy plays the same episodes. In the world it starts where the world itself starts
episodes, which knows nothing of the judged ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import fingerprint
from mesocosm.envs.config import parse_success
from mesocosm.envs.ledger import Ledger
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.evaluate.judge import JudgeResult, JudgeStore, judge
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.ranking import Ranking, ranking
from mesocosm.evaluate.policy_set import AGENT, ComparedPolicy
from mesocosm.model.any_world import AnyWorld
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.serve.world_env import WorldVectorEnv

ROWS = 512
"""Imagined environments that step together at most."""


@dataclass(frozen=True)
class Value:
    """The returns of one policy in real and in imagined episodes."""

    candidate: ComparedPolicy
    judged: JudgeResult
    imagined: NDArray[np.float64]

    @property
    def real(self) -> float:
        return self.judged.mean

    @property
    def world(self) -> float:
        return float(self.imagined.mean())

    def to_json(self, rule: str | None) -> dict[str, Any]:
        """`rule` is `reality.success`."""
        interval, count = stats.mean_interval(self.imagined), len(self.judged.returns)
        success = None
        if self.judged.successes is not None:
            world = success_by_return(rule, self.imagined)
            success = {"real": self.judged.successes / count, "world": world}
        return {
            "name": self.candidate.name,
            "iteration": self.candidate.iteration,
            "noise": self.candidate.noise,
            "held_out": self.candidate.held_out,
            "real": {"mean": self.real, "interval": self.judged.interval, "episodes": count},
            "world": {"mean": self.world, "interval": interval, "episodes": len(self.imagined)},
            "gap": self.world - self.real,
            "success": success,
        }


@dataclass(frozen=True)
class PolicyValue:
    """All compared policies."""

    values: tuple[Value, ...]
    ranking: Ranking
    """Ranking of the held-out policies"""
    success: str | None
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Real steps of this evaluation, without those of episodes that were judged before."""
        return sum(value.judged.steps for value in self.values)

    def to_json(self) -> dict[str, Any]:
        return {
            "policies": [value.to_json(self.success) for value in self.values],
            "ranking": asdict(self.ranking),
            "success": self.success,
            "real_steps": self.steps,
            "notes": list(self.notes),
        }


def imagining(seed: int) -> int:
    """The seed of imagined episodes, in a stream of its own: an agent's first imagined episodes in
    training had its job's seed.
    """
    return int(fingerprint("imagined", seed)[:8], 16)


def success_by_return(rule: str | None, returns: NDArray[np.float64]) -> float | None:
    """Share of imagined episodes that meet `reality.success`; None where it is not a rule of the
    return: a world knows nothing of infos.
    """
    if rule is None or not rule.lstrip().startswith("return"):
        return None
    met = parse_success(rule)
    return float(np.mean([met(total, {}) for total in returns]))


def policy_value(
    world: AnyWorld,
    candidates: Sequence[ComparedPolicy],
    cfg: EvaluateConfig,
    ledger: Ledger,
    *,
    store: JudgeStore,
    agent: JudgeResult | None,
    more: Callable[[Sequence[tuple[ComparedPolicy, float]]], ComparedPolicy | None],
    horizon: int,
    progress: Callable[[float, str], None],
) -> PolicyValue:
    """Judge each candidate in `cfg.reality`, and imagine it in the world.

    Args:
        world: The world.
        candidates: The policies, one of which is held out at least.
        cfg: The numbers of episodes, their seed, and reality.
        ledger: Counts the real steps.
        store: Holds judged episodes until the evaluation is committed.
        agent: The agent's episodes, which were judged before with the same seed and horizon.
        more: Given all (candidate, mean real return) so far, the next candidate, or None.
        horizon: Steps of an episode, at most.
        progress: Receives the number of judged policies and a text.
    """
    reality, seed, episodes = cfg.reality, cfg.seed, cfg.policy_episodes
    judged: list[tuple[ComparedPolicy, JudgeResult]] = []
    waiting, notes = list(candidates), list[str]()
    while waiting:
        candidate = waiting.pop(0)
        if agent is not None and candidate.name == AGENT and len(agent.episodes) >= episodes:
            result = replace(agent, episodes=agent.episodes[:episodes], steps=0)
        else:
            # Labels may repeat. The order of judging is the same when an evaluation continues.
            name, policy = f"{len(judged)}: {candidate.name}", candidate.policy
            segments = store.segments(name, policy, seed=seed, limit=horizon)
            limits: dict[str, Any] = {"episodes": episodes, "max_episode_steps": horizon}
            result = judge(policy, reality, ledger, seed=seed, segments=segments, **limits)
        judged.append((candidate, result))
        policy = candidate.policy
        if isinstance(policy, PlannerPolicy) and policy.actions:
            notes.append(f"{candidate.name}: {policy.ms_per_action:.1f} ms of CPU time an action.")
        progress(len(judged), f"{len(judged)} policies, {candidate.name}: {result.mean:.1f}")
        if not waiting:
            following = more([(c, r.mean) for c, r in judged if c.held_out])
            waiting += [] if following is None else [following]

    def report(steps: int) -> None:
        progress(len(judged), f"imagining, step {steps} of at most {horizon}")

    returns: list[NDArray[np.float64]] = []
    width = max(1, ROWS // cfg.imagined)
    for first in range(0, len(judged), width):
        some = [candidate.policy for candidate, _ in judged[first : first + width]]
        env = WorldVectorEnv(len(some) * cfg.imagined, world, horizon=horizon)
        returns += list(imagined_episodes(some, env, imagining(seed), report)[0])
    values = tuple(Value(*pair, each) for pair, each in zip(judged, returns, strict=True))
    counted = [v for v in values if v.candidate.held_out]
    ranked = ranking([v.real for v in counted], [v.world for v in counted], seed=seed)
    notes += [
        f"{v.candidate.name}: this behaviour collected some of the world's data; it is shown, and"
        " no figure counts it."
        for v in values
        if not v.candidate.held_out
    ]
    notes += [f"{v.candidate.name}: {reason}" for v in values for reason in v.judged.dropped]
    if reality.success is not None and success_by_return(reality.success, np.zeros(1)) is None:
        notes.append(
            f"reality.success={reality.success!r} asks an info, of which a world knows nothing:"
            " success in the world is undefined."
        )
    return PolicyValue(values, ranked, reality.success, tuple(notes))
