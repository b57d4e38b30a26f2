"""A real DeepSpeed engine in this process, in a group of one: its options take effect, and its
state is restored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mesocosm.errors import MesocosmError
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.counts import blank_windows
from mesocosm.model.families import build
from mesocosm.model.mup import init_
from mesocosm.model.net import apply_base
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.train import checkpoint, engine
from mesocosm.train.checkpoint import TrainingProgress
from mesocosm.train.config import TrainConfig
from mesocosm.train.engine import Rank

SPEC = Spec(PartSpec(2, (1e-2,) * 2), PartSpec(1, (1e-2,)))
MODEL = ModelConfig(size="10k", members=1, context=4, base=False)
ALONE = Rank(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def group(one_rank: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield


def start(resume_from: Path | None = None, **options: Any) -> Any:
    net = build(SPEC, MODEL)
    init_(net, 0)
    train = TrainConfig(batch=4, precision="fp32", **options)
    return engine.start(net, train, ALONE, resume_from)[0]


def largest_change(running: Any, steps: int = 3) -> float:
    """The largest change of a weight in a few steps."""
    before = [parameter.detach().clone() for parameter in running.module.parameters()]
    windows = blank_windows(SPEC, 4, 4)
    base = apply_base(Base(SPEC, MODEL), windows)
    for _ in range(steps):
        running.backward(running(windows, base).objective)
        engine.step(running)
    pairs = zip(running.module.parameters(), before, strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_are_clipped(stage: int) -> None:
    """Adam forgets the scale of gradients unless they are far below its eps, so that is where they
    are clipped to.
    """
    assert largest_change(start(zero_stage=stage, weight_decay=0.0)) > 1e-3
    assert largest_change(start(zero_stage=stage, weight_decay=0.0, clip=1e-14)) < 1e-5


def test_random_state_and_weights_are_restored() -> None:
    running = start()
    largest_change(running)
    torch.rand(3)
    folder = checkpoint.save_running(running, TrainingProgress(step=1, steps=2), 0)
    following = torch.rand(5)
    torch.manual_seed(12345)
    again = start(folder)
    assert torch.equal(torch.rand(5), following)
    pairs = zip(again.module.parameters(), running.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert largest_change(again) == largest_change(running), "the optimiser's moments are restored"
    shutil.rmtree(folder)


def test_a_checkpoint_without_all_its_ranks_is_refused() -> None:
    running, progress = start(), TrainingProgress(step=3, steps=9, world_size=2)
    whole, other = (checkpoint.save_running(running, progress, rank) for rank in range(2))
    with pytest.raises(MesocosmError, match=r"file 'rank-00001\.json' is missing .*--force"):
        checkpoint.verify(whole)
    shutil.copytree(other, whole, dirs_exist_ok=True)
    checkpoint.verify(whole)
    shard = next((whole / "ds" / "ds").iterdir())
    for name, data in ((f"ds/ds/{shard.name}", b"stale"), ("progress.json", b"{")):
        (whole / name).write_bytes(data)
        with pytest.raises(MesocosmError, match=f"file '{name}' is missing or damaged"):
            checkpoint.verify(whole)
    for folder in (whole, other):
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("options", "workers", "bytes_a_parameter"),
    [
        ({}, 1, 16),
        ({}, 4, 64),
        ({"zero_stage": 1}, 4, 8 + 4 * 8),
        ({"zero_stage": 2}, 4, 8 + 4 + 4 * 4),
        ({"zero_stage": 3}, 4, 16),
        ({"precision": "bf16"}, 4, 12 + 4 * 6),  # stage 1
    ],
)
def test_the_least_memory_follows_zeros_stage(
    options: dict[str, Any], workers: int, bytes_a_parameter: int
) -> None:
    config, processes = TrainConfig(**{"precision": "fp32"} | options), workers * engine.PROCESS_GIB
    memory, on_gpu = (
        engine.least_gib(2**30, config, workers, on_gpu=on_gpu) for on_gpu in (False, True)
    )
    assert memory == pytest.approx(bytes_a_parameter + processes)
    assert on_gpu == pytest.approx(processes)
