"""One set of hyperparameters for every rung: CompleteP's parametrisation (Dey et al. 2025, arXiv
2505.01618, table 1, alpha = 1).

With m_N = width / base width and m_L = layers / base layers, and AdamW:

    kind        initial std          learning rate    weight decay    AdamW's eps
    hidden      fan_in^-1/2          lr / m_N         wd * m_N        eps / (m_N m_L)
    embedding   1 / sqrt(inputs)     lr               0               eps
    output      given, see `tag`     lr               0               eps / m_N
    vector      as constructed       lr               0               eps / (m_N m_L)

The paper divides the embedding's eps by m_N too; here eps is far below an embedding's gradients
either way, and its tags carry no width. Nor do those of biases, whose eps is eps / m_L. The forward
multipliers (residual branches m_L^-1, outputs m_N^-1) are `ladder.Dims`'s; its docstring says what
a network must do. A network tags each parameter when it makes it; `init_` and `param_groups` read
the tags and refuse an untagged parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Kind = Literal["hidden", "embedding", "output", "vector"]
P = TypeVar("P", bound=Tensor)


@dataclass(frozen=True)
class Tag:
    kind: Kind
    width: float
    """m_N of the parameter's fan-in."""
    depth: float
    """m_L of the residual stack it lives in; 1 outside."""
    std: float
    """Initial standard deviation; 0 with kind "vector" leaves the parameter as constructed."""


def tag(
    parameter: P,
    kind: Kind,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    fan_in: int | None = None,
    gain: float = 1.0,
) -> P:
    """Mark `parameter` for `init_`, `param_groups` and `counts`; returns it.

    `fan_in`: the number of summed inputs; None reads the last dimension (as nn.Linear's [out, in]).
    Pass it for stacked [K, in, out] weights (fan_in = in) and for lookup tables (fan_in = 1). The
    initial std is gain * fan_in^-1/2, for an "output" gain * (fan_in / width)^-1/2, since its
    result is multiplied by 1 / width.
    """
    summed = parameter.shape[-1] if fan_in is None else fan_in
    if kind == "vector":
        std = 0.0
    elif kind == "output":
        std = gain * (summed / width) ** -0.5
    else:
        std = gain * summed**-0.5
    parameter.mup = Tag(kind, width, depth, std)  # type: ignore[attr-defined]
    return parameter


def tag_of(name: str, parameter: Tensor) -> Tag:
    found = getattr(parameter, "mup", None)
    assert isinstance(found, Tag), f"parameter {name} has no mup.tag"
    return found


def init_(net: nn.Module, seed: int) -> None:
    """Draw every tagged parameter of `net` anew from `seed`, in the order of `named_parameters`;
    vectors stay as constructed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            std = tag_of(name, parameter).std
            if std:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def param_groups(
    net: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8
) -> list[dict[str, Any]]:
    """AdamW's parameter groups by the table above: one group for each distinct (lr, weight decay,
    eps), in a stable order.

    `lr`, `weight_decay` and `eps` are the base width's. Weight decay is torch's (multiplied by the
    group's lr).
    """
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in _trainable(net):
        t = tag_of(name, parameter)
        if t.kind == "hidden":
            key = (lr / t.width, weight_decay * t.width, eps / (t.width * t.depth))
        elif t.kind == "vector":
            key = (lr, 0.0, eps / (t.width * t.depth))
        else:
            key = (lr, 0.0, eps / t.width)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": ps, "lr": a, "weight_decay": w, "eps": e} for (a, w, e), ps in groups.items()
    ]


def _trainable(net: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return (
        (name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad
    )
