"""What an evaluation says of a world, a line a question: what it may be trusted with, and where not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mesocosm.evaluation import page

Answer = Literal["yes", "partly", "no", "unknown"]
RANKS, REGRET = 0.9, 0.05
"""Pearson's r at least, and regret@1 at most, for a world that ranks policies; WorldGym reports r = .78 on robots (arXiv 2506.00613)."""
RANKS_PARTLY = 0.7
GAP = 0.1
"""Of the agent's return (or of the range of policies' returns), between the world and reality, for a world to train in."""
STARTS = 0.6
"""AUC, at most, of a classifier that tells generated starts from real ones."""
KNOWS = 0.75
"""AUROC at least for a disagreement that knows where the world is wrong."""


@dataclass(frozen=True)
class Verdict:
    question: str
    answer: Answer
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verdicts(suite: Mapping[str, Any], open_loop: Mapping[str, Any], agent: Mapping[str, Any] | None) -> list[Verdict]:
    """suite: what `run.suite` gives; open_loop: `OpenLoop.to_json()`; agent: {"real", "world"} mean returns of the judged agent, or None."""
    return [_ranks(suite.get("policy_value")), _trains(suite.get("policy_value"), agent), _horizon(open_loop), _where(suite), _starts(suite.get("starts"))]


def _ranks(value: Mapping[str, Any] | None) -> Verdict:
    question = "Trust it to rank policies?"
    if value is None:
        return Verdict(question, "unknown", "no policies were compared: set policies, or graded with an agent.")
    found = value["ranking"]
    if found["pearson"] is None or found["regret"] is None:
        return Verdict(question, "unknown", " ".join(found["notes"]))
    answer: Answer = "yes" if found["pearson"] >= RANKS and found["regret"] <= REGRET else "partly" if found["pearson"] >= RANKS_PARTLY else "no"
    low_high = f" ({page.span(found['pearson_interval'], lambda v: f'{v:.2f}')})" if found["pearson_interval"] is not None else ""
    return Verdict(
        question,
        answer,
        f"r = {found['pearson']:.2f}{low_high} over {found['policies']} policies; choosing by it loses {found['regret']:.1%} of the range; "
        f"its values are off by {page.number(found['error'])} on average.",
    )


def _trains(value: Mapping[str, Any] | None, agent: Mapping[str, Any] | None) -> Verdict:
    question = "Trust it to train in?"
    if agent is None:
        return Verdict(question, "unknown", "no agent was judged: set agent.")
    span = abs(agent["real"]) if value is None else max(value["ranking"]["high"] - value["ranking"]["low"], abs(agent["real"]))
    gap = agent["world"] - agent["real"]
    share = abs(gap) / span if span else None
    said = f"its agent earns {page.number(agent['real'])} in reality and {page.number(agent['world'])} in the world"
    if share is None:
        return Verdict(question, "unknown", f"{said}; nothing to measure the gap by.")
    answer: Answer = "yes" if share <= GAP else "partly" if share <= 3 * GAP else "no"
    why = "" if answer == "yes" else ": it flatters what is trained in it" if gap > 0 else ": it is harder than reality"
    return Verdict(question, answer, f"{said}, a gap of {share:.0%}{why}.")


def _horizon(table: Mapping[str, Any]) -> Verdict:
    question = "Up to which horizon?"
    rows = [row for row in table["rows"] if row["ratio"] is not None and row["horizon"] != "full"]
    if not rows:
        return Verdict(question, "unknown", "no episode was long enough to measure an open-loop error.")
    good = []
    for row in rows:
        if (row["interval"][1] if row["interval"] is not None else row["ratio"]) >= 1 or (row["linear"] is not None and row["ratio"] >= row["linear"]):
            break
        good.append(row)
    if not good:
        return Verdict(question, "no", "not even one step ahead is it better than predicting no change and than a linear model.")
    last, every = good[-1], len(good) == len([row for row in table["rows"] if row["horizon"] != "full"])
    held = "" if last["coverage"] is None else f"; its {table['nominal']:.0%} intervals hold {last['coverage']:.0%} there"
    further = "all that was asked" if every else f"not {rows[len(good)]['horizon']}" if len(good) < len(rows) else "held-out episodes are no longer"
    return Verdict(question, "yes" if every else "partly", f"{last['horizon']} steps ({further}): error {page.ratio(last['ratio'])} of no change's{held}.")


def _where(suite: Mapping[str, Any]) -> Verdict:
    question = "Where not?"
    off = suite.get("off_policy")
    if off is None:
        return Verdict(question, "unknown", "errors away from the data were not measured: that takes policies, or graded with an agent.")
    worst = max(off["behaviours"], key=lambda row: row["large"])
    knows = "" if off["auroc"] is None else f"; disagreement tells large errors from others with an AUROC of {off['auroc']:.2f}"
    far = f"of {worst['name']}'s steps {worst['large']:.0%} have an error as large as a tenth of the held-out ones have{knows}."
    answer: Answer = "yes" if worst["large"] <= 0.2 else "partly" if off["auroc"] is not None and off["auroc"] >= KNOWS else "no"
    return Verdict(question, answer, far)


def _starts(found: Mapping[str, Any] | None) -> Verdict:
    question = "Are its starts and tasks real ones?"
    if found is None or found["auc"] is None:
        return Verdict(question, "unknown", "too few real starts to tell." if found is None else " ".join(found["notes"]) or "undefined.")
    answer: Answer = "yes" if found["auc"] <= STARTS else "partly" if found["auc"] <= 0.75 else "no"
    return Verdict(question, answer, f"a classifier tells them from held-out real ones with an AUC of {found['auc']:.2f} (0.5: it cannot).")
