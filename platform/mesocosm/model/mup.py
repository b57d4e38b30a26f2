"""One set of hyperparameters for every rung: CompleteP's parametrisation (Dey et al. 2025, arXiv
2505.01618, table 1, alpha = 1).

With m_N = width / base width, m_L = layers / base layers, and AdamW:

    kind        initial std          learning rate    weight decay    AdamW's eps
    hidden      fan_in^-1/2          lr / m_N         wd * m_N        eps / (m_N m_L)
    embedding   1 / sqrt(inputs)     lr               0               eps
    output      see `tag`            lr               0               eps / m_N
    vector      as constructed       lr               0               eps / (m_N m_L)

Two deviations from the paper: the embedding's eps is not divided by m_N, because it is far below an
embedding's gradients either way, and the eps of biases is eps / m_L. `ladder` describes the forward
multipliers (residual branches m_L^-1, outputs m_N^-1). A network tags each parameter when it
creates it; `init_` and `param_groups` read the tags and refuse an untagged parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Kind = Literal["hidden", "embedding", "output", "vector"]
"""hidden: both sides grow with the width. embedding: the input side is fixed (projections of
numbers, category tables, slot vectors). output: the output side is fixed (mixture parameters,
logits). vector: norm gains and biases.
"""
P = TypeVar("P", bound=Tensor)


@dataclass(frozen=True)
class Tag:
    kind: Kind
    width: float  # m_N of the parameter's fan-in
    depth: float  # m_L of the parameter's residual stack; 1 outside one
    std: float  # initial standard deviation; 0 leaves the parameter as constructed


def tag(
    parameter: P,
    kind: Kind,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    fan_in: int | None = None,
    gain: float = 1.0,
) -> P:
    """Mark `parameter` for `init_`, `param_groups` and `counts`, and return it.

    Args:
        fan_in: The number of summed inputs; by default the last dimension (nn.Linear's [out, in]).
            Pass it for stacked [K, in, out] weights (in) and for lookup tables (1).
        gain: The initial std is gain * fan_in^-1/2, for an "output" gain * (fan_in / width)^-1/2,
            because its result is multiplied by 1 / width.
    """
    inputs = parameter.shape[-1] if fan_in is None else fan_in
    std = gain * (inputs / width if kind == "output" else inputs) ** -0.5
    std = 0.0 if kind == "vector" else std
    parameter.mup = Tag(kind, width, depth, std)  # type: ignore[attr-defined]
    return parameter


def tag_of(name: str, parameter: Tensor) -> Tag:
    tag = getattr(parameter, "mup", None)
    assert isinstance(tag, Tag), f"parameter {name} has no mup.tag"
    return tag


def init_(net: nn.Module, seed: int) -> None:
    """Draw every tagged parameter of `net` from `seed`, in the order of `named_parameters`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            std = tag_of(name, parameter).std
            if std:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def param_groups(
    net: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8
) -> list[dict[str, Any]]:
    """AdamW's parameter groups, one for each distinct (lr, weight decay, eps), in a stable order.

    The arguments are those of the base width. Weight decay is torch's (times the group's lr).
    """
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        t = tag_of(name, parameter)
        key = (lr, 0.0, eps / t.width)
        if t.kind == "hidden":
            key = (lr / t.width, weight_decay * t.width, eps / (t.width * t.depth))
        elif t.kind == "vector":
            key = (lr, 0.0, eps / (t.width * t.depth))
        groups.setdefault(key, []).append(parameter)
    names = ("lr", "weight_decay", "eps")
    return [{"params": ps, **dict(zip(names, key, strict=True))} for key, ps in groups.items()]
