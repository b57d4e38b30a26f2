"""The start model p(task, o_0), which all families share. It is fitted to the logged starts
(usually a few dozen) and frozen before pretraining.

The slots are drawn one after another: categories, then numbers. A number x_j is drawn as

    x_j = f_j(earlier numbers) +- g_j(an earlier number) + e

where f_j is a sparse polynomial of degree 2, g_j closes an ellipse (the sine of an angle whose
cosine is known), and e has a smoothed uniform density around an anchor, or around the anchors of
all logged starts. Weights of anchors depend on the earlier slots that matter. `StartModel.fit`
takes the structure that predicts each logged start best from the others. All densities have a wide
component, so that nats are finite.

A category is that of a logged start, or uniform. The characters of a text follow the logged texts
that begin as it does, so that whole logged texts are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density, rng
from mesocosm.model.layers import Constant
from mesocosm.model.spec import PartSpec, Spec, TextSpan
from mesocosm.model.start_fit import StartNumbers, fit_categories, fit_numbers
from mesocosm.model.tensors import Parts
from mesocosm.model.texts import Allowed

ANCHORS = 512
"""Logged starts to fit to, at most."""
WIDE = 1e-4
"""Weight of a number's wide component, whose scale is 1 in normalised units."""
UNIFORMS = 3
"""Uniforms a slot."""
PER_START = ("logged", "logged_categories", "number_signs", "number_residuals")
"""The buffers with a row for each logged start."""


