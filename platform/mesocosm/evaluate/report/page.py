"""`report.html` from a summary: HTML with inline SVG, no script, nothing loaded from elsewhere,
every text escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from mesocosm.evaluate.report import figures

UNDEFINED = "–"


def render(summary: Mapping[str, Any]) -> str:
    """The whole page. Takes the summary as `report.summarise` makes it, or as read back from
    summary.json.
    """
    template = Template(
        files("mesocosm.evaluate.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    target = f" · target return {summary['target']:g}" if summary["target"] is not None else ""
    spent = summary["real_steps"]["total"]["steps"]
    subtitle = (
        f"{summary['environment']}{target} · {count(spent)} real steps in all"
        if spent
        else f"{summary['environment']}{target}"
    )
    sections = [_result, _spent, _judged, _fidelity, _losses, _side_by_side, _wall, _lineage]
    if summary.get("suite") is not None:
        from mesocosm.evaluate.report import suite_page  # which uses the pieces below

        own = [
            suite_page.verdicts,
            suite_page.values,
            suite_page.off_policy,
            _fidelity,
            suite_page.starts,
        ]
        first = (
            [_result, _spent] if summary["wall"]["stages"] else []
        )  # a loop's own question is what it reached
        sections = [*first, *own, *(s for s in sections if s not in (*first, _fidelity))]
    body = "\n".join(part for section in sections if (part := section(summary)))
    return template.substitute(
        title=html.escape(summary["title"]), subtitle=html.escape(subtitle), body=body
    )


def _result(summary: Mapping[str, Any]) -> str:
    curves = [*summary["curves"]["world"], *summary["curves"]["model_free"]]
    if not curves:
        return ""
    said = "".join(f"<p>{html.escape(line)}</p>" for line in summary["verdict"]["text"])
    why = (
        "Every real step went through one ledger. A point stands at all the real steps that the"
        " agent, or the world it learned in, was trained on; the episodes that judged it are apart,"
        " alike for all, and listed below. Bars are 90% bootstrap intervals over judged episodes."
        " An open arrow is a run that was stopped before it reached the target."
    )
    rows = [
        [
            text(group["name"]),
            text(group["kind"]),
            count(group["runs"]),
            f"{group['reached']}",
            (
                count(group["median"])
                if group["median"] is not None
                else f"&gt; {count(group['more_than'])}"
            ),
            _bound(group),
            number(group["best"]),
            seconds(group["seconds"]),
        ]
        for group in summary["verdict"]["groups"]
    ]
    head = [
        "",
        "trained in",
        "runs",
        "reached",
        "real steps to target",
        "against the world's",
        "best return",
        "wall",
    ]
    drawn = figure(figures.returns(summary)) if any(curve["points"] for curve in curves) else ""
    comparison = table(head, rows, texts=2) if summary["target"] is not None else ""
    settings = "".join(
        f"<p class='why'>{html.escape(name)}: {html.escape(said)}</p>"
        for name, said in dict.fromkeys((c["name"], c["settings"]) for c in curves if c["settings"])
    )
    return (
        f'<div class="verdict">{said}</div>\n{drawn}<p class="why">{why}</p>{comparison}{settings}'
    )


def _bound(group: Mapping[str, Any]) -> str:
    if group["ratio"] is None:
        return UNDEFINED
    return f"{'≥ ' if group['ratio_is_bound'] else ''}{group['ratio']:.1f}×"


def _spent(summary: Mapping[str, Any]) -> str:
    spent = summary["real_steps"]
    if not spent["purposes"]:
        return ""
    currency = spent["currency"]

    def row(name: str, entry: Mapping[str, Any]) -> list[str]:
        return [
            text(name),
            count(entry["steps"]),
            count(entry["resets"]),
            seconds(entry["seconds"]),
            price(entry["price"], currency),
            count(entry["unconfirmed"]),
        ]

    rows = [row(entry["purpose"], entry) for entry in spent["purposes"]]
    bound = ""
    if spent["budget"] is not None:
        left = f"; {count(spent['remaining'])} remain" if spent["remaining"] is not None else ""
        bound = (
            f"<p class='why'>The budget for collecting and choosing was {count(spent['budget'])}"
            f" real steps{left}.</p>"
        )
    head = ["purpose", "real steps", "resets", "seconds in reality", "price", "unconfirmed"]
    why = (
        "<p class='why'>Unconfirmed steps were reserved by something that crashed; they count as"
        " spent.</p>"
        if spent["total"]["unconfirmed"]
        else ""
    )
    return section(
        "What reality cost", table(head, rows, last=row("in all", spent["total"])) + bound + why
    )


def _judged(summary: Mapping[str, Any]) -> str:
    rows, notes = [], []
    for curve in [*summary["curves"]["world"], *summary["curves"]["model_free"]]:
        for point in (p for p in curve["points"] if p["returns"]):
            when = UNDEFINED if point["round"] is None else count(point["round"])
            spread = [number(min(point["returns"])), number(max(point["returns"]))]
            rows.append(
                [
                    text(curve["name"]),
                    when,
                    count(point["real_steps"]),
                    number(point["mean"]),
                    span(point["interval"]),
                    *spread,
                    count(len(point["returns"])),
                ]
            )
            if point["note"]:
                notes.append(
                    f"<p class='why'>At {count(point['real_steps'])} real steps:"
                    f" {html.escape(point['note'])}.</p>"
                )
    if not rows:
        return ""
    head = [
        "agent",
        "round",
        "real steps",
        "mean return",
        "90% interval",
        "lowest",
        "highest",
        "episodes",
    ]
    return section("Returns in reality", table(head, rows) + "".join(notes))


def _fidelity(summary: Mapping[str, Any]) -> str:
    entries = summary["open_loop"]
    if not entries:
        return ""
    why = (
        "Logged actions played in the world from logged validation states. Root mean square error"
        " of the numbers, each over its standard deviation in the data, divided by that of"
        " predicting no change; the prediction is the mean of several sampled rollouts, and in its"
        " own column a single one. Typical is the ratio of the median errors: far below the first"
        " where rare events own the mean. Intervals are 90% bootstrap over episodes. The linear"
        " model is a ridge regression, iterated."
    )
    drawn = figures.open_loop(summary)
    body = f"<p class='why'>{why}</p>{figure(drawn) if drawn else ''}"
    horizons = list(
        dict.fromkeys(line["horizon"] for entry in entries for line in entry["table"]["rows"])
    )
    if len(entries) > 1:
        found = [
            {line["horizon"]: ratio(line["ratio"]) for line in entry["table"]["rows"]}
            for entry in entries
        ]
        cells = [
            [
                text("–" if e["round"] is None else e["round"]),
                *(row.get(h, UNDEFINED) for h in horizons),
            ]
            for e, row in zip(entries, found, strict=True)
        ]
        body += table(
            ["round", *(html.escape(f"{h} ahead" if h != "full" else "full") for h in horizons)],
            cells,
        )
    last = entries[-1]
    discrete = any(line["accuracy"] is not None for line in last["table"]["rows"])
    rows = [
        [
            text(line["horizon"]),
            ratio(line["ratio"]),
            span(line["interval"], ratio),
            ratio(line["single"]),
            ratio(line["typical"]),
            ratio(line["linear"]),
            *(_right(line) if discrete else []),
            number(line["persistence"], 3),
            f"{count(line['starts'])} / {count(line['episodes'])}",
        ]
        for line in last["table"]["rows"]
    ]
    named = (
        "steps ahead"
        if last["round"] is None or len(entries) == 1
        else f"ahead, round {last['round']}"
    )
    right = ["categories right", "90% interval", "of no change"] if discrete else []
    head = [
        named,
        "RMSE / no change",
        "90% interval",
        "single rollout",
        "typical",
        "a linear model's",
        *right,
        "RMSE of no change",
        "starts / episodes",
    ]
    body += table(head, rows) + "".join(
        f"<p class='why'>{html.escape(note)}</p>" for note in last["table"]["notes"]
    )
    return section("Open-loop error by horizon", body + _checks(summary))


def _right(line: Mapping[str, Any]) -> list[str]:
    """Cells of a row's categories."""
    if line["accuracy"] is None:
        return [UNDEFINED] * 3
    return [
        f"{line['accuracy']:.1%}",
        span(line["accuracy_interval"], lambda v: f"{v:.1%}"),
        f"{line['persistence_accuracy']:.1%}",
    ]


