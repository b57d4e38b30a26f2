"""A law and a budget -> the size and data of least loss, and what more money would buy. Imports
neither Ray nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import expit, logit

from mesocosm.errors import UsageError
from mesocosm.model.ladder import LADDERS
from mesocosm.scaling.law import Law, Pair, interval_text, quantiles
from mesocosm.scaling.optimum import PlanBudget, PlanPoint, PlanProblem, beyond
from mesocosm.scaling.plan_config import PlanConfig
from mesocosm.scaling.table import Notes

FAR = 10.0
"""A plan beyond the swept range by this factor, in either direction, is a guess."""
NEAR = 10.0
"""Rungs within this factor of the best N are compared."""
LADDER = 0.01
"""A relative excess of loss over the best size's that is a warning."""
STEP = 1e-3
"""The step of a derivative by money, relative to the smaller of the two spendings."""
AROUND = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Offsets of the share's logit, to both sides of the optimum, in the plot."""
RELEVANT = {"baseline_not_beaten", "e_touches_zero", "approaches_disagree", "wide_interval"}
RELEVANT |= {"few_groups", "no_held_out", "r_d_unmeasured", "r_n_unmeasured", "flops_not_6nd"}
"""Codes of the law's warnings that a plan repeats."""

Counter = Callable[[str], tuple[int, float]]
"""Size -> (params, counted FLOPs of a transition)."""


@dataclass(frozen=True)
class PlanRequest:
    """A budget to spend by a law."""

    config: PlanConfig
    """`data`, `model` and `train` are filled from the law's sweep."""
    law: Law
    source: str
    """The law's file or artifact."""
    budget: PlanBudget
    currency: str
    owned: int
    count: Counter | None
    """None without datasets."""
    notes: Notes
    """Warnings of how the plan's models differ from the law's."""
    batch: float
    """Transitions in a batch. 0 without datasets."""
    sweep_warmup: int | None
    """The sweep's warm-up in steps, where its training is taken."""


def answer(request: PlanRequest) -> dict[str, Any]:
    """The contents of plan.json. None where a figure is undefined.

    Raises:
        UsageError: the budget buys nothing.
    """
    law, budget, level = request.law, request.budget, request.law.interval_level
    problem = PlanProblem.of(law, budget)
    best = problem.best()
    resampled = PlanProblem.resampled(law, budget)
    spread = [other.best() for other in resampled]
    size, chosen = _rung(request, problem, best)
    each = chosen.flops / chosen.data
    losses = [other.counted(chosen.params, each).at_size(chosen.params).loss for other in resampled]
    optimum = asdict(best) | {"epochs": best.epochs}
    optimum["interval"] = {
        name: quantiles([getattr(point, name) for point in spread], level)
        for name in ("params", "data", "unique", "loss", "share")
    }
    plan = {"size": size, **asdict(chosen), "epochs": chosen.epochs}
    plan["interval"] = {"loss": quantiles(losses, level)}
    factors = beyond(law, chosen)
    notes = request.notes | {n.code: n.sentence for n in law.warnings if n.code in RELEVANT}
    notes |= _notes(request, best, size, chosen, factors)
    flops, paid = request.config.flops, budget.step_price is not None
    collect = max(0, round(chosen.unique) - request.owned)
    return {
        "schema": 1,
        "law": request.source,
        "form": law.form,
        "budget": {"flops": flops, "money": request.config.money, "currency": request.currency},
        "prices": {
            "per_step": budget.step_price,
            "per_exaflop": None if flops is not None else budget.compute_price * 1e18,
        },
        "owned": request.owned,
        "optimum": optimum,
        "plan": plan,
        "flops_counted": request.count is not None,
        "collect": collect if paid or budget.unlimited else 0,
        "next": _next(problem, best, resampled, spread, level) if paid else None,
        "shares": _shares(problem, best) if paid else None,
        "beyond": factors,
        "warnings": [{"code": code, "sentence": sentence} for code, sentence in notes.items()],
    }


def _rung(request: PlanRequest, problem: PlanProblem, best: PlanPoint) -> tuple[str, PlanPoint]:
    """The rung of the ladder whose best point has the least loss."""
    ladder = LADDERS[request.config.model.family]
    rungs = {size: ladder[size].params for size in ladder}
    nearest = min(rungs, key=lambda size: abs(math.log(rungs[size] / best.params)))
    points: list[tuple[float, str, PlanPoint]] = []
    for size, params in rungs.items():
        if size != nearest and not best.params / NEAR <= params <= best.params * NEAR:
            continue
        at = problem
        if request.count is not None:
            params, each = request.count(size)
            at = problem.counted(params, each)
        with suppress(UsageError):  # too large for the budget
            point = at.at_size(params)
            points.append((point.loss, size, point))
    if not points:
        text = f"the budget {request.budget.money:g} buys no transition at any rung near the best"
        raise UsageError(f"{text} size, {best.params:.3g} parameters; raise it")
    _, size, point = min(points)
    return size, point


