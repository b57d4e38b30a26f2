"""The report: one self-contained `report.html`, drawn from the summary alone, and `summary.json`.

No statistic is nan: a value that the data cannot answer is null, and the reason is given with it.
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

from mesocosm.envs.amounts import LedgerTotals
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.report import page

SUMMARY, PAGE = "summary.json", "report.html"
SPENT = ("steps", "resets", "seconds", "duration", "text_bytes", "price")
"""Fields of the bill: of `PurposeTotals`."""
DIMENSIONS, STEPS = 6, 600
"""Limits of trajectories on a page: the dimensions that move most, and the first steps."""


@dataclass(frozen=True)
class Point:
    """One judgement in reality of an agent, after `real_steps` real steps were spent on it."""

    real_steps: int
    mean: float
    interval: tuple[float, float] | None = None
    returns: tuple[float, ...] = ()
    round: int | None = None
    wall_seconds: float | None = None
    """Seconds since the run began."""

    @staticmethod
    def of(real_steps: int, returns: Sequence[float], **about: Any) -> Point:
        """A point from the returns of judged episodes, with its 90% bootstrap interval.

        `about` holds `round` and `wall_seconds`.
        """
        values = tuple(float(value) for value in returns)
        interval = stats.mean_interval(values)
        return Point(real_steps, float(np.mean(values)), interval, values, **about)


@dataclass(frozen=True)
class Curve:
    """The return in reality of one run by real steps spent. Runs of several seeds share a name."""

    name: str
    points: Sequence[Point]
    censored: bool = False
    """The budget stopped the run before the target; it needs more than it spent."""
    steps: int | None = None
    """All real steps of the run. None takes the steps of the last point."""
    wall_seconds: float | None = None
    settings: str = ""
    """A description: the algorithm, how it was tuned, and the cost of that in real steps."""


@dataclass(frozen=True)
class SideBySide:
    """A real episode [T, d] and imagined rollouts [T_i, d] of the same agent from the same first
    state, as raw values.
    """

    title: str
    reality: NDArray[np.float64]
    imagined: Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Stage:
    """Wall time of one stage of a loop."""

    name: str
    seconds: float
    round: int | None = None


@dataclass(frozen=True)
class ReportInput:
    """The contents of a report."""

    title: str
    environment: str
    target: float | None = None
    agent: Sequence[Curve] = ()
    """The agent trained in the world: a curve a seed."""
    model_free: Sequence[Curve] = ()
    purposes: Sequence[Mapping[str, Any]] = ()
    """Rows of `purpose_rows`"""
    currency: str = "USD"
    budget: int | None = None
    remaining: int | None = None
    money_budget: float | None = None
    money_remaining: float | None = None
    imagined: Sequence[Mapping[str, Any]] = ()
    """Rows of `imagined_row`"""
    losses: Sequence[Mapping[str, Any]] = ()
    """{"round": int | None, "parts": {part: nats a transition on validation}}"""
    open_loop: Sequence[Mapping[str, Any]] = ()
    """{"round": int | None, "table": an `OpenLoop` as a dict}"""
    checks: Sequence[Mapping[str, Any]] = ()
    """{"round": int | None, **an `OneStep` as a dict}: reward and termination on validation"""
    trajectories: Sequence[Mapping[str, Any]] = ()
    """Entries of `trajectories`, or of another summary"""
    stages: Sequence[Stage] = ()
    wall_seconds: float | None = None
    lineage: Sequence[tuple[str, str]] = ()
    """(kind, id or URI), in order"""
    notes: Sequence[str] = ()
    suite: Mapping[str, Any] | None = None
    """An evaluation: verdicts, policy values, off-policy errors, the task distribution"""


def purpose_rows(totals: LedgerTotals) -> list[dict[str, Any]]:
    """The purposes that spent anything.

    `unconfirmed` steps are those that a crash left reserved; `steps` counts them as spent.
    """
    return [
        {"purpose": name}
        | {key: getattr(s, key) for key in SPENT}
        | {"unconfirmed": s.unconfirmed_steps}
        for name, s in totals.purposes.items()
        if s.steps or s.resets
    ]


def imagined_row(stage: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The use that a training made of its world, from the metrics of its agent."""
    keys = {"steps": "imagined_steps", "seconds": "imagined_seconds", "tokens": "imagined_tokens"}
    return {"stage": stage} | {key: metrics.get(name) for key, name in keys.items()}


