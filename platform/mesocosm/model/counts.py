"""The exact size and compute of a model, counted on torch's meta device without allocating it.

Attention counts the full square of scores, the masked half too, as `torch.utils.flop_counter`
counts it under `sdpa_kernel(SDPBackend.MATH)`; the fused CPU kernel would count as 0. A
multiplication and its addition are 2 FLOPs; elementwise work, norms, look-ups and activations that
checkpointing recomputes do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mesocosm.model.base import Base
from mesocosm.model.config import LANGUAGE, ModelConfig
from mesocosm.model.families import build, new_text_net
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.net import TextNet, blank_rows
from mesocosm.model.language.pretrained import pretrained_shape
from mesocosm.model.language.shape import Shape, rung_shape
from mesocosm.model.language.stream import TokenRows
from mesocosm.model.mup import tag_of
from mesocosm.model.net import WorldNet, apply_base
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.tensors import Parts, Windows


@dataclass(frozen=True)
class ParamCounts:
    """Exact numbers of parameters."""

    n: int
    """N of the ladder and the laws: one member (the backbone and one decoder, or one MLP) without
    embeddings and output layers.
    """
    embeddings: int
    """Embeddings and output layers of one member, with their biases: what the spaces decide."""
    dynamics: int  # the backbone and all members' decoders (or all MLPs), embeddings included
    heads: int  # the corrections of reward and termination by history, of all members
    total: int  # all trained parameters: dynamics + heads
    members: int
    base: int  # the frozen base of all members, with the start model before its fit


def params(spec: Spec, config: ModelConfig) -> ParamCounts:
    """The counts of a model that need not exist. Raises UsageError on an invalid config."""
    if config.family == LANGUAGE:
        shape = _shape(config)
        if shape is None:
            return _other_params(spec, config)
        return language_params(shape, spec, config.members, config.adapter.rank)
    with torch.device("meta"):
        return count(build(spec, config), Base(spec, config))


def count(net: WorldNet, base: Base) -> ParamCounts:
    """The counts of an existing model."""
    n = embeddings = dynamics = heads = 0
    for name, parameter in net.named_parameters():
        size, part = parameter.numel(), name.split(".")[0]
        if part in ("reward", "termination"):
            heads += size
        else:
            dynamics += size
            shared = net.memory > 0 and part in ("embed", "blocks", "norm")
            one_member = size if shared else size // net.members
            # An output's bias is a "vector" to muP, but the spaces decide its size.
            if (
                part == "embed"
                or tag_of(name, parameter).kind in ("embedding", "output")
                or name.endswith(("density_bias", "logits_bias", "last.bias"))
                or (part in ("outputs", "mixer") and name.endswith("bias"))
            ):
                embeddings += one_member
            else:
                n += one_member
    frozen = sum(value.numel() for value in base.state_dict().values())
    total = dynamics + heads
    return ParamCounts(n, embeddings, dynamics, heads, total, net.members, frozen)


def flops_per_batch(spec: Spec, config: ModelConfig, batch: int, window: int) -> int:
    """FLOPs of a training step on `batch` windows of `window` transitions (language: tokens): the
    forward pass of base and network, and the network's backward pass.
    """
    if config.family == LANGUAGE:
        shape, rank = _shape(config), config.adapter.rank
        if shape is None:  # forward and backward pass of a dense network, without attention
            return 6 * _other_params(spec, config).total * batch * window
        return language_flops(shape, spec, batch, window, config.members, rank)
    with torch.device("meta"):
        net, base = build(spec, config), Base(spec, config)
        return measured_flops(net, base, blank_windows(spec, batch, window))


def measured_flops(net: WorldNet, base: Base, windows: Windows) -> int:
    """FLOPs of a training step by torch's counter, on any device. Leaves gradients on `net`."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        net(windows, apply_base(base, windows)).objective.backward()
    return int(counter.get_total_flops())


def blank_windows(spec: Spec, batch: int, window: int) -> Windows:
    """Windows of zeros, all valid, none at the start of an episode, on torch's default device."""
    zeros = torch.zeros(batch, window)

    def parts(of: PartSpec, *shape: int) -> Parts:
        return Parts.empty(of, *shape, device=zeros.device)

    o, a, task = spec.observation, spec.action, spec.task
    rows = parts(o, batch, window + 1), parts(a, batch, window), parts(task, batch)
    mask, episode = zeros == 0, zeros[:, 0].long()
    return Windows(*rows, zeros, zeros, zeros, mask, ~mask[:, 0], episode)


def _shape(config: ModelConfig) -> Shape | None:
    """The shape of a text world's network; None for an architecture other than ours."""
    if config.pretrained is None:
        return rung_shape(config.size, config.vocabulary)
    return pretrained_shape(config.pretrained, config.context)


def _other_params(spec: Spec, config: ModelConfig) -> ParamCounts:
    """The counts of a pretrained network of another architecture, which is loaded."""
    net = new_text_net(spec, config)
    total = sum(parameter.numel() for parameter in net.parameters())
    backbone = sum(parameter.numel() for parameter in net.backbone.parameters())
    shape = net.model.shape
    embeddings = shape.vocabulary * shape.d_model
    return ParamCounts(backbone - embeddings, embeddings, backbone, total - backbone, total, 1, 0)


def language_params(shape: Shape, spec: Spec, members: int = 1, rank: int = 0) -> ParamCounts:
    """The counts of a text world with a network of ours, which need not exist. N are the matrices
    and vectors of the blocks, without the token embedding, adapters and heads.
    """
    with torch.device("meta"):
        net = TextNet(Llama(shape, members=members, rank=rank), spec)
    total = sum(parameter.numel() for parameter in net.parameters())
    backbone = sum(parameter.numel() for parameter in net.backbone.parameters())
    heads = total - backbone
    return ParamCounts(shape.params, shape.embeddings, backbone, heads, total, members, 0)


def language_flops(
    shape: Shape, spec: Spec, batch: int, window: int, members: int = 1, rank: int = 0
) -> int:
    """FLOPs of a training step on `batch` rows of `window` tokens."""
    with torch.device("meta"):
        net = TextNet(Llama(shape, members=members, rank=rank), spec)
        return measured_language_flops(net, blank_rows(batch, window))


def measured_language_flops(net: TextNet, rows: TokenRows) -> int:
    """The same by torch's counter, on any device. Leaves gradients on `net`."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        net(rows).objective.backward()
    return int(counter.get_total_flops())
