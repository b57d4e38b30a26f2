"""Densities of numbers: mixtures of logistics, integrated over one bin, as in PixelCNN++ (Salimans
et al. 2017, arXiv 1701.05517), in float32.

With a = (x - w/2 - mu) / s and b = (x + w/2 - mu) / s, the mass of a logistic (mu, s) in the bin of
width w around x is sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(-w / s)), exactly: a
product of factors below 1, so that its log never cancels and never exceeds 0, however far the tail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PARAMS = 3
"""Parameters of a component: logit, mu, raw log-scale."""
FLOOR = 1 / 16
"""Least scale, in bins: a logistic this narrow already has 0.9993 of its mass in its own bin."""


class Mixture(NamedTuple):
    """A mixture of M logistics for each of [...] numbers: float32 [..., M], and half the bin
    [..., 1].
    """

    logits: Tensor
    mu: Tensor
    scale: Tensor
    half: Tensor


def mixture(params: Tensor, bin: Tensor, widening: Tensor | None = None) -> Mixture:
    """Make the density from a network's output [..., 3 M], and bins and factors (by default 1) that
    broadcast with [...]: scale = widening * exp(raw) + FLOOR * bin.
    """
    logits, mu, raw = params.float().chunk(PARAMS, -1)
    bin, scale = bin.unsqueeze(-1), raw.exp()
    if widening is not None:
        scale = scale * widening.unsqueeze(-1)
    return Mixture(logits, mu, scale + FLOOR * bin, 0.5 * bin)


def log_mass(x: Tensor, mu: Tensor, scale: Tensor, half: Tensor) -> Tensor:
    """Log of the mass of one logistic within `half` of `x`; all broadcast."""
    rate = scale.reciprocal()
    centre, half = (x - mu) * rate, half * rate
    tails = F.logsigmoid(centre + half) + F.logsigmoid(half - centre)
    return tails + torch.log(-torch.expm1(-2.0 * half))


def log_prob(m: Mixture, x: Tensor) -> Tensor:
    """Log of the mass of the bin around `x` [...]: float32 [...], <= 0."""
    mass = log_mass(x.float().unsqueeze(-1), m.mu, m.scale, m.half)
    return torch.logsumexp(F.log_softmax(m.logits, -1) + mass, -1).clamp(max=0.0)


def smooth_uniform(x: Tensor, mu: Tensor, scale: Tensor, width: Tensor, half: Tensor) -> Tensor:
    """Log of the mass within `half` of `x` of a uniform of half width `width` >= `half` around `mu`
    plus a logistic of `scale`, <= 0; all broadcast. The density is taken as constant over the bin;
    at `width` = `half` the mass is a logistic's, exactly.
    """
    return log_mass(x, mu, scale, width) + torch.log(half / width)


def mean(m: Mixture) -> Tensor:
    """The expectation [...] (of the mixture itself: a bin is narrow)."""
    return (F.softmax(m.logits, -1) * m.mu).sum(-1)


def sample(m: Mixture, u: Tensor, quantile: Tensor) -> Tensor:
    """A draw [...]: the uniform `u` chooses the component, `quantile` is the logit of a second
    uniform. Both uniforms are strictly between 0 and 1.
    """
    component = categorical(m.logits, u).unsqueeze(-1)
    mu, scale = (values.gather(-1, component).squeeze(-1) for values in (m.mu, m.scale))
    return mu + scale * quantile


def categorical(logits: Tensor, u: Tensor) -> Tensor:
    """int64 [...]: the category at quantile `u` [...] of `logits` [..., C]; one of zero probability
    is never drawn.
    """
    mass = F.softmax(logits.float(), -1).cumsum(-1)
    # u * mass[-1] < mass[-1] for every u of `rng.uniform`, so the count below stays under C and
    # skips empty categories.
    return (mass <= u.unsqueeze(-1) * mass[..., -1:]).sum(-1)


def categorical_log_prob(logits: Tensor, categories: Tensor) -> Tensor:
    """[K, ...]: each member's log-probability, by `logits` [K, ..., C], of `categories` [...]."""
    index = categories.expand(len(logits), *categories.shape).unsqueeze(-1)
    return F.log_softmax(logits, -1).gather(-1, index).squeeze(-1)
