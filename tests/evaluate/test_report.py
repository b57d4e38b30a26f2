"""The report: the page shows the summary's figures, parses, loads nothing, and says what is
undefined.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.report import page
from mesocosm.evaluate.report.report import (
    Curve,
    Point,
    ReportInput,
    SideBySide,
    Stage,
    imagined_row,
    trajectories,
    write,
)


def line(horizon: int, ratio: float, scale: float) -> dict[str, Any]:
    ratio, of = ratio * scale, ratio
    return {
        "horizon": str(horizon),
        "steps": horizon,
        "ratio": ratio,
        "interval": [ratio * 0.8, ratio * 1.2],
        "single": ratio * 1.4,
        "typical": ratio * 0.5,
        "linear": of * 3,
        "accuracy": 0.75,
        "accuracy_interval": [0.7, 0.8],
        "persistence_accuracy": 0.5,
        "persistence": 0.1 * horizon,
        "starts": 64,
        "episodes": 8,
    }


def table(scale: float) -> dict[str, Any]:
    rows = [line(h, ratio, scale) for h, ratio in ((1, 0.125), (5, 0.25), (50, 4.0))]
    whole = {"horizon": "full", "steps": 90, "persistence": 0.0, "starts": 3, "episodes": 3}
    rows.append(dict.fromkeys(rows[0]) | whole)
    return {"rows": rows, "notes": ["full: persistence made no error, so the ratio is undefined."]}


def purpose(name: str, *values: float) -> dict[str, Any]:
    keys = ("steps", "resets", "seconds", "duration", "text_bytes", "price", "unconfirmed")
    return {"purpose": name, **dict(zip(keys, values, strict=True))}


CHECK: dict[str, Any] = {
    "round": 1,
    "transitions": 150,
    "terminals": 7,
    "expected_terminals": 6.5,
    "precision": 0.875,
    "auc": 0.75,
    "auc_interval": (0.5, 0.875),
    "reward_accuracy": 1.0,
    "reward_accuracy_interval": (0.98, 1.0),
    "notes": ["R² is undefined."],
} | dict.fromkeys(("recall", "recall_interval", "reward_r2", "reward_r2_interval"))


def example() -> ReportInput:
    path = np.random.default_rng(0).normal(size=(40, 8)).cumsum(0)
    episodes = [SideBySide("episode <0>", path, [path[:30] + 0.1, path[:35] - 0.1])]
    points = [
        Point.of(1000, [20.0, 31.0, 27.0], round=0, wall_seconds=60.0),
        Point.of(1500, [500.0] * 3, round=1, wall_seconds=120.0),
    ]
    tuned = [Point(3000, 100.0), Point(6000, 480.0, wall_seconds=30.0)]
    stopped = [Point(1000, 12.0), Point(9000, 180.0)]
    parts = {"reward": 0.0125, "termination": float("nan")}
    return ReportInput(
        title="Loop <script>alert(1)</script> & more",
        environment="CartPole-v1",
        target=475.0,
        agent=[Curve("PPO in the world", points)],
        model_free=[
            Curve("PPO", tuned, settings="lr 1e-3, a tuning budget of 6 runs"),
            Curve("DQN", stopped, censored=True, wall_seconds=44.0),
        ],
        purposes=[
            purpose("collect", 1500, 70, 1.5, 3600.0, 2048, 15.0, 0),
            purpose("baseline", 15000, 300, 9.0, 0.0, 0, 150.0, 0),
            purpose("judge", 1578, 6, 1.0, 0.0, 0, 15.78, 7),
        ],
        currency="EUR",
        budget=2000,
        money_budget=20.0,
        money_remaining=0.004,
        imagined=[
            imagined_row("train-agent", {"imagined_steps": 65536, "imagined_seconds": 90.0}),
            imagined_row("again", {"imagined_steps": 9, "imagined_tokens": 777}),
        ],
        remaining=500,
        losses=[{"round": r, "parts": {"dynamics": 7.25 - r, **parts}} for r in range(2)],
        open_loop=[{"round": r, "table": table(1 / (1 + r))} for r in range(2)],
        checks=[CHECK],
        trajectories=[trajectories("round 1", [f"x{k}" for k in range(8)], episodes)],
        stages=[Stage("pretrain", 31.0, 0), Stage("pretrain", 33.0, 1), Stage("judge", 2.0)],
        wall_seconds=126.0,
        lineage=[("world", "worlds/0123456789abcdef")],
    )


class Strict(HTMLParser):
    """Fails on tags that do not nest, and collects text and what the page would load or run."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            inside = (value or "").startswith("data:image/png;base64,")
            assert name not in ("onclick", "onload") and (name != "src" or inside), (tag, value)
            assert not (name.endswith("href") and not (value or "").startswith("#")), value
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, (tag, self.stack)
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.texts.append(data)


def parsed(html: str) -> Strict:
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert not parser.stack
    return parser


@pytest.mark.integration
def test_the_page_is_well_formed_self_contained_and_escaped(tmp_path: Path) -> None:
    write(example(), tmp_path)
    html = (tmp_path / "report.html").read_text()
    page_parts = parsed(html)
    ElementTree.fromstring(html.replace("<!DOCTYPE html>", ""))
    assert len(page_parts.ids) == len(set(page_parts.ids)), "ids of several plots do not clash"
    assert not {"script", "link", "img"} & set(page_parts.tags)
    assert "@import" not in html and "url(http" not in html
    assert html.count("<svg") == 5
    assert "Loop <script>alert(1)</script> & more" in page_parts.texts, "shown as text"
    assert not re.search(r"\bnan\b|\binf\b|None", " ".join(page_parts.texts), re.I)


