"""Known parts beside the learned ones, on held-out transitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesocosm.data.loading.codec import Codec
from mesocosm.envs import known as shipped
from mesocosm.evaluate.metrics.known import known_parts
from mesocosm.model.known import KnownFunction
from mesocosm.model.world import World

from . import worlds
from .lab import Lab, summary_of
from .test_report import parsed

REWARD = KnownFunction("walk:reward", "0", lambda o, a, following: following[:, 0])
ENDED = KnownFunction("walk:ended", "0", lambda o, a, following: following[:, 0] > 2)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_true_functions_make_no_error_and_untrained_networks_do(
    tmp_path: Path, family: str
) -> None:
    data = worlds.collect(tmp_path / "walks", 30)
    world = worlds.untrained_world(data, family=family, context=4, head_steps=1)
    assert known_parts(world, data) is None
    world.known = Codec.from_json(world.codec).known(REWARD, ENDED)
    parts = known_parts(world, data)
    assert parts is not None and parts.reward is not None and parts.terminated is not None
    assert parts.split == "valid" and parts.transitions == data.count("valid")
    assert parts.reward.known < 1e-5 < 0.1 * parts.reward.size < parts.reward.learned
    ended = parts.terminated
    assert (ended.known_recall, ended.known_precision) == (1.0, 1.0) and ended.terminals > 2
    assert (ended.learned_recall, ended.learned_precision) == (0.0, None)


def test_a_report_compares_the_known_parts(lab: Lab) -> None:
    world = World.load(lab.storage.artifact("worlds", "w0").path)
    function = KnownFunction.load(f"{shipped.__name__}:never", "known.terminated")
    world.known = Codec.from_json(world.codec).known(None, function)
    lab.storage.make("worlds", "known", {"inputs": {"datasets": ["walks"]}}, world.save)
    artifact = lab.evaluate(lab.config(world="worlds/known"))
    parts = summary_of(artifact)["suite"]["known"]
    assert parts["reward"] is None and parts["terminated"]["known_recall"] == 0.0
    assert lab.figures["known/terminated/learned_recall"] == 0.0
    page = (artifact.path / "report.html").read_text()
    parsed(page)
    assert "Known parts" in page and "mesocosm.envs.known:never" in page