def _checks(summary: Mapping[str, Any]) -> str:
    if not summary["checks"]:
        return ""

    def with_interval(
        value: float | None, interval: Sequence[float] | None, form: Any = share
    ) -> str:
        return (
            UNDEFINED
            if value is None
            else form(value) + ("" if interval is None else f" ({span(interval, form)})")
        )

    rows = [
        [
            text("–" if c["round"] is None else c["round"]),
            count(c["transitions"]),
            count(c["terminals"]),
            number(c["expected_terminals"]),
            share(c["precision"]),
            with_interval(c["recall"], c["recall_interval"]),
            with_interval(c["auc"], c["auc_interval"]),
            with_interval(
                c["reward_accuracy"], c["reward_accuracy_interval"], lambda v: f"{v:.1%}"
            ),
            with_interval(c["reward_r2"], c["reward_r2_interval"], lambda v: f"{v:.4f}"),
        ]
        for c in summary["checks"]
    ]
    head = [
        "round",
        "transitions",
        "terminal",
        "expected",
        "termination precision",
        "recall",
        "AUC",
        "reward right",
        "reward R²",
    ]
    notes = dict.fromkeys(note for c in summary["checks"] for note in c["notes"])
    return table(head, rows) + "".join(f"<p class='why'>{html.escape(note)}</p>" for note in notes)


