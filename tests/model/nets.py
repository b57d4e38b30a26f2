"""Parts, and networks with random weights, for tests of properties that hold for any weights."""

from __future__ import annotations

import torch
from torch import Tensor

from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.groups import MemberGroups
from mesocosm.model.mup import init_
from mesocosm.model.net import BaseOut, WorldNet
from mesocosm.model.spec import Spec
from mesocosm.model.tensors import Outcome, Parts, Transition

torch.set_num_threads(1)


def numbers(values: Tensor) -> Parts:
    """Parts [..., n] without categories."""
    return Parts(values.float(), torch.zeros(*values.shape[:-1], 0, dtype=torch.int64))


def categories(values: Tensor) -> Parts:
    """Parts [..., m] without numbers."""
    return Parts(torch.zeros(*values.shape[:-1], 0), values.long())


def nothing(*lead: int) -> Parts:
    """Parts without slots, of the leading shape `lead`."""
    return numbers(torch.zeros(*lead, 0))


def noise_like(parts: Parts, generator: torch.Generator) -> Parts:
    """`parts` with normal numbers."""
    return Parts(torch.randn(parts.numbers.shape, generator=generator), parts.categories)


def repeated(transition: Transition, rows: int) -> Transition:
    """A transition [1, ...] as [rows, ...]."""
    index = torch.zeros(rows, dtype=torch.int64)
    parts = transition.observation, transition.action, transition.task
    return Transition(*(part[index] for part in parts))


def draw(
    net: WorldNet,
    features: Tensor | None,
    token: Transition,
    base: BaseOut,
    member: Tensor,
    keys: Tensor,
) -> Outcome:
    """`net.draw` for rows [B], each by its own member; `base` is of all members."""
    groups = MemberGroups(member, net.members)
    change = base.change[member, torch.arange(len(member))]
    drawn = net.draw(
        None if features is None else groups.split(features),
        groups.split_transition(token),
        BaseOut(groups.split(change), base.scale, base.widening),
        groups.split(keys),
    )
    return Outcome(groups.join_parts(drawn.observation), groups.join(drawn.duration))


def random_nets(spec: Spec, config: ModelConfig) -> tuple[WorldNet, Base]:
    """Random weights everywhere: also where a new network holds zeros."""
    net, base = build(spec, config), Base(spec, config)
    init_(net, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    for name, buffer in base.named_buffers():
        if name != "fits" and not name.startswith("start."):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.1)
    for head in (base.reward, base.termination):
        init_(head, 1)
    return net, base
