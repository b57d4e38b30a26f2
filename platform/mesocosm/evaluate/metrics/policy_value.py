"""What policies are worth in the world against what they are worth in reality, and how the gap
moves along an agent's training.

In reality each policy plays the same episodes (the same seeds), metered under `judge`; in the world
it starts where the world itself starts episodes, and nothing is told of reality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import fingerprint
from mesocosm.envs.config import RealityConfig, parse_success
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import UsageError
from mesocosm.evaluate.judge import JudgeResult, judge
from mesocosm.evaluate.judge_store import JudgeStore
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.ranking import Ranking, ranking
from mesocosm.evaluate.policy_set import Candidate
from mesocosm.model.world import World
from mesocosm.serve.client import WorldVectorEnv

ROWS = 512
"""Imagined environments that step together at most."""


@dataclass(frozen=True)
class Value:
    """One policy's: returns of real and of imagined episodes."""

    candidate: Candidate
    judged: JudgeResult
    imagined: NDArray[np.float64]

    @property
    def real(self) -> float:
        return self.judged.mean

    @property
    def world(self) -> float:
        return float(self.imagined.mean())


@dataclass(frozen=True)
class PolicyValue:
    values: tuple[Value, ...]
    ranking: Ranking
    """Of those that are held out"""
    success: str | None
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Real steps that it took, those apart that were judged already."""
        return sum(value.judged.steps for value in self.values)

    def to_json(self) -> dict[str, Any]:
        rows = []
        for value in self.values:
            row: dict[str, Any] = {
                "name": value.candidate.name,
                "iteration": value.candidate.iteration,
                "noise": value.candidate.noise,
                "held_out": value.candidate.held_out,
                "real": {
                    "mean": value.real,
                    "interval": value.judged.interval,
                    "episodes": len(value.judged.returns),
                },
                "world": {
                    "mean": value.world,
                    "interval": stats.mean_interval(value.imagined),
                    "episodes": len(value.imagined),
                },
                "gap": value.world - value.real,
                "success": None,
            }
            if value.judged.successes is not None:
                row["success"] = {
                    "real": value.judged.successes / len(value.judged.returns),
                    "world": success_by_return(self.success, value.imagined),
                }
            rows.append(row)
        return {
            "policies": rows,
            "ranking": self.ranking.to_json(),
            "success": self.success,
            "real_steps": self.steps,
            "notes": list(self.notes),
        }


def _by_return(rule: str | None) -> Callable[[float], bool] | None:
    """`reality.success` of a return; None where it asks an info, of which a world knows nothing."""
    if rule is None or not rule.lstrip().startswith("return"):
        return None
    met = parse_success(rule)
    return lambda total: met(total, {})


def imagining(seed: int) -> int:
    """The seed of imagined episodes: of a stream of its own, for an agent's first imagined episodes
    in training had its job's seed.
    """
    return int(fingerprint("imagined", seed)[:8], 16)


def success_by_return(rule: str | None, returns: NDArray[np.float64]) -> float | None:
    """Share of imagined episodes that meet `reality.success`; None where that is not of the return."""
    met = _by_return(rule)
    return None if met is None else float(np.mean([met(r) for r in returns]))


def policy_value(
    world: World,
    candidates: Sequence[Candidate],
    reality: RealityConfig,
    ledger: Ledger,
    *,
    store: JudgeStore,
    known: Mapping[str, JudgeResult],
    more: Callable[[Sequence[tuple[Candidate, float]]], Candidate | None] = lambda _: None,
    episodes: int,
    imagined: int,
    horizon: int,
    seed: int,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> PolicyValue:
    """Judge each candidate by `episodes` real episodes and imagine `imagined` of each, of at most
    `horizon` steps.

    store: where judged episodes lie until the evaluation is committed.
    known: real episodes that were judged already, by the candidate's name, of the same seed and
    limit. more: given all (candidate, mean real return) so far, the next candidate to judge, or
    None. Raises UsageError if there is none at all.
    """
    judged: list[tuple[Candidate, JudgeResult]] = []

    def look(candidate: Candidate) -> None:
        if candidate.name in known and len(known[candidate.name].episodes) >= episodes:
            before = known[candidate.name]
            result = replace(before, episodes=before.episodes[:episodes], steps=0, resets=0)
        else:
            # Labels may repeat. The order of judging is the same when an evaluation goes on.
            name = f"{len(judged)}: {candidate.name}"
            segments = store.segments(name, candidate.policy, seed=seed, limit=horizon)
            result = judge(
                candidate.policy,
                reality,
                ledger,
                episodes=episodes,
                seed=seed,
                max_episode_steps=horizon,
                segments=segments,
            )
        judged.append((candidate, result))
        progress(len(judged), f"{len(judged)} policies, {candidate.name}: {result.mean:.1f}")

    for candidate in candidates:
        look(candidate)
    while (following := more([(c, r.mean) for c, r in judged if c.held_out])) is not None:
        look(following)
    if not any(candidate.held_out for candidate, _ in judged):
        raise UsageError("there is no policy to compare; give policies, or an agent and graded")

    def report(steps: int) -> None:
        progress(len(judged), f"imagining, step {steps} of at most {horizon}")

    means: list[NDArray[np.float64]] = []
    width = max(1, ROWS // imagined)
    for first in range(0, len(judged), width):
        some = [candidate.policy for candidate, _ in judged[first : first + width]]
        env = WorldVectorEnv(len(some) * imagined, world, horizon=horizon)
        means += list(imagined_episodes(some, env, imagining(seed), report)[0])
    values = tuple(
        Value(candidate, result, returns)
        for (candidate, result), returns in zip(judged, means, strict=True)
    )
    counted = [v for v in values if v.candidate.held_out]
    found = ranking([v.real for v in counted], [v.world for v in counted], seed=seed)
    notes = [
        f"{v.candidate.name}: its like collected some of the world's data; it is shown, and no"
        " figure counts it."
        for v in values
        if v not in counted
    ]
    notes += [f"{v.candidate.name}: {reason}" for v in values for reason in v.judged.dropped]
    if reality.success is not None and _by_return(reality.success) is None:
        notes.append(
            f"reality.success={reality.success!r} asks an info, of which a world knows nothing:"
            " success in the world is undefined."
        )
    return PolicyValue(values, found, reality.success, tuple(notes))
