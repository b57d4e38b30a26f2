"""The decoder inside a step: an autoregressive transformer over slots of numbers and categories.

Slot i's distribution depends on a context and on the values of slots 0 .. i-1; with groups of an
image's codes (`model.group`), on the values of the groups before its own. K members are evaluated
at once. Each has its own parameters and its own view of the numbers (their residual over
its own base); all see one sample.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density, rng
from mesocosm.model.config import ModelConfig
from mesocosm.model.ladder import dims
from mesocosm.model.layers import Constant, Linear, RMSNorm, TransformerBlock, first_rows
from mesocosm.model.mup import tag
from mesocosm.model.spec import PartSpec
from mesocosm.model.texts import Allowed

Order = tuple[tuple[str, int], ...]
"""("number" or "category", j) of each slot"""


@dataclass(frozen=True)
class Scale:
    """How a decoder sees numbers: member k sees r_k = (x - shift_k) / scale, and its density is
    `widening` times as wide as its network gives it.
    """

    shift: Tensor  # [K, N, n] float32
    scale: Tensor  # [n] float32
    widening: Tensor  # [n] float32


def slot_order(part: PartSpec) -> Order:
    """The slots of a part: its numbers, then its categories."""
    numbers = [("number", j) for j in range(part.numbers)]
    categories = [("category", j) for j in range(len(part.categories))]
    return (*numbers, *categories)


def slot_groups(part: PartSpec, order: Order, group: int) -> list[slice]:
    """The groups of slots that are drawn at once: `group` positions of an image, else a slot.

    Args:
        part: The slots, whose images may have groups.
        order: The result of `slot_order`.
        group: Positions of an image.
    """
    ends = {
        image.start + min(first + group * image.digits, image.length)
        for image in part.images
        for first in range(0, image.length, group * image.digits)
    }
    inside = {j for image in part.images for j in range(image.start, image.start + image.length)}
    groups, first = [], 0
    for slot, (kind, j) in enumerate(order):
        if kind == "number" or j not in inside or j + 1 in ends:
            groups.append(slice(first, slot + 1))
            first = slot + 1
    return groups


class SlotBlock(TransformerBlock):
    """Causal attention among the slots of a step, then SwiGLU."""

    def forward(self, x: Tensor, slots: int, mask: Tensor | None = None) -> Tensor:
        """[K, N * S, d], slots innermost -> the same. `mask` [S, S] bool: which slots each slot
        sees; by default those before it and itself.
        """
        k, rows, d = x.shape
        qkv = self.qkv(self.norm_1(x)).view(k * rows // slots, slots, 3, self.heads, self.head)
        q, key, v = qkv.permute(2, 0, 3, 1, 4)
        attended = v
        if mask is not None:
            attended = F.scaled_dot_product_attention(q, key, v, attn_mask=mask)
        elif slots > 1:
            attended = F.scaled_dot_product_attention(q, key, v, is_causal=True)
        return self.residual(x, attended.transpose(1, 2).reshape(k, rows, d))

    def group(self, x: Tensor, cache: Tensor, first: int) -> Tensor:
        """The same for a group of G slots x [K, G, N, d] from `first` on, which see each other;
        `cache` [2, S, K, N, heads, head] takes them.
        """
        k, g, rows, d = x.shape
        flat = x.reshape(k, g * rows, d)
        qkv = self.qkv(self.norm_1(flat)).view(k, g, rows, 3, self.heads, self.head)
        q, key, v = qkv.unbind(3)
        end = first + g
        cache[0, first:end], cache[1, first:end] = key.transpose(0, 1), v.transpose(0, 1)
        score = torch.einsum("tkmhd,kgmhd->kgmht", cache[0, :end], q) * self.head**-0.5
        attended = torch.einsum("kgmht,tkmhd->kgmhd", score.softmax(-1), cache[1, :end])
        return self.residual(flat, attended.reshape(k, g * rows, d)).view(k, g, rows, d)

    def step(self, x: Tensor, cache: Tensor, slot: int) -> Tensor:
        """The same for x [K, N, d] at `slot`; `cache` [2, S, K, N, heads, head] takes it."""
        k, rows, d = x.shape
        q, key, v = self.qkv(self.norm_1(x)).view(k, rows, 3, self.heads, self.head).unbind(2)
        attended = v
        if cache.shape[1] > 1:
            cache[0, slot], cache[1, slot] = key, v
        if slot:
            score = (cache[0, : slot + 1] * q).sum(-1, keepdim=True) * self.head**-0.5
            attended = (score.softmax(0) * cache[1, : slot + 1]).sum(0)
        return self.residual(x, attended.reshape(k, rows, d))


class Decoder(nn.Module):
    """p(values of all slots | context) for K members. `inputs`: width of the context."""

    def __init__(
        self, part: PartSpec, order: Order, config: ModelConfig, *, members: int, inputs: int
    ):
        super().__init__()
        self.part, self.order, self.members = part, order, members
        self.slots = len(order)
        self.number_slots = [slot for slot, (kind, _) in enumerate(order) if kind == "number"]
        self.category_slots = [slot for slot, (kind, _) in enumerate(order) if kind == "category"]
        rung, components = dims(config.size), config.components
        stack, numbers, cardinalities = rung.decoder, part.numbers, part.categories
        self.allowed = Allowed(part)
        categories, several = len(cardinalities), self.slots > 1

        def embedding(*shape: int, fan_in: int) -> nn.Parameter:
            weight = nn.Parameter(torch.zeros(*shape, stack.d))
            return tag(weight, "embedding", fan_in=fan_in)

        # A ZeRO engine cannot partition a zero-sized parameter: a parameter without elements is
        # None.
        self.value = self.table = self.density = self.logits = None
        self.density_bias = self.logits_bias = None
        width = rung.backbone.width
        self.project = Linear(inputs, stack.d, "hidden", members=members, width=width)
        self.slot = embedding(members, self.slots, fan_in=1)
        if numbers and several:
            self.value = embedding(numbers, members, 2, fan_in=2)
        if categories and several:
            self.table = embedding(sum(cardinalities), members, fan_in=1)
        self.blocks = nn.ModuleList(SlotBlock(stack, members) for _ in range(stack.layers))
        self.norm = RMSNorm(stack, depth=1.0, members=members)
        scaled = partial(Linear, members=members, width=stack.width)
        output = partial(scaled, stack.d, kind="output", gain=0.1)
        if numbers:
            parameters = density.PARAMS * components
            self.density = output(parameters)
            spread = torch.zeros(density.PARAMS, components)
            spread[1] = torch.linspace(-1, 1, components) if components > 1 else 0.0
            bias = spread.flatten().repeat(members, numbers, 1)
            self.density_bias = tag(nn.Parameter(bias), "vector")
        if categories:
            self.logits = output(self.allowed.most)
            bias = torch.zeros(members, categories, self.allowed.most)
            self.logits_bias = tag(nn.Parameter(bias), "vector")

        self.bins = Constant(torch.tensor(part.bins))
        self.offsets = Constant(first_rows(cardinalities))
        self.groups = slot_groups(part, order, config.group)
        self.grouped = len(self.groups) < self.slots
        number = [i for i, group in enumerate(self.groups) for _ in range(group.start, group.stop)]
        numbers_of = torch.tensor(number)
        self.mask = Constant(numbers_of <= numbers_of.unsqueeze(1))
        # The slot of the next group that reads each slot's value: the slot at the same place, or
        # the last one.
        readers = [
            min(slot - group.start + following.start, following.stop - 1)
            for group, following in itertools.pairwise(self.groups)
            for slot in range(group.start, group.stop)
        ]
        self.readers = Constant(torch.tensor(readers, dtype=torch.int64))
        # The column of each slot's value in the concatenation of (numbers, categories).
        columns = [j if kind == "number" else numbers + j for kind, j in order]
        self.columns = Constant(torch.tensor(columns, dtype=torch.int64))
        self.uniforms = Constant(torch.arange(2 * self.slots) + rng.OBSERVATION)

    # All slots at once: the values are given.

    def forward(
        self, context: Tensor, r: Tensor, numbers: Tensor, categories: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced (density parameters [K, N, n, 3 M], logits [K, N, m, C]), float32, of
        context [N, inputs], r [K, N, n], numbers [N, n] and categories [N, m].
        """
        k, n, s = self.members, numbers.shape[0], self.slots
        x = self.slot.unsqueeze(1) + self.project(context).unsqueeze(2)
        if s > 1:
            last = self.groups[-1].start
            values = self._values(r, numbers, categories)[:, :, self.columns(r)[:last]]
            if self.grouped:
                x = x.index_add(2, self.readers(r), values)
            else:
                x = x + F.pad(values, (0, 0, 1, 0))
        x = x.reshape(k, n * s, -1)
        mask = self.mask(r) if self.grouped else None
        for block in self.blocks:
            x = block(x, s, mask)
        x = self.norm(x).view(k, n, s, -1)
        params, logits = r.new_zeros(k, n, 0, density.PARAMS), r.new_zeros(k, n, 0, 1)
        if self.density is not None and self.density_bias is not None:
            y = self.density(x[:, :, self.number_slots].flatten(1, 2))
            params = y.unflatten(1, (n, -1)).float() + self.density_bias.unsqueeze(1).float()
        if self.logits is not None and self.logits_bias is not None:
            y = self.logits(x[:, :, self.category_slots].flatten(1, 2))
            logits = y.unflatten(1, (n, -1)).float() + self.logits_bias.unsqueeze(1).float()
        return params, logits

    def _values(self, r: Tensor, numbers: Tensor, categories: Tensor) -> Tensor:
        """[K, N, n + m, d]: the embeddings of all values, numbers first."""
        values = []
        if self.value is not None:
            features = value_features(r, numbers).to(self.value.dtype)
            values.append(torch.einsum("knsf,skfd->knsd", features, self.value))
        if self.table is not None:
            rows = F.embedding(categories + self.offsets(categories), self.table.flatten(1))
            values.append(rows.unflatten(-1, (self.members, -1)).permute(2, 0, 1, 3))
        return torch.cat(values, 2)

    def log_prob(
        self,
        context: Tensor,
        numbers: Tensor,
        categories: Tensor,
        scale: Scale,
        absolute: Tensor | None = None,
    ) -> Tensor:
        """[K, N, S] float32 <= 0, of numbers [N, n] in the units of `scale` and categories [N, m].

        Later slots read r_k and `absolute` [N, n], by default `numbers`.
        """
        r, mixture, logits = self._distributions(context, numbers, categories, scale, absolute)
        log_prob = density.log_prob(mixture, r)
        if self.logits is None:
            return log_prob
        both = torch.cat((log_prob, density.categorical_log_prob(logits, categories)), -1)
        return both[..., self.columns(r)]

    def _distributions(
        self,
        context: Tensor,
        numbers: Tensor,
        categories: Tensor,
        scale: Scale,
        absolute: Tensor | None,
    ) -> tuple[Tensor, density.Mixture, Tensor]:
        """(r_k [K, N, n], its density, masked logits [K, N, m, C])"""
        r = (numbers - scale.shift) / scale.scale
        params, logits = self(context, r, numbers if absolute is None else absolute, categories)
        if self.logits is not None:
            logits = logits.masked_fill(~self.allowed(categories), -torch.inf)
        bins = self.bins(scale.scale) / scale.scale
        return r, density.mixture(params, bins, scale.widening), logits

    def expected(
        self, context: Tensor, numbers: Tensor, categories: Tensor, scale: Scale, absolute: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Each member's expected numbers in units of `scale` [K, N, n], and the categories'
        probabilities [K, N, m, C], with the arguments of `log_prob`.
        """
        _, mixture, logits = self._distributions(context, numbers, categories, scale, absolute)
        means = density.mean(mixture) + scale.shift / scale.scale
        return means, None if self.logits is None else F.softmax(logits, -1)

    # One slot after another: the values are drawn.

    def draw(
        self, context: Tensor, scale: Scale, keys: Tensor, now: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample all slots of K groups of M rows, by each member for its own group.

        Args:
            context: [K, M, inputs].
            scale: Its shift is [K, M, n].
            keys: [K, M] int64.
            now: [K, M, n]: later slots read `now` + numbers; by default the numbers alone.

        Returns:
            numbers [K, M, n] in the units of `scale`, categories [K, M, m].
        """
        (k, m), s = keys.shape, self.slots
        u = rng.uniform(keys.unsqueeze(-1), self.uniforms(keys)).view(k, m, s, 2)
        quantiles = torch.logit(u[..., 1])
        bins, offsets = self.bins(scale.scale) / scale.scale, self.offsets(u)
        members = torch.arange(k, device=u.device).unsqueeze(1)
        x0 = self.slot.unsqueeze(2) + self.project(context).unsqueeze(1)
        blocks = cast(list[SlotBlock], list(self.blocks))
        caches = [x0.new_empty(2, s, k, m, block.heads, block.head) for block in blocks]
        numbers = u.new_empty(k, m, self.part.numbers)
        categories = keys.new_empty(k, m, len(self.part.categories))
        value: Tensor | None = None
        for group in self.groups:
            slot, (kind, j) = group.start, self.order[group.start]
            if group.stop - slot > 1:
                value = self._draw_group(group, x0, value, caches, u[:, :, group, 0], categories)
                continue
            if value is not None and value.dim() == 4:
                value = value.sum(1)
            x = x0[:, slot].expand(k, m, -1) if value is None else x0[:, slot] + value
            for block, cache in zip(blocks, caches, strict=True):
                x = block.step(x, cache, slot)
            x = self.norm(x)
            last = slot + 1 == s
            if kind == "number":
                assert self.density is not None and self.density_bias is not None
                params = self.density(x).float() + self.density_bias[:, j : j + 1]
                mixture = density.mixture(params, bins[j], scale.widening[j])
                r = density.sample(mixture, u[:, :, slot, 0], quantiles[:, :, slot])
                number = torch.addcmul(scale.shift[..., j], r, scale.scale[j])
                numbers[..., j] = number
                if self.value is not None and not last:
                    features = value_features(r, number if now is None else number + now[..., j])
                    value = torch.bmm(features.to(self.value.dtype), self.value[j])
            else:
                assert self.logits is not None and self.logits_bias is not None
                logits = self.logits(x).float() + self.logits_bias[:, j : j + 1]
                logits = logits.masked_fill(~self.allowed.at(j, categories), -torch.inf)
                category = density.categorical(logits, u[:, :, slot, 0])
                categories[..., j] = category
                if self.table is not None and not last:
                    value = self.table[category + offsets[j], members]
        return numbers, categories

    def _draw_group(
        self,
        group: slice,
        x0: Tensor,
        value: Tensor | None,
        caches: list[Tensor],
        u: Tensor,
        categories: Tensor,
    ) -> Tensor | None:
        """Draw a group of codes into `categories` [K, M, m].

        Args:
            group: Its slots, G of them.
            x0: [K, S, M, d], what slots read beside values.
            value: [K, M, d] or [K, G', M, d], the embedding of the last slot or group.
            caches: As `SlotBlock.group` reads and fills them.
            u: [K, M, G] uniforms.
            categories: Takes the codes.

        Returns:
            [K, G, M, d]: the embeddings of the codes; None after the last group.
        """
        assert self.logits is not None and self.logits_bias is not None and self.table is not None
        first = self.order[group.start][1]
        columns = slice(first, first + group.stop - group.start)
        x = x0[:, group].expand(-1, -1, u.shape[1], -1)
        if value is not None:
            value = value.unsqueeze(1) if value.dim() == 3 else value
            before = self.groups[self.groups.index(group) - 1]
            x = x.index_add(1, self.readers(u)[before] - group.start, value)
        for block, cache in zip(cast(list[SlotBlock], list(self.blocks)), caches, strict=True):
            x = block.group(x, cache, group.start)
        k, g, m, d = x.shape
        logits = self.logits(self.norm(x.reshape(k, g * m, d))).float().view(k, g, m, -1)
        logits = logits + self.logits_bias[:, columns].unsqueeze(2)
        allowed = torch.stack([self.allowed.at(j, categories) for j in range(first, columns.stop)])
        logits = logits.masked_fill(~allowed.unsqueeze(1), -torch.inf)
        drawn = density.categorical(logits, u.transpose(1, 2))
        categories[..., columns] = drawn.transpose(1, 2)
        if group.stop == self.slots:
            return None
        members = torch.arange(k, device=u.device)[:, None, None]
        return self.table[drawn + self.offsets(u)[columns].unsqueeze(-1), members]


def value_features(r: Tensor, numbers: Tensor) -> Tensor:
    """[K, ..., 2]: later slots read asinh of a number's residual [K, ...] and of itself [...]."""
    return torch.asinh(torch.stack((r, numbers.expand_as(r)), -1))
