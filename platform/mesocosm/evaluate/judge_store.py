"""The judged episodes of an evaluation, in storage until the evaluation is committed.

Each judged episode is a segment of `data.segments`, written as the episode ends and before its
steps are confirmed in the ledger:

    ROOT/runs/episodes/<evaluation id>/<key of a policy>/0000-<number of the episode>.npz

An evaluation that was interrupted is run again and goes on after the stored episodes. All episodes
of a result pass through this encoding, so a continued evaluation has the same ones as an
undisturbed one, dtypes included.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from mesocosm.config import fingerprint
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.writer import encode_episode
from mesocosm.envs.api import Env
from mesocosm.envs.ledger import Ledger, Usage
from mesocosm.envs.meter import Meter
from mesocosm.envs.segments import FOLDER, Attempt, Rows, Segments
from mesocosm.errors import MesocosmError
from mesocosm.evaluate.policy_set import Noisy
from mesocosm.policies.policy import Acts, Policy
from mesocosm.store.artifacts import Storage

LANE = 0
"""The one lane of a policy's segments."""


@dataclass(frozen=True)
class Judged:
    """One judged episode. `steps` were taken in reality."""

    steps: int
    episode: Episode | None = None
    reason: str | None = None
    """Why the episode was dropped. None where it was not."""


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


class StoredEpisodes:
    """The episodes of one policy, read from and written to its segments."""

    def __init__(self, segments: Segments, ledger: Ledger, env: Env):
        self._segments, self._ledger = segments, ledger
        self._observation = SpaceCodec(env.observation_space, "observation")
        self._action = SpaceCodec(env.action_space, "action")

    def load(self, start: int = 0) -> list[Judged]:
        """The stored episodes from number `start` on. Confirms their steps where needed."""
        pairs = self._segments.recorded(LANE, start, self._ledger)
        return [self._judged(attempt, rows) for attempt, rows in pairs]

    def add(self, meter: Meter, k: int, judged: Judged) -> list[Judged]:
        """Store episode k, then confirm its steps.

        An episode with a value that is not of its space is dropped, as in collection.

        Returns:
            Episode k. Where another process has stored it meanwhile, the stored ones from k on.
        """
        attempt, rows = self._encode(k, judged)

        def record(usage: Usage, beyond: tuple[int, int]) -> bool:
            some = [] if rows is None else [rows]
            return self._segments.write(LANE, k, [attempt], some, self._ledger.id, usage, beyond)

        if meter.settle(attempt.steps, 1, record):
            return [self._judged(attempt, rows)]
        return self.load(k)

    def _encode(self, k: int, judged: Judged) -> tuple[Attempt, Rows | None]:
        reason = judged.reason
        if judged.episode is not None:
            try:
                rows = encode_episode(judged.episode, self._observation, self._action)
                return Attempt.of(judged.episode, judged.steps, None), rows
            except MesocosmError as error:
                reason = str(error)
        return Attempt(k, "policy", judged.steps, reason), None

    def _judged(self, attempt: Attempt, rows: Rows | None) -> Judged:
        if rows is None:
            return Judged(attempt.steps, reason=attempt.reason)
        episode = attempt.episode(rows)
        observations = self._observation.decode(rows["obs_num"], rows["obs_cat"])
        actions = self._action.decode(rows["act_num"][:-1], rows["act_cat"][:-1])
        episode.observations = self._observation.unbatch(observations)
        episode.actions = self._action.unbatch(actions)
        return Judged(attempt.steps, episode)

    def remove(self) -> None:
        """Remove the policy's episodes, so that they are judged again."""
        self._segments.remove()


def policy_identity(policy: Acts) -> list[Any]:
    """The identity of a policy within an evaluation: its noise, and a digest of the weights.

    The code of scripted policies is part of the evaluation's id.
    """
    if isinstance(policy, Noisy):
        return ["noisy", policy.noise, policy_identity(policy.policy)]
    if isinstance(policy, Policy):
        digest = hashlib.sha256()
        for name, tensor in sorted(policy.network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return ["network", digest.hexdigest()]
    return [type(policy).__qualname__]
