"""The least predicted loss that a budget buys: how large a model, how much it sees, how much of
that is new. Imports neither torch nor Ray.

    minimise L(N, D, U)   where   compute_price C(N, D) + step_price max(0, U - owned) <= money,  U <= D

U are different real transitions, of which `owned` are there already and cost nothing. A law without
repeats (`chinchilla`) says nothing of D > U, so that there D = U. With FLOPs as the budget, real
steps cost nothing, or cannot be had beyond `owned`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from mesocosm.errors import UsageError
from mesocosm.scaling.forms import FORMS, Array, Cells
from mesocosm.scaling.law import Flops, Law, theta_of

SIZES = (3.0, 40.0)
"""Of log N, where nothing bounds it: 20 parameters to 2e17."""
LOGITS = (-30.0, 30.0)
"""Of a share of the money: log(share / (1 - share))."""
POINTS, KEEP, ZOOMS = 41, 2, 9
"""A grid of so many points is narrowed to so many cells about its best, so often: log N and the
share's logit end within 1e-7 of the optimum.
"""


@dataclass(frozen=True)
class Budget:
    """Money, or FLOPs where `compute_price` is 1 and `step_price` None."""

    money: float
    compute_price: float
    """Money for a FLOP."""
    step_price: float | None
    """Money for a real transition; None: none can be bought."""
    owned: float
    """Different transitions that are there already."""
    unlimited: bool = False
    """New transitions cost nothing: U = D."""
    most: float = math.exp(40)
    """Parameters that a model may have."""


@dataclass(frozen=True)
class Point:
    """What to train, on what. Equal to what `buy` gives for (params, share)."""

    params: float
    data: float
    unique: float
    loss: float
    flops: float
    compute: float
    """Money."""
    reality: float
    share: float
    """Of the money, that goes to real steps."""

    @property
    def epochs(self) -> float:
        return self.data / self.unique


class Problem:
    """One law's parameters (theta [P] of its form) and a budget."""

    def __init__(self, form: str, theta: Array, flops: Flops, budget: Budget):
        self.form, self.theta, self.flops, self.budget = form, theta, flops, budget
        self.repeats = form == "data_constrained"

    def buy(self, log_n: Array, share: Array) -> tuple[Array, Array]:
        """(D, U), each [n], that `share` of the money for real steps and the rest for compute buy
        at size exp(log_n).
        """
        b = self.budget
        compute = b.money * (1 - share) / b.compute_price
        with np.errstate(over="ignore", divide="ignore"):
            data = np.exp((np.log(compute) - self.flops.log_each(log_n)) / self.flops.q)
        if b.unlimited:
            return data, data
        bought = np.zeros_like(data) if b.step_price is None else b.money * share / b.step_price
        unique = np.minimum(b.owned + bought, data)
        return (data if self.repeats else unique), unique

    def loss(self, log_n: Array, share: Array) -> Array:
        """Of arrays of one shape; infinite where no transition is bought."""
        shape = log_n.shape
        log_n, share = log_n.reshape(-1), share.reshape(-1)
        data, unique = self.buy(log_n, share)
        cells = Cells(log_n, np.log(np.maximum(data, 1e-9)), np.log(np.maximum(unique, 1e-9)))
        found = FORMS[self.form].log_loss(self.theta[None], cells)[0]
        return np.where(unique >= 1, np.exp(found), np.inf).reshape(shape)

    @property
    def sizes(self) -> tuple[float, float]:
        """Bounds of log N."""
        return SIZES[0], min(SIZES[1], math.log(self.budget.most))

    @property
    def free(self) -> bool:
        """Whether there is a choice between compute and reality."""
        return self.budget.step_price is not None and not self.budget.unlimited

    def best(self, share: float | None = None) -> Point:
        """The least loss, at that share of the money for real steps or, with None, at the best one.
        Raises UsageError where nothing is bought.

        For each share the best size is sought, then the best share: the valley of good (size,
        share) bends, and has a crease where U = D, along which a search in both at once, or a
        gradient, would stop short.
        """
        if share is not None or not self.free:
            parts = np.array([0.0 if share is None else share])
        else:
            found, _ = _narrowed(
                lambda t: self._sized(expit(t[0]))[1][None],
                np.array([LOGITS[0]]),
                np.array([LOGITS[1]]),
            )
            parts = np.array([0.0, float(expit(found[0]))])
        sizes, losses = self._sized(parts)
        i = int(np.argmin(losses))
        made = self.point(math.exp(float(sizes[i])), float(parts[i]))
        if sizes[i] < SIZES[0] + 0.01 or sizes[i] > SIZES[1] - 0.01:
            raise UsageError(
                f"the loss is least at {made.params:.3g} parameters, where the search ends: no such"
                f" budget as {self.budget.money:g} can be meant"
            )
        return made

    def _sized(self, shares: Array) -> tuple[Array, Array]:
        """The best log N at each share [S], and its loss [S]."""
        low, high = (np.full(len(shares), edge) for edge in self.sizes)
        return _narrowed(
            lambda n: self.loss(n, np.broadcast_to(shares[:, None], n.shape)), low, high
        )

    def point(self, params: float, share: float) -> Point:
        log_n, part = np.array([math.log(params)]), np.array([share])
        data, unique = (float(x[0]) for x in self.buy(log_n, part))
        loss = float(self.loss(log_n, part)[0])
        if not math.isfinite(loss):
            raise UsageError(
                f"the budget of {self.budget.money:g} buys less than one transition with"
                f" {share:.3g} of it for real steps; raise it, or lower the prices"
            )
        flops = math.exp(float(self.flops.log_each(log_n)[0])) * data**self.flops.q
        reality = (
            0.0
            if self.budget.step_price is None
            else max(0.0, unique - self.budget.owned) * self.budget.step_price
        )
        return Point(
            params, data, unique, loss, flops, flops * self.budget.compute_price, reality, share
        )

    def more(self, at: Point, compute: float = 0.0, reality: float = 0.0) -> float:
        """The least loss, over N, of `at` with so much money more on compute and on real steps, the
        rest spent as it is.
        """
        b = self.budget
        money = at.compute + compute
        new = (at.reality + reality) / b.step_price if b.step_price else 0.0
        once = Problem(
            self.form,
            self.theta,
            self.flops,
            replace(b, money=money, step_price=None, owned=b.owned + new),
        )
        centre, most = math.log(at.params), self.sizes[1]
        nothing = np.zeros(1)
        found = minimize_scalar(
            lambda log_n: float(once.loss(np.array([log_n]), nothing)[0]),
            bounds=(centre - 3, min(centre + 3, most)),
            method="bounded",
            options={"xatol": 1e-7},
        )
        return min(float(found.fun), float(once.loss(np.array([centre]), nothing)[0]))


