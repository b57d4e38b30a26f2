"""Counts are exact: parameters against the modules themselves, FLOPs against torch's counter on the
CPU.
"""

from __future__ import annotations

import time

import pytest

from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.counts import blank_windows, count, flops_per_batch, measured_flops, params
from mesocosm.model.families import build
from mesocosm.model.ladder import dims, ensemble_dims
from mesocosm.model.mup import init_
from mesocosm.model.spec import PartSpec, Spec, TextSpan

PLAIN = Spec(PartSpec(4, (1e-3,) * 4), PartSpec(categories=(2,)), reward_values=(1.0,))
RICH = Spec(
    PartSpec(3, (1e-3,) * 3, (3, 7, 7, 7), (TextSpan(1, 3, 1),)),
    PartSpec(2, (1e-3,) * 2, (4,)),
    PartSpec(1, (1e-3,)),
    terminal_rate=0.1,
    durations=True,
)
WORDS = Spec(PartSpec(0, (), (9, 9), (TextSpan(0, 2, 0),)), PartSpec(0, (), (3,)))
SPECS = {"plain": PLAIN, "rich": RICH, "words": WORDS}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_parameters_are_exact(spec: Spec, family: str) -> None:
    config = ModelConfig(family=family, size="30k", members=3)
    net, base = build(spec, config), Base(spec, config)
    counts = params(spec, config)
    assert counts == count(net, base)
    assert counts.total == sum(p.numel() for p in net.parameters())
    assert counts.total == counts.dynamics + counts.heads
    assert counts.base == sum(b.numel() for b in base.state_dict().values()) and counts.members == 3
    assert counts.n == (dims("30k") if family == "sequence" else ensemble_dims("30k")).params
    one = params(spec, ModelConfig(family=family, size="30k", members=1))
    assert (one.n, one.embeddings) == (counts.n, counts.embeddings)
    assert one.n + one.embeddings == one.dynamics


@pytest.mark.parametrize("size", ["10k", "1m", "300m", "7b"])
def test_every_rung_is_counted_without_being_made(size: str) -> None:
    assert params(PLAIN, ModelConfig(size=size)).n == dims(size).params
    assert params(PLAIN, ModelConfig(size=size, family="ensemble")).n == ensemble_dims(size).params


@pytest.mark.integration
@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (PLAIN, ModelConfig(size="10k", members=2)),
        (RICH, ModelConfig(size="100k", members=3, base=False)),
        (WORDS, ModelConfig(size="1m", members=1)),
        (PLAIN, ModelConfig(family="ensemble", size="10k")),
        (RICH, ModelConfig(family="ensemble", size="1m", members=2)),
    ],
)
def test_flops_are_what_torch_counts_on_the_cpu(spec: Spec, config: ModelConfig) -> None:
    net, base = build(spec, config), Base(spec, config)
    init_(net, 0)
    windows = blank_windows(spec, 3, 5)
    assert flops_per_batch(spec, config, 3, 5) == measured_flops(net, base, windows) > 0
    assert flops_per_batch(spec, config, 1, 5) * 3 == flops_per_batch(spec, config, 3, 5)


def test_attention_counts_the_full_square() -> None:
    """The second difference over windows of W is the square of scores alone: 2 products of W x W x
    d_model a layer, and twice as many backward.
    """
    config, rung = ModelConfig(size="30k", members=1, context=64), dims("30k")
    a, b, c = (flops_per_batch(PLAIN, config, 1, w) for w in (16, 32, 48))
    assert (c - b) - (b - a) == rung.layers * 3 * 2 * 2 * rung.d_model * (48**2 - 2 * 32**2 + 16**2)


@pytest.mark.integration
def test_a_planner_can_count_7b_quickly() -> None:
    config = ModelConfig(size="7b", members=4)
    began = time.process_time()
    counts, flops = params(PLAIN, config), flops_per_batch(PLAIN, config, 1, 16) / 16
    assert time.process_time() - began < 60
    assert counts.n == pytest.approx(7e9, rel=0.15)
    # 6 N for the backbone, and the decoders' on every slot.
    assert flops > 6 * 0.97 * (counts.n - 4 * counts.embeddings)
