"""`report.html` from a summary: a jinja2 template with inline SVG and no script.

The page loads nothing from elsewhere. Every text is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mesocosm.evaluate.report import figures
from mesocosm.shipped import PAGE_STYLE

UNDEFINED = "–"


def render(summary: Mapping[str, Any]) -> str:
    """The whole page of a summary that `report.summarise` makes, or that summary.json holds."""
    tables = [entry["table"] for entry in summary["open_loop"]]
    horizons = list(dict.fromkeys(row["horizon"] for table in tables for row in table["rows"]))
    drawings = [
        (group["title"], figures.trajectories(group, k))
        for k, group in enumerate(summary["trajectories"])
    ]
    plots: dict[str, Any] = {
        "returns": figures.returns(summary),
        "open_loop": figures.open_loop(summary),
        "losses": figures.losses(summary),
        "stages": figures.stages(summary),
        "trajectories": [(title, svg) for title, svg in drawings if svg],
    }
    suite = summary["suite"]
    if suite is not None:
        plots["calibration"] = figures.calibration(tables[-1])
        if "policy_value" in suite:
            plots["policy_values"] = figures.policy_values(suite["policy_value"])
            plots["off_policy"] = figures.off_policy(suite["off_policy"])
    return PAGES.get_template("report.html").render(
        summary=summary,
        figures=plots,
        horizons=horizons,
        horizon_names=[h if h == "full" else f"{h} ahead" for h in horizons],
        parts=list(dict.fromkeys(part for row in summary["losses"] for part in row["parts"])),
    )


def render_text(summary: Mapping[str, Any]) -> str:
    """The page of a text world's summary."""
    value = summary["policy_value"]
    plots = {"policy_values": figures.policy_values(value) if value else ""}
    return PAGES.get_template("text.html").render(summary=summary, figures=plots)


def at_horizon(table: Mapping[str, Any], horizon: str) -> Mapping[str, Any]:
    """The row of an open-loop table at one horizon."""
    rows = (row for row in table["rows"] if row["horizon"] == horizon)
    return next(rows, {"ratio": None, "coverage": None})


def count(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:,.0f}"


def number(value: float | None, digits: int = 1) -> str:
    return UNDEFINED if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2f}"


def percent(value: float | None, digits: int = 0) -> str:
    return UNDEFINED if value is None else f"{value:.{digits}%}"


def ratio(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def times(value: float | None, is_bound: bool) -> str:
    """A factor; with `is_bound`, its lower bound."""
    return UNDEFINED if value is None else f"{'≥ ' if is_bound else ''}{value:.1f}×"


def span(pair: Sequence[float] | None, form: Callable[..., str] = number, *digits: int) -> str:
    if pair is None:
        return UNDEFINED
    return f"{form(pair[0], *digits)} to {form(pair[1], *digits)}"


def with_span(
    value: float | None, interval: Sequence[float] | None, form: Callable[..., str], *digits: int
) -> str:
    """A figure and, where there is one, its interval in brackets."""
    text = form(value, *digits)
    return text if interval is None else f"{text} ({span(interval, form, *digits)})"


def seconds(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    for limit, unit, name, digits in ((10, 1, "s", 1), (120, 1, "s", 0), (7200, 60, "min", 1)):
        if value < limit:
            return f"{value / unit:.{digits}f} {name}"
    return f"{value / 3600:.1f} h"


def price(value: float, currency: str) -> str:
    """Money: two decimals, or three digits below a hundredth."""
    return f"{money(value)} {currency}" if value else "0"


def money(value: float) -> str:
    """An amount without its currency: two decimals, or three digits below a hundredth."""
    return f"{value:,.2f}" if value == 0 or value >= 0.01 else f"{value:.3g}"


PAGES = Environment(
    loader=PackageLoader("mesocosm.evaluate.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
FORMATS = (count, number, share, percent, ratio, times, span, with_span, seconds, price)
PAGES.globals |= {form.__name__: form for form in (*FORMATS, at_horizon)}
PAGES.globals["style"] = Markup(PAGE_STYLE.read_text())
PAGES.filters["number"] = number
