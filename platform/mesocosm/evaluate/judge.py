"""Judge a policy in reality: whole episodes through the ledger, the same ones for the same seed.

An evaluation stores each episode in ROOT/runs/episodes/<evaluation id>/<key of a policy>/ before
the ledger confirms its steps, until the evaluation is committed; an interrupted one continues after
them. All episodes pass through this encoding, so that a continued evaluation equals an undisturbed
one, dtypes included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mesocosm.config import fingerprint
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.horizon import MAX_EPISODE_STEPS
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.texts import stored
from mesocosm.datasets.writer import encode_episode
from mesocosm.envs.amounts import Amount, Usage, time_price
from mesocosm.envs.api import Env
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.episode import Act, EpisodeAct, EpisodeError, run_episode
from mesocosm.envs.guard import Timed
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of, make_env
from mesocosm.envs.meter import Meter
from mesocosm.envs.metered import MeteredEnv
from mesocosm.envs.segments import FOLDER, Attempt, Rows, Segments
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.policy_set import Noisy
from mesocosm.policies.image_policy import ImagePolicy
from mesocosm.policies.planner import Planner
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.policies.policy import Acts, Policy
from mesocosm.policies.scorer import CandidatePolicy
from mesocosm.store.artifacts import Storage

BLOCK = 256
"""Real steps reserved at a time: the most that a crash over-counts."""
LANE = 0
"""The one lane of a policy's segments."""


@dataclass(frozen=True)
class JudgeResult:
    """The judged episodes of a policy."""

    episodes: tuple[Episode, ...]
    steps: int
    """Real steps charged to the ledger, including those of dropped episodes."""
    dropped: tuple[str, ...]
    """Why episodes were dropped: the environment crashed, hung or gave NaN."""

    @property
    def returns(self) -> tuple[float, ...]:
        return tuple(episode.total_reward for episode in self.episodes)

    @property
    def successes(self) -> int | None:
        """Episodes that met `reality.success`; None if it is not set."""
        flags = [episode.success for episode in self.episodes if episode.success is not None]
        return sum(flags) if flags else None

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def interval(self) -> stats.Interval | None:
        """90% bootstrap interval of the mean return; None for a single episode."""
        return stats.mean_interval(self.returns)


@dataclass(frozen=True)
class _Judged:
    """One judged episode of `steps` real steps, or the reason why it was dropped."""

    steps: int
    episode: Episode | None = None
    reason: str | None = None


