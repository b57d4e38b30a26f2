"""The decoder inside a step: an autoregressive transformer over slots of numbers and categories.

Slot i's distribution is conditioned on a context and on the values of slots 0 .. i-1, so that
dimensions that move together are drawn together. K members are evaluated at once; each has its own
parameters, and its own view of the numbers (their residual over its own base), but all see one
sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density, rng
from mesocosm.model.ladder import Dims
from mesocosm.model.layers import Constant, MemberLinear, RMSNorm, first_rows
from mesocosm.model.mup import tag
from mesocosm.model.spec import TextSpan


@dataclass(frozen=True)
class Layout:
    """The slots of a decoder, in their order. Number j is slot `number_slots[j]`; category j is
    slot `category_slots[j]`.
    """

    order: tuple[tuple[str, int], ...]
    """("number" or "category", j) of each slot"""
    bins: tuple[float, ...]
    categories: tuple[int, ...]
    texts: tuple[TextSpan, ...]

    @property
    def number_slots(self) -> list[int]:
        return [i for i, (kind, _) in enumerate(self.order) if kind == "number"]

    @property
    def category_slots(self) -> list[int]:
        return [i for i, (kind, _) in enumerate(self.order) if kind == "category"]


@dataclass(frozen=True)
class Scale:
    """How a decoder sees numbers: member k sees r_k = (x - shift_k) / scale, with bins in the same
    units.
    """

    shift: Tensor
    """[K, N, n] float32"""
    scale: Tensor
    """[n] float32"""


class Block(nn.Module):
    """Causal attention among the slots of a step, then SwiGLU: [K, N, S, d] -> the same."""

    def __init__(self, members: int, dims: Dims):
        super().__init__()
        width, depth, d, ff = dims.dec_width, dims.dec_depth, dims.d_dec, dims.d_ff_dec
        self.heads = dims.dec_heads
        self.norm_1 = RMSNorm(d, m_width=width, m_depth=depth, members=members)
        self.qkv = MemberLinear(members, d, 3 * d, "hidden", width=width, depth=depth)
        self.out = MemberLinear(
            members,
            d,
            d,
            "hidden",
            width=width,
            depth=depth,
            multiplier=dims.dec_residual_multiplier,
        )
        self.norm_2 = RMSNorm(d, m_width=width, m_depth=depth, members=members)
        self.up = MemberLinear(members, d, 2 * ff, "hidden", width=width, depth=depth)
        self.down = MemberLinear(
            members,
            ff,
            d,
            "hidden",
            width=width,
            depth=depth,
            multiplier=dims.dec_residual_multiplier,
        )

    def forward(self, x: Tensor, slots: int) -> Tensor:
        """x: [K, N * S, d], slots innermost."""
        k, rows, d = x.shape
        q, key, v = (
            self.qkv(self.norm_1(x))
            .view(k * rows // slots, slots, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        attended = v if slots == 1 else F.scaled_dot_product_attention(q, key, v, is_causal=True)
        return self._mlp(x + self.out(attended.transpose(1, 2).reshape(k, rows, d)))

    def step(self, x: Tensor, cache: Tensor, slot: int) -> Tensor:
        """x: [K, N, d] at `slot`; `cache` [2, S, K, N, heads, d / heads] holds the slots before,
        and takes this one.
        """
        k, rows, d = x.shape
        q, key, v = self.qkv(self.norm_1(x)).view(k, rows, 3, self.heads, -1).unbind(2)
        if slot == 0:
            attended = v
        if cache.shape[1] > 1:
            cache[0, slot], cache[1, slot] = key, v
        if slot:
            score = (cache[0, : slot + 1] * q).sum(-1, keepdim=True) * (d // self.heads) ** -0.5
            attended = (score.softmax(0) * cache[1, : slot + 1]).sum(0)
        return self._mlp(x + self.out(attended.reshape(k, rows, d)))

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """p(values of all slots | context) for K members. `inputs`: width of the context, 0 for none
    (the start model's).
    """

    def __init__(self, layout: Layout, dims: Dims, *, members: int, components: int, inputs: int):
        super().__init__()
        self.layout = layout
        self.members = members
        self.slots = len(layout.order)
        d, width = dims.d_dec, dims.dec_width
        numbers, cardinalities = len(layout.bins), layout.categories
        self.most = max(cardinalities, default=0)
        self.project = (
            MemberLinear(members, inputs, d, "hidden", width=dims.width) if inputs else None
        )
        self.slot = tag(nn.Parameter(torch.zeros(members, self.slots, d)), "embedding", fan_in=1)
        # A zero-sized parameter is more than a ZeRO engine can partition: what has nothing to hold
        # is None.
        many = self.slots > 1
        self.value = (
            tag(nn.Parameter(torch.zeros(numbers, members, 2, d)), "embedding", fan_in=2)
            if numbers and many
            else None
        )
        self.table = (
            tag(nn.Parameter(torch.zeros(sum(cardinalities), members, d)), "embedding", fan_in=1)
            if cardinalities and many
            else None
        )
        self.blocks = nn.ModuleList(Block(members, dims) for _ in range(dims.dec_layers))
        self.norm = RMSNorm(d, m_width=width, m_depth=1.0, members=members)

        def output(outputs: int) -> MemberLinear:
            return MemberLinear(
                members,
                d,
                outputs,
                "output",
                width=width,
                multiplier=dims.dec_output_multiplier,
                gain=0.1,
            )

        self.density = output(density.PARAMS * components) if numbers else None
        self.logits = output(self.most) if cardinalities else None
        spread = torch.zeros(density.PARAMS, components)
        spread[1] = torch.linspace(-1, 1, components) if components > 1 else 0.0
        self.density_bias = (
            tag(nn.Parameter(spread.flatten().repeat(members, numbers, 1)), "vector")
            if numbers
            else None
        )
        self.logits_bias = (
            tag(nn.Parameter(torch.zeros(members, len(cardinalities), self.most)), "vector")
            if cardinalities
            else None
        )

        self.bins = Constant(torch.tensor(layout.bins))
        self.offsets = Constant(first_rows(cardinalities))
        allowed = torch.arange(self.most) < torch.tensor(
            cardinalities, dtype=torch.int64
        ).unsqueeze(-1)
        for text in layout.texts:
            allowed[text.start : text.start + text.min_length, 0] = False
        self.allowed = Constant(allowed)
        # Of each slot's value among (numbers, categories) laid side by side.
        self.columns = Constant(
            torch.tensor(
                [j if kind == "number" else numbers + j for kind, j in layout.order],
                dtype=torch.int64,
            )
        )
        self.uniforms = Constant(torch.arange(2 * self.slots) + rng.OBSERVATION)
        self.text_of = {text.start + i: text for text in layout.texts for i in range(text.length)}

    # -- all slots at once
    # -----------------------------------------------------------------------------------------------

    def forward(
        self, context: Tensor | None, r: Tensor, numbers: Tensor, categories: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced outputs: (density parameters [K, N, n, 3 M], logits [K, N, m, C]),
        float32.

        context [N, inputs]; r [K, N, n]; numbers [N, n]; categories [N, m].
        """
        k, n, s = self.members, numbers.shape[0], self.slots
        x = self.slot.unsqueeze(1).expand(k, n, s, -1)
        if self.project is not None:
            x = x + self.project(context).unsqueeze(2)
        if s > 1:
            x = x + F.pad(
                self._values(r, numbers, categories)[:, :, self.columns(r)[:-1]], (0, 0, 1, 0)
            )
        x = x.reshape(k, n * s, -1)
        for block in self.blocks:
            x = block(x, s)
        x = self.norm(x).view(k, n, s, -1)
        params, logits = r.new_zeros(k, n, 0, density.PARAMS), r.new_zeros(k, n, 0, 1)
        if self.density is not None and self.density_bias is not None:
            params = (
                self.density(x[:, :, self.layout.number_slots].flatten(1, 2))
                .unflatten(1, (n, -1))
                .float()
                + self.density_bias.unsqueeze(1).float()
            )
        if self.logits is not None and self.logits_bias is not None:
            logits = (
                self.logits(x[:, :, self.layout.category_slots].flatten(1, 2))
                .unflatten(1, (n, -1))
                .float()
                + self.logits_bias.unsqueeze(1).float()
            )
        return params, logits

    def _values(self, r: Tensor, numbers: Tensor, categories: Tensor) -> Tensor:
        """[K, N, n + m, d]: the embeddings of all values, numbers first."""
        values = []
        if self.value is not None:
            values.append(
                torch.einsum(
                    "knsf,skfd->knsd", value_features(r, numbers).to(self.value.dtype), self.value
                )
            )
        if self.table is not None:
            values.append(
                F.embedding(categories + self.offsets(categories), self.table.flatten(1))
                .unflatten(-1, (self.members, -1))
                .permute(2, 0, 1, 3)
            )
        return torch.cat(values, 2)

    def log_prob(
        self,
        context: Tensor | None,
        numbers: Tensor,
        categories: Tensor,
        scale: Scale,
        absolute: Tensor | None = None,
    ) -> Tensor:
        """[K, N, S] float32 <= 0, slots in their order. `numbers` [N, n] in the units of `scale`;
        `absolute`: what later slots read of them beside r_k (None: the same numbers).
        """
        r, m, logits = self._scored(context, numbers, categories, scale, absolute)
        of_numbers = density.log_prob(m, r)
        if self.logits is None:
            return of_numbers
        of_categories = (
            F.log_softmax(logits, -1)
            .gather(-1, categories.expand(self.members, -1, -1).unsqueeze(-1))
            .squeeze(-1)
        )
        return torch.cat((of_numbers, of_categories), -1)[..., self.columns(r)]

    def _scored(
        self,
        context: Tensor | None,
        numbers: Tensor,
        categories: Tensor,
        scale: Scale,
        absolute: Tensor | None,
    ) -> tuple[Tensor, density.Mixture, Tensor]:
        """(r_k [K, N, n], its density, masked logits [K, N, m, C])"""
        r = (numbers - scale.shift) / scale.scale
        params, logits = self(context, r, numbers if absolute is None else absolute, categories)
        if self.logits is not None:
            logits = logits.masked_fill(~self._allowed(categories), -torch.inf)
        return r, density.mixture(params, self.bins(scale.scale) / scale.scale), logits

    def expected(
        self, context: Tensor, numbers: Tensor, categories: Tensor, scale: Scale, absolute: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `log_prob`, each member's expectation: of the numbers in units of `scale` [K, N, n],
        and the categories' probabilities [K, N, m, C].
        """
        _, m, logits = self._scored(context, numbers, categories, scale, absolute)
        return density.mean(m) + scale.shift / scale.scale, (
            None if self.logits is None else F.softmax(logits, -1)
        )

    def _allowed(self, categories: Tensor) -> Tensor:
        """[N, m, C] bool: what each slot may be, given the slots before: after a text's end only
        its padding.
        """
        allowed = self.allowed(categories).expand(categories.shape[0], -1, -1)
        if self.layout.texts:
            allowed = allowed.clone()
            for text in self.layout.texts:
                ended = (categories[:, text.start : text.start + text.length - 1] == 0).cumsum(
                    1
                ) > 0
                rest = slice(text.start + 1, text.start + text.length)
                allowed[:, rest, 1:] &= ~ended.unsqueeze(-1)
                allowed[:, rest, 0] |= ended
        return allowed

    # -- one slot after another
    # ------------------------------------------------------------------------------------------

    def draw(
        self,
        context: Tensor | None,
        scale: Scale,
        member: Tensor,
        keys: Tensor,
        now: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Sample all slots: (numbers [N, n] in the units of `scale`, categories [N, m], and what
        every member expected of each slot, given the sample before it, as `expected` has it). Row i
        draws from `member[i]` with `keys[i]`; later slots read `now` + numbers.
        """
        k, n, s = self.members, len(keys), self.slots
        u = rng.uniform(keys.unsqueeze(-1), self.uniforms(keys)).view(n, s, 2)
        rows = member * n + torch.arange(n, device=u.device)
        quantiles = torch.logit(u[..., 1])
        bins, offsets = self.bins(scale.scale) / scale.scale, self.offsets(u)
        shift = scale.shift.flatten(0, 1).index_select(0, rows)
        x0 = self.slot.unsqueeze(2)
        if self.project is not None:
            x0 = x0 + self.project(context).unsqueeze(1)
        stack = cast(list[Block], list(self.blocks))
        cache = [
            x0.new_empty(2, s, k, n, block.heads, x0.shape[-1] // block.heads) for block in stack
        ]
        numbers, categories = (
            u.new_empty(n, len(self.layout.bins)),
            member.new_empty(n, len(self.layout.categories)),
        )
        params, chances = [], []
        value: Tensor | None = None
        for i, (kind, j) in enumerate(self.layout.order):
            x = x0[:, i].expand(k, n, -1) if value is None else x0[:, i] + value
            for block, c in zip(stack, cache, strict=True):
                x = block.step(x, c, i)
            x = self.norm(x)
            if kind == "number":
                assert self.density is not None and self.density_bias is not None
                params.append(self.density(x).float() + self.density_bias[:, j : j + 1])
                m = density.mixture(params[-1].flatten(0, 1).index_select(0, rows), bins[j])
                numbers[:, j] = drawn = torch.addcmul(
                    shift[:, j], density.sample(m, u[:, i, 0], quantiles[:, i]), scale.scale[j]
                )
                if self.value is not None and i + 1 < s:
                    seen = (drawn - scale.shift[:, :, j]) / scale.scale[j]
                    features = value_features(seen, drawn if now is None else drawn + now[:, j])
                    value = torch.bmm(features.to(self.value.dtype), self.value[j])
            else:
                assert self.logits is not None and self.logits_bias is not None
                logits = (self.logits(x).float() + self.logits_bias[:, j : j + 1]).masked_fill(
                    ~self._allowed_at(j, categories), -torch.inf
                )
                categories[:, j] = drawn = density.categorical(
                    logits.flatten(0, 1).index_select(0, rows), u[:, i, 0]
                )
                chances.append(F.softmax(logits, -1))
                if self.table is not None and i + 1 < s:
                    value = self.table[drawn + offsets[j]].transpose(0, 1)
        means = scale.shift.expand(k, n, -1)
        if params:  # of all numbers at once: the others' expectations are not needed on the way
            means = (
                density.mean(density.mixture(torch.stack(params, 2), bins))
                + scale.shift / scale.scale
            )
        return numbers, categories, means, torch.stack(chances, 2) if chances else None

    def _allowed_at(self, j: int, categories: Tensor) -> Tensor:
        text = self.text_of.get(j)
        allowed = self.allowed(categories)[j]
        if text is None or j == text.start:
            return allowed
        ended = (categories[:, j - 1] == 0).unsqueeze(-1)
        return torch.where(ended, torch.arange(self.most, device=ended.device) == 0, allowed)


def value_features(r: Tensor, numbers: Tensor) -> Tensor:
    """What a slot reads of a number before it: its residual [K, ...] and the number itself [...],
    by asinh: [K, ..., 2].
    """
    return torch.asinh(torch.stack((r, numbers.expand_as(r)), -1))
