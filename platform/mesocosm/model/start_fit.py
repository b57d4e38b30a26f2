"""The structure of the start model's numbers and categories. It is chosen by the likelihood of each
logged start given the others, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mesocosm.model import density
from mesocosm.model.spec import TextSpan
from mesocosm.model.start_curves import FEW, MAX_TERMS, PARTNERS, order_of

BANDWIDTHS = (0.05, 0.2, 0.8)
MISMATCHES = (1.0, 3.0, 8.0)
EPSILONS = (1e-4, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Uniform shares of a category. A slot of a text has the first, and so has a single start: texts
are hardly ever logged twice, and by the likelihood of one given the others all would be noise."""
NATS = 3.0
"""Nats, over all starts, that a dependence or another form must gain to be believed."""


@dataclass
class StartNumbers:
    """How n numbers are drawn, from N logged starts, all standardised.

    The centres of number j are sum_t coefficients[j, t] z_p z_q + signs[:, j] g_j + residuals[:, j]
    with (p, q) = terms[j, t], where z_n = 1; g_j is 0, or the root of (1, z, z^2) @ ellipse[j] with
    z the number partner[j].
    """

    order: Tensor  # [n] int64
    terms: Tensor  # [n, T, 2] int64
    coefficients: Tensor  # [n, T]
    partner: Tensor  # [n] int64, -1 without an ellipse
    ellipse: Tensor  # [n, 3]
    signs: Tensor  # [N, n]
    residuals: Tensor  # [N, n]
    width: Tensor  # [n]: half the width of the uniform
    spread: Tensor  # [n]: scale of the logistic that smooths it
    near: Tensor  # [n, n]: log weight lost at a distance of 1 in another number, times 2
    mismatch: Tensor  # [n]: log weight lost at a different category

    @staticmethod
    def names() -> list[str]:
        return [field.name for field in fields(StartNumbers)]

    def tensors(self) -> dict[str, Tensor]:
        """All fields, float32 or int64."""
        values = {name: getattr(self, name) for name in self.names()}
        return {k: v.float() if v.is_floating_point() else v for k, v in values.items()}

    @staticmethod
    def blank(starts: int, n: int) -> StartNumbers:
        """Zeros, float64; no ellipse."""
        terms = MAX_TERMS + 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        constant = torch.full((n, terms, 2), n)
        return StartNumbers(
            torch.arange(n), constant, zeros(n, terms), torch.full((n,), -1), zeros(n, 3),
            zeros(starts, n), zeros(starts, n), zeros(n), zeros(n), zeros(n, n), zeros(n),
        )  # fmt: skip

    @staticmethod
    def normal(n: int) -> StartNumbers:
        """n independent, about normal numbers."""
        numbers = StartNumbers.blank(1, n)
        _, spread, width = _normal(torch.zeros(()), torch.ones(()))
        numbers.spread += spread
        numbers.width += width
        return numbers

    def centres(self, j: int, z: Tensor) -> Tensor:
        """[B, N]: the anchors of number j, given the earlier numbers of z [B, n]."""
        with_one = torch.cat((z, torch.ones_like(z[:, :1])), 1)
        p, q = self.terms[j].unbind(1)
        curve = (with_one[:, p] * with_one[:, q]) @ self.coefficients[j]
        root = self.root(j, z)
        return curve.unsqueeze(1) + self.residuals[:, j] + self.signs[:, j] * root.unsqueeze(1)

    def root(self, j: int, z: Tensor) -> Tensor:
        """[B]: the root g_j of each start."""
        x, (a, b, c) = z[:, int(self.partner[j])], self.ellipse[j]
        return (a + b * x + c * x * x).clamp(min=0).sqrt()


def fit_numbers(z: Tensor, half: Tensor, categories: Tensor) -> StartNumbers:
    """Find the structure of numbers z [N, n], standardised, with half bins [n], float64, given
    categories [N, m].
    """
    starts, n = z.shape
    order, curves = order_of(z, half)
    result = StartNumbers.blank(starts, n)
    result.order = torch.tensor(order, dtype=torch.int64)
    for j, curve in curves.items():
        for t, (p, q) in enumerate([(n, n), *curve.terms]):
            result.terms[j, t] = torch.tensor((p, q))
        values = torch.tensor(curve.coefficients, dtype=z.dtype)
        result.coefficients[j, : len(values)] = values
        result.partner[j] = curve.partner
        result.ellipse[j] = torch.tensor(curve.ellipse)
        if curve.partner >= 0:
            result.signs[:, j] = torch.where(z[:, j] > curve.coefficients[0], 1.0, -1.0)
    different = (categories[:, None] != categories[None]).sum(-1).double()
    slots = [
        _Slot(result, j, z, half[j], order[:k], different if categories.shape[1] else None)
        for k, j in enumerate(order)
    ]
    uniform = _share_of_uniforms([slot for slot in slots if "uniform" in slot.forms])
    for slot in slots:
        slot.choose(uniform)
    return result


