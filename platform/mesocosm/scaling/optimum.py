"""The least predicted loss that a budget buys: model size, transitions seen, and new ones of them.
Imports neither torch nor Ray.

    minimise L(N, D, U)
    subject to compute_price C(N, D) + step_price max(0, U - owned) <= money and U <= D

U are different real transitions, of which `owned` exist already and cost nothing. A law without
repeats (`chinchilla`) does not predict D > U, so that D = U there. With FLOPs as the budget, real
steps are free, or cannot be bought beyond `owned`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from mesocosm.errors import UsageError
from mesocosm.scaling.forms import FORMS, Array, Cells
from mesocosm.scaling.law import Flops, Law, theta_of

SIZES, LOGITS = (3.0, 40.0), (-30.0, 30.0)
"""Default bounds of log N, and of log(share / (1 - share)) for a share of the money."""
POINTS, KEEP, ZOOMS = 41, 2, 9
"""A grid of POINTS points is narrowed ZOOMS times to KEEP cells around its best point. log N and
the share's logit end within 1e-7 of the optimum.
"""


@dataclass(frozen=True)
class PlanBudget:
    """Money, or FLOPs where `compute_price` is 1 and `step_price` None."""

    money: float
    compute_price: float  # of a FLOP
    step_price: float | None  # of a real transition. None: none can be bought
    owned: float  # different transitions that exist already
    unlimited: bool = False  # new transitions are free: U = D
    most: float = math.exp(40)  # parameters of a model


@dataclass(frozen=True)
class PlanPoint:
    """A model size with the data it sees, as `PlanProblem.buy` gives for (params, share)."""

    params: float
    data: float
    unique: float
    loss: float
    flops: float
    compute: float  # money for compute
    reality: float  # money for real steps
    share: float  # of the money that goes to real steps

    @property
    def epochs(self) -> float:
        return self.data / self.unique


@dataclass(frozen=True)
class PlanProblem:
    """A budget and the parameters of one law."""

    form: str
    theta: Array
    """[P]."""
    flops: Flops
    budget: PlanBudget

    @staticmethod
    def of(law: Law, budget: PlanBudget) -> PlanProblem:
        return PlanProblem(law.form, theta_of(law.form, law.params)[0], law.flops, budget)

    @staticmethod
    def resampled(law: Law, budget: PlanBudget, most: int = 200) -> list[PlanProblem]:
        """The same problem for the law's resamples, at most `most` of them, evenly chosen."""
        every = theta_of(law.form, law.bootstrap.draws)
        chosen = np.unique(np.linspace(0, len(every) - 1, min(most, len(every))).astype(int))
        return [
            PlanProblem(law.form, theta, law.flops, budget)
            for theta in every[chosen]
            if np.isfinite(theta).all() and theta[3] > 0 and theta[4] > 0
        ]

    def counted(self, params: float, each: float) -> PlanProblem:
        """The problem for the size `params`, with `each` FLOPs for a transition, whatever D is."""
        flops = Flops(source="table", k=each / params, p=1.0, q=1.0, max_rel_residual=0.0)
        return replace(self, flops=flops)

    def buy(self, log_n: Array, share: Array) -> tuple[Array, Array]:
        """(D, U), each [n], at size exp(log_n) with `share` of the money for real steps."""
        b = self.budget
        compute = b.money * (1 - share) / b.compute_price
        with np.errstate(over="ignore", divide="ignore"):
            data = np.exp((np.log(compute) - self.flops.log_each(log_n)) / self.flops.q)
        if b.unlimited:
            return data, data
        bought = np.zeros_like(data) if b.step_price is None else b.money * share / b.step_price
        unique = np.minimum(b.owned + bought, data)
        return (data if self.form == "data_constrained" else unique), unique

    def loss(self, log_n: Array, share: Array) -> Array:
        """The loss, of arrays of one shape. Infinite where no transition is bought."""
        shape, log_n, share = log_n.shape, log_n.reshape(-1), share.reshape(-1)
        data, unique = self.buy(log_n, share)
        cells = Cells(log_n, np.log(np.maximum(data, 1e-9)), np.log(np.maximum(unique, 1e-9)))
        log_loss = FORMS[self.form].log_loss(self.theta[None], cells)[0]
        return np.where(unique >= 1, np.exp(log_loss), np.inf).reshape(shape)

    @property
    def has_choice(self) -> bool:
        """True if money can go to compute or to reality."""
        return self.budget.step_price is not None and not self.budget.unlimited

    def best(self, share: float | None = None) -> PlanPoint:
        """The point of least loss, at one share of the money for real steps or at the best share.

        The best size is searched for each share, then the best share. The valley of good (size,
        share) bends, with a crease where U = D, along which a joint search or a gradient would stop
        short.

        Raises:
            UsageError: nothing is bought, or the search ends at its bounds.
        """
        shares = np.array([0.0 if share is None else share])
        if share is None and self.has_choice:
            shares = self._candidates(lambda t: self._sized(expit(t[0]))[1][None])
        sizes, losses = self._sized(shares)
        i = int(np.argmin(losses))
        point = self.point(math.exp(float(sizes[i])), float(shares[i]))
        if not SIZES[0] + 0.01 <= sizes[i] <= SIZES[1] - 0.01:
            message = f"the budget {self.budget.money:g} has its least loss at the search's end,"
            raise UsageError(f"{message} {point.params:.3g} parameters; correct it")
        return point

    def at_size(self, params: float) -> PlanPoint:
        """The best point of one size. Raises UsageError where the budget buys no transition."""
        share = 0.0
        if self.has_choice:
            log_n = math.log(params)
            shares = self._candidates(lambda t: self.loss(np.full_like(t, log_n), expit(t)))
            share = float(shares[np.argmin(self.loss(np.full(2, log_n), shares))])
        return self.point(params, share)

    def point(self, params: float, share: float) -> PlanPoint:
        """The purchase at one size and share. Raises UsageError where the budget buys nothing."""
        b, log_n, shares = self.budget, np.array([math.log(params)]), np.array([share])
        data, unique = (float(x[0]) for x in self.buy(log_n, shares))
        loss = float(self.loss(log_n, shares)[0])
        if not math.isfinite(loss):
            message = f"the budget {b.money:g} buys less than one transition with {share:.3g} of it"
            raise UsageError(f"{message} for real steps; raise it, or lower the prices")
        flops = math.exp(float(self.flops.log_each(log_n)[0])) * data**self.flops.q
        reality = 0.0
        if b.step_price is not None:
            reality = max(0.0, unique - b.owned) * b.step_price
        compute = flops * b.compute_price
        return PlanPoint(params, data, unique, loss, flops, compute, reality, share)

    def more(self, at: PlanPoint, compute: float = 0.0, reality: float = 0.0) -> float:
        """The least loss over N with more money for compute and real steps than `at` spends."""
        b = self.budget
        new = (at.reality + reality) / b.step_price if b.step_price else 0.0
        money, owned = at.compute + compute, b.owned + new
        fixed = replace(self, budget=replace(b, money=money, step_price=None, owned=owned))
        return float(fixed._sized(np.zeros(1))[1][0])

    def _sized(self, shares: Array) -> tuple[Array, Array]:
        """The best log N at each share [S], and its loss [S]."""
        edges = SIZES[0], min(SIZES[1], math.log(self.budget.most))
        low, high = (np.full(len(shares), edge) for edge in edges)
        return _narrowed(
            lambda n: self.loss(n, np.broadcast_to(shares[:, None], n.shape)), low, high
        )

    def _candidates(self, loss: Callable[[Array], Array]) -> Array:
        """The shares 0 and the best one by `loss` of logits [1, POINTS]."""
        low, high = (np.array([edge]) for edge in LOGITS)
        return np.array([0.0, float(expit(_narrowed(loss, low, high)[0][0]))])


def beyond(law: Law, point: PlanPoint) -> dict[str, float]:
    """How many times the point's values are the largest fitted ones, or (below 1) the least.

    Values within the fitted range are left out.
    """
    factors = {}
    for name in ("params", "data", "unique", "flops"):
        value = getattr(point, name)
        low, high = law.range.get(name, (0.0, math.inf))
        if value > high * (1 + 1e-9):
            factors[name] = value / high
        elif value < low * (1 - 1e-9):
            factors[name] = value / low
    return factors


def _narrowed(loss: Callable[[Array], Array], low: Array, high: Array) -> tuple[Array, Array]:
    """The minimiser of each row of `loss` ([S, POINTS] -> [S, POINTS]) between low and high [S],
    and its least value.
    """
    rows = np.arange(len(low))
    for _ in range(ZOOMS):
        at = np.linspace(low, high, POINTS, axis=1)
        values = loss(at)
        i = values.argmin(1)
        low, high = at[rows, np.maximum(i - KEEP, 0)], at[rows, np.minimum(i + KEEP, POINTS - 1)]
    return at[rows, i], values[rows, i]