@pytest.mark.integration
def test_the_page_shows_the_summarys_figures_and_nothing_else(tmp_path: Path) -> None:
    summary = write(example(), tmp_path)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored == summary
    html = (tmp_path / "report.html").read_text()
    assert page.render(stored) == html, "the page is a function of summary.json"
    text = " ".join(parsed(html).texts)
    assert stored["real_steps"]["total"]["steps"] == 18078
    assert stored["losses"][1]["parts"] == {"dynamics": 6.25, "reward": 0.0125, "termination": None}
    assert stored["open_loop"][1]["table"]["rows"][2]["ratio"] == 2.0
    for figure in ("18,078", "180.78 EUR", "6.2500"):
        assert figure in text
    for figure in ("60.0 min", "2,048", "20.00 EUR; 0.004 EUR remain", "65,536", "90 s", "777"):
        assert figure in text, "durations, texts, money and imagination are part of the bill"
    changed = json.loads(json.dumps(stored))
    changed["real_steps"]["purposes"][0]["steps"] = 4321
    assert "4,321" in page.render(changed)


@pytest.mark.integration
def test_the_verdict_counts_real_steps_and_names_censored_runs(tmp_path: Path) -> None:
    verdict = write(example(), tmp_path)["verdict"]
    ours, tuned, censored = verdict["groups"]
    assert ours["median"] == 1500 and ours["reached"] == 1
    assert tuned["median"] == 6000 and tuned["ratio"] == 4.0 and not tuned["ratio_is_bound"]
    assert censored["median"] is None and censored["more_than"] == 9000
    assert censored["ratio"] == 6.0 and censored["ratio_is_bound"]
    text = verdict["text"]
    assert text[0] == "PPO in the world reached the target of 475 after 1,500 real steps."
    assert text[1] == "PPO needed 6,000 real steps, 4.0 times as many."
    assert text[2].endswith("9,000 real steps, at least 6.0 times as many.")
    assert text[3].startswith("Wall time: 2.0 min with the world, 30 s for PPO: ")
    assert "model-free training is the faster way" in text[3]


def test_a_missed_target_counts_as_more_in_medians(tmp_path: Path) -> None:
    runs = [
        Curve("PPO in the world", [Point.of(1000, [10.0, 20.0]), Point.of(2000, [level, level])])
        for level in (500.0, 480.0, 300.0)
    ]
    rival = [Curve("PPO", [Point(1000, 600.0)], wall_seconds=3.0)]
    verdict = write(ReportInput("t", "e", 475.0, runs, rival), tmp_path)["verdict"]
    group = verdict["groups"][0]
    assert group["steps"] == [2000, 2000, None] and group["median"] == 2000
    assert "fewer than the world's agent (0.5 times as many)" in verdict["text"][1]
    missed = write(ReportInput("t", "e", 475.0, runs[2:], rival), tmp_path)["verdict"]
    line = "did not reach the target of 475 within 2,000 real steps; its best mean return was 300.0"
    assert line in missed["text"][0]
    assert missed["groups"][1]["ratio"] is None
    assert "300.0" in write(ReportInput("t", "e", None, runs[2:]), tmp_path)["verdict"]["text"][0]
    empty = write(ReportInput("nothing", "e"), tmp_path)
    assert empty["verdict"]["text"] == ["No agent was judged in reality."]
    parsed((tmp_path / "report.html").read_text())


def test_a_censored_median_is_a_bound(tmp_path: Path) -> None:
    """Of runs of 5000, more than 8000 and more than 30000 steps, the median is more than 8000."""
    ours = [Curve("ours", [Point.of(1000, [500.0, 500.0])])]
    rivals = [
        Curve("PPO", [Point(5000, 600.0)]),
        *(Curve("PPO", [Point(steps, 1.0)], censored=True) for steps in (8000, 30000)),
    ]
    group = write(ReportInput("t", "e", 475.0, ours, rivals), tmp_path)["verdict"]["groups"][1]
    assert group["more_than"] == 8000 and group["ratio"] == 8.0 and group["ratio_is_bound"]
    unjudged = ReportInput("t", "e", 475.0, ours, [Curve("PPO", [], censored=True, steps=700)])
    assert "after 700 real steps" in write(unjudged, tmp_path)["verdict"]["text"][1]


def test_statistics_say_when_they_are_undefined() -> None:
    assert stats.mean_interval([3.0]) is None
    assert stats.mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert "equal" in (stats.interval_note([2.0, 2.0, 2.0]) or "")
    assert stats.r_squared([1.0, 1.0], [1.0, 0.0], np.arange(2)) == (None, None)
    assert stats.r_squared([0.0, 1.0], [0.0, 1.0], np.arange(2))[0] == 1.0
    assert stats.grouped_mean([1.0, 5.0], np.zeros(2, int)) == (3.0, None)
    assert stats.grouped_mean([0.0], np.zeros(1, int), weights=[0.0]) == (None, None)
    assert stats.ratio_of_rms([4.0], [0.0]) is None
    assert stats.ratio_of_rms([4.0, 4.0], [1.0, 1.0]) == 2.0
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = stats.mean_interval(rng.normal(5.0, 2.0, size=30), seed=trial) or (0.0, 0.0)
        covered += low <= 5.0 <= high
    assert 160 <= covered <= 196, "a 90% interval covers about nine times in ten"