# The density of one number.


def _uniform(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(centre, spread, half width) of a uniform by its extremes: half a mean gap lies beyond."""
    gap = (high - low) / (count - 1)
    return (low + high) / 2, gap / 4, (high - low + gap) / 2


def _normal(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of a uniform of half width pi s and a logistic of scale s, both of variance
    pi^2 s^2 / 3, has a normal's kurtosis: -2 (pi s)^4 / 15 + 2 (pi s)^4 / 15 = 0.
    """
    spread = deviation * (math.sqrt(1.5) / math.pi)
    return mean, spread, math.pi * spread


class _Slot:
    """One number while its density is chosen."""

    def __init__(
        self,
        result: StartNumbers,
        j: int,
        z: Tensor,
        half: Tensor,
        earlier: list[int],
        different: Tensor | None,
    ):
        self.result, self.j, self.z, self.half = result, j, z, half
        self.different = different
        self.starts = len(z)
        at_zero = result.centres(j, z)  # [N, N] for each start and sign; residuals are still 0
        apart = z[:, j, None] - at_zero
        self.residual = apart.diagonal().clone()  # a view would hold all of `apart` until `choose`
        self.root = int(result.partner[j]) >= 0
        self.forms: dict[str, tuple[float, Any]] = {}
        still = float(self.residual.std(correction=0)) <= float(2 * half)
        if (still and not self.root) or self.starts < 3:
            return
        if not self.root:
            self._add_forms()
        self._add_anchors(apart, earlier)

    def _mass(self, x: Tensor, form: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        centre, spread, width = form
        spread, width = spread + self.half / 4, torch.maximum(width, self.half)
        return density.smooth_uniform(x, centre, spread, width, self.half)

    def _add_forms(self) -> None:
        """Fit a uniform and a normal. A form's score is the likelihood of each start given the
        other starts.
        """
        r, n = self.residual, self.starts
        ranked = r.sort().values
        low = torch.where(r == ranked[0], ranked[1], ranked[0])
        high = torch.where(r == ranked[-1], ranked[-2], ranked[-1])
        left_out = self._mass(r, _uniform(low, high, n - 1)).sum()
        self.forms["uniform"] = float(left_out), _uniform(ranked[0], ranked[-1], n)
        mean = (r.sum() - r) / (n - 1)
        variance = (r.square().sum() - r.square()) / (n - 1) - mean.square()
        inflated = (n - 1) / max(n - 2, 1) * (1 + 1 / (n - 1))  # of the predictive distribution
        deviation = (variance.clamp(min=0) * inflated).sqrt()
        left_out = self._mass(r, _normal(mean, deviation)).sum()
        deviation = r.std() * math.sqrt(1 + 1 / n)
        self.forms["normal"] = float(left_out), _normal(r.mean(), deviation)

    def _add_anchors(self, apart: Tensor, earlier: list[int]) -> None:
        """Add the form with an anchor at each start's residual. The anchors' weights depend on
        those earlier slots that raise the likelihood most.

        Args:
            apart: [N, N]: the residual of start i's number if its root had the sign of start k.
            earlier: The numbers that are drawn before this one.
        """
        n, deviation = self.starts, self.residual.std()
        centres = apart - self.residual  # [N, N]: of start i by the anchor of start k
        masses: dict[float, Tensor] = {}

        def gain(weights: Tensor, spread: float) -> float:
            if spread not in masses:
                form = (torch.zeros(()), torch.tensor(spread).double(), self.half)
                masses[spread] = self._mass(centres, form)
            return float(torch.logsumexp(weights + masses[spread], 1).sum())

        weights = torch.zeros(n, n, dtype=self.z.dtype).fill_diagonal_(-math.inf)
        grid = [float(deviation) * 10.0 ** (k / 4) for k in range(-10, 1)]
        equal = torch.log_softmax(weights, 1)
        best, spread = max((gain(equal, spread), spread) for spread in grid)
        near, mismatch = torch.zeros(self.z.shape[1], dtype=self.z.dtype), 0.0
        self.forms["anchors"] = best, (spread, near, mismatch)
        spreads = [spread, spread / 3, spread / 10]
        candidates = self._related(earlier)
        threshold = max(score for score, _ in self.forms.values())
        while n >= FEW:
            options = []
            for other in candidates:
                for width in BANDWIDTHS if not near[other] else ():
                    distance = (self.z[:, other, None] - self.z[:, other]) / width
                    options.append((weights - 0.5 * distance.square(), other, width**-2))
            if self.different is not None and not mismatch:
                options += [(weights - c * self.different, -1, c) for c in MISMATCHES]
            tried = [
                (gain(torch.log_softmax(option[0], 1), spread), spread, k)
                for k, option in enumerate(options)
                for spread in spreads
            ]
            if not tried:
                break
            score, spread, k = max(tried)
            if score < threshold + NATS + math.log(len(tried)):
                break
            weights, other, value = options[k]
            threshold, near = score, near.clone()
            if other < 0:
                mismatch = value
            else:
                near[other] = value
            self.forms["related"] = score, (spread, near, mismatch)

    def _related(self, earlier: list[int]) -> list[int]:
        """Earlier numbers whose value or square goes with the residual's, at most PARTNERS."""
        r = self.residual
        strength = torch.zeros(len(earlier))
        x = self.z[:, earlier]
        for a in (x, x.square()):
            for b in (r, r.square(), self.result.signs[:, self.j]):
                a, b = a - a.mean(0), b - b.mean()
                size = a.norm(dim=0) * b.norm()
                strength = torch.maximum(strength, (b @ a).abs() / size.clamp(min=1e-12))
        some = strength.argsort(descending=True)[:PARTNERS].tolist()
        return [earlier[k] for k in some if strength[k] > 2 * len(r) ** -0.5]

    def choose(self, uniforms: float) -> None:
        """Write the best form into the result. `uniforms` is the share of uniforms that the
        numbers have together.
        """
        result, j, scores = self.result, self.j, {}
        prices = {"uniform": -math.log(uniforms), "normal": -math.log1p(-uniforms)}
        for name, (score, _) in self.forms.items():
            others = NATS + math.log(self.starts)
            scores[name] = score - prices.get(name, 0.0 if self.root else others)
        name = max(scores, key=lambda name: scores[name], default="still")
        if name in ("anchors", "related"):
            spread, near, mismatch = self.forms[name][1]
            result.residuals[:, j] = self.residual
            result.near[j], result.mismatch[j] = near, mismatch
            result.spread[j], result.width[j] = spread + self.half / 4, self.half
            return
        r = self.residual
        form = (r.mean(), torch.zeros(()), (r.max() - r.min()) / 2)
        if name != "still":
            form = self.forms[name][1]
        result.residuals[:, j] = form[0]
        result.spread[j] = form[1] + self.half / 4
        result.width[j] = torch.maximum(form[2], self.half)


def _share_of_uniforms(slots: Sequence[_Slot]) -> float:
    """The share of numbers that are uniform rather than normal, estimated from all of them
    (empirical Bayes). The numbers of one environment mostly have starts of the same kind.
    """
    odds = [slot.forms["uniform"][0] - slot.forms["normal"][0] for slot in slots]
    share = 0.5
    for _ in range(20):
        prior = math.log(share / (1 - share))
        likely = [1 / (1 + math.exp(-max(min(odd + prior, 50.0), -50.0))) for odd in odds]
        share = (sum(likely) + 0.5) / (len(odds) + 1)
    return share


# Categories.


def fit_categories(
    categories: Tensor, sizes: Sequence[int], texts: Sequence[TextSpan] = ()
) -> tuple[Tensor, Tensor]:
    """(epsilon [m], mismatch [m]), float32, of categories [N, m]: by the likelihood of each start's
    category or text given the other starts and its earlier categories.

    Inside a text, all the logged starts that differ in the previous character have together at most
    exp(-MISMATCHES[-1]) of the weight of one that does not differ.
    """
    starts, m = categories.shape
    epsilon, mismatch = torch.full((m,), EPSILONS[0]), torch.zeros(m)
    inside = MISMATCHES[-1] + math.log(starts)
    lengths = {text.start: text.length for text in texts}
    different = torch.zeros(starts, starts, dtype=torch.float64)
    itself = torch.eye(starts, dtype=torch.bool)
    j = 0
    while j < m and starts > 1:
        end = j + lengths.get(j, 1)
        unequal = [categories[:, k, None] != categories[:, k] for k in range(j, end)]
        scores = []
        for price in (0.0, *MISMATCHES) if j else (0.0,):
            weights = (-price * different).masked_fill(itself, -math.inf)
            p = []  # of each slot's category
            for k in range(j, end):
                if k > j:
                    weights = weights - inside * unequal[k - 1 - j]
                p.append((torch.softmax(weights, 1) * ~unequal[k - j]).sum(1))
                if k > j:
                    p[-1][categories[:, k - 1] == 0] = 1.0  # the text has ended
            for share in EPSILONS[:1] if j in lengths else EPSILONS:
                score = torch.log(torch.stack(p) * (1 - share) + share / sizes[j]).sum()
                scores.append((float(score) - (NATS if price else 0.0), share, price))
        _, epsilon[j:end], mismatch[j] = max(scores)
        mismatch[j + 1 : end] = inside
        different += sum(unequal)
        j = end
    return epsilon, mismatch