def judge(
    policy: Acts,
    reality: RealityConfig,
    ledger: Ledger,
    *,
    episodes: int,
    seed: int,
    purpose: str = "judge",
    max_episode_steps: int | None = None,
    progress: Callable[[int, str], None] = lambda done, text: None,
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
        segments: Stores each episode as it ends (`JudgeStore`); stored ones are not run again.

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
    stored = None if segments is None else _StoredEpisodes(segments, ledger, bare)

    def greedy(observation: Any, rng: np.random.Generator) -> Any:
        return policy.act_one(observation, False, rng)  # type: ignore[attr-defined]

    act: Act = policy if isinstance(policy, EpisodeAct) else greedy

    def metered(env: Env) -> MeteredEnv:
        holder, deferred = f"{purpose}-{seed}", stored is not None
        meter = Meter(ledger, purpose, block=BLOCK, holder=holder, deferred=deferred)
        return MeteredEnv(Timed(env, reality), meter)

    episode_seed = int(fingerprint(purpose, seed)[:8], 16)
    judged: list[_Judged] = []
    env = metered(bare)
    try:
        if stored is not None:
            judged = stored.load()[:episodes]
        while (k := len(judged)) < episodes:
            before, episode, reason = env.meter.steps, None, None
            about: dict[str, Any] = {"behaviour": "policy", "max_steps": limit, "config": reality}
            try:
                episode = run_episode(env, act, k=k, seed=episode_seed, **about)
            except EpisodeError as error:
                reason = str(error)
            one = _Judged(env.meter.steps - before, episode, reason)
            judged += [one] if stored is None else stored.add(env.meter, k, one)
            if reason is not None:
                with suppress(Exception):  # after a crash, closing may fail; the meter closes first
                    env.close()
                env = metered(make_env(reality))
            returns = [each.episode.total_reward for each in judged if each.episode is not None]
            progress(len(judged), f"mean return {np.mean(returns):.1f}" if returns else "")
    finally:
        env.close()
    judged = judged[:episodes]
    done = tuple(each.episode for each in judged if each.episode is not None)
    dropped = tuple(each.reason for each in judged if each.reason is not None)
    if not done:
        if segments is not None:
            segments.remove()  # so that the next run tries them again
        raise MesocosmError(
            f"reality.env={reality.env!r}: all {episodes} judged episodes were dropped; the last:"
            f" {dropped[-1]}"
        )
    return JudgeResult(done, sum(each.steps for each in judged), dropped)


def judging(reality: RealityConfig, episodes: int, limit: int | None = None) -> dict[str, Any]:
    """The cost of judging at most, for a dry run. Takes no real step.

    `limit` is the longest possible episode; None takes the environment's.
    """
    longest = limit or facts_of(reality).max_episode_steps or MAX_EPISODE_STEPS
    steps, price = episodes * longest, reality.price
    cost = f"{price.of(steps, episodes, 0.0):g} {price.currency}"
    return {
        "judged episodes": episodes,
        "judged real steps": f"at most {steps}",
        "price of judging": f"at most {cost}{time_price(price, steps + episodes)}",
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


class JudgeStore:
    """The stored episodes of one evaluation, by policy."""

    def __init__(self, storage: Storage, evaluation: str):
        self._storage, self._evaluation = storage, evaluation
        self._folder = f"{FOLDER}/{evaluation}"

    def segments(self, name: str, policy: Acts, *, seed: int, limit: int) -> Segments:
        """The segments of one policy.

        Args:
            name: Unique among the policies of the evaluation.
            policy: Its weights are part of the key, so an agent that was trained again is judged
                again.
            seed: Of the judged episodes.
            limit: The longest possible episode, in steps.
        """
        key = fingerprint("judge", name, policy_identity(policy), seed, limit)
        return Segments(self._storage, f"{self._evaluation}/{key}")

    def confirm(self, ledger: Ledger) -> int:
        """Confirm the steps of all stored episodes that are not confirmed yet.

        Returns:
            The number of stored episodes, dropped ones included.
        """
        keys = self._storage.list(self._folder)
        stored = [Segments(self._storage, f"{self._evaluation}/{key}") for key in keys]
        return sum(len(segments.attempts(LANE, 0, ledger)) for segments in stored)

    def remove(self) -> None:
        """Remove all episodes: the evaluation is committed."""
        self._storage.remove(self._folder)


class _StoredEpisodes:
    """The episodes of one policy, read from and written to its segments."""

    def __init__(self, segments: Segments, ledger: Ledger, env: Env):
        self._segments, self._ledger = segments, ledger
        self._observation = SpaceCodec(env.observation_space, "observation")
        self._action = SpaceCodec(env.action_space, "action")

    def load(self, start: int = 0) -> list[_Judged]:
        """The stored episodes from number `start` on. Confirms their steps where needed."""
        pairs = self._segments.recorded(LANE, start, self._ledger)
        return [self._judged(attempt, rows) for attempt, rows in pairs]

    def add(self, meter: Meter, k: int, judged: _Judged) -> list[_Judged]:
        """Store episode k, then confirm its steps.

        An episode with a value that is not of its space is dropped, as in collection.

        Returns:
            Episode k. Where another process has stored it meanwhile, the stored ones from k on.
        """
        rows: Rows | None = None
        attempt = Attempt(k, "policy", judged.steps, judged.reason)
        if judged.episode is not None:
            try:
                rows = encode_episode(judged.episode, self._observation, self._action)
                attempt = Attempt.of(judged.episode, judged.steps, None)
            except MesocosmError as error:
                attempt = replace(attempt, reason=str(error))

        def record(usage: Usage, beyond: Amount) -> bool:
            some = [] if rows is None else [rows]
            return self._segments.write(LANE, k, [attempt], some, self._ledger.id, usage, beyond)

        if meter.settle(attempt.steps, 1, record):
            return [self._judged(attempt, rows)]
        return self.load(k)

    def _judged(self, attempt: Attempt, rows: Rows | None) -> _Judged:
        if rows is None:
            return _Judged(attempt.steps, reason=attempt.reason)
        episode = attempt.episode(rows)
        observations = self._observation.decode_stored(*stored(rows, "obs"))
        actions = self._action.decode_stored(*stored(rows, "act", -1))
        episode.observations = self._observation.unbatch(observations)
        episode.actions = self._action.unbatch(actions)
        return _Judged(attempt.steps, episode)


def policy_identity(policy: Acts) -> list[Any]:
    """The identity of a policy within an evaluation: its noise, a digest of the weights, and how
    it lists its candidates.

    The code of scripted policies is part of the evaluation's id.
    """
    if isinstance(policy, Noisy):
        return ["noisy", policy.noise, policy_identity(policy.policy)]
    if isinstance(policy, Policy | CandidatePolicy | ImagePolicy):
        digest = hashlib.sha256()
        for name, tensor in sorted(policy.network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        rest = policy.identity if isinstance(policy, CandidatePolicy) else []
        if isinstance(policy, ImagePolicy):
            rest = [policy.encoder.id]
        return ["network", digest.hexdigest(), *rest]
    if isinstance(policy, PlannerPolicy) and isinstance(policy.planner, Planner):
        agent = policy.planner.agent
        return ["planner", *([] if agent is None else policy_identity(agent[0]))]
    return [type(policy).__qualname__]
