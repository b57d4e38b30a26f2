"""Counts of the first pass of an import, and their report."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mesocosm.data.ingest.leaves import Space
from mesocosm.data.ingest.readers import LogPiece
from mesocosm.data.ingest.schema import Schema
from mesocosm.data.ingest.values import Stat


@dataclass
class ImportTally:
    """Counts of rows and episodes."""

    stats: dict[str, Stat] = field(default_factory=dict)
    rows: Counter[int] = field(default_factory=Counter)
    """Counts by source."""
    episodes: int = 0
    transitions: int = 0
    longest: int = 0
    """Transitions of the longest episode."""
    outcomes: Counter[str] = field(default_factory=Counter)
    behaviours: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Episodes, by reason."""
    left_out_rows: Counter[str] = field(default_factory=Counter)
    left_out_numbers: set[int] = field(default_factory=set)
    """The numbers of the episodes that are left out, among all that begin."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first fault of each reason, with file and row."""
    last_actions: int = 0
    """Actions left out because the observation after them is not logged."""
    empty: int = 0
    """Episodes of one row, whose only action was left out."""
    rewarded: int = 0
    """Episodes with a reward other than 0."""
    led: int = 0
    """Episodes whose logs have the observation after the last action."""
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

    pieces: list[LogPiece]
    schema: Schema
    tally: ImportTally
    spaces: tuple[Space, Space]
    limit: int | None
    """Steps of an episode: `reality.horizon`, or the environment's own limit."""
    task: list[str]

    @property
    def time_limit(self) -> int | None:
        """The common number of rows of the episodes that are done and did not succeed.

        None if the numbers differ, or if the logs say why an episode ended. An environment that
        ends its episodes itself does not end them all at the same step.
        """
        fewest, most = self.tally.done_rows
        return most if self.schema.done_only and self.tally.done > 1 and fewest == most else None

    def outcome(self, outcome: str, success: bool | None) -> str:
        """The outcome of an episode: as its rows say, or truncated by the `time_limit`."""
        limited = outcome == "terminated" and self.time_limit is not None and not success
        return "truncated" if limited else outcome

    def report(self) -> dict[str, Any]:
        """The mapping of columns, counts, omissions with their reasons, and warnings."""
        tally, columns = self.tally, self.schema.describe(self.tally.stats)
        outcomes = {
            name: tally.outcomes[name] for name in ("terminated", "truncated", "unfinished")
        }
        if self.time_limit is not None:
            limited = outcomes["terminated"] - tally.succeeded
            outcomes["terminated"] -= limited
            outcomes["truncated"] += limited
            unless = " without success" if "success" in self.schema.types else ""
            how = (
                f"guess: all {tally.done} episodes that end{unless} have {self.time_limit} steps: a"
                " time limit ends them"
            )
            truncated = {"became": "truncated", "how": how}
            columns = [row | truncated if row["became"] == "terminated" else row for row in columns]
        return {
            "columns": columns,
            "counts": {
                "rows": sum(tally.rows.values()),
                "episodes": tally.episodes,
                "transitions": tally.transitions,
                "outcomes": outcomes,
                "behaviours": dict(sorted(tally.behaviours.items())),
                "episodes_left_out": sum(tally.left_out.values()),
                "empty_episodes": tally.empty,
                "last_actions_left_out": tally.last_actions,
            },
            "left_out": [
                {
                    "reason": reason,
                    "episodes": tally.left_out[reason],
                    "rows": tally.left_out_rows[reason],
                    "first": re.sub(r"( row \d+): .*", r"\1", tally.examples[reason], flags=re.S),
                }
                for reason in sorted(tally.left_out)
            ],
            "warnings": self._warnings(ends=outcomes["terminated"] > 0),
        }

    def _warnings(self, ends: bool) -> list[str]:
        tally, limit = self.tally, self.limit
        rows, lost = sum(tally.rows.values()), sum(tally.left_out_rows.values())
        varies = any(
            stat.low != stat.high or stat.longest or "image" in stat.kinds
            for name, stat in tally.stats.items()
            if name.partition(".")[0] == "observation"
        )
        unrewarded = "; the last actions that were left out may have rewards"
        warnings = [
            (
                varies and 1 < tally.led == tally.repeated,
                f"in each of {tally.led} episodes the last next_observation equals the observation"
                " before it: unless the environment stands still, the logger stored one"
                " observation twice; log the observation that step() returned, or a world learns"
                " that the last action changes nothing",
            ),
            (
                varies and 1 < tally.pairs == tally.restarted,
                f"in each of {tally.pairs} episodes the last next_observation equals the first"
                " observation of the next episode: unless episodes end where they begin, the"
                " environment was reset in the same step (SAME_STEP autoreset); log"
                " infos['final_obs'] instead",
            ),
            (
                2 * lost > rows,
                f"{lost} of {rows} rows were left out: check the reasons, and whether these are the"
                " intended logs",
            ),
            (
                tally.last_actions,
                f"{tally.last_actions} episodes lost their last action, for no observation follows"
                " it: they count as unfinished, and whether they ended there is not learned; give"
                " next_observation, or a last row with the observation alone",
            ),
            (
                tally.episodes and not tally.rewarded,
                "every reward is 0, so an agent has nothing to learn from"
                f"{unrewarded if tally.last_actions else ''}: name the column that holds it,"
                " columns.reward=NAME",
            ),
            (
                tally.episodes and not ends,
                "no episode is terminated: a world made of these logs never ends one",
            ),
            (
                limit is not None and tally.longest > limit,
                f"the longest episode has {tally.longest} steps, more than the limit of {limit};"
                f" set reality.horizon={tally.longest} or more",
            ),
        ]
        return [text for holds, text in warnings if holds]
