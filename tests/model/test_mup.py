"""Coordinate check: a few steps at one learning rate move activations by as much at every width and
depth.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mesocosm.model import ladder
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.counts import blank_windows
from mesocosm.model.families import build
from mesocosm.model.ladder import Dims, EnsembleDims
from mesocosm.model.mup import init_, param_groups, tag
from mesocosm.model.net import apply_base
from mesocosm.model.spec import PartSpec, Spec

from .nets import noise_like

SPEC = Spec(PartSpec(3, (1e-2,) * 3), PartSpec(1, (1e-2,)), reward_values=(0.0, 1.0))
WATCHED = {
    "sequence": ("blocks.{last}", "decoder.blocks.{last_decoder}", "decoder.density"),
    "ensemble": ("hidden.0", "hidden.{last}", "last"),
}
"""The modules whose activations are compared"""


def moved(
    monkeypatch: pytest.MonkeyPatch, rung: Dims | EnsembleDims, *, groups: bool = True
) -> list[float]:
    """RMS of the change in the watched activations by 5 steps of a network of `rung`; without
    `groups` every parameter gets the base's lr.
    """
    if isinstance(rung, Dims):
        family, last, last_decoder = "sequence", rung.layers - 1, rung.dec_layers - 1
        monkeypatch.setitem(ladder.RUNGS, "test", rung)
    else:
        family, last, last_decoder = "ensemble", rung.layers - 2, 0
        monkeypatch.setitem(ladder.RUNGS, "test", ladder.RUNGS["30k"])
        monkeypatch.setitem(ladder.ENSEMBLE_RUNGS, "test", rung)
    config = ModelConfig(family=family, size="test", members=1, context=6, base=False)
    generator, blank = torch.Generator().manual_seed(0), blank_windows(SPEC, 8, 6)
    parts = {
        name: noise_like(getattr(blank, name), generator) for name in ("observation", "action")
    }
    windows, base = replace(blank, **parts), Base(SPEC, config)
    net = build(SPEC, config)
    init_(net, 0)
    outputs: list[Tensor] = []
    for name in WATCHED[family]:
        module = net.get_submodule(name.format(last=last, last_decoder=last_decoder))
        module.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))

    def activations() -> list[Tensor]:
        outputs.clear()
        with torch.no_grad():
            net(windows, apply_base(base, windows))
        return list(outputs)

    before = activations()
    plain = [{"params": list(net.parameters()), "lr": 1e-2, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(param_groups(net, 1e-2, 0.0) if groups else plain)
    for _ in range(5):
        optimizer.zero_grad()
        net(windows, apply_base(base, windows)).objective.backward()
        optimizer.step()
    pairs = zip(activations(), before, strict=True)
    return [float((after - first).pow(2).mean().sqrt()) for after, first in pairs]


def narrow(width: int) -> Dims:
    return Dims(width, 2, 2 * width, width // 2, 1, width)


def deep(layers: int) -> Dims:
    return Dims(64, layers, 128, 32, layers // 2, 64)


@pytest.mark.parametrize(
    ("small", "large"),
    [(narrow(64), narrow(256)), (deep(2), deep(8)), (EnsembleDims(64, 3), EnsembleDims(512, 3))],
)
def test_change_is_alike_at_every_size(
    monkeypatch: pytest.MonkeyPatch, small: Dims | EnsembleDims, large: Dims | EnsembleDims
) -> None:
    pairs = list(zip(moved(monkeypatch, small), moved(monkeypatch, large), strict=True))
    assert len(pairs) == 3 and all(0.6 < b / a < 1.6 for a, b in pairs), pairs


def test_without_the_groups_it_grows_with_width(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (moved(monkeypatch, narrow(width), groups=False)[0] for width in (64, 256))
    assert b > 3 * a


def test_groups_hold_every_parameter_once_with_the_factors_of_the_paper() -> None:
    net = build(SPEC, ModelConfig(size="300k"))
    groups = param_groups(net, 1e-3, 0.1, 1e-8)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    m_n, m_l = 96 / 64, 3 / 2
    eps = 1e-8 / (m_n * m_l)
    for name, expected in (
        ("blocks.0.qkv.weight", (1e-3 / m_n, 0.1 * m_n, eps)),
        ("blocks.0.norm_1.weight", (1e-3, 0.0, eps)),
        ("embed.numbers", (1e-3, 0.0, 1e-8)),
    ):
        parameter = net.get_parameter(name)
        (group,) = [g for g in groups if any(p is parameter for p in g["params"])]
        values = group["lr"], group["weight_decay"], group["eps"]
        assert values == pytest.approx(expected, abs=0), name


def test_initialisation_is_a_function_of_the_seed() -> None:
    nets = [build(SPEC, ModelConfig(size="10k")) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        init_(net, seed)
    same, again, other = (net.state_dict() for net in nets)
    assert all(torch.equal(same[name], again[name]) for name in same)
    weight = same["blocks.0.qkv.weight"]
    assert not torch.equal(weight, other["blocks.0.qkv.weight"])
    assert float(weight.std()) == pytest.approx(32**-0.5, rel=0.1)


def test_an_untagged_parameter_is_refused() -> None:
    layer = nn.Linear(3, 3)
    tag(layer.weight, "hidden")
    with pytest.raises(AssertionError, match="bias"):
        param_groups(layer, 1e-3, 0.0)
