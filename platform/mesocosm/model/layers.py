"""The layers that networks consist of, each tagged for muP (see `ladder`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model.ladder import Stack
from mesocosm.model.mup import Kind, tag
from mesocosm.model.spec import PartSpec
from mesocosm.model.tensors import Parts

EDGE = 8.0
"""Bend of `squash`: normalised numbers rarely leave +-8 before a policy does."""
EPS = 1e-4
"""RMSNorm's epsilon: a root mean square far below this counts as zero."""


class Inputs(NamedTuple):
    """Several `Parts` as a network reads them: squashed numbers [..., 2 n], categories [..., m]."""

    numbers: Tensor
    categories: Tensor


def read(*parts: Parts) -> Inputs:
    """Join several `Parts` of one leading shape."""
    return Inputs(
        squash(torch.cat([part.numbers for part in parts], -1)),
        torch.cat([part.categories for part in parts], -1),
    )


def squash(x: Tensor) -> Tensor:
    """[..., n] -> [..., 2 n] float32: x bent smoothly towards +-EDGE, and sign(x) log(1 + |x|).

    NaN and infinity become finite, so that a broken episode spoils no other.
    """
    x = torch.nan_to_num(x.float(), nan=0.0, posinf=1e30, neginf=-1e30)
    bent = x / torch.sqrt(1.0 + (x / EDGE).square())
    return torch.cat((bent, torch.sign(x) * torch.log1p(x.abs())), -1)


