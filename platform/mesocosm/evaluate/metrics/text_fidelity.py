"""The accuracy of a text world: step by step on logged episodes, and over whole imagined ones.

An environment with a checker (`Chores.check_episode`) separates texts that follow from earlier ones
from texts that reveal something random, and judges imagined episodes by the true rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mesocosm.envs.text.checks import EpisodeCheck, ImaginedStep, StepCheck
from mesocosm.model import rng
from mesocosm.model.language.stream import TextEpisode
from mesocosm.model.language.world import TextWorld
from mesocosm.serve.protocol import START

Check = Callable[[str, Iterable[ImaginedStep]], EpisodeCheck]
"""The check of an episode's first text and steps."""
Start = tuple[str, str]
"""A task and a first observation."""
Act = Callable[[str], str]
"""The action after an observation; one object for each environment, which may remember."""

BATCH = 64
"""Episodes that are predicted together."""


@dataclass(frozen=True)
class StepPrediction:
    """A prediction of the next step from true texts alone, at temperature 0."""

    step: int
    """From 0."""
    exact: bool
    """The text is the true one, character by character."""
    revealed: bool | None
    """True if the true text shows something that no earlier text showed; None without a checker."""
    changed: int | None
    """Fields in which the true text differs from the one before it; None without a checker."""
    reward: float
    """The true reward."""
    generated_reward: float
    """The most likely, or expected, reward after the generated text."""
    predicted_reward: float
    """The same after the true text."""
    terminated: bool
    """The true termination."""
    generated_p: float
    """The probability of termination after the generated text."""
    predicted_p: float
    """The same after the true text."""


@dataclass(frozen=True)
class Share:
    """A part of some steps or episodes: `count` out of `of`."""

    count: int
    of: int

    @property
    def value(self) -> float | None:
        """The share, or None where `of` is 0."""
        return self.count / self.of if self.of else None

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.0%} of {self.of:,}"


@dataclass(frozen=True)
class TextFidelity:
    """Predictions of single steps from true texts."""

    exact: Share
    determined: Share
    """Share predicted exactly, of the steps whose text follows from what was shown before."""
    revealed: Share
    """Share predicted exactly, of the steps whose text shows something new, drawn at random."""
    wrong_by_changes: dict[int, Share]
    """By number of changed fields: the share predicted wrong, of the determined steps."""
    reward_events: Share
    """Share with the right reward after the true text, of the steps with a reward other than 0."""
    reward_events_generated: Share
    """The same share after the generated text."""
    false_rewards: Share
    """Share with a predicted reward after the true text, of the steps without one."""
    terminations: Share
    """Share predicted as terminal after the true text, of the terminal steps."""
    terminations_generated: Share
    false_terminations: Share


@dataclass(frozen=True)
class Consistency:
    """Whole imagined episodes, judged by the true rules."""

    valid_starts: Share
    agreeing_steps: Share
    unbroken: dict[int, Share]
    """By step k: the share without a contradiction up to k, of the episodes with a valid start."""
    rewards: Share
    """Share with the right reward, of the steps before the first contradiction."""
    successes: Share
    """Share of episodes with an imagined return at the target whose true return reaches it too."""


@dataclass(frozen=True)
class StartNovelty:
    """Starts that equal a training start. A world that repeats its data has more than reality."""

    copies: Share
    """The share of the world's starts."""
    copies_real: Share
    """The share of held-out real starts."""


def start_novelty(
    world: TextWorld, train: Sequence[Start], valid: Sequence[Start], count: int, seed: int
) -> StartNovelty:
    """Compare starts, (task, first observation), with those of training, character by character.

    Args:
        world: Draws `count` starts.
        train: The training starts.
        valid: Held-out starts.
        count: At least 1.
        seed: Seed of the world's draws.
    """
    env = torch.arange(count, device=world.device)
    drawn = list(zip(*world.sample_start(rng.keys(seed, env, 0, START)), strict=True))
    known = set(train)
    shares = [Share(sum(each in known for each in some), len(some)) for some in (drawn, valid)]
    return StartNovelty(*shares)


