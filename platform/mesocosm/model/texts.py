"""The categories that each slot may take: a text continues until its end, then it is padded."""

from __future__ import annotations

import torch
from torch import Tensor

from mesocosm.model.layers import Constant
from mesocosm.model.spec import PartSpec, TextSpan


class Allowed:
    """The values that each of the m category slots of a part may take; C is the most of any.

    `inside_text` holds the slots of texts but for each text's first.
    """

    def __init__(self, part: PartSpec):
        self.texts = part.texts
        self.most = max(part.categories, default=0)
        sizes = torch.tensor(part.categories, dtype=torch.int64).unsqueeze(-1)
        allowed = torch.arange(self.most) < sizes
        for text in part.texts:
            allowed[text.start : text.start + text.min_length, 0] = False
        self._allowed = Constant(allowed)
        self.inside_text = {
            j for text in part.texts for j in range(text.start + 1, text.start + text.length)
        }

    def __call__(self, categories: Tensor) -> Tensor:
        """[N, m, C] bool of categories [N, m]: after a text's end only padding is allowed."""
        allowed = self._allowed(categories).expand(len(categories), -1, -1)
        if self.texts:
            allowed = allowed.clone()
        for text in self.texts:
            ended = text_ended(categories, text)
            rest = slice(text.start + 1, text.start + text.length)
            allowed[:, rest, 1:] &= ~ended.unsqueeze(-1)
            allowed[:, rest, 0] |= ended
        return allowed

    def at(self, j: int, categories: Tensor) -> Tensor:
        """[..., C] bool, of slot j alone; only slots before j of `categories` [..., m] are read.
        Without a text the leading dimensions may be left out.
        """
        allowed = self._allowed(categories)[j]
        if j not in self.inside_text:
            return allowed
        ended = (categories[..., j - 1] == 0).unsqueeze(-1)
        return torch.where(ended, torch.arange(self.most, device=ended.device) == 0, allowed)


def text_ended(categories: Tensor, text: TextSpan) -> Tensor:
    """[N, length - 1] bool: True where the text has ended before each of its slots 1 and on."""
    before = categories[:, text.start : text.start + text.length - 1]
    return (before == 0).cumsum(1) > 0