class StartModel(nn.Module):
    """All state is in buffers. Before `fit`, numbers are normal and categories uniform."""

    logged: Tensor  # [N, n] float32: numbers of logged starts, standardised by `mean` and `scale`
    logged_categories: Tensor  # [N, m] int64
    epsilon: Tensor  # [m] float32: the share of a category slot that is uniform
    category_mismatch: Tensor
    """[m] float32: what each different earlier category takes from an anchor's log weight; inside a
    text, what a different previous character takes"""
    mean: Tensor  # [n] float32, of the logged starts
    scale: Tensor  # [n] float32, of the logged starts, at least the bin

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        task, o = spec.task, spec.observation
        first = len(task.categories)
        texts = tuple(TextSpan(t.start + first, t.length, t.min_length) for t in o.texts)
        numbers, categories = task.numbers + o.numbers, task.categories + o.categories
        self.part = PartSpec(numbers, task.bins + o.bins, categories, task.texts + texts)
        self.bins = Constant(torch.tensor(self.part.bins))
        self.allowed = Allowed(self.part)
        m = len(categories)
        self.register_buffer("logged", torch.zeros(1, numbers))
        self.register_buffer("logged_categories", torch.zeros(1, m, dtype=torch.int64))
        self.register_buffer("epsilon", torch.ones(m))
        self.register_buffer("category_mismatch", torch.zeros(m))
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("scale", torch.ones(numbers))
        self._set(StartNumbers.normal(numbers))

    def _set(self, numbers: StartNumbers) -> None:
        for name, value in numbers.tensors().items():
            self.register_buffer(f"number_{name}", value)

    @property
    def numbers(self) -> StartNumbers:
        """The structure of the numbers."""
        return StartNumbers(
            **{name: getattr(self, f"number_{name}") for name in StartNumbers.names()}
        )

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Give the buffers the number of logged starts that `state` has."""
        for name in PER_START:
            buffer, stored = getattr(self, name), state.get(prefix + name)
            if stored is not None and stored.dim():
                setattr(self, name, buffer.new_empty(len(stored), *buffer.shape[1:]))
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[arg-type]

    @torch.no_grad()
    def fit(self, task: Parts, observation: Parts) -> StartModel:
        """Fit to the starts [N, ...] on the CPU and return self. Memory and time grow with N^2. The
        same input gives the same bits.
        """
        numbers, categories = _join(task, observation)
        if not len(numbers):
            return self
        x, self.logged_categories = numbers.cpu().double(), categories.cpu()
        bins = self.bins(x).double()
        mean = x.mean(0)
        scale = torch.maximum((x - mean).square().mean(0).sqrt(), bins)
        z, half = (x - mean) / scale, 0.5 * bins / scale
        self.epsilon, self.category_mismatch = fit_categories(
            self.logged_categories, self.part.categories, self.part.texts
        )
        self._set(fit_numbers(z, half, self.logged_categories))
        self.logged, self.mean, self.scale = z.float(), mean.float(), scale.float()
        return self

    def log_prob(self, task: Parts, observation: Parts) -> Tensor:
        """[B] float32 <= 0, of the task and o_0 [B, ...] jointly."""
        numbers, categories = _join(task, observation)
        z = (numbers - self.mean) / self.scale
        half = 0.5 * self.bins(z) / self.scale
        total, different = self._start(len(z))
        allowed, weights = self.allowed(categories), different
        for j in range(categories.shape[1]):
            weights = self._category_log_weights(j, weights, different, categories)
            p = self._category(j, weights, allowed[:, j])
            total = total + p.gather(1, categories[:, j, None]).log().squeeze(1)
            different = different + (categories[:, j, None] != self.logged_categories[:, j])
        model = self.numbers
        for j in model.order.tolist():
            centres = model.centres(j, z)
            log_mass = density.smooth_uniform(
                z[:, j, None], centres, model.spread[j], model.width[j], half[j]
            )
            near = torch.logsumexp(self._log_weights(j, z, different) + log_mass, 1)
            wide = density.smooth_uniform(
                z[:, j], z.new_zeros(()), self.scale[j].reciprocal(), half[j], half[j]
            )
            shares = torch.tensor([1 - WIDE, WIDE], device=z.device).log()
            total = total + torch.logaddexp(near + shares[0], wide + shares[1])
        return total

    def draw(self, keys: Tensor) -> tuple[Parts, Parts]:
        """(task, o_0) for each of `keys` [B] int64."""
        n, m = self.part.numbers, len(self.part.categories)
        slots = torch.arange(UNIFORMS * (n + m), device=keys.device) + rng.OBSERVATION
        u = rng.uniform(keys.unsqueeze(1), slots).view(len(keys), n + m, UNIFORMS)
        _, different = self._start(len(keys))
        categories, weights = keys.new_zeros(len(keys), m), different
        for j in range(m):
            weights = self._category_log_weights(j, weights, different, categories)
            p = self._category(j, weights, self.allowed.at(j, categories))
            categories[:, j] = density.categorical(p.log(), u[:, j, 0])
            different = different + (categories[:, j, None] != self.logged_categories[:, j])
        model, z = self.numbers, u.new_zeros(len(keys), n)
        for j in model.order.tolist():
            which, uniform, logistic = u[:, m + j].unbind(1)
            wide = which < WIDE
            which = ((which - WIDE) / (1 - WIDE)).clamp(min=0)
            anchor = density.categorical(self._log_weights(j, z, different), which)
            centre = model.centres(j, z).gather(1, anchor.unsqueeze(1)).squeeze(1)
            noise = model.width[j] * (2 * uniform - 1) + model.spread[j] * torch.logit(logistic)
            far = torch.logit(logistic) / self.scale[j]
            z[:, j] = torch.where(wide, far, centre + noise)
        numbers = torch.addcmul(self.mean, z, self.scale)
        n, m = self.spec.task.numbers, len(self.spec.task.categories)
        return Parts(numbers[:, :n], categories[:, :m]), Parts(numbers[:, n:], categories[:, m:])

    def _start(self, batch: int) -> tuple[Tensor, Tensor]:
        """Log-probability [B] of no slots, and how many categories differ from each logged start's
        [B, N].
        """
        zeros = self.mean.new_zeros(batch, len(self.logged))
        return zeros.sum(1), zeros

    def _category_log_weights(
        self, j: int, before: Tensor, different: Tensor, categories: Tensor
    ) -> Tensor:
        """[B, N]: log weights, up to a constant, of the anchors of category slot j. `before` holds
        those of slot j - 1, `different` how many of the slots before j differ, and `categories`
        [B, m] is read before slot j only.
        """
        price = self.category_mismatch[j]
        if j not in self.allowed.inside_text:
            return -price * different
        return before - price * (categories[:, j - 1, None] != self.logged_categories[:, j - 1])

    def _category(self, j: int, log_weights: Tensor, allowed: Tensor) -> Tensor:
        """[B, C]: probabilities of category slot j by the anchors' `log_weights` [B, N], 0 where
        not `allowed` [C] or [B, C].
        """
        weights = torch.softmax(log_weights, 1)
        copies = weights @ F.one_hot(self.logged_categories[:, j], allowed.shape[-1]).float()
        mixed = torch.lerp(copies, 1 / allowed.sum(-1, keepdim=True), self.epsilon[j]) * allowed
        return mixed / mixed.sum(1, keepdim=True)

    def _log_weights(self, j: int, z: Tensor, different: Tensor) -> Tensor:
        """[B, N]: log weights of the anchors of number j."""
        model = self.numbers
        weights = -model.mismatch[j] * different
        for other in model.near[j].nonzero().flatten().tolist():
            apart = z[:, other, None] - self.logged[:, other]
            weights = weights - 0.5 * model.near[j, other] * apart.square()
        return torch.log_softmax(weights, 1)


def _join(task: Parts, observation: Parts) -> tuple[Tensor, Tensor]:
    """Numbers [N, n] float32 and categories [N, m] of both."""
    numbers = torch.cat((task.numbers, observation.numbers), -1).float()
    return numbers, torch.cat((task.categories, observation.categories), -1)
