"""Counts of the first pass of an import, and their report."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mesocosm.data.ingest.leaves import Space
from mesocosm.data.ingest.readers import LogPiece
from mesocosm.data.ingest.schema import Schema
from mesocosm.data.ingest.sources import Source
from mesocosm.data.ingest.values import Stat


@dataclass
class ImportTally:
    """Counts of rows and episodes."""

    stats: dict[str, Stat] = field(default_factory=dict)
    rows: Counter[int] = field(default_factory=Counter)
    """By source."""
    episodes: int = 0
    transitions: int = 0
    longest: int = 0
    """Transitions of the longest episode."""
    outcomes: Counter[str] = field(default_factory=Counter)
    behaviours: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Episodes, by reason."""
    left_out_rows: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first fault of each reason, with file and row."""
    last_actions: int = 0
    """Actions left out because nothing says what they led to."""
    empty: int = 0
    """Episodes of one row, whose only action was left out."""
    rewarded: int = 0
    """Episodes with a reward other than 0."""
    led: int = 0
    """Episodes whose logs tell what the last action led to."""
    repeated: int = 0
    """Episodes of `led` whose last observation equals the one before the last action."""
    pairs: int = 0
    """Episodes of `led` that another episode follows."""
    restarted: int = 0
    """Episodes of `pairs` whose last observation equals the first one of the next episode."""
    succeeded: int = 0
    """Episodes that are terminated and succeeded."""
    done: int = 0
    """Episodes whose last row says terminated, without success."""
    done_rows: tuple[int, int] = (0, 0)
    """Their fewest and most rows."""


@dataclass(frozen=True)
class Inspection:
    """The result of the first pass."""

    files: list[Source]
    pieces: list[LogPiece]
    schema: Schema
    tally: ImportTally
    spaces: tuple[Space, Space]
    limit: int | None
    """Steps of an episode: `reality.horizon`, or the environment's own limit."""
    task: list[str]

    def report(self) -> dict[str, Any]:
        """The mapping of columns, counts, omissions with their reasons, and warnings."""
        tally = self.tally
        left_out = [
            {
                "reason": reason,
                "episodes": tally.left_out[reason],
                "rows": tally.left_out_rows[reason],
                "first": re.sub(r"( row \d+): .*", r"\1", tally.examples[reason], flags=re.DOTALL),
            }
            for reason in sorted(tally.left_out)
        ]
        return {
            "columns": self._columns(),
            "counts": self.counts(),
            "left_out": left_out,
            "warnings": self._warnings(),
        }

    def counts(self) -> dict[str, Any]:
        tally, outcomes = self.tally, self._outcomes()
        return {
            "rows": sum(tally.rows.values()),
            "episodes": tally.episodes,
            "transitions": tally.transitions,
            "outcomes": {
                name: outcomes[name] for name in ("terminated", "truncated", "unfinished")
            },
            "behaviours": dict(sorted(tally.behaviours.items())),
            "episodes_left_out": sum(tally.left_out.values()),
            "empty_episodes": tally.empty,
            "last_actions_left_out": tally.last_actions,
        }

    @property
    def time_limit(self) -> int | None:
        """Rows after which all episodes end that are done and did not succeed.

        None where they differ, or where the logs say why an episode ended. An environment that
        ends its episodes itself does not end them all at one step.
        """
        fewest, most = self.tally.done_rows
        return most if self.schema.done_only and self.tally.done > 1 and fewest == most else None

    def outcome(self, outcome: str, success: bool | None) -> str:
        """The outcome of an episode: as its rows say, or truncated by the `time_limit`."""
        limited = outcome == "terminated" and self.time_limit is not None and not success
        return "truncated" if limited else outcome

    def _outcomes(self) -> Counter[str]:
        counts = Counter(self.tally.outcomes)
        if self.time_limit is not None:
            limited = counts["terminated"] - self.tally.succeeded
            counts.update(terminated=-limited, truncated=limited)
        return counts

    def _columns(self) -> list[dict[str, str]]:
        rows = self.schema.describe(self.tally.stats)
        if self.time_limit is not None:
            unless = " without success" if "success" in self.schema.types else ""
            how = (
                f"guess: all {self.tally.done} episodes that end{unless} have {self.time_limit}"
                " steps: a time limit ends them"
            )
            truncated = {"became": "truncated", "how": how}
            rows = [row | truncated if row["became"] == "terminated" else row for row in rows]
        return rows

    def _warnings(self) -> list[str]:
        tally, warnings = self.tally, []
        rows, lost = sum(tally.rows.values()), sum(tally.left_out_rows.values())
        varies = any(
            stat.low != stat.high or stat.longest
            for name, stat in tally.stats.items()
            if name.partition(".")[0] == "observation"
        )
        if varies and 1 < tally.led == tally.repeated:
            warnings.append(
                f"in each of {tally.led} episodes the last next_observation equals the observation"
                " before it: unless the environment stands still, the logger stored one"
                " observation twice; log the observation that step() returned, or a world learns"
                " that the last action changes nothing"
            )
        if varies and 1 < tally.pairs == tally.restarted:
            warnings.append(
                f"in each of {tally.pairs} episodes the last next_observation equals the first"
                " observation of the next episode: unless episodes end where they begin, the"
                " environment was reset in the same step (SAME_STEP autoreset); log"
                " infos['final_obs'] instead"
            )
        if 2 * lost > rows:
            warnings.append(
                f"{lost} of {rows} rows were left out: check the reasons, and whether these are the"
                " intended logs"
            )
        if tally.last_actions:
            warnings.append(
                f"{tally.last_actions} episodes lost their last action, for no observation follows"
                " it: they count as unfinished, and whether they ended there is not learned; give"
                " next_observation, or a last row with the observation alone"
            )
        if tally.episodes and not tally.rewarded:
            lost_rewards = "; the last actions that were left out may have rewards"
            warnings.append(
                "every reward is 0, so an agent has nothing to learn from"
                f"{lost_rewards if tally.last_actions else ''}: name the column that holds it,"
                " columns.reward=NAME"
            )
        if tally.episodes and not self._outcomes()["terminated"]:
            warnings.append("no episode is terminated: a world made of these logs never ends one")
        if self.limit is not None and tally.longest > self.limit:
            warnings.append(
                f"the longest episode has {tally.longest} steps, more than the limit of"
                f" {self.limit}; set reality.horizon={tally.longest} or more"
            )
        return warnings