def problem_of(law: Law, budget: Budget) -> Problem:
    return Problem(law.form, theta_of(law.form, law.params)[0], law.flops, budget)


def drawn(law: Law, budget: Budget, draws: int = 200) -> list[Problem]:
    """The same question of the law's resamples, at most so many, evenly taken."""
    every = theta_of(law.form, law.bootstrap.draws)
    chosen = np.unique(np.linspace(0, len(every) - 1, min(draws, len(every))).astype(int))
    return [
        Problem(law.form, theta, law.flops, budget)
        for theta in every[chosen]
        if np.isfinite(theta).all() and theta[3] > 0 and theta[4] > 0
    ]


def interval(values: Sequence[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(
        np.asarray(values, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2]
    )
    return float(low), float(high)


def beyond(law: Law, point: Point) -> dict[str, float]:
    """How many times the plan's params, data, unique and flops are the largest that were fitted, or
    (below 1) the least; those within are left out.
    """
    found = {}
    here: dict[str, Any] = {
        "params": point.params,
        "data": point.data,
        "unique": point.unique,
        "flops": point.flops,
    }
    for name, value in here.items():
        if name in law.range:
            low, high = law.range[name]
            if value > high * (1 + 1e-9):
                found[name] = value / high
            elif value < low * (1 - 1e-9):
                found[name] = value / low
    return found


def counted(problem: Problem, params: float, each: float) -> Problem:
    """The problem at one size of `params`, a transition of which takes `each` FLOPs: they do not
    depend on D.
    """
    flops = Flops(source="table", k=each / params, p=1.0, q=1.0, max_rel_residual=0.0)
    return Problem(problem.form, problem.theta, flops, problem.budget)


def at_size(problem: Problem, params: float) -> Point:
    """The best point of one size. Raises UsageError where the budget buys it no transition."""
    if not problem.free:
        return problem.point(params, 0.0)
    found, _ = _narrowed(
        lambda t: problem.loss(np.full_like(t, math.log(params)), expit(t)),
        np.array([LOGITS[0]]),
        np.array([LOGITS[1]]),
    )
    parts = np.array([0.0, float(expit(found[0]))])
    return problem.point(
        params, float(parts[np.argmin(problem.loss(np.full(2, math.log(params)), parts))])
    )


def along(problem: Problem, shares: Iterable[float]) -> list[Point]:
    """The best point at each share of the money for real steps; those that buy nothing are left
    out.
    """
    found = []
    for share in shares:
        with suppress(UsageError):
            found.append(problem.best(share))
    return found


def _narrowed(loss: Callable[[Array], Array], low: Array, high: Array) -> tuple[Array, Array]:
    """Where each row of `loss` ([S, POINTS] -> [S, POINTS]) is least between low and high [S], and
    its least value.
    """
    rows = np.arange(len(low))
    for _ in range(ZOOMS):
        at = np.linspace(low, high, POINTS, axis=1)
        values = loss(at)
        i = values.argmin(1)
        low, high = at[rows, np.maximum(i - KEEP, 0)], at[rows, np.minimum(i + KEEP, POINTS - 1)]
    return at[rows, i], values[rows, i]