def _losses(summary: Mapping[str, Any]) -> str:
    rows = summary["losses"]
    if not rows:
        return ""
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))

    def cell(row: Mapping[str, Any], part: str) -> str:
        pair = (row.get("intervals") or {}).get(part)
        return number(row["parts"].get(part), 4) + (
            "" if pair is None else f" ({span(pair, lambda v: number(v, 3))})"
        )

    cells = [
        [text("–" if row["round"] is None else row["round"]), *(cell(row, part) for part in parts)]
        for row in rows
    ]
    drawn = figures.losses(summary)
    why = (
        "<p class='why'>Validation, of the members' mean likelihood, discretised at the dataset's"
        " precision; intervals are 90% bootstrap over episodes.</p>"
    )
    return section(
        "Losses by part, nats a transition",
        why + (figure(drawn) if drawn else "") + table(["round", *map(html.escape, parts)], cells),
    )


def _side_by_side(summary: Mapping[str, Any]) -> str:
    drawn = [
        (group, figures.trajectories(group, k)) for k, group in enumerate(summary["trajectories"])
    ]
    body = "".join(
        f"<p><strong>{html.escape(group['title'])}</strong></p>{figure(svg)}"
        for group, svg in drawn
        if svg
    )
    why = (
        "<p class='why'>Broad grey: reality. Thin blue: the same agent in the world from the same"
        " first state, a line a sampled rollout, each by one member; a line ends where its episode"
        " does.</p>"
    )
    return section("Reality and imagination, side by side", why + body) if body else ""


def _wall(summary: Mapping[str, Any]) -> str:
    drawn = figures.stages(summary)
    if drawn is None:
        return ""
    total = summary["wall"]["seconds"]
    said = f"<p class='why'>{seconds(total)} in all.</p>" if total is not None else ""
    return section("Wall time by stage", said + figure(drawn))


def _lineage(summary: Mapping[str, Any]) -> str:
    rows = [[text(what), f"<code>{html.escape(name)}</code>"] for what, name in summary["lineage"]]
    body = (table(["what", "where"], rows, texts=2) if rows else "") + "".join(
        f"<p class='why'>{html.escape(note)}</p>" for note in summary["notes"]
    )
    return section("What it was made from", body) if body else ""


# -- pieces
# ------------------------------------------------------------------------------------------------------------


def section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{body}"


def figure(svg: str) -> str:
    return f"<figure>{svg}</figure>\n"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: int = 1,
    last: Sequence[str] | None = None,
) -> str:
    """A table of cells that are already HTML; the first `texts` columns are aligned left."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=' + chr(34) + 'text' + chr(34) if k < texts else ''}>{cell}</{tag}>"
            for k, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    foot = f'<tr class="total">{cells("td", last)}</tr>' if last is not None else ""
    return (
        "<div"
        f' class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}{foot}</tbody></table></div>\n'
    )


def text(value: Any) -> str:
    return html.escape(str(value))


def count(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:,.0f}"


def number(value: float | None, digits: int = 1) -> str:
    return UNDEFINED if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2f}"


def ratio(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def span(pair: Sequence[float] | None, form: Any = number) -> str:
    return UNDEFINED if pair is None else f"{form(pair[0])} to {form(pair[1])}"


def seconds(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    return (
        f"{value:.1f} s"
        if value < 10
        else (
            f"{value:.0f} s"
            if value < 120
            else f"{value / 60:.1f} min"
            if value < 7200
            else f"{value / 3600:.1f} h"
        )
    )


def price(value: float, currency: str) -> str:
    return f"{value:,.2f} {html.escape(currency)}" if value else "0"
