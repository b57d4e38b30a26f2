"""What an evaluation says of a world, a line a question: what it may be trusted with, and where
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mesocosm.data.analysis.evidence import FEWEST, Evidence
from mesocosm.evaluate.metrics.ranking import firm
from mesocosm.evaluate.metrics.starts import POWER
from mesocosm.evaluate.report import page

Answer = Literal["yes", "partly", "no", "unknown"]
RANKS, REGRET = 0.9, 0.05
"""Pearson's r at least, and regret@1 at most, for a world that ranks policies; WorldGym reports r =
.78 on robots (arXiv 2506.00613).
"""
RANKS_PARTLY = 0.7
GAP = 0.1
"""Of the range of policies' returns (of the agent's return, where none were compared), between the
world and reality, for a world to train in.
"""
STARTS, STARTS_PARTLY = 0.6, 0.75
"""AUC, at most, of a classifier that tells generated starts from real ones."""
COPIES, NEAREST = 0.1, 0.5
"""A memory: more generated starts equal a training start than this share more than held-out ones
do, or they lie nearer to training's than this share of the distance of held-out ones.
"""
VALID = 0.9
"""Share of generated starts that must be valid, over that of held-out real ones."""
LARGE = 0.2
"""Share of steps away from the data that may have a large error."""
SEEN = 100
"""Transitions away from the data, below which nothing is said of it."""
FREE = 0.2
"""Share of the variance of an action, given the observation, above which the logs show what it
does.
"""
KNOWS = 0.75
"""AUROC at least for a disagreement that knows where the world is wrong."""


@dataclass(frozen=True)
class Verdict:
    question: str
    answer: Answer
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verdicts(
    suite: Mapping[str, Any], open_loop: Mapping[str, Any], agent: Mapping[str, Any] | None
) -> list[Verdict]:
    """suite: what `run.suite` gives; open_loop: `OpenLoop.to_json()`; agent: {"real", "world"} mean
    returns of the judged agent, or None.
    """
    return [
        _ranks(suite.get("policy_value")),
        _trains(suite.get("policy_value"), agent),
        _horizon(open_loop),
        _where(suite),
        _starts(suite.get("starts")),
        _actions(suite.get("evidence")),
    ]


def _ranks(value: Mapping[str, Any] | None) -> Verdict:
    question = "Trust it to rank policies?"
    if value is None:
        return Verdict(
            question, "unknown", "no policies were compared: set policies, or graded with an agent."
        )
    found = value["ranking"]
    if found["pearson"] is None or found["regret"] is None:
        return Verdict(question, "unknown", " ".join(found["notes"]))
    enough = firm(found["fifths"])
    ranks = found["pearson"] >= RANKS and found["regret"] <= REGRET
    answer: Answer = (
        "yes" if ranks and enough else "partly" if found["pearson"] >= RANKS_PARTLY else "no"
    )
    low_high = (
        f" ({page.span(found['pearson_interval'], lambda v: f'{v:.2f}')})"
        if found["pearson_interval"] is not None
        else ""
    )
    few = (
        ""
        if enough
        else (
            f" That rests on few policies: {', '.join(map(str, found['fifths']))} in the fifths of"
            " the range."
        )
    )
    return Verdict(
        question,
        answer,
        f"r = {found['pearson']:.2f}{low_high} over {found['policies']} policies; choosing by it"
        f" loses {found['regret']:.1%} of the range; its values are off by"
        f" {page.number(found['error'])} on average.{few}",
    )


def _trains(value: Mapping[str, Any] | None, agent: Mapping[str, Any] | None) -> Verdict:
    question = "Trust it to train in?"
    if agent is None:
        return Verdict(question, "unknown", "no agent was judged: set agent.")
    span = 0.0 if value is None else value["ranking"]["high"] - value["ranking"]["low"]
    gap, size = agent["world"] - agent["real"], span or abs(agent["real"])
    said = (
        f"its agent earns {page.number(agent['real'])} in reality and {page.number(agent['world'])}"
        " in the world"
    )
    if not size:
        return Verdict(question, "unknown", f"{said}; nothing to measure the gap by.")
    share, of = abs(gap) / size, "of the policies' range" if span else "of the return"
    answer: Answer = "yes" if share <= GAP else "partly" if share <= 3 * GAP else "no"
    why = (
        ""
        if answer == "yes"
        else ": it flatters what is trained in it"
        if gap > 0
        else ": it is harder than reality"
    )
    unexplained = agent.get("unexplained")
    claim = f" The logs do not explain that: {unexplained}." if unexplained else ""
    return Verdict(question, answer, f"{said}, a gap of {share:.0%} {of}{why}.{claim}")


def _horizon(table: Mapping[str, Any]) -> Verdict:
    question = "Up to which horizon?"
    asked = sorted(
        (row for row in table["rows"] if row["horizon"] != "full"), key=lambda row: row["steps"]
    )
    good, end = [], "all that was asked"
    for row in asked:
        why = _fails(row)
        if why is not None:
            end = f"not {row['horizon']}: {why}"
            break
        good.append(row)
    if not good:
        return Verdict(
            question,
            "no" if asked and asked[0]["starts"] else "unknown",
            f"{end}." if asked else "no horizon was asked for.",
        )
    last = good[-1]
    held = (
        ""
        if last["coverage"] is None
        else f"; its {table['nominal']:.0%} intervals hold {last['coverage']:.0%} there"
    )
    error = (
        f"categories right {last['accuracy']:.0%}"
        if last["ratio"] is None
        else f"error {page.ratio(last['ratio'])} of no change's"
    )
    return Verdict(
        question,
        "yes" if len(good) == len(asked) else "partly",
        f"{last['horizon']} steps ({end}): {error}{held}.",
    )


def _fails(row: Mapping[str, Any]) -> str | None:
    """Why a horizon is beyond the world; None where it is not."""
    if not row["starts"]:
        return "no held-out episode is that long"
    if row["ratio"] is None and row["accuracy"] is not None and row["persistence"] is None:
        return None if row["accuracy"] > row["persistence_accuracy"] else "no better than no change"
    if row["ratio"] is None:
        return (
            "nothing changes there"
            if row["persistence"] == 0
            else "rollouts leave the finite numbers"
        )
    if (row["interval"][1] if row["interval"] is not None else row["ratio"]) >= 1:
        return "no better than no change"
    return (
        "no better than a linear model"
        if row["linear"] is not None and row["ratio"] >= row["linear"]
        else None
    )


def _where(suite: Mapping[str, Any]) -> Verdict:
    question = "Trust it away from its data?"
    off = suite.get("off_policy")
    if off is None:
        return Verdict(
            question, "unknown", "not measured: that takes policies, or graded with an agent."
        )
    rows = [row for row in off["behaviours"] if not row["logged"]]
    if sum(row["transitions"] for row in rows) < SEEN:
        seen = (
            "only the logs' own behaviour was looked at"
            if not rows
            else f"{sum(row['transitions'] for row in rows)} transitions of others than the logs'"
        )
        return Verdict(
            question, "unknown", f"{seen}: that takes {SEEN} transitions of other policies."
        )
    worst = max(rows, key=lambda row: row["large"])
    knows = (
        ""
        if off["auroc"] is None
        else f"; disagreement tells large errors from others with an AUROC of {off['auroc']:.2f}"
    )
    far = (
        f"worst of {worst['name']}, {worst['large']:.0%} of whose steps have an error that a tenth"
        f" of the held-out ones have{knows}."
    )
    answer: Answer = (
        "yes"
        if worst["large"] <= LARGE
        else "partly"
        if off["auroc"] is not None and off["auroc"] >= KNOWS
        else "no"
    )
    return Verdict(question, answer, far)


def _starts(found: Mapping[str, Any] | None) -> Verdict:
    question = "Are its starts and tasks real ones?"
    if found is None or found["auc"] is None:
        return Verdict(
            question,
            "unknown",
            (
                "too few real starts to tell."
                if found is None
                else " ".join(found["notes"]) or "undefined."
            ),
        )
    held_out = found["split"] == "valid"
    kind = (
        "held-out real ones"
        if held_out
        else "the training split's (too few are held out, so that a memory would not show)"
    )
    said = f"a classifier tells them from {kind} with an AUC of {found['auc']:.2f} (0.5: it cannot)"
    if held_out and (memory := _memory(found)) is not None:
        return Verdict(
            question, "no", f"{memory}: it repeats the starts that it was trained on; {said}."
        )
    if found["validity"] is not None and found["validity"] < VALID * (
        found["validity_real"] or 1.0
    ):
        return Verdict(
            question,
            "no" if found["auc"] > STARTS_PARTLY else "partly",
            f"{found['validity']:.0%} of them are valid; {said}.",
        )
    weak = (
        f", by {found['pairs']} starts of each side, which is weak evidence below {POWER}"
        if found["pairs"] < POWER
        else ""
    )
    answer: Answer = (
        "no"
        if found["auc"] > STARTS_PARTLY
        else "yes"
        if found["auc"] <= STARTS and held_out and not weak
        else "partly"
    )
    return Verdict(question, answer, f"{said}{weak}.")


def _actions(found: Mapping[str, Any] | None) -> Verdict:
    question = "Do its logs show what actions do?"
    if found is None:
        return Verdict(
            question, "unknown", "the datasets that it was trained on are not in storage."
        )
    shown = Evidence(**found)
    if not shown.known:
        text = f"its logs hold {shown.transitions} training transitions, and that takes {FEWEST}."
        return Verdict(question, "unknown", text)
    unidentified = shown.unidentified()
    if unidentified is not None:
        return Verdict(question, "no", f"{unidentified}.")
    name, share = min(shown.free.items(), key=lambda item: item[1])
    text = (
        f"where observations agree, at least {share:.0%} of the variance of each part of the action"
        " is free"
    )
    if share <= FREE:
        return Verdict(
            question,
            "partly",
            f"{text} (least of {name}): its logs show little else than one action a state.",
        )
    return Verdict(question, "yes", f"{text}.")


def _memory(found: Mapping[str, Any]) -> str | None:
    """What shows that generated starts are training's; None where nothing does."""
    if found["copies"] is not None and found["copies"] > found["copies_real"] + COPIES:
        return (
            f"{found['copies']:.0%} of them equal a training start, and {found['copies_real']:.0%}"
            " of held-out real ones"
        )
    if found["nearest_ratio"] is not None and found["nearest_ratio"] < NEAREST:
        return (
            f"they are {found['nearest_ratio']:.2g} times as far from the nearest training start as"
            " held-out real ones"
        )
    return None
