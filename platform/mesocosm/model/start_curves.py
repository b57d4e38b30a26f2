"""Finds which numbers of a start determine others: sparse polynomials and ellipses, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_TERMS = 10
"""Terms of a polynomial, at most."""
PRODUCTS = 32
"""The most numbers with which polynomials have products of two numbers. With more they have only
squares.
"""
POLYNOMIALS = 128
"""The most numbers with which there are polynomials."""
EXACT, USEFUL, ON_ELLIPSE = 0.02, 0.5, 0.05
"""Largest residuals of a polynomial that counts as exact, of one that is of use, and of an ellipse,
in standard deviations of the number."""
PARTNERS = 4
"""Earlier numbers, or partners on an ellipse, that are tried, at most."""
FEW = 8
"""Fewest starts in which a dependence can be found."""


@dataclass
class StartCurve:
    """A polynomial of other numbers, or an ellipse with one other, that determines a number."""

    error: float = math.inf  # root mean square residual, standard deviations
    terms: list[tuple[int, int]] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=lambda: [0.0])  # the first is the constant
    partner: int = -1
    ellipse: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def others(self) -> set[int]:
        return {index for term in self.terms for index in term} | {self.partner}


def order_of(z: Tensor, half: Tensor) -> tuple[list[int], dict[int, StartCurve]]:
    """The order in which numbers are drawn, and the curves of those that others determine: the
    number that the others determine best is drawn last, and so on.
    """
    n = z.shape[1]
    moving = [j for j in range(n) if float(z[:, j].std(correction=0)) > float(2 * half[j])]
    still = [j for j in range(n) if j not in moving]
    curves: dict[int, StartCurve] = {}
    if len(z) < FEW or n > POLYNOMIALS:
        return still + moving, curves
    last: list[int] = []
    products = _products(z)
    polynomials: dict[int, StartCurve] = {}
    while len(moving) > 1:
        for j in moving:
            if j not in polynomials:
                others = [i for i in moving if i != j]
                polynomials[j] = _polynomial(z[:, j], *products, [*others, n], float(half[j]))
        j, curve = min(((j, polynomials[j]) for j in moving), key=lambda pair: pair[1].error)
        if curve.error > EXACT:
            ellipses = [(j, _ellipse(z, j, [i for i in moving if i != j])) for j in moving]
            i, round_one = min(ellipses, key=lambda pair: pair[1].error)
            if round_one.error < min(curve.error, ON_ELLIPSE):
                j, curve = i, round_one
        if curve.error > USEFUL:
            break
        curves[j] = curve
        last.insert(0, j)
        moving.remove(j)
        polynomials = {i: c for i, c in polynomials.items() if i != j and j not in c.others}
    return still + moving + last, curves


def _products(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns z_p z_q [N, F] and their p and q [F], where z_n = 1."""
    n = z.shape[1]
    p, q = torch.triu_indices(n, n) if n <= PRODUCTS else torch.arange(n).expand(2, -1)
    p, q = torch.cat((torch.arange(n), p)), torch.cat((torch.full((n,), n), q))
    with_one = torch.cat((z, torch.ones_like(z[:, :1])), 1)
    return with_one[:, p] * with_one[:, q], p, q


def _polynomial(
    y: Tensor, columns: Tensor, p: Tensor, q: Tensor, others: list[int], floor: float
) -> StartCurve:
    """Forward selection of terms by generalized cross-validation and a price for each choice."""
    usable = torch.zeros(int(q.max()) + 1, dtype=torch.bool)
    usable[others] = True
    chosen_from = (usable[p] & usable[q]).nonzero().flatten()
    x, n = columns[:, chosen_from], len(y)
    # Prefer the linear one of terms that fit equally well (a number with two values and its
    # square): the square's coefficient would multiply the errors of earlier numbers.
    preference = torch.where(q[chosen_from] == q.max(), 1.0, 1 - 1e-6).to(y.dtype)
    ones = torch.ones(n, 1, dtype=y.dtype)
    left = x - x.mean(0)
    size = left.norm(dim=0)
    residual, best, worse = y - y.mean(), StartCurve(), 0
    chosen: list[int] = []
    lowest = n * math.log(float(residual.square().mean() + floor**2) ** 0.5 / (1 - 1 / n))
    while len(chosen) < min(MAX_TERMS, n - 5) and worse < 3:
        if float(residual.square().mean()) ** 0.5 <= floor:
            break
        lengths = left.norm(dim=0)
        match = preference * (residual @ left).abs() / lengths.clamp(min=1e-300)
        match[lengths <= 1e-6 * size.clamp(min=1e-6)] = 0
        t = int(match.argmax())
        if match[t] == 0:
            break
        chosen.append(t)
        direction = left[:, t] / lengths[t]
        left = left - direction[:, None] * (direction @ left)
        design = torch.cat((ones, x[:, chosen]), 1)
        values = torch.linalg.lstsq(design, y[:, None], driver="gelsd").solution[:, 0]
        residual = y - design @ values
        error = float(residual.square().mean()) ** 0.5
        score = n * math.log((error**2 + floor**2) ** 0.5 / (1 - (len(chosen) + 1) / n))
        score += len(chosen) * math.log(x.shape[1])
        worse += 1
        if score < lowest - 1:
            columns_chosen = [int(chosen_from[c]) for c in chosen]
            terms = [(int(p[c]), int(q[c])) for c in columns_chosen]
            lowest, worse, best = score, 0, StartCurve(error, terms, values.tolist())
    return best


def _ellipse(z: Tensor, j: int, others: list[int]) -> StartCurve:
    """The best y = y0 +- sqrt(a + b x + c x^2), by least squares of y^2 on (1, y, x, x^2)."""
    y = z[:, j]
    squares = z[:, others].square()
    centred = squares - squares.mean(0)
    match = ((y * y - 1) @ centred) / centred.norm(dim=0).clamp(min=1e-300)
    best = StartCurve()
    for i in match.argsort()[:PARTNERS].tolist():
        x = z[:, others[i]]
        design = torch.stack((torch.ones_like(x), y, x, x * x), 1)
        if torch.linalg.cond(design) > 1e4:
            continue
        values = torch.linalg.lstsq(design, (y * y)[:, None]).solution[:, 0].tolist()
        y0 = values[1] / 2
        ellipse = (values[0] + y0 * y0, values[2], values[3])
        inside = ellipse[0] + ellipse[1] * x + ellipse[2] * x * x
        error = float((y - y0).abs().sub(inside.clamp(min=0).sqrt()).square().mean()) ** 0.5
        if error < best.error:
            best = StartCurve(error, [], [y0], others[i], ellipse)
    return best
