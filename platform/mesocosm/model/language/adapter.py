"""LoRA (Hu et al. 2021, arXiv 2106.09685): K low-rank corrections of one matrix, one for each
member; each token of a batch is read by its own member.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model.mup import tag

Selection = Tensor | None
"""[..., K * rank] of 0 and 1: the columns of each token's member; None: all columns."""


class Adapter(nn.Module):
    """x -> up(down(x)) for K members at once: all members' columns are computed, and those of other
    members are multiplied by 0. At K * rank columns this costs less than gathering matrices.
    """

    def __init__(self, inputs: int, outputs: int, members: int, rank: int, width: float):
        super().__init__()
        self.rank = rank
        columns = members * rank
        self.reduce = tag(nn.Parameter(torch.zeros(columns, inputs)), "hidden", width=width)
        # Its input side is fixed, as an embedding's; it starts at zero.
        expand = nn.Parameter(torch.zeros(outputs, columns))
        self.expand = tag(expand, "embedding", fan_in=rank, gain=0.0)

    def forward(self, x: Tensor, selection: Selection) -> Tensor:
        reduced = F.linear(x.to(self.reduce.dtype), self.reduce)
        if selection is not None:
            reduced = reduced * selection
        return F.linear(reduced, self.expand)

    def correction(self, member: int) -> Tensor:
        """[out, in]: what a member adds to the matrix."""
        columns = slice(member * self.rank, (member + 1) * self.rank)
        return self.expand[:, columns] @ self.reduce[columns]
