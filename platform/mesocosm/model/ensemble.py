"""The ensemble family: K probabilistic MLPs on (o, a, task), as PETS (Chua et al. 2018, arXiv
1805.12114), without history.

The change of each number (or its residual over the base) is one logistic, integrated over its bin;
each category has its own logits. Slots are independent given (o, a, task), except that a text is
padded after its end. The last hidden units are tanh, so that scales and means stay bounded when an
imagined state leaves the data. The slots of a table share their weights (`tables`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density, rng
from mesocosm.model.config import ModelConfig
from mesocosm.model.ladder import BASE_WIDTH, ensemble_dims
from mesocosm.model.layers import Constant, Linear, PartsEmbedding, read
from mesocosm.model.net import BaseOut, Features, WorldNet, spread
from mesocosm.model.spec import Spec
from mesocosm.model.tables import TableMixer, TableOutputs
from mesocosm.model.tensors import Outcome, Parts, Transition
from mesocosm.model.texts import text_ended


class Ensemble(WorldNet):
    """K probabilistic MLPs; see the module."""

    def __init__(self, spec: Spec, config: ModelConfig, *, features: int = 0):
        """`features`: of `context`, which a table's network reads (`sequence.TableSequence`)."""
        super().__init__(spec, config, features=features)
        rung, o, members = ensemble_dims(config.size), spec.observation, config.members
        hidden, width = rung.hidden, rung.width
        self.numbers = o.numbers + int(spec.durations)
        self.most = max(o.categories, default=0)
        total = sum(o.categories)
        parts = o, spec.action, spec.task
        if o.table is None:
            self.embed = PartsEmbedding(*parts, width=hidden, members=members)
        else:
            of_history: Any = {"context": features, "context_width": features / BASE_WIDTH}
            self.mixer = TableMixer(
                *parts, hidden=hidden, width=width, members=members, **of_history
            )
        self.hidden = nn.ModuleList(
            Linear(hidden, hidden, "hidden", members=members, width=width, bias=True, gain=1.4)
            for _ in range(rung.layers - 1)
        )
        if o.table is None:
            outputs = 2 * self.numbers + total
            self.last = Linear(
                hidden, outputs, "output", members=members, width=width, bias=True, gain=0.1
            )
        else:
            sizes: Any = {"hidden": hidden, "members": members, "width": width}
            self.outputs = TableOutputs(o, int(spec.durations), **sizes)
        self.bins = Constant(torch.tensor(o.bins + (spec.duration_bin,) * spec.durations))
        # All logits are concatenated; `columns` spreads them over [m, most]. The column after the
        # last means "no such category".
        columns = torch.full((len(o.categories), self.most), total, dtype=torch.int64)
        for slot, cardinality in enumerate(o.categories):
            columns[slot, :cardinality] = sum(o.categories[:slot]) + torch.arange(cardinality)
        for text in o.texts:
            columns[text.start : text.start + text.min_length, 0] = total
        self.columns = Constant(columns)

    def context(self, transition: Transition) -> Features:
        return None

    def _outputs(self, features: Features, transition: Transition) -> tuple[Tensor, Tensor, Tensor]:
        """Each member's means and raw log-scales [K, N, n] and logits [K, N, m, most], float32, of
        the same rows [N], or of its own rows [K, N].
        """
        inputs = read(transition.observation, transition.action, transition.task)
        layers = cast(list[Linear], list(self.hidden))
        if self.spec.observation.table is None:
            x = F.silu(self.embed(inputs), inplace=not torch.is_grad_enabled())
            for layer in layers[:-1]:
                x = F.silu(layer(x))
            y = self.last(torch.tanh(layers[-1](x))).float()
        else:
            rest, slots, common = self.mixer(inputs, features)
            x = torch.cat((rest.expand_as(common).unsqueeze(2), slots), 2)
            for i, layer in enumerate(layers):
                y = layer(x.flatten(1, 2)).view(x.shape)
                y = y + common.unsqueeze(2) if i == 0 else y
                x = F.silu(y) if i + 1 < len(layers) else torch.tanh(y)
            y = self.outputs(x[:, :, 0], x[:, :, 1:])
        mu, raw, logits = y.split([self.numbers, self.numbers, y.shape[-1] - 2 * self.numbers], -1)
        if self.most:
            logits = F.pad(logits, (0, 1), value=-torch.inf)[..., self.columns(logits)]
        return mu, raw, logits

    def log_prob(
        self, features: Features, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> tuple[Tensor, Tensor | None]:
        lead, n = outcome.observation.numbers.shape[:-1], self.spec.observation.numbers
        now, following = transition.observation.flatten(), outcome.observation.flatten()
        flat = None if features is None else features.flatten(0, -2)
        mu, raw, logits = self._outputs(flat, transition.flatten())
        change = following.numbers - now.numbers
        if self.spec.durations:
            change = torch.cat((change, outcome.duration.reshape(-1, 1)), -1)
        shift, scale, widening = base.flat(self.spec.durations)
        bins = self.bins(scale) / scale
        r, width = (change - shift) / scale, raw.exp() * widening + density.FLOOR * bins
        numbers = density.log_mass(r, mu, width, 0.5 * bins).clamp(max=0.0)
        joint = numbers[..., :n].sum(-1)
        if self.most:
            joint = joint + self._categories_log_prob(logits, following.categories).sum(-1)
        duration = numbers[..., n].unflatten(1, lead) if self.spec.durations else None
        return joint.unflatten(1, lead), duration

    def _categories_log_prob(self, logits: Tensor, categories: Tensor) -> Tensor:
        """[K, N, m]: after a text's end only its padding is possible, and certain."""
        log_prob = density.categorical_log_prob(logits, categories)
        for text in self.spec.observation.texts:
            rest = slice(text.start + 1, text.start + text.length)
            padding = torch.where(categories[:, rest] == 0, 0.0, -torch.inf)
            inside = torch.where(text_ended(categories, text), padding, log_prob[..., rest])
            log_prob = torch.cat(
                (log_prob[..., : rest.start], inside, log_prob[..., rest.stop :]), -1
            )
        return log_prob

    def draw(
        self, features: Features, transition: Transition, base: BaseOut, keys: Tensor
    ) -> Outcome:
        o = self.spec.observation
        mu, raw, logits = self._outputs(features, transition)
        shift, scale, widening = base.flat(self.spec.durations)
        width = raw.exp() * widening + density.FLOOR * (self.bins(scale) / scale)
        slots = torch.arange(self.numbers + len(o.categories), device=keys.device)
        u = rng.uniform(keys.unsqueeze(-1), slots + rng.OBSERVATION)
        change = shift + (mu + width * torch.logit(u[..., : self.numbers])) * scale
        categories = keys.new_zeros(*keys.shape, 0)
        if self.most:
            categories = density.categorical(logits, u[..., self.numbers :])
            for text in o.texts:
                span = slice(text.start, text.start + text.length)
                categories[..., span] *= (categories[..., span] != 0).cumprod(-1)
        return self._outcome(transition, change, categories)

    def expected(self, features: Features, transition: Transition, base: BaseOut) -> Outcome:
        mu, _, _ = self._outputs(features, transition)
        shift, scale, _ = base.flat(self.spec.durations)
        categories = torch.zeros_like(transition.observation.categories)
        return self._outcome(transition, shift + mu * scale, categories)

    def _outcome(self, transition: Transition, change: Tensor, categories: Tensor) -> Outcome:
        n, now = self.spec.observation.numbers, transition.observation.numbers
        duration = change[..., n] if self.spec.durations else change.new_zeros(change.shape[:-1])
        return Outcome(Parts(now + change[..., :n], categories), duration)

    def disagreement(
        self, features: Features, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> Tensor:
        flat = None if features is None else features.flatten(0, -2)
        mu, _, logits = self._outputs(flat, transition.flatten())
        return self._spread(mu, logits, base).view(transition.observation.numbers.shape[:-1])

    def _spread(self, mu: Tensor, logits: Tensor, base: BaseOut) -> Tensor:
        shift, scale, _ = base.flat(self.spec.durations)
        numbers = (mu + shift / scale)[..., : self.spec.observation.numbers]
        return spread(numbers, F.softmax(logits, -1) if self.most else None)
