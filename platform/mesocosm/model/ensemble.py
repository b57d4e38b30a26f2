"""The ensemble family: K probabilistic MLPs on (o, a, task), as PETS (Chua et al. 2018, arXiv
1805.12114). No history.

Every number's change (or its residual over the base) is a logistic of its own, integrated over its
bin; every category has its own logits. Slots are independent of each other given (o, a, task), but
for a text's end. The last hidden units are tanh, so that scales and means stay bounded when an
imagined state leaves the data.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density, rng
from mesocosm.model.config import ModelConfig
from mesocosm.model.ladder import dims, ensemble_dims
from mesocosm.model.layers import Constant, MemberLinear, PartsEmbedding, flatten, read
from mesocosm.model.net import BaseOut, Draw, Outcome, Transition, WorldNet, spread
from mesocosm.model.spec import Parts, Spec


class Ensemble(WorldNet):
    """See the module. `dims`: its rung of the ladder."""

    def __init__(self, spec: Spec, config: ModelConfig):
        super().__init__(spec, config, hidden=2 * dims(config.size).d_model, features=0)
        rung = self.dims = ensemble_dims(config.size)
        o, members = spec.observation, config.members
        self.numbers = o.numbers + int(spec.durations)
        self.most = max(o.categories, default=0)
        outputs = 2 * self.numbers + sum(o.categories)
        self.embed = PartsEmbedding(o, spec.action, spec.task, width=rung.hidden, members=members)
        self.hidden = nn.ModuleList(
            MemberLinear(
                members, rung.hidden, rung.hidden, "hidden", width=rung.width, bias=True, gain=1.4
            )
            for _ in range(rung.layers - 1)
        )
        self.last = MemberLinear(
            members,
            rung.hidden,
            outputs,
            "output",
            width=rung.width,
            bias=True,
            multiplier=rung.output_multiplier,
            gain=0.1,
        )
        self.bins = Constant(torch.tensor(o.bins + (spec.duration_bin,) * spec.durations))
        # Logits are laid side by side; `columns` spreads them over [m, most], the last column of
        # all standing for "no such category".
        total = sum(o.categories)
        columns = torch.full((len(o.categories), self.most), total, dtype=torch.int64)
        for slot, cardinality in enumerate(o.categories):
            first = sum(o.categories[:slot])
            columns[slot, :cardinality] = torch.arange(first, first + cardinality)
        for text in o.texts:
            columns[text.start : text.start + text.min_length, 0] = total
        self.columns = Constant(columns)

    def context(self, transition: Transition) -> None:
        return None

    def _outputs(self, transition: Transition) -> tuple[Tensor, Tensor, Tensor]:
        """Flat transitions [N] -> each member's means and raw log-scales [K, N, n] and logits [K,
        N, m, most], float32.
        """
        x = F.silu(
            self.embed(read(transition.observation, transition.action, transition.task)),
            inplace=not torch.is_grad_enabled(),
        )
        layers = cast(list[MemberLinear], list(self.hidden))
        for layer in layers[:-1]:
            x = F.silu(layer(x))
        y = self.last(torch.tanh(layers[-1](x))).float()
        mu, raw, logits = y.split([self.numbers, self.numbers, y.shape[-1] - 2 * self.numbers], -1)
        if self.most:
            logits = F.pad(logits, (0, 1), value=-torch.inf)[..., self.columns(logits)]
        return mu, raw, logits

    def _shift_scale(self, base: BaseOut) -> tuple[Tensor, Tensor, Tensor]:
        """What a number's unit is: (shift [K, N, n], scale [n], bin [n] in units of scale); a
        duration's is its own.
        """
        shift, scale = base.change.flatten(1, -2), base.scale
        if self.spec.durations:
            shift, scale = F.pad(shift, (0, 1)), F.pad(scale, (0, 1), value=1.0)
        return shift, scale, self.bins(scale) / scale

    def log_prob(
        self, features: Tensor | None, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> tuple[Tensor, Tensor | None]:
        now = flatten(transition.observation)
        after, lead = flatten(outcome.observation), outcome.observation.numbers.shape[:-1]
        mu, raw, logits = self._outputs(
            Transition(now, flatten(transition.action), flatten(transition.task))
        )
        change = after.numbers - now.numbers
        if self.spec.durations:
            change = torch.cat((change, outcome.duration.reshape(-1, 1)), -1)
        shift, scale, bins = self._shift_scale(base)
        of_numbers = _log_prob(mu, raw.exp() + density.FLOOR * bins, bins, (change - shift) / scale)
        n = self.spec.observation.numbers
        joint = of_numbers[..., :n].sum(-1)
        if self.most:
            joint = joint + self._log_prob_categories(logits, after.categories).sum(-1)
        return joint.unflatten(1, lead), of_numbers[..., n].unflatten(
            1, lead
        ) if self.spec.durations else None

    def _log_prob_categories(self, logits: Tensor, categories: Tensor) -> Tensor:
        """[K, N, m]: after a text's end only its padding is possible, and certain."""
        chosen = (
            F.log_softmax(logits, -1)
            .gather(-1, categories.expand(len(logits), -1, -1).unsqueeze(-1))
            .squeeze(-1)
        )
        for text in self.spec.observation.texts:
            rest = slice(text.start + 1, text.start + text.length)
            ended = (categories[:, text.start : text.start + text.length - 1] == 0).cumsum(1) > 0
            sure = torch.where(categories[:, rest] == 0, 0.0, -torch.inf)
            chosen = torch.cat(
                (
                    chosen[..., : rest.start],
                    torch.where(ended, sure, chosen[..., rest]),
                    chosen[..., rest.stop :],
                ),
                -1,
            )
        return chosen

    def draw(
        self,
        features: Tensor | None,
        transition: Transition,
        base: BaseOut,
        member: Tensor,
        keys: Tensor,
    ) -> Draw:
        mu, raw, logits = self._outputs(transition)
        own = member * len(keys) + torch.arange(
            len(keys), device=keys.device
        )  # rows of [K * N, ...]
        shift, scale, bins = self._shift_scale(base)
        n = self.spec.observation.numbers
        slots = (
            torch.arange(self.numbers + len(self.spec.observation.categories), device=keys.device)
            + rng.OBSERVATION
        )
        u = rng.uniform(keys.unsqueeze(-1), slots)
        widths = raw.exp() + density.FLOOR * bins
        mean, width, origin = (t.flatten(0, 1).index_select(0, own) for t in (mu, widths, shift))
        change = origin + (mean + width * torch.logit(u[:, : self.numbers])) * scale
        categories = torch.zeros(len(keys), 0, dtype=torch.int64, device=keys.device)
        if self.most:
            categories = density.categorical(
                logits.flatten(0, 1).index_select(0, own), u[:, self.numbers :]
            )
            for text in self.spec.observation.texts:
                span = slice(text.start, text.start + text.length)
                alive = (categories[:, span] != 0).cumprod(1)
                categories[:, span] *= alive
        duration = change[:, n] if self.spec.durations else change.new_zeros(len(change))
        return Draw(
            Parts(transition.observation.numbers + change[:, :n], categories),
            duration,
            self._spread(mu, logits, shift, scale),
        )

    def disagreement(
        self, features: Tensor | None, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> Tensor:
        lead = transition.observation.numbers.shape[:-1]
        mu, _, logits = self._outputs(
            Transition(
                flatten(transition.observation),
                flatten(transition.action),
                flatten(transition.task),
            )
        )
        shift, scale, _ = self._shift_scale(base)
        return self._spread(mu, logits, shift, scale).view(lead)

    def _spread(self, mu: Tensor, logits: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        n = self.spec.observation.numbers
        return spread((mu + shift / scale)[..., :n], F.softmax(logits, -1) if self.most else None)


def _log_prob(mu: Tensor, spread: Tensor, bins: Tensor, r: Tensor) -> Tensor:
    """As `density.log_prob`, for one logistic a number: all [K, N, n] but the bins [n]; float32 <=
    0.
    """
    rate = spread.reciprocal()
    centre, half = (r - mu) * rate, 0.5 * bins * rate
    return (
        F.logsigmoid(centre + half)
        + F.logsigmoid(half - centre)
        + torch.log(-torch.expm1(-2.0 * half))
    ).clamp(max=0.0)
