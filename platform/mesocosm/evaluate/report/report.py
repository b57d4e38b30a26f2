"""The report: one self-contained `report.html`, and the same figures as `summary.json`.

`summarise` turns a `ReportInput` into the summary; the page is drawn from the summary and nothing
else, so the two cannot differ. No statistic is nan: what the data cannot say is null, with the
reason beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from mesocosm.envs.ledger import LedgerTotals
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.report import page

SUMMARY, PAGE = "summary.json", "report.html"


@dataclass(frozen=True)
class Point:
    """One judgement in reality of an agent, after `real_steps` real steps had been spent on it."""

    real_steps: int
    mean: float
    interval: tuple[float, float] | None = None
    returns: tuple[float, ...] = ()
    round: int | None = None
    wall_seconds: float | None = None
    """Since the run began."""

    @staticmethod
    def of(
        real_steps: int,
        returns: Sequence[float],
        *,
        round: int | None = None,
        wall_seconds: float | None = None,
    ) -> Point:
        """A point from the returns of judged episodes, with its 90% bootstrap interval."""
        values = tuple(float(value) for value in returns)
        return Point(
            real_steps,
            float(np.mean(values)),
            stats.mean_interval(values),
            values,
            round,
            wall_seconds,
        )


@dataclass(frozen=True)
class Curve:
    """One run's return in reality against real steps spent. Runs of several seeds share a name."""

    name: str
    points: Sequence[Point]
    censored: bool = False
    """Stopped by its budget before the target was reached: what it would have needed is only known
    to be more.
    """
    steps: int | None = None
    """All real steps of the run; None: those of its last point."""
    wall_seconds: float | None = None
    settings: str = ""
    """In words: algorithm, how it was tuned, at what cost in real steps."""


@dataclass(frozen=True)
class PurposeRow:
    """What the ledger says was spent on one purpose."""

    purpose: str
    steps: int
    resets: int = 0
    seconds: float = 0.0
    price: float = 0.0
    unconfirmed: int = 0
    """Steps that a crash left reserved: counted in `steps` as spent."""


@dataclass(frozen=True)
class Episode:
    """Reality [T, d] and imagined rollouts of the same agent from the same first state, each [T_i,
    d], raw values.
    """

    title: str
    reality: NDArray[np.float64]
    imagined: Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Trajectories:
    title: str
    names: Sequence[str]
    """d names of the dimensions"""
    episodes: Sequence[Episode]


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    round: int | None = None


@dataclass(frozen=True)
class ReportInput:
    title: str
    environment: str
    target: float | None = None
    agent: Sequence[Curve] = ()
    """The agent trained in the world: a curve a seed."""
    model_free: Sequence[Curve] = ()
    purposes: Sequence[PurposeRow] = ()
    currency: str = "USD"
    budget: int | None = None
    remaining: int | None = None
    losses: Sequence[Mapping[str, Any]] = ()
    """{"round": int | None, "parts": {part: nats a transition on validation}}"""
    open_loop: Sequence[Mapping[str, Any]] = ()
    """{"round": int | None, "table": OpenLoop.to_json()}"""
    checks: Sequence[Mapping[str, Any]] = ()
    """{"round": int | None, **OneStep.to_json()}: reward and termination on validation"""
    trajectories: Sequence[Trajectories] = ()
    stages: Sequence[Stage] = ()
    wall_seconds: float | None = None
    lineage: Sequence[tuple[str, str]] = ()
    """(what, id or uri), in order"""
    notes: Sequence[str] = ()
    suite: Mapping[str, Any] | None = None
    """Of an evaluation: verdicts, policy value, errors away from the data, the task distribution"""


def purpose_rows(totals: LedgerTotals) -> list[PurposeRow]:
    """The purposes that spent anything."""
    return [
        PurposeRow(
            name, spent.steps, spent.resets, spent.seconds, spent.price, spent.unconfirmed_steps
        )
        for name, spent in totals.purposes.items()
        if spent.steps or spent.resets
    ]


