"""Each verdict at both sides of each of its thresholds, and the behaviours that the off-policy
table is made of.
"""

from __future__ import annotations

from typing import Any

import pytest

from mesocosm.evaluate import policy_set, verdicts
from mesocosm.evaluate.metrics.starts import POWER
from mesocosm.evaluate.policy_set import ComparedPolicy
from mesocosm.evaluate.suite import ADVERSARY, MOST_BEHAVIOURS, behaviours_of
from mesocosm.evaluate.verdicts import Verdict


def answers(
    suite: dict[str, Any],
    rows: list[dict[str, Any]] | None = None,
    agent: dict[str, Any] | None = None,
) -> list[Verdict]:
    return verdicts.verdicts(suite, {"rows": rows or [], "nominal": 0.9}, agent)


def ranking(**changes: Any) -> dict[str, Any]:
    verdict = {
        "pearson": 0.95,
        "pearson_interval": (0.9, 0.99),
        "regret": 0.0,
        "fifths": (3, 3, 3, 3, 3),
        "policies": 15,
        "error": 1.0,
        "notes": (),
    }
    return {"policy_value": {"ranking": {**verdict, "low": 0.0, "high": 100.0, **changes}}}


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "yes"),
        ({"pearson": 0.9, "regret": 0.05}, "yes"),
        ({"pearson": 0.89}, "partly"),
        ({"regret": 0.06}, "partly"),
        ({"fifths": (3, 2, 3, 3, 4)}, "partly"),
        ({"pearson": 0.69}, "no"),
        ({"pearson": None, "notes": ("all the same",)}, "unknown"),
    ],
)
def test_ranks(changes: dict[str, Any], answer: str) -> None:
    assert answers(ranking(**changes))[0].answer == answer


@pytest.mark.parametrize(
    ("world", "answer"),
    [(60.0, "yes"), (59.0, "yes"), (61.0, "partly"), (80.0, "partly"), (81.0, "no"), (19.0, "no")],
)
def test_trains_by_the_range_of_the_policies(world: float, answer: str) -> None:
    verdict = answers(ranking(), agent={"real": 50.0, "world": world})[1]
    assert verdict.answer == answer
    assert answer == "yes" or ("flatters" in verdict.text) == (world > 50)


def test_trains_by_the_return_where_no_policies_were_compared() -> None:
    for world, answer in ((110.0, "yes"), (111.0, "partly"), (131.0, "no")):
        assert answers({}, agent={"real": 100.0, "world": world})[1].answer == answer
    assert answers({}, agent={"real": 0.0, "world": 1.0})[1].answer == "unknown"
    assert answers({})[1].answer == "unknown"


def row(horizon: int, **changes: Any) -> dict[str, Any]:
    verdict = {
        "ratio": 0.1,
        "interval": (0.05, 0.2),
        "linear": 0.5,
        "accuracy": None,
        "persistence": 1.0,
        "persistence_accuracy": None,
        "coverage": 0.9,
    }
    return {"horizon": str(horizon), "steps": float(horizon), "starts": 9, **verdict, **changes}


@pytest.mark.parametrize(
    ("last", "answer", "text"),
    [
        ({}, "yes", "15 steps (all that was asked)"),
        ({"interval": (0.5, 1.0)}, "partly", "5 steps (not 15: no better than no change)"),
        ({"linear": 0.1}, "partly", "no better than a linear model"),
        ({"starts": 0}, "partly", "no held-out episode is that long"),
        ({"ratio": None, "persistence": 0.0}, "partly", "nothing changes there"),
    ],
)
def test_horizon(last: dict[str, Any], answer: str, text: str) -> None:
    verdict = answers({}, [row(1), row(5), row(15, **last)])[2]
    assert verdict.answer == answer and text in verdict.text
    assert answers({}, [row(1, linear=0.1)])[2].answer == "no"
    assert answers({})[2].answer == "unknown"


def away(*rows: tuple[str, float, int, bool], auroc: float | None = 0.9) -> dict[str, Any]:
    keys = ("name", "large", "transitions", "logged")
    behaviours = [dict(zip(keys, values, strict=True)) for values in rows]
    return {"off_policy": {"auroc": auroc, "behaviours": behaviours}}