def predict_steps(
    world: TextWorld, episodes: Sequence[TextEpisode], check: Check | None = None
) -> list[StepPrediction]:
    """Predict every step of the episodes from the true texts before it.

    Args:
        world: A text world, whose temperature stays as it is.
        episodes: Held-out episodes.
        check: Labels the steps as determined or revealed.
    """
    temperature, world.temperature = world.temperature, 0.0
    try:
        parts = [episodes[k : k + BATCH] for k in range(0, len(episodes), BATCH)]
        return [step for part in parts for step in _predicted(world, part, check)]
    finally:
        world.temperature = temperature


def _predicted(
    world: TextWorld, episodes: Sequence[TextEpisode], check: Check | None
) -> list[StepPrediction]:
    member = torch.arange(len(episodes), device=world.device) % world.net.members
    starts = [episode.observations[0] for episode in episodes]
    carry = world.begin([episode.task for episode in episodes], starts, member)
    labels = [None if check is None else _labels(episode, check) for episode in episodes]
    predictions: list[StepPrediction] = []
    rows = list(range(len(episodes)))
    for t in range(max(len(episode.actions) for episode in episodes)):
        running = [k for k, row in enumerate(rows) if t < len(episodes[row].actions)]
        if len(running) < len(rows):  # finished episodes leave the batch
            chosen = torch.tensor(running, device=world.device)
            carry = world.copy_rows(carry, chosen, carry.member[chosen])
            rows = [rows[k] for k in running]
        keys = rng.keys(0, torch.tensor(rows, device=world.device), 0, t)
        acts = [episodes[row].actions[t] for row in rows]
        carry, out = world.step(carry, acts, keys, disagreement=False)
        true = [episodes[row].observations[t + 1] for row in rows]
        reward, p = world.observe(carry, true)
        for k, row in enumerate(rows):
            steps = labels[row]
            label = None if steps is None else steps[t]
            predictions.append(
                StepPrediction(
                    step=t,
                    exact=out.observation[k] == true[k],
                    revealed=None if label is None else label.revealed,
                    changed=None if label is None else len(label.changed),
                    reward=float(episodes[row].rewards[t]),
                    generated_reward=float(out.reward[k]),
                    predicted_reward=float(reward[k]),
                    terminated=episodes[row].ends[t],
                    generated_p=float(out.p_terminated[k]),
                    predicted_p=float(p[k]),
                )
            )
    return predictions


def _labels(episode: TextEpisode, check: Check) -> tuple[StepCheck, ...]:
    steps = zip(
        episode.actions, episode.observations[1:], episode.rewards, episode.ends, strict=True
    )
    return check(episode.observations[0], [ImaginedStep(*step) for step in steps]).steps


def fidelity(steps: Sequence[StepPrediction], *, tolerance: float = 0.05) -> TextFidelity:
    """Summarize predictions.

    Args:
        steps: Of `predict_steps`.
        tolerance: A reward is right if it is at most this far from the true one.
    """

    def right(reward: float, step: StepPrediction) -> bool:
        return math.isfinite(reward) and abs(reward - step.reward) <= tolerance

    determined = [step for step in steps if step.revealed is False]
    changes = sorted({step.changed for step in determined if step.changed is not None})
    events = [step for step in steps if abs(step.reward) > tolerance]
    quiet = [step for step in steps if abs(step.reward) <= tolerance]
    ends = [step for step in steps if step.terminated]
    others = [step for step in steps if not step.terminated]
    return TextFidelity(
        exact=_share(step.exact for step in steps),
        determined=_share(step.exact for step in determined),
        revealed=_share(step.exact for step in steps if step.revealed),
        wrong_by_changes={
            n: _share(not step.exact for step in determined if step.changed == n) for n in changes
        },
        reward_events=_share(right(step.predicted_reward, step) for step in events),
        reward_events_generated=_share(right(step.generated_reward, step) for step in events),
        false_rewards=_share(not right(step.predicted_reward, step) for step in quiet),
        terminations=_share(step.predicted_p > 0.5 for step in ends),
        terminations_generated=_share(step.generated_p > 0.5 for step in ends),
        false_terminations=_share(step.predicted_p > 0.5 for step in others),
    )