def write(report: ReportInput, folder: Path) -> dict[str, Any]:
    """Write `summary.json` and `report.html` into `folder`; returns the summary."""
    summary = summarise(report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    (folder / PAGE).write_text(page.render(summary), encoding="utf-8")
    return summary


def summarise(report: ReportInput) -> dict[str, Any]:
    """Everything the page shows, as JSON-able values; None where something is undefined."""
    world, free = (
        [_curve(c, report.target) for c in report.agent],
        [_curve(c, report.target) for c in report.model_free],
    )
    total = {
        key: sum(getattr(row, key) for row in report.purposes)
        for key in ("steps", "resets", "seconds", "price", "unconfirmed")
    }
    summary: dict[str, Any] = {
        "schema": 1,
        "title": report.title,
        "environment": report.environment,
        "target": report.target,
        "curves": {"world": world, "model_free": free},
        "real_steps": {
            "purposes": [vars(row) for row in report.purposes],
            "total": total,
            "currency": report.currency,
            "budget": report.budget,
            "remaining": report.remaining,
        },
        "losses": [dict(row) for row in report.losses],
        "open_loop": [dict(row) for row in report.open_loop],
        "checks": [dict(row) for row in report.checks],
        "trajectories": [_trajectories(group) for group in report.trajectories],
        "wall": {
            "stages": [vars(stage) for stage in report.stages],
            "seconds": report.wall_seconds,
        },
        "lineage": [list(pair) for pair in report.lineage],
        "notes": list(report.notes),
        "suite": report.suite,
    }
    summary["verdict"] = verdict(world, free, report.target, report.wall_seconds)
    return clean(summary)


def _curve(curve: Curve, target: float | None) -> dict[str, Any]:
    points = sorted(curve.points, key=lambda point: point.real_steps)
    at = next((p for p in points if target is not None and p.mean >= target), None)
    return {
        "name": curve.name,
        "settings": curve.settings,
        "points": [
            vars(p) | {"note": stats.describe(p.returns)["note"] if p.returns else None}
            for p in points
        ],
        "steps_to_target": None if at is None else at.real_steps,
        "seconds_to_target": None if at is None else at.wall_seconds,
        "censored": curve.censored or (target is not None and at is None),
        "steps_spent": (
            curve.steps if curve.steps is not None else points[-1].real_steps if points else 0
        ),
        "best": max((p.mean for p in points), default=None),
        "wall_seconds": curve.wall_seconds,
    }


def verdict(
    world: Sequence[Mapping[str, Any]],
    free: Sequence[Mapping[str, Any]],
    target: float | None,
    wall_seconds: float | None,
) -> dict[str, Any]:
    """What was reached, in numbers and in words. Of several seeds the median counts; a censored run
    is 'more than' its last step.
    """
    groups = [
        _group("world", name, [c for c in world if c["name"] == name])
        for name in dict.fromkeys(c["name"] for c in world)
    ]
    groups += [
        _group("model-free", name, [c for c in free if c["name"] == name])
        for name in dict.fromkeys(c["name"] for c in free)
    ]
    ours = min(
        (g for g in groups if g["kind"] == "world" and g["median"] is not None),
        key=lambda g: g["median"],
        default=None,
    )
    for group in groups:
        group["ratio"] = None
        if ours is not None and group["kind"] == "model-free" and ours["median"]:
            group["ratio"] = (group["median"] or group["more_than"]) / ours["median"]
            group["ratio_is_bound"] = group["median"] is None
    return {"text": _words(groups, ours, target, wall_seconds), "groups": groups}


def _group(kind: str, name: str, curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reached = sorted(c["steps_to_target"] for c in curves if c["steps_to_target"] is not None)
    ranked = [*reached, *([math.inf] * (len(curves) - len(reached)))]
    middle = median(ranked) if ranked else math.inf
    seconds = [
        c["seconds_to_target"] if c["seconds_to_target"] is not None else c["wall_seconds"]
        for c in curves
    ]
    return {
        "kind": kind,
        "name": name,
        "runs": len(curves),
        "reached": len(reached),
        "steps": [c["steps_to_target"] for c in curves],
        "median": middle if math.isfinite(middle) else None,
        # A censored run is only known to need more than it spent, so the median of these bounds is
        # all that is known of the median.
        "more_than": (
            None if math.isfinite(middle) else median([_at_least(c) for c in curves] or [0])
        ),
        "best": max((c["best"] for c in curves if c["best"] is not None), default=None),
        "seconds": (
            median(s for s in seconds if s is not None)
            if any(s is not None for s in seconds)
            else None
        ),
    }


def _at_least(curve: Mapping[str, Any]) -> int:
    steps: int = (
        curve["steps_spent"] if curve["steps_to_target"] is None else curve["steps_to_target"]
    )
    return steps


def _words(
    groups: Sequence[Mapping[str, Any]],
    ours: Mapping[str, Any] | None,
    target: float | None,
    wall_seconds: float | None,
) -> list[str]:
    """One sentence a fact; the first is the headline."""
    ranked = [g for g in groups if g["kind"] == "world"]
    rivals = [g for g in groups if g["kind"] == "model-free"]
    if not groups:
        return ["No agent was judged in reality."]
    if target is None:
        return [
            f"No target was set; the best mean return in reality of {g['name']} was"
            f" {page.number(g['best'])}."
            for g in groups
        ]
    lines: list[str] = []
    for group in ranked:
        if group["median"] is not None:
            seeds = f" (median of {group['runs']} runs)" if group["runs"] > 1 else ""
            lines.append(
                f"{group['name']} reached the target of {target:g} after"
                f" {page.count(group['median'])} real steps{seeds}."
            )
        else:
            within = (
                f"within {page.count(group['more_than'])} real steps; its best mean return was"
                f" {page.number(group['best'])}"
            )
            lines.append(f"{group['name']} did not reach the target of {target:g} {within}.")
    for group in rivals:
        runs = (
            f" ({group['reached']} of {group['runs']} runs reached it)" if group["runs"] > 1 else ""
        )
        if group["median"] is not None:
            lines.append(
                f"{group['name']} needed {page.count(group['median'])} real"
                f" steps{_times(group)}{runs}."
            )
        else:
            lines.append(
                f"{group['name']} had not reached it when it was stopped after"
                f" {page.count(group['more_than'])} real steps{_times(group)}{runs}."
            )
    lines += _wall(ours, rivals, wall_seconds)
    return [line[0].upper() + line[1:] for line in lines]


def _times(group: Mapping[str, Any]) -> str:
    if group["ratio"] is None:
        return ""
    times = f"{group['ratio']:.1f} times" if group["ratio"] < 100 else f"{group['ratio']:.0f} times"
    if group["ratio_is_bound"]:
        return (
            f", at least {times} as many"
            if group["ratio"] >= 1
            else (
                f", which is fewer than the world's agent spent ({times}): no comparison can be"
                " made"
            )
        )
    return (
        f", {times} as many"
        if group["ratio"] >= 1
        else f", fewer than the world's agent ({times} as many)"
    )


def _wall(
    ours: Mapping[str, Any] | None, rivals: Sequence[Mapping[str, Any]], wall_seconds: float | None
) -> list[str]:
    mine = ours["seconds"] if ours is not None and ours["seconds"] is not None else wall_seconds
    timed = [g for g in rivals if g["seconds"] is not None]
    if mine is None or not timed:
        return []
    quickest = min(timed, key=lambda g: g["seconds"])
    said = (
        f"Wall time: {page.seconds(mine)} with the world, {page.seconds(quickest['seconds'])} for"
        f" {quickest['name']}"
    )
    if quickest["seconds"] < mine and quickest["median"] is not None:
        return [
            said
            + ": where real steps are this quick and cheap, model-free training is the faster way."
        ]
    return [said + "."]


def _trajectories(group: Trajectories) -> dict[str, Any]:
    """At most six dimensions (those that move most) and 600 steps, which is what a page can show."""
    spread = (
        np.max(
            [
                np.std(e.reality, axis=0) if len(e.reality) else np.zeros(len(group.names))
                for e in group.episodes
            ],
            axis=0,
        )
        if group.episodes
        else []
    )
    kept = sorted(np.argsort(-np.asarray(spread), kind="stable")[:6].tolist())

    def rows(values: NDArray[np.float64]) -> list[list[float]]:
        return [
            [float(f"{v:.6g}") for v in row]
            for row in np.asarray(values, dtype=np.float64)[:600, kept]
        ]

    episodes = [
        {"title": e.title, "reality": rows(e.reality), "imagined": [rows(i) for i in e.imagined]}
        for e in group.episodes
    ]
    return {"title": group.title, "names": [group.names[k] for k in kept], "episodes": episodes}


def trajectories_of(summary: Mapping[str, Any]) -> list[Trajectories]:
    """The trajectories of a written summary, to be shown in another."""
    return [
        Trajectories(
            group["title"],
            group["names"],
            [
                Episode(
                    e["title"], np.asarray(e["reality"]), [np.asarray(i) for i in e["imagined"]]
                )
                for e in group["episodes"]
            ],
        )
        for group in summary["trajectories"]
    ]


def curves_table(summary: Mapping[str, Any]) -> Table:
    """Return in reality against real steps spent, the world's agent beside model-free training."""
    table = Table(
        "",
        "real steps",
        "return in reality",
        "90% interval",
        "wall so far",
        box=None,
        header_style="dim",
        pad_edge=False,
    )
    for curve in summary["curves"]["world"]:
        for point in curve["points"]:
            table.add_row(
                "in the world",
                page.count(point["real_steps"]),
                page.number(point["mean"]),
                page.span(point["interval"]),
                page.seconds(point["wall_seconds"]),
            )
    for curve in summary["curves"]["model_free"]:
        points = curve["points"]
        for point in (
            [points[round(i * (len(points) - 1) / 4)] for i in range(5)]
            if len(points) > 5
            else points
        ):
            table.add_row(
                curve["name"],
                page.count(point["real_steps"]),
                page.number(point["mean"]),
                "",
                page.seconds(point["wall_seconds"]),
            )
    table.caption = "\n".join(summary["verdict"]["text"])
    return table


def clean(value: Any) -> Any:
    """Plain JSON values; a float that is not finite becomes None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [clean(item) for item in value]
    return value
