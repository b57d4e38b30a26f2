"""An evaluation's own sections of the page: verdicts first, then values of policies, errors away
from the data, generated starts.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from mesocosm.evaluate.report import suite_figures
from mesocosm.evaluate.report.page import (
    UNDEFINED,
    count,
    figure,
    number,
    ratio,
    section,
    share,
    span,
    table,
    text,
)

ANSWERS = {"yes": "yes", "partly": "partly", "no": "no", "unknown": "not known"}


def percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.0%}"


def _notes(found: Mapping[str, Any]) -> str:
    return "".join(
        f"<p class='why'>{html.escape(note[0].upper() + note[1:])}</p>" for note in found["notes"]
    )


def verdicts(summary: Mapping[str, Any]) -> str:
    rows = [
        [text(v["question"]), f"<strong>{ANSWERS[v['answer']]}</strong>", text(v["text"])]
        for v in summary["suite"]["verdicts"]
    ]
    answers = table(["", "", ""], rows, texts=3)
    return (
        section("May the last round's world be trusted?", answers)
        if summary["wall"]["stages"]
        else answers
    )


def values(summary: Mapping[str, Any]) -> str:
    found = summary["suite"].get("policy_value")
    if found is None:
        return ""
    ranked = found["ranking"]
    why = (
        "Each policy played the same real episodes, metered, and imagined ones that begin where the"
        " world itself begins them; none of the data of those that are counted trained the world."
        " On the dashed line the world is right. Intervals are 90% bootstrap: over episodes in the"
        " plot, over policies in the table."
    )
    head = [
        "policies",
        "Pearson",
        "interval",
        "Spearman",
        "in the top half",
        "rank violation",
        "regret@1",
        "mean error",
        "bias",
    ]
    cells = [
        [
            count(ranked["policies"]),
            share(ranked["pearson"]),
            span(ranked["pearson_interval"], share),
            share(ranked["spearman"]),
            share(ranked["spearman_top"]),
            number(ranked["mmrv"]),
            percent(ranked["regret"]),
            number(ranked["error"]),
            number(ranked["bias"]),
        ]
    ]
    body = f"{figure(suite_figures.values(found))}<p class='why'>{why}</p>{table(head, cells)}"
    success = any(row["success"] is not None for row in found["policies"])
    rows = [
        [
            text(row["name"]) + ("" if row["held_out"] else " (not counted)"),
            number(row["real"]["mean"]),
            span(row["real"]["interval"]),
            number(row["world"]["mean"]),
            span(row["world"]["interval"]),
            number(row["gap"]),
            *(
                [
                    (
                        UNDEFINED
                        if row["success"] is None
                        else (
                            f"{percent(row['success']['real'])} /"
                            f" {percent(row['success']['world'])}"
                        )
                    )
                ]
                if success
                else []
            ),
        ]
        for row in sorted(found["policies"], key=lambda row: -row["real"]["mean"])
    ]
    head = [
        "policy",
        "reality",
        "90% interval",
        "world",
        "90% interval",
        "world - reality",
        *(["success, reality / world"] if success else []),
    ]
    spent = f"<p class='why'>This took {count(found['real_steps'])} real steps.</p>"
    return section(
        "Policy values", body + table(head, rows) + spent + _notes(ranked) + _notes(found)
    )


def off_policy(summary: Mapping[str, Any]) -> str:
    found = summary["suite"].get("off_policy")
    if found is None:
        return ""
    why = (
        "The judged episodes, played from their logged states. Distance is the mean negative log"
        " density of the actions under a clone of the logs' behaviour (the held-out logs"
        f" themselves: {number(found['logs'], 2)} nats). An error is large where a tenth of the"
        " held-out transitions have larger ones; the dashed line is that tenth. AUROC: does the"
        " members' disagreement tell large errors from the others. Under logs of random actions"
        " every action is as likely, so that the distance says little: look at the errors."
    )
    horizons = [
        line["horizon"]
        for line in summary["open_loop"][-1]["table"]["rows"]
        if line["horizon"] != "full"
    ]
    rows = [
        [
            text(row["name"]),
            number(row["divergence"], 2),
            count(row["transitions"]),
            *(
                ratio(
                    next(
                        (
                            r["ratio"]
                            for r in row["fidelity"]["open_loop"]["rows"]
                            if r["horizon"] == h
                        ),
                        None,
                    )
                )
                for h in horizons
            ),
            percent(
                next(
                    (
                        r["coverage"]
                        for r in row["fidelity"]["open_loop"]["rows"]
                        if r["horizon"] == horizons[0]
                    ),
                    None,
                )
                if horizons
                else None
            ),
            share(row["fidelity"]["one_step"]["auc"]),
            percent(row["large"]),
            number(row["disagreement"], 2),
            f"{share(row['auroc'])} ({span(row['auroc_interval'], share)})",
        ]
        for row in found["behaviours"]
    ]
    told = ["intervals hold", "termination AUC", "large errors", "disagreement", "AUROC"]
    head = [
        "behaviour",
        "distance",
        "transitions",
        *(html.escape(f"{h} ahead") for h in horizons),
        *told,
    ]
    pooled = (
        f"<p class='why'>All together: AUROC {share(found['auroc'])}"
        f" ({span(found['auroc_interval'], share)}).</p>"
    )
    body = (
        f"{figure(suite_figures.off_policy(found))}<p"
        f" class='why'>{why}</p>{table(head, rows)}{pooled}"
    )
    return section("Away from the data", body + _notes(found))


def starts(summary: Mapping[str, Any]) -> str:
    suite, last = summary["suite"], summary["open_loop"][-1]["table"]
    found, ends = suite["starts"], suite["time_to_end"]
    drawn = suite_figures.calibration(last)
    nominal = f"{last['nominal']:.0%}"
    body = ""
    if drawn:
        why = (
            f"Share of true numbers between the lowest and the highest of {last['samples']} sampled"
            f" rollouts: {nominal} where the world is calibrated."
        )
        body += section("Calibration", figure(drawn) + f"<p class='why'>{why}</p>")
    cells = [
        [
            count(ends["episodes"]),
            number(ends["ahead"]),
            number(ends["bias"], 2),
            number(ends["error"], 2),
            span(ends["error_interval"], lambda v: number(v, 2)),
            percent(ends["missed"]),
        ]
    ]
    head = [
        "episodes that end",
        "from steps before",
        "late by (mean, at most 1)",
        "error (mean)",
        "90% interval",
        "goes on after",
    ]
    why = (
        "<p class='why'>Logged actions played up to a logged terminal: when the world ends the"
        " episode, in steps.</p>"
    )
    body += section(
        "Time to termination",
        why
        + table(head, cells)
        + (f"<p class='why'>{html.escape(ends['note'])}</p>" if ends["note"] else ""),
    )
    cells = [
        [
            f"{count(found['generated'])} / {count(found['real'])}",
            percent(found["validity"]),
            percent(found["coverage"]),
            f"{share(found['auc'])} ({span(found['auc_interval'], share)})",
            number(found["nearest"], 3),
            number(found["nearest_real"], 3),
            percent(found["copies"]),
        ]
    ]
    head = [
        "generated / real",
        "valid",
        "coverage",
        "AUC",
        "to nearest training start",
        "the same, of real ones",
        "copies",
    ]
    why = (
        "<p class='why'>Starts and tasks that the world draws, against held-out real ones, both"
        " rounded to the data's precision. AUC: a gradient-boosted classifier, cross-validated; 0.5"
        " cannot tell them apart. A start much nearer to a training start than real ones are would"
        " be a memory.</p>"
    )
    return body + section("Starts and tasks", why + table(head, cells) + _notes(found))
