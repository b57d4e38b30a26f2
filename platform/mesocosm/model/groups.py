"""Rows grouped by the ensemble member that imagines them, so that a step computes each row once."""

from __future__ import annotations

import torch
from torch import Tensor

from mesocosm.model.tensors import Parts, Transition


class MemberGroups:
    """Maps rows [B, ...] to groups [K, M, ...] and back: group k holds the rows of member k.

    M is the size of the largest group. Smaller groups are filled up with row 0, whose results are
    dropped.
    """

    def __init__(self, member: Tensor, members: int):
        """`member`: [B] int64 in 0 .. members - 1."""
        rows = torch.arange(len(member), device=member.device)
        counts = torch.bincount(member, minlength=members)
        order = torch.argsort(member, stable=True)
        sorted_member = member[order]
        rank = rows - (counts.cumsum(0) - counts)[sorted_member]
        self.shape = (members, int(counts.max()) if len(member) else 0)
        places = sorted_member * self.shape[1] + rank
        self._rows = rows.new_zeros(members * self.shape[1]).index_copy_(0, places, order)
        self._places = torch.empty_like(rows).index_copy_(0, order, places)

    def split(self, x: Tensor) -> Tensor:
        """[B, ...] -> [K, M, ...]"""
        return x.index_select(0, self._rows).unflatten(0, self.shape)

    def join(self, x: Tensor) -> Tensor:
        """[K, M, ...] -> [B, ...]"""
        return x.flatten(0, 1).index_select(0, self._places)

    def split_parts(self, parts: Parts) -> Parts:
        return Parts(self.split(parts.numbers), self.split(parts.categories))

    def join_parts(self, parts: Parts) -> Parts:
        return Parts(self.join(parts.numbers), self.join(parts.categories))

    def split_transition(self, transition: Transition) -> Transition:
        parts = (transition.observation, transition.action, transition.task)
        return Transition(*map(self.split_parts, parts))
