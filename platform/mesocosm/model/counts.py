"""The exact size and compute of a model, counted on torch's meta device without allocating it; 7B
takes a second or two.

Attention counts the full square of scores, the masked half too, as `torch.utils.flop_counter`
counts it under `sdpa_kernel(SDPBackend.MATH)`; the fused CPU kernel would count as 0. A
multiplication and its addition are 2 FLOPs; elementwise work, norms and look-ups are none.
Activations that checkpointing recomputes are not counted again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.mup import tag_of
from mesocosm.model.net import WorldNet, apply_base
from mesocosm.model.spec import Events, Parts, Spec, Windows


@dataclass(frozen=True)
class Counts:
    """Exact numbers of parameters."""

    n: int
    """N of the ladder and the laws: one member (the backbone and one decoder, or one MLP) without
    embeddings and output layers.
    """
    embeddings: int
    """Embeddings and output layers of one member, with their biases: what the spaces decide."""
    dynamics: int
    """The backbone and all members' decoders (or all MLPs), embeddings included."""
    heads: int
    """The reward and termination networks of all members."""
    start: int
    """The start model."""
    total: int
    """All trained parameters: dynamics + heads + start."""
    members: int
    base: int
    """The frozen base of all members."""


def params(spec: Spec, config: ModelConfig) -> Counts:
    """The counts of a model that need not exist. Raises UsageError on an invalid config."""
    with torch.device("meta"):
        return count(build(spec, config), Base(spec, config))


def count(net: WorldNet, base: Base) -> Counts:
    """The counts of an existing model."""
    n = embeddings = dynamics = heads = start = 0
    for name, parameter in net.named_parameters():
        size, part = parameter.numel(), name.split(".")[0]
        if part in ("reward", "termination"):
            heads += size
        elif part == "start":
            start += size
        else:
            dynamics += size
            one_member = size // net.members if net.memory == 0 or part == "decoder" else size
            # An output's bias is a "vector" to muP, but the spaces decide its size.
            if (
                part == "embed"
                or tag_of(name, parameter).kind in ("embedding", "output")
                or name.endswith(("density_bias", "logits_bias", "last.bias"))
            ):
                embeddings += one_member
            else:
                n += one_member
    buffers = sum(buffer.numel() for buffer in base.buffers())
    total = dynamics + heads + start
    return Counts(n, embeddings, dynamics, heads, start, total, net.members, buffers)


def flops_per_batch(
    spec: Spec,
    config: ModelConfig,
    batch: int,
    window: int,
    *,
    events: int = 0,
    backward: bool = True,
) -> int:
    """FLOPs of one step on `batch` windows of `window` transitions and `events` single ones: the
    forward pass of base and network and, with `backward`, the network's backward pass.
    """
    with torch.device("meta"):
        net, base = build(spec, config), Base(spec, config)
        windows = blank_windows(spec, batch, window, events)
        return measured_flops(net, base, windows, backward=backward)


def flops_per_transition(
    spec: Spec, config: ModelConfig, window: int, *, backward: bool = True
) -> float:
    """FLOPs of training on one transition of full windows (without `backward`, of evaluating it):
    exact for any batch, because they are linear in it.
    """
    return flops_per_batch(spec, config, 1, window, backward=backward) / window


def measured_flops(net: WorldNet, base: Base, windows: Windows, *, backward: bool) -> int:
    """FLOPs of this step by torch's counter, on any device. Leaves gradients on `net`."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.set_grad_enabled(backward):
        objective = net(windows, apply_base(base, windows)).objective
        if backward:
            objective.backward()
    return int(counter.get_total_flops())


def blank_windows(spec: Spec, batch: int, window: int, events: int = 0) -> Windows:
    """Windows of zeros, all valid, on torch's default device."""
    device = torch.get_default_device()

    def parts(part: str, *shape: int) -> Parts:
        return Parts.empty(getattr(spec, part), *shape, device=device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    singles = Events(
        parts("observation", events),
        parts("action", events),
        parts("observation", events),
        parts("task", events),
        zeros(events),
        zeros(events),
        zeros(events).long(),
    )
    return Windows(
        parts("observation", batch, window + 1),
        parts("action", batch, window),
        parts("task", batch),
        reward=zeros(batch, window),
        terminated=zeros(batch, window),
        duration=zeros(batch, window),
        mask=zeros(batch, window) == 0,
        start=zeros(batch) == 0,
        episode=zeros(batch).long(),
        events=singles if events else None,
    )