def bill_lines(
    totals: LedgerTotals | None, imagined: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """(name, value) of what reality and imagination took, for the page of a text world."""
    lines = []
    for row in [] if totals is None else purpose_rows(totals):
        parts = [f"{page.count(row['steps'])} real steps", page.seconds(row["seconds"])]
        parts += [f"{page.count(row['text_bytes'])} bytes of text"]
        parts += [page.price(row["price"], totals.currency)] if totals and row["price"] else []
        lines.append((f"reality, {row['purpose']}", ", ".join(parts)))
    for use in imagined:
        parts = [f"{page.count(use['steps'])} steps", page.seconds(use["seconds"])]
        parts += [f"{page.count(use['tokens'])} tokens"] if use["tokens"] else []
        lines.append((f"imagination, {use['stage']}", ", ".join(parts)))
    return lines


def write(report: ReportInput, folder: Path) -> dict[str, Any]:
    """Write `summary.json` and `report.html` into `folder`; returns the summary."""
    summary = summarise(report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    (folder / PAGE).write_text(page.render(summary), encoding="utf-8")
    return summary


def summarise(report: ReportInput) -> dict[str, Any]:
    """Everything that the page shows, as JSON values; None where something is undefined."""
    world = [_curve(curve, report.target) for curve in report.agent]
    free = [_curve(curve, report.target) for curve in report.model_free]
    purposes = list(report.purposes)
    keys = (*SPENT, "unconfirmed")
    summary: dict[str, Any] = {
        "schema": 1,
        "title": report.title,
        "environment": report.environment,
        "target": report.target,
        "curves": {"world": world, "model_free": free},
        "real_steps": {
            "purposes": purposes,
            "total": {key: sum(row[key] for row in purposes) for key in keys},
            "currency": report.currency,
            "budget": report.budget,
            "remaining": report.remaining,
            "money_budget": report.money_budget,
            "money_remaining": report.money_remaining,
        },
        "imagined": report.imagined,
        "losses": report.losses,
        "open_loop": report.open_loop,
        "checks": report.checks,
        "trajectories": report.trajectories,
        "wall": {"stages": [vars(row) for row in report.stages], "seconds": report.wall_seconds},
        "lineage": report.lineage,
        "notes": report.notes,
        "suite": report.suite,
        "verdict": _verdict(world, free, report.target, report.wall_seconds),
    }
    return clean(summary)


def _curve(curve: Curve, target: float | None) -> dict[str, Any]:
    points = sorted(curve.points, key=lambda point: point.real_steps)
    reached = next((p for p in points if target is not None and p.mean >= target), None)
    last = points[-1].real_steps if points else 0
    return {
        "name": curve.name,
        "settings": curve.settings,
        "points": [
            vars(p) | {"note": stats.interval_note(p.returns) if p.returns else None}
            for p in points
        ],
        "steps_to_target": None if reached is None else reached.real_steps,
        "seconds_to_target": None if reached is None else reached.wall_seconds,
        "censored": curve.censored or (target is not None and reached is None),
        "steps_spent": last if curve.steps is None else curve.steps,
        "best": max((p.mean for p in points), default=None),
        "wall_seconds": curve.wall_seconds,
    }


def _verdict(
    world: Sequence[Mapping[str, Any]],
    free: Sequence[Mapping[str, Any]],
    target: float | None,
    wall_seconds: float | None,
) -> dict[str, Any]:
    """The result in numbers and in words. The median counts of several seeds; a censored run needs
    more than its last step.
    """
    groups = [
        _group(kind, name, [curve for curve in curves if curve["name"] == name])
        for kind, curves in (("world", world), ("model-free", free))
        for name in dict.fromkeys(curve["name"] for curve in curves)
    ]
    reached = [g for g in groups if g["kind"] == "world" and g["median"] is not None]
    best = min(reached, key=lambda group: group["median"], default=None)
    for group in groups:
        group["ratio"] = None
        if best is not None and group["kind"] == "model-free" and best["median"]:
            group["ratio"] = (group["median"] or group["more_than"]) / best["median"]
            group["ratio_is_bound"] = group["median"] is None
    return {"text": _sentences(groups, best, target, wall_seconds), "groups": groups}


def _group(kind: str, name: str, curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [curve["steps_to_target"] for curve in curves]
    middle = median(math.inf if step is None else step for step in steps)
    # A censored run needs more than it spent: the median of these bounds is a bound of the median.
    bounds = [c["steps_spent"] if s is None else s for s, c in zip(steps, curves, strict=True)]
    both = [(c["seconds_to_target"], c["wall_seconds"]) for c in curves]
    seconds = [whole if reached is None else reached for reached, whole in both]
    timed = [value for value in seconds if value is not None]
    return {
        "kind": kind,
        "name": name,
        "runs": len(curves),
        "reached": sum(step is not None for step in steps),
        "steps": steps,
        "median": middle if math.isfinite(middle) else None,
        "more_than": None if math.isfinite(middle) else median(bounds),
        "best": max((c["best"] for c in curves if c["best"] is not None), default=None),
        "seconds": median(timed) if timed else None,
    }


def _sentences(
    groups: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    target: float | None,
    wall_seconds: float | None,
) -> list[str]:
    """One sentence a fact; the first is the headline."""
    if not groups:
        return ["No agent was judged in reality."]
    if target is None:
        of = "No target was set; the best mean return in reality of"
        return [f"{of} {g['name']} was {page.number(g['best'])}." for g in groups]
    lines: list[str] = []
    for group in groups:
        name, several = group["name"], group["runs"] > 1
        reached = group["median"] is not None
        steps = page.count(group["median"] if reached else group["more_than"])
        if group["kind"] == "model-free":
            runs = f" ({group['reached']} of {group['runs']} runs reached it)" if several else ""
            did = "needed" if reached else "had not reached it when it was stopped after"
            lines.append(f"{name} {did} {steps} real steps{_times(group)}{runs}.")
        elif reached:
            seeds = f" (median of {group['runs']} runs)" if several else ""
            reach = f"{name} reached the target of {target:g}"
            lines.append(f"{reach} after {steps} real steps{seeds}.")
        else:
            reach = f"{name} did not reach the target of {target:g} within {steps} real steps"
            lines.append(f"{reach}; its best mean return was {page.number(group['best'])}.")
    ours = wall_seconds if best is None or best["seconds"] is None else best["seconds"]
    timed = [g for g in groups if g["kind"] == "model-free" and g["seconds"] is not None]
    if ours is not None and timed:
        quickest = min(timed, key=lambda group: group["seconds"])
        line = f"Wall time: {page.seconds(ours)} with the world, "
        line += f"{page.seconds(quickest['seconds'])} for {quickest['name']}"
        if quickest["seconds"] < ours and quickest["median"] is not None:
            cheap = "where real steps are this quick and cheap"
            line += f": {cheap}, model-free training is the faster way"
        lines.append(f"{line}.")
    return [line[0].upper() + line[1:] for line in lines]


def _times(group: Mapping[str, Any]) -> str:
    ratio = group["ratio"]
    if ratio is None:
        return ""
    times = f"{ratio:.1f} times" if ratio < 100 else f"{ratio:.0f} times"
    if not group["ratio_is_bound"]:
        fewer = f", fewer than the world's agent ({times} as many)"
        return f", {times} as many" if ratio >= 1 else fewer
    if ratio >= 1:
        return f", at least {times} as many"
    return f", which is fewer than the world's agent spent ({times}): no comparison can be made"


def trajectories(
    title: str, names: Sequence[str], episodes: Sequence[SideBySide]
) -> dict[str, Any]:
    """Episodes of `names` [d] as JSON: the DIMENSIONS that move most, and the first STEPS."""
    spread = [e.reality.std(0) if len(e.reality) else np.zeros(len(names)) for e in episodes]
    order = np.argsort(-np.max(spread, axis=0), kind="stable").tolist() if episodes else []
    columns = sorted(order[:DIMENSIONS])

    def rows(values: NDArray[np.float64]) -> list[list[float]]:
        return [[float(f"{v:.6g}") for v in row] for row in values[:STEPS, columns].tolist()]

    return {
        "title": title,
        "names": [names[column] for column in columns],
        "episodes": [
            {"title": e.title, "reality": rows(e.reality), "imagined": [*map(rows, e.imagined)]}
            for e in episodes
        ],
    }


def curves_table(summary: Mapping[str, Any]) -> Table:
    """A table of the return in reality by real steps, of the world's agent and of model-free
    training.
    """
    head = ("", "real steps", "return in reality", "90% interval", "wall so far")
    table = Table(*head, box=None, header_style="dim", pad_edge=False)
    rows = [("in the world", p) for c in summary["curves"]["world"] for p in c["points"]]
    for curve in summary["curves"]["model_free"]:
        points = curve["points"]
        if len(points) > 5:
            points = [points[round(i * (len(points) - 1) / 4)] for i in range(5)]
        rows += [(curve["name"], p | {"interval": ""}) for p in points]
    for name, p in rows:
        span = page.span(p["interval"]) if p["interval"] != "" else ""
        steps, mean = page.count(p["real_steps"]), page.number(p["mean"])
        table.add_row(name, steps, mean, span, page.seconds(p["wall_seconds"]))
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
