"""What the first pass of an import finds in the logs, and how it is reported."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import gymnasium

from mesocosm.data.ingest.assemble import Closed, Tally
from mesocosm.data.ingest.readers import Piece, Source
from mesocosm.data.ingest.schema import Schema

Space = gymnasium.Space[Any]


@dataclass(frozen=True)
class Looked:
    """What the first pass found."""

    files: list[Source]
    pieces: list[Piece]
    schema: Schema
    tally: Tally
    spaces: tuple[Space, Space]
    limit: int | None
    """Of an episode's steps: `reality.horizon`, or the environment's own"""
    task: list[str]

    def report(self) -> dict[str, Any]:
        """What each column became, what is left out and why."""
        tally = self.tally
        names = sorted(tally.left_out)
        return {
            "columns": self._columns(),
            "counts": self.counts(),
            "left_out": [
                {
                    "reason": n,
                    "episodes": tally.left_out[n],
                    "rows": tally.left_out_rows[n],
                    "first": _place(tally.examples[n]),
                }
                for n in names
            ],
            "warnings": self.warnings(),
        }

    def counts(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "rows": sum(tally.rows.values()),
            "episodes": tally.episodes,
            "transitions": tally.transitions,
            "outcomes": {
                outcome: self.outcomes[outcome]
                for outcome in ("terminated", "truncated", "unfinished")
            },
            "behaviours": dict(sorted(tally.behaviours.items())),
            "episodes_left_out": sum(tally.left_out.values()),
            "empty_episodes": tally.empty,
            "last_actions_left_out": tally.last_actions,
        }

    @property
    def time_limit(self) -> int | None:
        """Rows after which every episode that is done and did not succeed has ended, where the logs
        do not say why it ended.

        Such an end is taken for a time limit: an environment that ends its episodes itself does not
        end them all at one step.
        """
        fewest, most = self.tally.done_rows
        return most if self.schema.done_only and self.tally.done > 1 and fewest == most else None

    def outcome(self, episode: Closed) -> str:
        """How an episode ended: as its rows say, or at the `time_limit`."""
        limited = (
            episode.outcome == "terminated"
            and self.time_limit is not None
            and not episode.known["success"]
        )
        return "truncated" if limited else episode.outcome

    @property
    def outcomes(self) -> Counter[str]:
        """Episodes by outcome."""
        counts = Counter(self.tally.outcomes)
        if self.time_limit is not None:
            limited = counts["terminated"] - self.tally.succeeded
            counts["terminated"] -= limited
            counts["truncated"] += limited
        return counts

    def _columns(self) -> list[dict[str, str]]:
        rows = self.schema.describe(self.tally.stats)
        if self.time_limit is None:
            return rows
        unless = " without success" if "success" in self.schema.layout.present else ""
        how = (
            f"guess: all {self.tally.done} episodes that end{unless} have {self.time_limit} steps:"
            " a time limit ends them"
        )
        return [
            {**row, "became": "truncated", "how": how} if row["became"] == "terminated" else row
            for row in rows
        ]

    def warnings(self) -> list[str]:
        tally, found = self.tally, _mistakes(self.tally)
        if 2 * (lost := sum(tally.left_out_rows.values())) > (rows := sum(tally.rows.values())):
            found.append(
                f"{lost} of {rows} rows were left out: see the reasons, and whether these logs are"
                " what was meant"
            )
        if tally.last_actions:
            found.append(
                f"{tally.last_actions} episodes lost their last action, for no observation follows"
                " it: they count as unfinished, and whether they ended there is not learned; give"
                " next_observation, or a last row with the observation alone"
            )
        if tally.episodes and not tally.rewarded:
            perhaps = (
                "; the last actions that were left out may have had others"
                if tally.last_actions
                else ""
            )
            found.append(
                f"every reward is 0, so an agent has nothing to learn from{perhaps}: name the"
                " column that holds it, columns.reward=NAME"
            )
        if tally.episodes and not self.outcomes["terminated"]:
            found.append("no episode is terminated: a world made of these logs never ends one")
        if self.limit is not None and tally.longest > self.limit:
            found.append(
                f"the longest episode has {tally.longest} steps, more than the limit of"
                f" {self.limit}; give reality.horizon={tally.longest} or more"
            )
        return found


def _place(problem: str) -> str:
    """The file and row that a problem begins with."""
    found = re.match(r".*? row \d+(?=: )", problem)
    return problem if found is None else found[0]


def _mistakes(tally: Tally) -> list[str]:
    """Mistakes of loggers that are known: what an episode's last action led to is, in every
    episode, another observation.
    """
    varies = any(
        stat.low != stat.high or stat.longest
        for name, stat in tally.stats.items()
        if name.partition(".")[0] == "observation"
    )
    found = []
    if varies and tally.led > 1 and tally.repeated == tally.led:
        found.append(
            f"in each of {tally.led} episodes the last next_observation equals the observation"
            " before it: unless the environment stands still, the logger stored one observation"
            " twice; log the observation that step() returned, or a world learns that the last"
            " action changes nothing"
        )
    if varies and tally.pairs > 1 and tally.restarted == tally.pairs:
        found.append(
            f"in each of {tally.pairs} episodes the last next_observation equals the first"
            " observation of the next episode: unless episodes end where they begin, the"
            " environment was reset in the same step (SAME_STEP autoreset); log infos['final_obs']"
            " instead"
        )
    return found