class Constant:
    """A fixed tensor, copied once to each device that asks for it. It is not a buffer, so that an
    engine that casts its module to bfloat16 leaves bins, angles and scales exact.
    """

    def __init__(self, value: Tensor):
        self._copies = {value.device: value}
        self._value = value

    def __call__(self, like: Tensor) -> Tensor:
        """The copy on the device of `like`."""
        if like.device not in self._copies:
            with torch.inference_mode(False):  # a later use may need gradients
                self._copies[like.device] = self._value.to(like.device)
        return self._copies[like.device]


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32. With `members`, the gain is [K, 1, ..., d]."""

    def __init__(self, stack: Stack, *, depth: float, members: int | None = None):
        super().__init__()
        gain = torch.ones(stack.d) if members is None else torch.ones(members, 1, stack.d)
        self.weight = tag(nn.Parameter(gain), "vector", width=stack.width, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        # x / (|x| d^-1/2 + eps): four kernels on a CPU, where F.rms_norm takes six.
        wide = x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide / (size * x.shape[-1] ** -0.5 + EPS)).to(x.dtype) * self.weight


class Linear(nn.Module):
    """y = multiplier * x W (+ b), in the dtype of W. Weights are [out, in].

    With `members`, K maps at once by weights [K, in, out], and a bias if `bias`: [K, N, in] ->
    [K, N, out]; a shared input is [N, in] or [1, N, in]. An output's multiplier is muP's 1 / width.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kind: Kind,
        *,
        members: int | None = None,
        width: float = 1.0,
        depth: float = 1.0,
        bias: bool = False,
        multiplier: float = 1.0,
        gain: float = 1.0,
    ):
        super().__init__()
        self.members = members
        self.multiplier = 1.0 / width if kind == "output" else multiplier
        shape = (outputs, inputs) if members is None else (members, inputs, outputs)
        weight = nn.Parameter(torch.zeros(shape))
        self.weight = tag(weight, kind, width=width, depth=depth, fan_in=inputs, gain=gain)
        self.bias = None
        if members is not None and bias:
            self.bias = tag(nn.Parameter(torch.zeros(members, 1, outputs)), "vector", depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.members is not None:
            if x.dim() == 2:
                x = x.unsqueeze(0)
            if x.shape[0] != self.members:
                x = x.expand(self.members, -1, -1)
            if self.bias is not None:
                return torch.baddbmm(self.bias, x, self.weight, alpha=self.multiplier)
        y = F.linear(x, self.weight) if self.members is None else torch.bmm(x, self.weight)
        return y if self.multiplier == 1.0 else y * self.multiplier


class TransformerBlock(nn.Module):
    """The layers of attention and SwiGLU. A subclass computes the attention from `qkv(norm_1(x))`
    and passes the result to `residual`.
    """

    def __init__(self, stack: Stack, members: int | None = None):
        super().__init__()
        d, ff, depth = stack.d, stack.d_ff, stack.depth
        linear = partial(Linear, kind="hidden", members=members, width=stack.width, depth=depth)
        self.heads, self.head = stack.heads, stack.head
        self.norm_1 = RMSNorm(stack, depth=depth, members=members)
        self.qkv = linear(d, 3 * d)
        self.out = linear(d, d, multiplier=1.0 / depth)
        self.norm_2 = RMSNorm(stack, depth=depth, members=members)
        self.up = linear(d, 2 * ff)
        self.down = linear(ff, d, multiplier=1.0 / depth)

    def residual(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's result [..., d], then the SwiGLU."""
        x = x + self.out(attended)
        gate, up = self.up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PartsEmbedding(nn.Module):
    """The summed linear embedding of several `Parts`: a matrix for squashed numbers, tables for
    categories. Without `members` [...] -> [..., width]. With K members [N] -> [K, N, width], or
    [K, N] -> [K, N, width] where each member has its own rows.
    """

    def __init__(self, *parts: PartSpec, width: int, members: int | None = None, gain: float = 1.0):
        super().__init__()
        self.members, self.width = members, width
        columns = width * (members or 1)
        numbers = sum(part.numbers for part in parts)
        cardinalities = [c for part in parts for c in part.categories]
        self.numbers = self.table = None
        if numbers:
            weight = nn.Parameter(torch.zeros(columns, 2 * numbers))
            self.numbers = tag(weight, "embedding", gain=gain)
        if cardinalities:
            rows = nn.Parameter(torch.zeros(sum(cardinalities), columns))
            self.table = tag(rows, "embedding", fan_in=len(cardinalities), gain=gain)
        self.bias = tag(nn.Parameter(torch.zeros(columns)), "vector")
        self.offsets = Constant(first_rows(cardinalities))

    def forward(self, x: Inputs) -> Tensor:
        if self.members is not None and x.numbers.dim() == 3:
            return self._of_groups(x, self.members)
        y: Tensor = self.bias
        if self.numbers is not None:
            y = F.linear(x.numbers.to(y.dtype), self.numbers, y)
        if self.table is not None:
            rows = x.categories + self.offsets(x.categories)
            summed = F.embedding_bag(rows.flatten(0, -2), self.table, mode="sum")
            y = y + summed.view(*rows.shape[:-1], -1)
        return y if self.members is None else y.view(-1, self.members, self.width).transpose(0, 1)

    def _of_groups(self, x: Inputs, members: int) -> Tensor:
        y = self.bias.view(members, 1, self.width)
        if self.numbers is not None:
            weight = self.numbers.view(members, self.width, -1).transpose(1, 2)
            y = torch.baddbmm(y, x.numbers.to(y.dtype), weight)
        if self.table is not None:
            rows = (x.categories + self.offsets(x.categories)) * members
            rows = rows + torch.arange(members, device=rows.device)[:, None, None]
            table = self.table.view(-1, self.width)
            summed = F.embedding_bag(rows.flatten(0, 1), table, mode="sum")
            y = y + summed.view(*rows.shape[:2], -1)
        return y.expand(-1, x.numbers.shape[1], -1)


class MemberMLP(nn.Module):
    """K MLPs with two hidden SiLU layers and a linear skip path: inputs of leading shape [N], or
    [K, N] where each member has its own rows -> [K, N, out] float32.
    """

    def __init__(self, *parts: PartSpec, members: int, hidden: int, outputs: int, width: float):
        super().__init__()
        linear = partial(Linear, hidden, members=members, width=width, bias=True)
        self.first = PartsEmbedding(*parts, width=hidden, members=members)
        self.second = linear(hidden, "hidden")
        self.last = linear(outputs, "output", gain=0.1)
        self.skip = PartsEmbedding(*parts, width=outputs, members=members, gain=0.0)

    def forward(self, x: Inputs) -> Tensor:
        hidden = F.silu(self.second(F.silu(self.first(x))))
        return (self.last(hidden) + self.skip(x)).float()


def first_rows(cardinalities: Sequence[int]) -> Tensor:
    """int64 [m]: the first row of each slot in a table that holds all slots' categories in turn."""
    starts = [sum(cardinalities[:i]) for i in range(len(cardinalities))]
    return torch.tensor(starts, dtype=torch.int64)
