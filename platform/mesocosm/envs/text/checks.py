"""Results of checking an imagined text episode against the true rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ImaginedStep:
    """One step of an imagined episode."""

    action: str
    observation: str
    reward: float
    terminated: bool


@dataclass(frozen=True)
class StepCheck:
    """The verdict of the true rules on one imagined step, given all that was imagined before."""

    revealed: bool
    """True if the true text depends on what no earlier text showed. Otherwise it is determined."""
    agrees: bool
    """True if the text is the true one; of a revealed step, a possible one."""
    expected: str
    """The true text. Of a revealed step: with the objects that the imagined text shows and that are
    possible. It equals a text that disagrees only because objects are missing."""
    changed: tuple[str, ...]
    """The fields in which the true text differs from the true text before."""
    differing: tuple[str, ...]
    """The fields in which the imagined text differs from the true one; empty if it agrees."""
    reward: float
    """The true reward."""
    reward_agrees: bool
    """True if the true reward is the nearest possible one; False for a reward that is not finite.
    """
    terminated: bool
    """The true termination."""
    termination_agrees: bool


@dataclass(frozen=True)
class EpisodeCheck:
    """The check of one imagined episode."""

    start_problems: tuple[str, ...]
    """Why the true task distribution cannot give the first text; empty if it can."""
    steps: tuple[StepCheck, ...]

    @property
    def valid_start(self) -> bool:
        """True if the true task distribution can give the first text."""
        return not self.start_problems

    @property
    def first_break(self) -> int | None:
        """The first step whose text disagrees, from 1; 0 for an invalid start; None if unbroken."""
        if self.start_problems:
            return 0
        return next((t for t, step in enumerate(self.steps, 1) if not step.agrees), None)

    def unbroken(self, step: int) -> bool:
        """True if the start and all texts until this step, or the end, agree."""
        first = self.first_break
        return first is None or first > step


def error_by_changes(episodes: Sequence[EpisodeCheck]) -> dict[int, tuple[int, int]]:
    """Number of changed fields -> (wrong steps, steps), over the determined steps."""
    counts: dict[int, tuple[int, int]] = {}
    for step in (step for episode in episodes for step in episode.steps if not step.revealed):
        wrong, total = counts.get(len(step.changed), (0, 0))
        counts[len(step.changed)] = (wrong + (not step.agrees), total + 1)
    return dict(sorted(counts.items()))
