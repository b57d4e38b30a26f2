"""The verdicts of an evaluation, one line a question: for which uses the world is trustworthy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mesocosm.agents.gate import RANKS, REGRET
from mesocosm.data.analysis.evidence import FEWEST, Evidence
from mesocosm.evaluate import gain
from mesocosm.evaluate.metrics.ranking import firm
from mesocosm.evaluate.metrics.starts import POWER
from mesocosm.evaluate.report import page

Answer = Literal["yes", "partly", "no", "unknown"]
RANKS_PARTLY = 0.7
GAP = 0.1
"""Greatest gap between the world and reality in a world to train in, as a share of the range of the
policies' returns (of the agent's return, where no policies were compared).
"""
STARTS, STARTS_PARTLY = 0.6, 0.75
"""Greatest allowed AUC of a classifier of generated against real starts."""
COPIES, NEAREST = 0.1, 0.5
"""A memory of training starts: the share of generated starts that equal one exceeds the share of
held-out starts by more than this, or the ratio of their distances to the nearest one is below this.
"""
VALID = 0.9
"""Share of generated starts that must be valid, over that of held-out real ones."""
LARGE = 0.2
"""Share of steps away from the data that may have a large error."""
SEEN = 100
"""Fewest transitions away from the data for an answer."""
FREE = 0.2
"""Share of the variance of an action, given the observation, above which the logs show what it
does.
"""
KNOWS = 0.75
"""Least AUROC at which disagreement shows where the world is wrong."""


@dataclass(frozen=True)
class Verdict:
    """The answer to one question."""

    question: str
    answer: Answer
    text: str


def verdicts(
    suite: Mapping[str, Any], open_loop: Mapping[str, Any], agent: Mapping[str, Any] | None
) -> list[Verdict]:
    """The answers to all questions, in the order of the page.

    Args:
        suite: As `suite.run` returns it.
        open_loop: an `OpenLoop` as a dict.
        agent: {"real", "world"} mean returns of the judged agent and its "gain", or None.
    """
    value = suite.get("policy_value")
    answers = {
        "Trust it to rank policies?": _ranks(value),
        "Trust it to train in?": _trains(value, agent),
        "Up to which horizon?": _horizon(open_loop),
        "Trust it away from its data?": _off_policy(suite.get("off_policy")),
        "Are its starts and tasks real ones?": _starts(suite.get("starts")),
        "Do its logs show what actions do?": _actions(suite.get("evidence")),
    }
    return [Verdict(question, answer, text) for question, (answer, text) in answers.items()]


def _ranks(value: Mapping[str, Any] | None) -> tuple[Answer, str]:
    if value is None:
        return "unknown", "no policies were compared: set policies, or graded with an agent."
    ranking = value["ranking"]
    r, regret = ranking["pearson"], ranking["regret"]
    if r is None or regret is None:
        return "unknown", " ".join(ranking["notes"])
    interval = ranking["pearson_interval"]
    text = (
        f"r = {page.with_span(r, interval, page.share)} over {ranking['policies']} policies;"
        f" choosing by it loses {regret:.1%} of the range; its values are off by"
        f" {page.number(ranking['error'])} on average."
    )
    if not firm(ranking["fifths"]):
        counts = ", ".join(map(str, ranking["fifths"]))
        text += f" That rests on few policies: {counts} in the fifths of the range."
    elif r >= RANKS and regret <= REGRET:
        return "yes", text
    return "partly" if r >= RANKS_PARTLY else "no", text


def _trains(value: Mapping[str, Any] | None, agent: Mapping[str, Any] | None) -> tuple[Answer, str]:
    if agent is None:
        return "unknown", "no agent was judged: set agent."
    span = 0.0 if value is None else value["ranking"]["high"] - value["ranking"]["low"]
    gap, size = agent["world"] - agent["real"], span or abs(agent["real"])
    text = (
        f"its agent earns {page.number(agent['real'])} in reality and {page.number(agent['world'])}"
        " in the world"
    )
    if not size:
        return "unknown", f"{text}; nothing to measure the gap by."
    share, of = abs(gap) / size, "of the policies' range" if span else "of the return"
    text += f", a gap of {share:.0%} {of}"
    if share > GAP:
        text += f": it {'flatters what is trained in it' if gap > 0 else 'is harder than reality'}"
    if agent.get("unexplained"):
        text += f". The logs do not explain that: {agent['unexplained']}"
    gained = agent.get("gain")
    if gained is not None:
        text += f"; {gain.sentence(gained)}"
    answer: Answer = "yes" if share <= GAP else "partly"
    if gained is not None and gained["unconfirmed"]:
        answer = "partly"
    return "no" if share > 3 * GAP else answer, f"{text}."


def _horizon(table: Mapping[str, Any]) -> tuple[Answer, str]:
    rows = [row for row in table["rows"] if row["horizon"] != "full"]
    rows.sort(key=lambda row: row["steps"])
    if not rows:
        return "unknown", "no horizon was asked for."
    failures = [_failure(row) for row in rows]
    good = next((i for i, failure in enumerate(failures) if failure), len(rows))
    end = "all that was asked"
    if good < len(rows):
        end = f"not {rows[good]['horizon']}: {failures[good]}"
    if good == 0:
        return "no" if rows[0]["starts"] else "unknown", f"{end}."
    last = rows[good - 1]
    text = f"{last['horizon']} steps ({end}): "
    if last["ratio"] is None:
        text += f"categories right {last['accuracy']:.0%}"
    else:
        text += f"error {page.ratio(last['ratio'])} of no change's"
    if last["coverage"] is not None:
        text += f"; its {table['nominal']:.0%} intervals hold {last['coverage']:.0%} there"
    return "yes" if good == len(rows) else "partly", f"{text}."


def _failure(row: Mapping[str, Any]) -> str | None:
    """The reason why the world's predictions fail at a horizon, or None."""
    if not row["starts"]:
        return "no held-out episode is that long"
    if row["ratio"] is None and row["accuracy"] is not None and row["persistence"] is None:
        return None if row["accuracy"] > row["persistence_accuracy"] else "no better than no change"
    if row["ratio"] is None:
        still = row["persistence"] == 0
        return "nothing changes there" if still else "rollouts leave the finite numbers"
    if (row["ratio"] if row["interval"] is None else row["interval"][1]) >= 1:
        return "no better than no change"
    linear = row["linear"] is not None and row["ratio"] >= row["linear"]
    return "no better than a linear model" if linear else None