def _notes(
    request: PlanRequest, best: PlanPoint, size: str, chosen: PlanPoint, factors: dict[str, float]
) -> Notes:
    budget, notes = request.budget, Notes()
    names = [
        f"{name} {max(x, 1 / x):.3g} times {'the largest' if x > 1 else 'below the least'}"
        for name, x in factors.items()
    ]
    text = f"beyond the fitted cells: {', '.join(names)}."
    if any(max(x, 1 / x) > FAR for x in factors.values()):
        notes["far"] = f"The plan is a guess, far {text} Sweep nearer to it first."
    elif factors:
        notes["beyond"] = f"The plan is {text}"
    if best.params > 0.99 * budget.most:
        text = "The best size is the ladder's last: compute is nearly free compared with reality"
        notes["ladder_end"] = f"{text}, and larger models would have less loss."
    if budget.step_price is None and not budget.unlimited and best.unique > 0.999 * budget.owned:
        text = f"All {budget.owned:,.0f} owned transitions are used"
        notes["owned_bind"] = f"{text}: collect more to spend the rest of the budget well."
    if request.law.form == "chinchilla" and not budget.unlimited:
        notes["one_epoch"] = (
            "The law was fitted without repeated data: the plan sees each transition once. A sweep"
            " over grid.unique shows what repeats are worth."
        )
    if chosen.loss > best.loss * (1 + LADDER):
        text = f"{size} has {chosen.loss / best.loss - 1:.1%} more predicted loss than"
        notes["ladder"] = f"No rung is near the best size: {text} {best.params:.3g} parameters."
    return notes


def _next(
    problem: PlanProblem,
    best: PlanPoint,
    resampled: list[PlanProblem],
    spread: Sequence[PlanPoint],
    level: float,
) -> dict[str, Any]:
    """The loss that the next unit of money removes, at the optimum and to both sides of it.

    `reality_first` is the share of the law's resamples in which reality is worth more at the
    optimum.
    """
    places = {"at the optimum": best.share}
    if best.reality > 0:
        places = {"half the reality": best.share / 2} | places
        places["half the compute"] = 1 - (1 - best.share) / 2
    rows = []
    for name, share in places.items():
        with suppress(UsageError):
            at = best if share == best.share else problem.best(share)
            rows.append({"at": name, "share": at.share, "loss": at.loss, **rates(problem, at)})
    each = [rates(other, other.point(best.params, best.share)) for other in resampled]
    first = [rate["reality"] > rate["compute"] for rate in each]
    return {
        "rows": rows,
        "reality_first": sum(first) / len(first) if first else None,
        "share_interval": quantiles([point.share for point in spread], level),
    }


def rates(problem: PlanProblem, at: PlanPoint) -> dict[str, float]:
    """Nats that a unit of money takes off the loss at `at`, as compute and as reality.

    Both are equal at an optimum that spends on both.
    """
    little = STEP * min(money for money in (at.compute, at.reality) if money > 0)
    return {
        "compute": (at.loss - problem.more(at, compute=little)) / little,
        "reality": (at.loss - problem.more(at, reality=little)) / little,
    }


def _shares(problem: PlanProblem, best: PlanPoint) -> list[dict[str, float]]:
    """The best point at each share of the money, closer together near the optimum."""
    centre = float(logit(best.share)) if 0 < best.share < 1 else -6.0
    rows = []
    for step in (*(-x for x in reversed(AROUND)), 0.0, *AROUND):
        with suppress(UsageError):  # a share that buys nothing
            point = problem.best(float(expit(centre + step)))
            names = ("share", "loss", "params", "data", "unique")
            rows.append({name: getattr(point, name) for name in names})
    return rows


def lines(answer: dict[str, Any]) -> dict[str, str]:
    """The answer as lines for the terminal, by label."""
    best, plan, pairs = answer["optimum"], answer["plan"], answer["optimum"]["interval"]
    names = ("params", "data", "unique", "loss")
    n, d, u, loss = (value_text(best[name], pairs[name]) for name in names)
    planned = value_text(plan["loss"], plan["interval"]["loss"])
    counted = " counted" if answer["flops_counted"] else ""
    out = {
        "law": f"{answer['law']} ({answer['form']})",
        "optimum": f"N {n}, D {d}, U {u} ({best['epochs']:.3g} epochs), loss {loss}",
        "plan": (
            f"{plan['size']}: N {plan['params']:.4g}, D {plan['data']:.4g}, U {plan['unique']:.4g}"
            f" ({plan['epochs']:.3g} epochs), loss {planned}, {plan['flops']:.3g} FLOPs{counted}"
        ),
    }
    if answer["next"] is not None:
        coin = answer["budget"]["currency"]
        out["spend"] = (
            f"{plan['compute']:.4g} {coin} on compute, {plan['reality']:.4g} {coin} on"
            f" {answer['collect']:,} real transitions beyond the {answer['owned']:,} owned"
        )
        for row in answer["next"]["rows"]:
            out[row["at"]] = (
                f"loss {row['loss']:.4g}; the next {coin} takes off {row['compute']:.3g} of loss as"
                f" compute, {row['reality']:.3g} as reality"
            )
    warnings = enumerate(answer["warnings"], 1)
    return out | {f"warning {i}": warning["sentence"] for i, warning in warnings}


def value_text(value: float, pair: Pair) -> str:
    return f"{value:.4g} ({interval_text(pair)})"