@pytest.mark.parametrize(
    ("suite", "answer", "text"),
    [
        (away(("a", 0.2, 100, False), ("b", 0.1, 500, False)), "yes", "worst of a"),
        (away(("a", 0.21, 100, False)), "partly", "AUROC of 0.90"),
        (away(("a", 0.21, 100, False), auroc=0.74), "no", "worst of a"),
        (away(("a", 0.21, 100, False), auroc=None), "no", "worst of a"),
        (away(("a", 0.0, 99, False)), "unknown", "99 transitions of others"),
        (away(("random", 0.0, 9999, True)), "unknown", "only the logs' own behaviour"),
        (away(("random", 0.9, 9999, True), ("a", 0.0, 100, False)), "yes", "worst of a"),
    ],
)
def test_away_from_the_data(suite: dict[str, Any], answer: str, text: str) -> None:
    verdict = answers(suite)[3]
    assert verdict.answer == answer and text in verdict.text


def starts(**changes: Any) -> dict[str, Any]:
    verdict = {
        "auc": 0.6,
        "split": "valid",
        "pairs": POWER,
        "validity": 0.95,
        "validity_real": 1.0,
        "copies": 0.0,
        "copies_real": 0.0,
        "nearest_ratio": 0.9,
    }
    return {"starts": {**verdict, "notes": (), **changes}}


@pytest.mark.parametrize(
    ("changes", "answer", "text"),
    [
        ({}, "yes", "AUC of 0.60"),
        ({"auc": 0.61}, "partly", "AUC of 0.61"),
        ({"auc": 0.76}, "no", "AUC of 0.76"),
        ({"pairs": POWER - 1}, "partly", "weak evidence"),
        ({"split": "train"}, "partly", "a memory would not show"),
        ({"auc": 0.5, "copies": 0.11}, "no", "11% of them equal a training start"),
        ({"auc": 0.5, "copies": 0.6, "copies_real": 0.55}, "yes", "AUC"),
        ({"auc": 0.5, "nearest_ratio": 0.49}, "no", "0.49 times as far"),
        ({"validity": 0.89}, "partly", "89% of them are valid"),
        ({"validity": 0.2, "auc": 0.8}, "no", "20% of them are valid"),
        ({"auc": None, "notes": ("too few.",)}, "unknown", "too few"),
    ],
)
def test_starts(changes: dict[str, Any], answer: str, text: str) -> None:
    verdict = answers(starts(**changes))[4]
    assert verdict.answer == answer and text in verdict.text


def shown(**changes: Any) -> dict[str, Any]:
    verdict: dict[str, Any] = {"transitions": 500, "free": {"action[0]": 0.9}, "fixed": []}
    return {**verdict, "best_return": 9.0, "low_rate": 0.0, "high_rate": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "answer", "text"),
    [
        ({}, "yes", "90%"),
        ({"free": {"action[0]": 0.21, "action[1]": 0.9}}, "yes", "21%"),
        ({"free": {"action[0]": 0.2, "action[1]": 0.9}}, "partly", "least of action[0]"),
        (
            {"free": {"action[0]": 0.01}, "fixed": ["action[0]"]},
            "no",
            "action[0] (1.0% of its variance is free)",
        ),
        ({"transitions": 99}, "unknown", "99 training transitions"),
    ],
)
def test_actions(changes: dict[str, Any], answer: str, text: str) -> None:
    verdict = answers({"evidence": shown(**changes)})[5]
    assert verdict.answer == answer and text in verdict.text
    assert answers({})[5].answer == "unknown"


def test_a_return_that_the_logs_do_not_explain_has_its_reason() -> None:
    agent = {"real": 50.0, "world": 60.0, "unexplained": "it earns 6 a step"}
    text = answers(ranking(), agent=agent)[1].text
    assert "The logs do not explain that: it earns 6 a step." in text
    assert "explain" not in answers(ranking(), agent={**agent, "unexplained": None})[1].text


class Judged:
    def __init__(self, name: str, **facts: Any):
        policy = policy_set.RandomPolicy.__new__(policy_set.RandomPolicy)
        self.candidate = ComparedPolicy(name, policy, **facts)


def names_of(*values: Any) -> list[str]:
    return [value.candidate.name for value in behaviours_of(values)]


def test_the_named_kinds_come_first_and_none_comes_twice() -> None:
    scripted = [Judged(f"scripted {i}") for i in range(9)]
    agents = [Judged(f"agent@{i}", iteration=i) for i in range(3)] + [Judged("agent", iteration=3)]
    noisy = [Judged(f"noise {i}", noise=i / 4) for i in range(5)]
    names = names_of(*scripted, *agents, Judged(ADVERSARY), *noisy)
    assert names[:5] == [ADVERSARY, "agent", "agent@2", "noise 2", "noise 4"]
    assert len(names_of(*scripted, *agents, *noisy)) == MOST_BEHAVIOURS
    few = names_of(Judged("agent", iteration=3), Judged("noise 2", noise=2.0))
    assert few == ["agent", "noise 2"]
