"""A policy's network over the slots of a table: attention among slots, with shared weights.

The rest of an observation is one more token. An action's component that points to a slot has a
score for each slot (as in pointer networks, Vinyals et al. 2015, arXiv 1506.03134); a permutation
of the slots permutes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.datasets.masks import MASK, counts, has_mask
from mesocosm.datasets.tables import PRESENT, ElementTable, table_of
from mesocosm.policies.heads import flat_size

LAYERS, HEADS = 2, 4
Space = gym.Space[Any]


@dataclass(frozen=True)
class TableColumns:
    """The columns of flat observations (`heads.flatten_batch`) of each slot, and of the rest."""

    slots: list[list[int]]
    """[N][p]"""
    rest: list[int]
    present: int
    """The place of `present` among a slot's columns"""

    @staticmethod
    def of(observation: Any, table: ElementTable) -> TableColumns:
        """The columns of a table."""
        slots: list[list[int]] = [[] for _ in range(table.slots)]
        rest: list[int] = []
        at = present = 0
        for name, entry in observation.spaces.items():
            leaves = entry.spaces.items() if name == table.key else [(name, entry)]
            for leaf, space in leaves:
                columns = torch.arange(at, at + flat_size(space))
                at += len(columns)
                if name == table.key:
                    rows = columns.view(table.slots, -1)
                    present = len(slots[0]) if leaf == PRESENT else present
                elif name == MASK and table.pointer:
                    rows = columns.view(-1, table.slots).T
                else:
                    rest += columns.tolist()
                    continue
                for slot, row in zip(slots, rows.tolist(), strict=True):
                    slot += row
        return TableColumns(slots, rest, present)


class SetBlock(nn.Module):
    """Attention among the tokens that exist, then an MLP: [B, T, d] -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """`exists` [B, 1, 1, T] bool."""
        b, t, d = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, t, 3, HEADS, d // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=exists)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.silu(self.up(self.norm_2(x))))


class TableNetwork(nn.Module):
    """Flat observations [B, n] to the logits of discrete actions and values [B]."""

    def __init__(self, observation: Space, action: Space, width: int):
        """Spaces with `attends`. `width` is a multiple of HEADS."""
        super().__init__()
        table = table_of(observation, action)
        assert table is not None
        columns = TableColumns.of(observation, table)
        components = counts(action)
        self.embed_rest = nn.Linear(len(columns.rest) + 1, width)
        self.embed_slot = nn.Linear(len(columns.slots[0]), width)
        self.blocks = nn.ModuleList(SetBlock(width) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.of_slots = self.of_rest = None
        if table.pointer:  # with a mask, all actions share one distribution
            self.of_slots = nn.Linear(width, math.prod(components[:-1]))
        else:
            joined = has_mask(observation)
            self.of_rest = nn.Linear(width, math.prod(components) if joined else sum(components))
        self.value = nn.Linear(width, 1)
        self._slots = torch.tensor(columns.slots)
        self._rest = torch.tensor(columns.rest, dtype=torch.int64)
        self._present = columns.present

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        slots = observations[:, self._slots.to(observations.device)]
        present = slots[..., self._present]
        count = present.mean(-1, keepdim=True)
        rest = torch.cat((observations[:, self._rest.to(observations.device)], count), -1)
        x = torch.cat((self.embed_rest(rest).unsqueeze(1), self.embed_slot(slots)), 1)
        exists = F.pad(present > 0.5, (1, 0), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, exists)
        x = self.norm(x)
        parts = []
        if self.of_rest is not None:
            parts.append(self.of_rest(x[:, 0]))
        if self.of_slots is not None:
            parts.append(self.of_slots(x[:, 1:]).transpose(1, 2).flatten(1))
        return torch.cat(parts, -1), self.value(x[:, 0]).squeeze(-1)

    def start_even(self) -> None:
        """Scale the last layers, so that all actions begin almost equally likely."""
        with torch.no_grad():
            for last in (self.of_rest, self.of_slots):
                if last is not None:
                    last.weight.mul_(0.01)
                    last.bias.zero_()


def attends(observation: Space, action: Space) -> bool:
    """True if a policy between these spaces has a `TableNetwork`, where its algorithm takes it."""
    discrete = isinstance(action, spaces.Discrete | spaces.MultiDiscrete)
    return discrete and table_of(observation, action) is not None
