"""Judge a policy in reality: whole episodes through the ledger, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mesocosm.config import fingerprint
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.horizon import MAX_EPISODE_STEPS
from mesocosm.envs.api import Env
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.episode import EpisodeError, run_episode
from mesocosm.envs.guard import Timed
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of, make_env
from mesocosm.envs.meter import Meter, MeteredEnv
from mesocosm.envs.segments import Segments
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.judge_store import Judged, StoredEpisodes
from mesocosm.evaluate.metrics import stats
from mesocosm.policies.policy import Acts

BLOCK = 256
"""Real steps reserved at a time: the most that a crash over-counts."""


@dataclass(frozen=True)
class JudgeResult:
    """The judged episodes of a policy."""

    episodes: tuple[Episode, ...]
    steps: int
    """Real steps that the ledger was charged, those of dropped episodes included."""
    resets: int
    dropped: tuple[str, ...]
    """Why episodes were dropped: the environment crashed, hung or gave NaN."""

    @property
    def returns(self) -> tuple[float, ...]:
        return tuple(episode.total_reward for episode in self.episodes)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(episode) for episode in self.episodes)

    @property
    def successes(self) -> int | None:
        """Episodes that met `reality.success`; None where it is not set."""
        flags = [episode.success for episode in self.episodes if episode.success is not None]
        return sum(flags) if flags else None

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def interval(self) -> stats.Interval | None:
        """90% bootstrap interval of the mean return; None for a single episode."""
        return stats.mean_interval(self.returns)

    def to_json(self) -> dict[str, Any]:
        cut = sum(episode.outcome == "unfinished" for episode in self.episodes)
        return {
            **stats.describe(self.returns),
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "successes": self.successes,
            "steps": self.steps,
            "resets": self.resets,
            "dropped": list(self.dropped),
            "cut": cut,
        }


def judge(
    policy: Acts,
    reality: RealityConfig,
    ledger: Ledger,
    *,
    episodes: int,
    seed: int,
    purpose: str = "judge",
    max_episode_steps: int | None = None,
    progress: Callable[[int, str], None] | None = None,
    segments: Segments | None = None,
) -> JudgeResult:
    """Run episodes of `policy`, acting greedily, one after the other in this process.

    A step or reset that takes longer than `reality.step_timeout_s` drops its episode, as a crash
    does. (In the main thread: elsewhere a thread cannot be interrupted and a hang hangs.)

    Args:
        policy: Of the environment's spaces.
        reality: The environment.
        ledger: Counts the steps.
        episodes: At least 1.
        seed: With `purpose`, seeds the episodes: no other purpose has the same ones.
        purpose: Of the ledger.
        max_episode_steps: Cuts an episode. Defaults to the environment's limit.
        progress: Receives the number of episodes and a text.
        segments: Stores each episode as it ends, before its steps are confirmed; stored ones are
            not run again (`JudgeStore`). Without, an interrupted judgement starts again.

    Raises:
        UsageError: Before a real step, where the policy has other spaces.
        BudgetSpent: The budget is spent.
        MesocosmError: Every episode was dropped.
    """
    if reality.bounds == "drop":  # a return is real wherever the observations were
        reality = replace(reality, bounds="ignore")
    bare = make_env(reality)
    check_spaces(policy, bare, reality)
    registered = bare.spec.max_episode_steps if bare.spec is not None else None
    limit = max_episode_steps
    if limit is None and reality.horizon is None and registered is None:
        limit = MAX_EPISODE_STEPS
    stored = None if segments is None else StoredEpisodes(segments, ledger, bare)

    def act(observation: Any, rng: np.random.Generator) -> Any:
        return policy.act_one(observation, False, rng)  # type: ignore[attr-defined]

    def metered(env: Env) -> MeteredEnv:
        holder, deferred = f"{purpose}-{seed}", stored is not None
        meter = Meter(ledger, purpose, block=BLOCK, holder=holder, deferred=deferred)
        return MeteredEnv(Timed(env, reality.step_timeout_s), meter)

    judged: list[Judged] = []
    env = metered(bare)
    try:
        if stored is not None:
            judged = stored.load()[:episodes]
        while (k := len(judged)) < episodes:
            before = env.meter.steps
            episode, reason = None, None
            try:
                episode = run_episode(
                    env,
                    act,
                    k=k,
                    seed=int(fingerprint(purpose, seed)[:8], 16),
                    behaviour="policy",
                    max_steps=limit,
                    config=reality,
                )
            except EpisodeError as error:
                reason = str(error)
            one = Judged(env.meter.steps - before, episode, reason)
            judged += [one] if stored is None else stored.add(env.meter, k, one)
            if reason is not None:
                with suppress(Exception):  # after a crash, closing may fail; the meter closes first
                    env.close()
                env = metered(make_env(reality))
            if progress is not None:
                returns = [each.episode.total_reward for each in judged if each.episode is not None]
                progress(len(judged), f"mean return {np.mean(returns):.1f}" if returns else "")
    finally:
        env.close()
    judged = judged[:episodes]
    done = tuple(each.episode for each in judged if each.episode is not None)
    dropped = tuple(each.reason for each in judged if each.reason is not None)
    if not done:
        if stored is not None:
            stored.remove()  # so that the next run tries them again
        raise MesocosmError(
            f"reality.env={reality.env!r}: all {episodes} judged episodes were dropped; the last:"
            f" {dropped[-1]}"
        )
    return JudgeResult(done, sum(each.steps for each in judged), len(judged), dropped)


def judging(reality: RealityConfig, episodes: int, limit: int | None = None) -> dict[str, Any]:
    """The cost of judging at most, for a dry run. Takes no real step.

    `limit` is the longest possible episode; None takes the environment's.
    """
    longest = limit or facts_of(reality).max_episode_steps or MAX_EPISODE_STEPS
    steps, price = episodes * longest, reality.price
    cost = steps * price.per_step + episodes * price.per_reset
    return {
        "judged episodes": episodes,
        "judged real steps": f"at most {steps}",
        "price of judging": f"at most {cost:g} {price.currency}",
    }


def check_spaces(policy: Any, env: Env | EnvFacts, reality: RealityConfig) -> None:
    """Raise UsageError unless `policy` has the environment's spaces. Takes no real step."""
    for name in ("observation_space", "action_space"):
        space, expected = getattr(policy, name, None), getattr(env, name)
        if space is not None and space != expected:
            raise UsageError(
                f"the policy's {name} must be that of reality.env={reality.env!r}, {expected}, got"
                f" {space}; judge it where it was trained, or train one here"
            )