def _off_policy(off: Mapping[str, Any] | None) -> tuple[Answer, str]:
    if off is None:
        return "unknown", "not measured: that takes policies, or graded with an agent."
    rows = [row for row in off["behaviours"] if not row["logged"]]
    seen = sum(row["transitions"] for row in rows)
    if seen < SEEN:
        text = f"{seen} transitions of others than the logs'"
        text = text if rows else "only the logs' own behaviour was looked at"
        return "unknown", f"{text}: that takes {SEEN} transitions of other policies."
    worst = max(rows, key=lambda row: row["large"])
    text = (
        f"worst of {worst['name']}, {worst['large']:.0%} of whose steps have an error that a tenth"
        " of the held-out ones have"
    )
    auroc = off["auroc"]
    if auroc is not None:
        text += f"; disagreement tells large errors from others with an AUROC of {auroc:.2f}"
    if worst["large"] <= LARGE:
        return "yes", f"{text}."
    return "no" if auroc is None or auroc < KNOWS else "partly", f"{text}."


def _starts(starts: Mapping[str, Any] | None) -> tuple[Answer, str]:
    if starts is None:
        return "unknown", "too few real starts to tell."
    auc, valid = starts["auc"], starts["validity"]
    if auc is None:
        return "unknown", " ".join(starts["notes"]) or "undefined."
    held_out = starts["split"] == "valid"
    kind = "held-out real ones"
    if not held_out:
        kind = "the training split's (too few are held out, so that a memory would not show)"
    text = f"a classifier tells them from {kind} with an AUC of {auc:.2f} (0.5: it cannot)"
    memory = _memory(starts) if held_out else None
    if memory is not None:
        return "no", f"{memory}: it repeats the starts that it was trained on; {text}."
    different = auc > STARTS_PARTLY
    if valid is not None and valid < VALID * (starts["validity_real"] or 1.0):
        return "no" if different else "partly", f"{valid:.0%} of them are valid; {text}."
    weak = starts["pairs"] < POWER
    if weak:
        text += f", by {starts['pairs']} starts of each side, which is weak evidence below {POWER}"
    if auc <= STARTS and held_out and not weak:
        return "yes", f"{text}."
    return "no" if different else "partly", f"{text}."


def _memory(starts: Mapping[str, Any]) -> str | None:
    """The evidence that generated starts repeat those of training; None without evidence."""
    copies, real = starts["copies"], starts["copies_real"]
    if copies is not None and copies > real + COPIES:
        return f"{copies:.0%} of them equal a training start, and {real:.0%} of held-out real ones"
    ratio = starts["nearest_ratio"]
    if ratio is None or ratio >= NEAREST:
        return None
    return (
        f"they are {ratio:.2g} times as far from the nearest training start as held-out real ones"
    )


def _actions(fields: Mapping[str, Any] | None) -> tuple[Answer, str]:
    if fields is None:
        return "unknown", "the datasets that it was trained on are not in storage."
    evidence = Evidence(**fields)
    if not evidence.known:
        count = evidence.transitions
        return "unknown", f"its logs hold {count} training transitions, and that takes {FEWEST}."
    unidentified = evidence.unidentified()
    if unidentified is not None:
        return "no", f"{unidentified}."
    name, share = min(evidence.free.items(), key=lambda item: item[1])
    text = (
        f"where observations agree, at least {share:.0%} of the variance of each part of the action"
        " is free"
    )
    if share > FREE:
        return "yes", f"{text}."
    few = "its logs show little else than one action a state"
    return "partly", f"{text} (least of {name}): {few}."
