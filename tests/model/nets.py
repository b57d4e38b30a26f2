"""Networks that are not trained, for tests of what holds for any weights."""

from __future__ import annotations

import torch

from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.mup import init_
from mesocosm.model.net import WorldNet
from mesocosm.model.spec import Spec


def random_nets(spec: Spec, config: ModelConfig) -> tuple[WorldNet, Base]:
    """Random weights everywhere: also where a new network holds zeros."""
    net, base = build(spec, config), Base(spec, config)
    init_(net, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    for buffer in base.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.1)
    return net, base
