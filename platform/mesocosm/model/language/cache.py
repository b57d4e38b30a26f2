"""Keys and values of B rows of ragged lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mesocosm.model.language.shape import Shape

BLOCK = 128
"""Columns that attention reads at a time."""


@dataclass(frozen=True)
class Places:
    """The places of the N tokens of a chunk, in the order of slots. The A rows that have tokens lie
    in slots 0 .. A-1.
    """

    row: Tensor  # [N] int64 in 0 .. B-1
    column: Tensor  # [N] int64, within the chunk
    slot: Tensor  # [N] int64 in 0 .. A-1
    position: Tensor  # [N] int64, within the row
    bias: Tensor
    """[A, C, used] float32, added to the scores: 0 for the columns that a query sees, minus
    infinity for the others. A query without a token sees the first column.
    """
    used: int  # columns of the cache that hold tokens, a multiple of BLOCK
    count: Tensor  # [B] int64


class KeyCache:
    """Rotated keys and values. Rows may lie in any slot: rows that read a chunk are moved to the
    first ones, so that attention passes over no finished row.
    """

    def __init__(self, shape: Shape, batch: int, window: int, like: Tensor):
        """`like`: a tensor of the dtype and device."""
        self.shape, self.window, self.batch = shape, window, batch
        self.length = torch.zeros(batch, dtype=torch.int64, device=like.device)
        """[B] int64: the tokens of each row"""
        self._slot = torch.arange(batch, device=like.device)
        heads, head = batch * shape.key_heads, shape.head
        layers = range(shape.layers)
        self._keys = [like.new_zeros(heads, head, BLOCK, requires_grad=False) for _ in layers]
        self._values = [like.new_zeros(heads, BLOCK, head, requires_grad=False) for _ in layers]

    @property
    def columns(self) -> int:
        """The tokens of a row for which there is memory."""
        return self._keys[0].shape[2]

    def select(self, rows: Tensor) -> KeyCache:
        """A new cache of copies of `rows` [N] int64."""
        copy = KeyCache(self.shape, 0, self.window, self._keys[0])
        copy.batch, copy.length = len(rows), self.length[rows]
        copy._slot = torch.arange(len(rows), device=rows.device)
        slots = self._slot[rows]
        for source, target in ((self._keys, copy._keys), (self._values, copy._values)):
            target[:] = [self._by_row(tensor)[slots].flatten(0, 1) for tensor in source]
        return copy

    @staticmethod
    def joined(caches: Sequence[KeyCache]) -> KeyCache:
        """A new cache of copies of the rows of several ones of equal windows."""
        first = caches[0]
        columns = max(cache.columns for cache in caches)
        for cache in caches:
            cache._reserve(columns)
        copy = KeyCache(first.shape, 0, first.window, first._keys[0])
        copy.batch = sum(cache.batch for cache in caches)
        copy.length = torch.cat([cache.length for cache in caches])
        copy._slot = torch.arange(copy.batch, device=copy.length.device)
        for layer in range(first.shape.layers):
            for name in ("_keys", "_values"):
                rows = [c._by_row(getattr(c, name)[layer])[c._slot] for c in caches]
                getattr(copy, name)[layer] = torch.cat(rows).flatten(0, 1)
        return copy

    def rewind(self, length: Tensor) -> None:
        """Forget the tokens of each row from `length` [B] int64 on."""
        self.length = torch.minimum(self.length, length)

    def places(self, count: Tensor) -> Places:
        """Prepare to append `count` [B] int64 tokens to the rows."""
        rows = count.nonzero().squeeze(-1)
        if len(rows) < self.batch:
            self._move_to_front(rows)
        rows = rows[self._slot[rows].argsort()]
        columns = int(count.max())
        grid = torch.arange(columns, device=count.device) < count[rows].unsqueeze(-1)
        index, column = grid.nonzero(as_tuple=True)
        row = rows[index]
        slot, position = self._slot[row], self.length[row] + column
        limit = count.new_zeros(len(rows), columns)
        limit[slot, column] = position
        used = -(-(int(position.max()) + 1) // BLOCK) * BLOCK
        self._reserve(used)
        unseen = torch.arange(used, device=count.device) > limit.unsqueeze(-1)
        bias = torch.zeros_like(unseen, dtype=self._keys[0].dtype).masked_fill_(unseen, -torch.inf)
        return Places(row, column, slot, position, bias, used, count)

    def write(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [N, key_heads, head]."""
        self._by_row(self._keys[layer])[places.slot, :, :, places.position] = keys
        self._by_row(self._values[layer])[places.slot, :, places.position] = values

    def attend(self, layer: int, queries: Tensor, places: Places) -> Tensor:
        """The mixed values of scaled queries [A * key_heads, M, head], where M is at least the
        groups times the columns of `places.bias`: the same shape.
        """
        active, columns, _ = places.bias.shape
        heads, used, groups = active * self.shape.key_heads, places.used, self.shape.groups
        keys, values = self._keys[layer][:heads], self._values[layer][:heads]
        scores = torch.bmm(queries, keys[:, :, :used])
        seen = scores[:, : groups * columns].view(
            active, self.shape.key_heads, groups, columns, used
        )
        seen += places.bias[:, None, None]
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        sums = weights.unflatten(-1, (-1, BLOCK)).sum(-1)
        mixed, total = torch.bmm(weights[..., :BLOCK], values[:, :BLOCK]), sums[..., 0]
        for block in range(1, used // BLOCK):
            span = slice(block * BLOCK, (block + 1) * BLOCK)
            mixed.baddbmm_(weights[..., span], values[:, span])
            total = total + sums[..., block]
        return mixed.div_(total.unsqueeze(-1))

    def advance(self, places: Places) -> None:
        """Count the tokens that were written."""
        self.length = self.length + places.count

    def _by_row(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.batch, self.shape.key_heads))

    def _reserve(self, columns: int) -> None:
        """Hold at least `columns`, doubled up to the window."""
        present = self.columns
        if columns <= present:
            return
        window = -(-self.window // BLOCK) * BLOCK
        missing = min(window, max(columns, 2 * present)) - present
        for tensors, dim in ((self._keys, 2), (self._values, 1)):
            for layer, tensor in enumerate(tensors):
                extra = list(tensor.shape)
                extra[dim] = missing
                tensors[layer] = torch.cat((tensor, tensor.new_zeros(extra)), dim)

    def _move_to_front(self, rows: Tensor) -> None:
        """Exchange slots so that the slots of `rows` come first."""
        slots = self._slot[rows]
        outside = rows[slots >= len(rows)]
        if not len(outside):
            return
        chosen = torch.zeros(self.batch, dtype=torch.bool, device=rows.device)
        chosen[rows] = True
        inside = ((self._slot < len(rows)) & ~chosen).nonzero().squeeze(-1)
        left, right = self._slot[outside], self._slot[inside]
        columns = int(torch.cat((self.length[outside], self.length[inside])).max())
        both, swapped = torch.cat((left, right)), torch.cat((right, left))
        for tensors, dim in ((self._keys, 3), (self._values, 2)):
            for tensor in tensors:
                part = self._by_row(tensor).narrow(dim, 0, columns)
                part[both] = part[swapped]
        self._slot[outside], self._slot[inside] = right, left
