"""The export of a world: the check that its episodes end where those of the data do, and the scale
of its disagreement.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.evaluate.metrics.log import Log
from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.families import build
from mesocosm.model.layers import Constant
from mesocosm.model.world import World
from mesocosm.store.artifacts import Storage
from mesocosm.train import prepare
from mesocosm.train.export import EXCEEDED, TerminationCheck, calibrate, check_termination


@pytest.mark.parametrize(("transitions", "measured_on"), [(40, "training"), (400, "validation")])
def test_a_world_that_ends_everywhere_fails(
    tmp_path: Path,
    cart_root: Callable[..., str],
    load: Callable[..., Any],
    transitions: int,
    measured_on: str,
) -> None:
    """Its precision is the data's own rate of terminals, also where that is measured on events, of
    which a third are terminals.
    """
    storage = Storage(cart_root(tmp_path, transitions))
    dataset = prepare.open_datasets(storage, ["cart"])
    codec = Codec.fit(dataset)
    config = load(storage.root).model
    world = World(build(codec.spec, config), Base(codec.spec, config))
    world.net.termination.prior = Constant(torch.tensor(50.0))
    check = check_termination(world, dataset, codec, 0)
    split = "train" if measured_on == "training" else "valid"
    assert check.measured_on == measured_on and check.recall == 1.0
    rate = len(dataset.episodes(split)) / dataset.count(split)
    assert check.precision == pytest.approx(rate, rel=0.01)
    if check.terminals >= 10:
        low = f"precision {check.precision:.2g} on {check.terminals} terminal transitions"
        assert check.verdict.startswith(f"failed: {low}")


@pytest.mark.parametrize(
    ("terminals", "hits", "false_alarms", "verdict"),
    [
        (0, 0, 9.0, "not applicable: no episode of the data terminates"),
        (3, 0, 0.0, "failed: of 3 terminal transitions (validation) the world ends none"),
        (50, 4, 0.0, "failed: recall 0.08 on 50 terminal transitions (validation) is below 0.1"),
        (50, 5, 46.0, "failed: precision 0.098 on 50 terminal transitions (validation) is below"),
        (50, 5, 5.0, "passed"),
        (9, 9, 500.0, "passed"),
    ],
)
def test_verdicts(terminals: int, hits: int, false_alarms: float, verdict: str) -> None:
    check = TerminationCheck(terminals, hits, false_alarms, "validation")
    assert check.verdict.startswith(verdict)


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_a_tenth_of_held_out_transitions_disagree_by_more_than_one(
    tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any], family: str
) -> None:
    storage = Storage(cart_root(tmp_path, 2000))
    dataset = prepare.open_datasets(storage, ["cart"])
    codec = Codec.fit(dataset)
    config = load(storage.root, f"model.family={family}", "model.members=3").model
    torch.manual_seed(0)
    net = build(codec.spec, config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    world = World(net, Base(codec.spec, config), codec.to_json())
    calibrate(world, dataset, codec)
    log, n = Log(dataset, codec, "valid"), dataset.count("valid")
    episode, step = log.starts(1, n, np.random.default_rng(0))
    carry = world.begin(
        log.task(episode), log.observation(episode, step), torch.zeros(n, dtype=torch.int64)
    )
    _, out = world.step(carry, log.action(episode, step), rng.keys(0, torch.arange(n), 0, 0))
    above = float((out.disagreement > 1).float().mean())
    assert n > 100 and abs(above - EXCEEDED) < (0.01 if family == "ensemble" else 0.1), (
        "history, which these starts lack, shifts the sequence family's"
    )
    world.save(tmp_path / "world")
    assert World.load(tmp_path / "world").disagreement_scale == world.disagreement_scale != 1.0
