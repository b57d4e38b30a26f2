"""The figures of an evaluation that its run logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesocosm.evaluate import gain
from mesocosm.evaluate.judge import JudgeResult
from mesocosm.evaluate.metrics.fidelity import Fidelity
from mesocosm.evaluate.metrics.ranking import firm
from mesocosm.runs.tracking import Run

RANKED = ("policies", "pearson", "spearman", "spearman_top", "mmrv", "regret", "error", "bias")
"""Figures of the ranking that are logged."""


def text_figures(measured: Mapping[str, Any]) -> dict[str, float]:
    """The defined figures of a text world's policy values and agent, as far as measured."""
    figures: dict[str, float] = {}
    if measured["policy_value"] is not None:
        ranking = measured["policy_value"]["ranking"]
        figures |= {f"policy_value/{k}": ranking[k] for k in RANKED if ranking[k] is not None}
        figures["policy_value/firm"] = float(firm(ranking["fifths"]))
    if (agent := measured["agent"]) is not None:
        figures |= {"return/mean": agent["real"], "return/imagined": agent["world"]}
        figures |= gain.figures(agent["gain"])
    return figures


def log_figures(
    run: Run, faithful: Fidelity, result: JudgeResult | None, measured: dict[str, Any]
) -> dict[str, float]:
    """Log and return the evaluation's defined figures."""
    values: dict[str, float | None] = {}

    def add(group: str, source: Mapping[str, Any], *names: str, **renamed: str) -> None:
        values.update({f"{group}/{name}": source[name] for name in names})
        values.update({f"{group}/{name}": source[key] for name, key in renamed.items()})

    rows = faithful.open_loop.rows
    add("valid", faithful.losses, *faithful.losses)
    values |= {f"open_loop/{row.horizon}": row.ratio for row in rows}
    values |= {f"coverage/{row.horizon}": row.coverage for row in rows}
    one_step, ends = vars(faithful.one_step), vars(faithful.time_to_end)
    add("termination", one_step, "precision", "recall", "auc")
    add("termination", ends, late="bias", off="error", missed="missed")
    add("reward", one_step, accuracy="reward_accuracy", r2="reward_r2")
    add("starts", measured["starts"], "auc", "validity", "coverage")
    if (images := measured.get("images")) is not None:
        add("images", images, "unigram", "copy_or_unigram")
        for image in images["images"]:
            rows_of = {row["steps"]: row["world"] for row in image["rows"]}
            values |= {f"moving_psnr/{image['name']}/{k}": v for k, v in rows_of.items()}
    parts = measured.get("known", {})
    for part, names in (
        ("reward", ("known", "learned")),
        ("terminated", ("known_recall", "known_precision", "learned_recall", "learned_precision")),
    ):
        if parts.get(part) is not None:
            add(f"known/{part}", parts[part], *names)
    if "policy_value" in measured:
        add("policy_value", measured["policy_value"]["ranking"], *RANKED)
        add("policy_value", measured["policy_value"], "real_steps")
        values["policy_value/firm"] = float(firm(measured["policy_value"]["ranking"]["fifths"]))
        add("off_policy", measured["off_policy"], "auroc")
    agent = measured["agent"]
    if agent is not None:
        add("return", agent, imagined="world")
        values |= gain.figures(agent["gain"])
        if agent["success"] is not None:
            add("success", agent["success"], "real", "world")
    if result is not None:
        values |= {"return/mean": result.mean, "real_steps/judge": float(result.steps)}
        if result.interval is not None:
            values |= {"return/low": result.interval[0], "return/high": result.interval[1]}
    figures = {name: value for name, value in values.items() if value is not None}
    run.log(figures)
    return figures
