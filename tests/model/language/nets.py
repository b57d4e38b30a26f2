"""Small networks with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mesocosm.model.language.llama import Llama
from mesocosm.model.language.shape import Shape, rung_shape
from mesocosm.model.language.stream import TextEpisode
from mesocosm.model.mup import init_

torch.set_num_threads(1)


def small(size: str = "100k", vocabulary: int = 97, members: int = 1, rank: int = 0) -> Llama:
    """A network of the ladder; its adapters are not zero."""
    return randomised(Llama(rung_shape(size, vocabulary), members=members, rank=rank))


def randomised(network: Llama) -> Llama:
    """Random weights everywhere: also where a new network holds zeros or ones."""
    init_(network, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network.eval().requires_grad_(False)


def shape(**changes: object) -> Shape:
    """A plain Llama of 3 query heads for 1 key head."""
    fields = dict(vocabulary=61, d_model=48, layers=2, heads=6, key_heads=2, head=8, d_ff=80)
    return Shape(**{**fields, **changes})  # type: ignore[arg-type]


class Bytes:
    """A tokenizer of single bytes, which needs no package."""

    bos, eoo, eoa = 0, 1, 2
    specials = (0, 1, 2)
    size = 259

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(byte + 3 for byte in text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids if i > 2).decode(errors="replace")


def counting(length: int, first: int = 0, hash: int = 0) -> TextEpisode:
    """Observations count up by the action's number; a reward of 1 at a multiple of 4; the last step
    terminates.
    """
    now, actions, observations, rewards = first, [], [f"at {first}"], []
    for step in range(length):
        by = 1 + (first + step) % 3
        now = (now + by) % 10
        actions.append(f"add {by}")
        observations.append(f"it is {now}")
        rewards.append(float(now % 4 == 0))
    return TextEpisode("", observations, actions, rewards, True, hash)
