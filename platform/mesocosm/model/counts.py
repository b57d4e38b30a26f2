"""How large a model is, and how much it computes: exact, and without making it (on torch's meta
device), 7B in a second or two.

The causal convention, the same everywhere: attention counts the *full square* of scores, the masked
half too, as `torch.utils.flop_counter` counts it under `sdpa_kernel(SDPBackend.MATH)`. (The fused
CPU kernel would count as 0.) A multiplication and its addition are 2 FLOPs; elementwise work, norms
and look-ups are none. Activations that checkpointing computes again are not counted again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.mup import tag_of
from mesocosm.model.net import WorldNet, apply_base, build
from mesocosm.model.spec import Events, Parts, Spec, Windows

META = "meta"


@dataclass(frozen=True)
class Counts:
    """Parameters, exactly. `total` is what is trained: dynamics + heads + start."""

    n: int
    """N of the ladder and the laws: one head (the backbone and one decoder, or one member's MLP)
    without embeddings and output layers.
    """
    embeddings: int
    """What the spaces decide, of one head: embeddings and output layers with their biases."""
    dynamics: int
    """The backbone and all members' decoders (or all MLPs), embeddings included."""
    heads: int
    """The reward and termination networks of all members."""
    start: int
    """The start model."""
    total: int
    members: int
    base: int
    """The frozen base of all members."""


def params(spec: Spec, config: ModelConfig) -> Counts:
    """The counts of a model before it is made. Raises UsageError on an invalid config."""
    with torch.device(META):
        return count(build(spec, config), Base(spec, config))


def count(net: WorldNet, base: nn.Module) -> Counts:
    """The counts of a model as it stands."""
    sums = dict.fromkeys(("n", "embeddings", "dynamics", "heads", "start"), 0)
    for name, parameter in net.named_parameters():
        size, part = parameter.numel(), name.split(".")[0]
        if part in ("reward", "termination"):
            sums["heads"] += size
        elif part == "start":
            sums["start"] += size
        else:
            sums["dynamics"] += size
            # An output's bias is a "vector" to muP, yet the spaces decide its size.
            of_spaces = (
                part == "embed"
                or tag_of(name, parameter).kind in ("embedding", "output")
                or name.endswith(("density_bias", "logits_bias", "last.bias"))
            )
            each = size // net.members if net.memory == 0 or part == "decoder" else size
            sums["embeddings" if of_spaces else "n"] += each
    total = sums["dynamics"] + sums["heads"] + sums["start"]
    return Counts(
        **sums,
        total=total,
        members=net.members,
        base=sum(buffer.numel() for buffer in base.buffers()),
    )


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
    base's and the network's forward pass and, with `backward`, the network's backward pass.
    """
    with torch.device(META):
        net, base = build(spec, config), Base(spec, config)
        windows = blank_windows(spec, batch, window, events)
        return measured_flops(net, base, windows, backward=backward)


def flops_per_transition(
    spec: Spec, config: ModelConfig, window: int, *, backward: bool = True
) -> float:
    """FLOPs of training (or, without `backward`, of evaluating) on one transition of full windows:
    exact for any batch, in which they are linear.
    """
    return flops_per_batch(spec, config, 1, window, backward=backward) / window


def measured_flops(net: WorldNet, base: nn.Module, windows: Windows, *, backward: bool) -> int:
    """What torch's counter says of this step on the device where everything lies. Leaves gradients
    on `net`.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.set_grad_enabled(backward):
        objective = net(windows, apply_base(base, windows)).objective
        if backward:
            objective.backward()
    return int(counter.get_total_flops())


def blank_windows(
    spec: Spec, batch: int, window: int, events: int = 0, device: torch.device | str | None = None
) -> Windows:
    """Windows of zeros, all valid, on `device` (None: torch's present default)."""
    place = torch.get_default_device() if device is None else device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=place)

    side = Events(
        Parts.empty(spec.observation, events, device=place),
        Parts.empty(spec.action, events, device=place),
        Parts.empty(spec.observation, events, device=place),
        Parts.empty(spec.task, events, device=place),
        terminated=zeros(events),
        weight=zeros(events),
        episode=zeros(events).long(),
    )
    return Windows(
        Parts.empty(spec.observation, batch, window + 1, device=place),
        Parts.empty(spec.action, batch, window, device=place),
        Parts.empty(spec.task, batch, device=place),
        reward=zeros(batch, window),
        terminated=zeros(batch, window),
        duration=zeros(batch, window),
        mask=zeros(batch, window) == 0,
        start=zeros(batch) == 0,
        episode=zeros(batch).long(),
        events=side if events else None,
    )
