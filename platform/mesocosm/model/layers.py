"""The small parts that networks are made of, each tagged for muP (see `ladder`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model.mup import Kind, tag
from mesocosm.model.spec import Parts, PartSpec

EDGE = 8.0
"""Where `squash` bends: normalised numbers rarely leave +-8 before a policy does."""
EPS = 1e-4
"""Of RMSNorm: a root mean square much below this counts as zero."""


class Read(NamedTuple):
    """What a network reads of several `Parts`: numbers squashed [..., 2 n], categories [..., m]."""

    numbers: Tensor
    categories: Tensor


def read(*parts: Parts) -> Read:
    """Several `Parts` of one leading shape, side by side."""
    return Read(
        squash(torch.cat([part.numbers for part in parts], -1)),
        torch.cat([part.categories for part in parts], -1),
    )


def squash(x: Tensor) -> Tensor:
    """[..., n] -> [..., 2 n] float32: x bent smoothly towards +-EDGE, and sign(x) log(1 + |x|).
    Monotone, so nothing is lost to a network that reads both; only inputs are squashed. NaN and
    infinity become finite, so that a broken episode spoils no other.
    """
    x = torch.nan_to_num(x.float(), nan=0.0, posinf=1e30, neginf=-1e30)
    size = x.abs()
    return torch.cat(
        (x / torch.sqrt(1.0 + (x / EDGE).square()), torch.sign(x) * torch.log1p(size)), -1
    )


class Constant:
    """A fixed tensor, copied once to each device that asks for it. No buffer, so that an engine
    that casts its module to bfloat16 leaves bins, angles and scales exact.
    """

    def __init__(self, value: Tensor):
        self._on = {value.device: value}
        self._value = value

    def __call__(self, like: Tensor) -> Tensor:
        """On the device of `like`."""
        found = self._on.get(like.device)
        if found is None:
            found = self._on[like.device] = self._value.to(like.device)
        return found


class RMSNorm(nn.Module):
    """Over the last dimension, in float32. With `members`, the gain is [K, 1, ..., d] for inputs
    with a leading member dimension.
    """

    def __init__(self, width: int, *, m_width: float, m_depth: float, members: int | None = None):
        super().__init__()
        self.weight = tag(
            nn.Parameter(torch.ones(width) if members is None else torch.ones(members, 1, width)),
            "vector",
            width=m_width,
            depth=m_depth,
        )

    def forward(self, x: Tensor) -> Tensor:
        # x / (|x| d^-1/2 + eps): four kernels on a CPU, where F.rms_norm is six.
        wide = x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide / (size * x.shape[-1] ** -0.5 + EPS)).to(x.dtype) * self.weight


class Linear(nn.Module):
    """y = multiplier * x W^T (+ b), in the dtype of W. Weights [out, in]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kind: Kind,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        bias: bool = False,
        multiplier: float = 1.0,
        gain: float = 1.0,
    ):
        super().__init__()
        self.weight = tag(
            nn.Parameter(torch.zeros(outputs, inputs)),
            kind,
            width=width,
            depth=depth,
            fan_in=inputs,
            gain=gain,
        )
        self.bias = (
            tag(nn.Parameter(torch.zeros(outputs)), "vector", width=1.0, depth=depth)
            if bias
            else None
        )
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self.weight.dtype), self.weight)
        if self.multiplier != 1.0:
            y = y * self.multiplier
        return y if self.bias is None else y + self.bias


class MemberLinear(nn.Module):
    """K linear maps at once: [K, N, in] -> [K, N, out] by weights [K, in, out]; a shared input is
    [N, in] or [1, N, in].
    """

    def __init__(
        self,
        members: int,
        inputs: int,
        outputs: int,
        kind: Kind,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        bias: bool = False,
        multiplier: float = 1.0,
        gain: float = 1.0,
    ):
        super().__init__()
        self.weight = tag(
            nn.Parameter(torch.zeros(members, inputs, outputs)),
            kind,
            width=width,
            depth=depth,
            fan_in=inputs,
            gain=gain,
        )
        self.bias = (
            tag(nn.Parameter(torch.zeros(members, 1, outputs)), "vector", width=1.0, depth=depth)
            if bias
            else None
        )
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.dim() == 2:
            x = x.unsqueeze(0)
        if x.shape[0] != self.weight.shape[0]:
            x = x.expand(self.weight.shape[0], -1, -1)
        if self.bias is None:
            y = torch.bmm(x, self.weight)
            return y if self.multiplier == 1.0 else y * self.multiplier
        return torch.baddbmm(self.bias, x, self.weight, alpha=self.multiplier)


class PartsEmbedding(nn.Module):
    """Several `Parts` of one leading shape -> their summed linear embedding: squashed numbers by a
    matrix, categories by tables.

    Without `members` [...] -> [..., width]; with K members [N] -> [K, N, width].
    """

    def __init__(self, *parts: PartSpec, width: int, members: int | None = None, gain: float = 1.0):
        super().__init__()
        self.members = members
        self.width = width
        columns = width * (members or 1)
        numbers = sum(part.numbers for part in parts)
        cardinalities = [c for part in parts for c in part.categories]
        self.numbers = (
            tag(nn.Parameter(torch.zeros(columns, 2 * numbers)), "embedding", gain=gain)
            if numbers
            else None
        )
        self.table = (
            tag(
                nn.Parameter(torch.zeros(sum(cardinalities), columns)),
                "embedding",
                fan_in=len(cardinalities),
                gain=gain,
            )
            if cardinalities
            else None
        )
        self.bias = tag(nn.Parameter(torch.zeros(columns)), "vector")
        self.offsets = Constant(first_rows(cardinalities))

    def forward(self, of: Read) -> Tensor:
        y: Tensor = self.bias
        if self.numbers is not None:
            y = F.linear(of.numbers.to(y.dtype), self.numbers, y)
        if self.table is not None:
            rows = of.categories + self.offsets(of.categories)
            y = y + F.embedding_bag(rows.flatten(0, -2), self.table, mode="sum").view(
                *rows.shape[:-1], -1
            )
        return y if self.members is None else y.view(-1, self.members, self.width).transpose(0, 1)


class MemberMLP(nn.Module):
    """K MLPs with two hidden SiLU layers, and a linear path beside them, on what was `read`, of
    leading shape [N]: [K, N, out] float32.
    """

    def __init__(self, *parts: PartSpec, members: int, hidden: int, outputs: int, width: float):
        super().__init__()
        self.first = PartsEmbedding(*parts, width=hidden, members=members)
        self.second = MemberLinear(members, hidden, hidden, "hidden", width=width, bias=True)
        self.last = MemberLinear(
            members,
            hidden,
            outputs,
            "output",
            width=width,
            bias=True,
            multiplier=1.0 / width,
            gain=0.1,
        )
        self.skip = PartsEmbedding(*parts, width=outputs, members=members, gain=0.0)

    def forward(self, of: Read) -> Tensor:
        hidden = F.silu(self.second(F.silu(self.first(of))))
        return (self.last(hidden) + self.skip(of)).float()


def first_rows(cardinalities: Sequence[int]) -> Tensor:
    """int64 [m]: where each slot's rows begin in a table that holds all slots' categories one after
    another.
    """
    return torch.tensor(
        [sum(cardinalities[:i]) for i in range(len(cardinalities))], dtype=torch.int64
    )


def flatten(parts: Parts) -> Parts:
    """Leading dimensions as one."""
    return Parts(parts.numbers.flatten(0, -2), parts.categories.flatten(0, -2))
