"""Collecting from an environment behind OpenEnv's protocol."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from factories import wait_until
from openenv_server import EchoServer

from mesocosm.data.collecting.config import CollectConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import PriceConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.store.artifacts import Artifact, Storage

from .reality import config, scripted

pytestmark = pytest.mark.integration


def test_collect(
    root: str, collect: Callable[[CollectConfig], Artifact], user_module: None
) -> None:
    """Its steps are metered and priced, and a failing one drops its episode."""
    with EchoServer() as server:
        reality = {"price": PriceConfig(per_step=0.5), "success": "info.success"}
        cfg = config(root, f"openenv:{server.url}", steps=20, reality=reality)
        cfg.behaviours = scripted("chat")
        artifact = collect(cfg)
        wait_until(lambda: server.open == 0)
        steps = sum(message["type"] == "step" for message in server.messages)
    data = Dataset([artifact.path])
    storage, price = Storage(root), cfg.reality.price
    totals = Ledger(storage, artifact.id, cfg.reality.budget, price).totals()
    purpose = totals.purposes["collect"]
    assert (purpose.steps, purpose.price) == (steps, steps * 0.5)
    texts = {text for number in range(len(data.table)) for text in data.episode(number).actions}
    assert {"hi there", "go"} <= texts and "crash" not in texts
