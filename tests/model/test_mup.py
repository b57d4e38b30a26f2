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
from mesocosm.model.ensemble import Ensemble
from mesocosm.model.families import build
from mesocosm.model.ladder import Dims, EnsembleDims
from mesocosm.model.mup import init_, param_groups, tag
from mesocosm.model.net import WorldNet, apply_base
from mesocosm.model.sequence import Sequence
from mesocosm.model.spec import Parts, PartSpec, Spec, Windows

torch.set_num_threads(1)
SPEC = Spec(PartSpec(3, (1e-2,) * 3), PartSpec(1, (1e-2,)), reward_values=(0.0, 1.0))


def data() -> Windows:
    g = torch.Generator().manual_seed(0)
    blank = blank_windows(SPEC, 8, 6)

    def noise(parts: Parts) -> Parts:
        return Parts(torch.randn(parts.numbers.shape, generator=g), parts.categories)

    return replace(blank, observation=noise(blank.observation), action=noise(blank.action))


def watched(net: WorldNet) -> dict[str, nn.Module]:
    if isinstance(net, Sequence):
        assert net.decoder.density is not None
        return {
            "backbone": net.blocks[-1],
            "decoder": net.decoder.blocks[-1],
            "outputs": net.decoder.density,
        }
    assert isinstance(net, Ensemble)
    return {"first": net.hidden[0], "last hidden": net.hidden[-1], "outputs": net.last}


def moved(
    monkeypatch: pytest.MonkeyPatch, rung: Dims | EnsembleDims, *, groups: bool = True
) -> dict[str, float]:
    """RMS of what 5 steps change in the activations of a network of `rung`; without `groups` every
    parameter gets the base's lr.
    """
    ensemble = isinstance(rung, EnsembleDims)
    monkeypatch.setitem(
        ladder.RUNGS, "test", ladder.RUNGS["30k"] if isinstance(rung, EnsembleDims) else rung
    )
    if isinstance(rung, EnsembleDims):
        monkeypatch.setitem(ladder.ENSEMBLE_RUNGS, "test", rung)
    config = ModelConfig(
        family="ensemble" if ensemble else "sequence", size="test", members=1, context=6, base=False
    )
    net, base, windows = build(SPEC, config), Base(SPEC, config), data()
    init_(net, 0)
    seen: dict[str, Tensor] = {}
    for name, module in watched(net).items():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.__setitem__(
                name, output.detach().clone()
            )
        )

    def activations() -> dict[str, Tensor]:
        with torch.no_grad():
            net(windows, apply_base(base, windows))
        return dict(seen)

    before = activations()
    groups_of_parameters = (
        param_groups(net, 1e-2, 0.0)
        if groups
        else [{"params": list(net.parameters()), "lr": 1e-2, "weight_decay": 0.0}]
    )
    optimizer = torch.optim.AdamW(groups_of_parameters)
    for _ in range(5):
        optimizer.zero_grad()
        net(windows, apply_base(base, windows)).objective.backward()
        optimizer.step()
    after = activations()
    return {name: float((after[name] - before[name]).pow(2).mean().sqrt()) for name in before}


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
    a, b = moved(monkeypatch, small), moved(monkeypatch, large)
    for name in a:
        assert 0.6 < b[name] / a[name] < 1.6, (name, a[name], b[name])


def test_without_the_groups_it_grows_with_width(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (moved(monkeypatch, narrow(width), groups=False) for width in (64, 256))
    assert b["backbone"] > 3 * a["backbone"]


def test_groups_hold_every_parameter_once_with_the_papers_factors() -> None:
    config = ModelConfig(size="300k")
    net = build(SPEC, config)
    groups = param_groups(net, 1e-3, 0.1, 1e-8)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert isinstance(net, Sequence)
    of = {id(p): group for group in groups for p in group["params"]}
    m_n, m_l = 96 / 64, 3 / 2
    hidden = of[id(net.get_parameter("blocks.0.qkv.weight"))]
    assert (
        hidden["lr"] == pytest.approx(1e-3 / m_n)
        and hidden["weight_decay"] == pytest.approx(0.1 * m_n)
        and hidden["eps"] == pytest.approx(1e-8 / (m_n * m_l))
    )
    gain = of[id(net.get_parameter("blocks.0.norm_1.weight"))]
    assert gain["lr"] == 1e-3 and gain["weight_decay"] == 0.0
    assert gain["eps"] == pytest.approx(1e-8 / (m_n * m_l))
    embedding = of[id(net.get_parameter("embed.numbers"))]
    assert (embedding["lr"], embedding["weight_decay"], embedding["eps"]) == (1e-3, 0.0, 1e-8)


def test_initialisation_is_a_function_of_the_seed() -> None:
    nets = [build(SPEC, ModelConfig(size="10k")) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        init_(net, seed)
    same, again, other = (net.state_dict() for net in nets)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["blocks.0.qkv.weight"], other["blocks.0.qkv.weight"])
    assert float(same["blocks.0.qkv.weight"].std()) == pytest.approx(32**-0.5, rel=0.1)


def test_an_untagged_parameter_is_refused() -> None:
    layer = nn.Linear(3, 3)
    tag(layer.weight, "hidden")
    with pytest.raises(AssertionError, match="bias"):
        param_groups(layer, 1e-3, 0.0)