@dataclass(frozen=True)
class ImaginedText:
    """One imagined episode as texts."""

    first_text: str
    steps: tuple[ImaginedStep, ...]

    @property
    def total(self) -> float:
        """Its undiscounted return."""
        return sum(step.reward for step in self.steps)


def imagine_texts(
    world: TextWorld,
    acts: Sequence[Act],
    steps: int,
    seed: int,
    starts: Sequence[str] | None = None,
) -> list[ImaginedText]:
    """Imagine one episode with each policy, of at most `steps` steps, at the world's temperature.

    Args:
        world: A text world whose tasks are part of the first observation.
        acts: One policy for each of N episodes.
        steps: Steps after which an episode ends.
        seed: Seed of the world's draws; the episodes are a function of it.
        starts: [N] first observations. The world draws them by default.
    """
    count, device = len(acts), world.device
    env = torch.arange(count, device=device)
    tasks, first = world.sample_start(rng.keys(seed, env, 0, START))
    if starts is not None:
        tasks, first = [""] * count, list(starts)
    members = world.net.members
    carry = world.begin(tasks, first, rng.member_of(seed, env, 0, members))
    texts, taken = list(first), [list[ImaginedStep]() for _ in range(count)]
    rows = list(range(count))
    for t in range(steps):
        actions = [acts[row](texts[row]) for row in rows]
        keys = rng.keys(seed, torch.tensor(rows, device=device), 0, t)
        carry, out = world.step(carry, actions, keys, disagreement=False)
        ended = out.terminated.tolist()
        for k, row in enumerate(rows):
            texts[row] = out.observation[k]
            reward = float(out.reward[k])
            taken[row].append(ImaginedStep(actions[k], texts[row], reward, ended[k]))
        left = [k for k in range(len(rows)) if not ended[k]]
        if not left:
            break
        if len(left) < len(rows):
            chosen = torch.tensor(left, device=device)
            carry = world.copy_rows(carry, chosen, carry.member[chosen])
            rows = [rows[k] for k in left]
    return [ImaginedText(text, tuple(steps)) for text, steps in zip(first, taken, strict=True)]


def consistency(
    episodes: Sequence[ImaginedText],
    check: Check,
    target: float,
    at: Sequence[int] = (1, 5, 10, 15, 20),
) -> Consistency:
    """Judge imagined episodes by the true rules.

    Args:
        episodes: Imagined episodes.
        check: The true rules.
        target: The return of a success.
        at: The steps k of `Consistency.unbroken`.
    """
    checks = [check(episode.first_text, episode.steps) for episode in episodes]
    valid = [c for c in checks if c.valid_start]
    steps = [step for c in checks for step in c.steps]
    before = [step for c in valid for step in c.steps[: (c.first_break or len(c.steps) + 1) - 1]]
    pairs = zip(episodes, checks, strict=True)
    won = [c for episode, c in pairs if episode.total >= target]
    return Consistency(
        valid_starts=Share(len(valid), len(checks)),
        agreeing_steps=_share(step.agrees for step in steps),
        unbroken={k: _share(c.unbroken(k) for c in valid) for k in at},
        rewards=_share(step.reward_agrees for step in before),
        successes=_share(sum(step.reward for step in c.steps) >= target for c in won),
    )


def _share(hits: Iterable[bool]) -> Share:
    values = np.fromiter(hits, np.bool_)
    return Share(int(values.sum()), len(values))
