"""Parts of the worker that need no cluster: the feed, the base, the noise on histories."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.net import unroll
from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint, prepare
from mesocosm.train.driver_channel import Feed
from mesocosm.train.rank_trainer import corrupted


def test_records_arrive_once_in_order_whoever_reads(root: str) -> None:
    worker, driver, later = (Feed(Storage(root), "runs/checkpoints/x") for _ in range(3))
    for step in range(3):
        worker.put({"step": step})
        worker.flush()
    assert [record["step"] for record in driver.take()] == [0, 1, 2]
    worker.put({"step": 3})
    worker.flush()
    assert [record["step"] for record in later.take()] == [3]
    assert driver.take() == []


def test_a_failure_stops_every_later_attempt(root: str) -> None:
    worker, driver, later = (Feed(Storage(root), "runs/checkpoints/x") for _ in range(3))
    assert not worker.stopped
    worker.fail("the loss is nan at step 3")
    assert driver.take() == [{"failed": "the loss is nan at step 3"}]
    assert later.stopped
    driver.clear()
    assert not worker.stopped


def test_a_new_run_drops_failures_and_keeps_measurements(root: str) -> None:
    """The driver was killed before it read any of it."""
    worker = Feed(Storage(root), "runs/checkpoints/x")
    worker.put({"step": 1})
    worker.fail("the loss is nan at step 2")
    fresh = Feed(Storage(root), "runs/checkpoints/x")
    fresh.clear()
    assert fresh.take() == [{"step": 1}] and not fresh.stopped and fresh.take() == []


@pytest.mark.parametrize(
    "torn", [b"", b'{"latest_checkpoint_res', b"{}", b'{"latest_checkpoint_result": {"a": 1}}']
)
def test_a_torn_record_of_checkpoints_is_an_error(root: str, torn: bytes) -> None:
    storage, name = Storage(root), "runs/checkpoints/w/checkpoint_manager_snapshot.json"
    assert checkpoint.latest(storage, "w") is None
    storage.write(name, torn)
    with pytest.raises(UsageError, match=f"'{name}' .* is damaged; use --force to start again"):
        checkpoint.latest(storage, "w")


@dataclass
class Cart:
    storage: Storage
    dataset: Dataset
    codec: Codec
    model: ModelConfig


@pytest.fixture
def cart(tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any]) -> Cart:
    storage = Storage(cart_root(tmp_path, 200))
    dataset = prepare.open_datasets(storage, ["cart"])
    return Cart(storage, dataset, Codec.fit(dataset), load(storage.root).model)


def test_noise_is_on_the_inputs_and_the_same_for_any_number_of_workers(cart: Cart) -> None:
    base = Base(cart.codec.spec, cart.model)
    base.residual_scale.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    loader = Loader(cart.dataset, cart.codec, "train", 8, 8, 0)

    def noise(step: int, rank: int, world_size: int) -> torch.Tensor:
        batch, first = loader.batch(step, rank, world_size), step * 8 + rank * (8 // world_size)
        windows = corrupted(batch, base, 3.0, 0, first)
        transition, outcome = unroll(windows)
        truth, seen = windows.observation.numbers, transition.observation.numbers
        assert torch.equal(outcome.observation.numbers, truth[:, 1:]), "the targets stay true"
        assert torch.equal(seen[windows.start][:, 0], truth[windows.start][:, 0]), "exact starts"
        return seen - truth[:, :-1]

    whole = noise(3, 0, 1)
    assert torch.equal(whole, torch.cat([noise(3, rank, 4) for rank in range(4)]))
    assert not torch.equal(whole, noise(4, 0, 1))
    spread = torch.cat([noise(step, 0, 1)[:, 1:] for step in range(60)]).flatten(0, 1).std(0)
    torch.testing.assert_close(spread, 3.0 * base.residual_scale, rtol=0.1, atol=0.0)


def test_the_base_sees_every_training_transition_once(cart: Cart) -> None:
    dataset, codec = cart.dataset, cart.codec
    observation, action, _, following, episode = prepare.transitions(dataset, codec)
    assert len(episode) == dataset.count("train") == len(action.categories)
    encode = dataset.observation_codec.encode_list
    episodes = (encode(e.observations) for e in dataset.iter_episodes("train"))
    numbers = [codec.observation_parts(*encoded).numbers for encoded in episodes]
    assert torch.equal(observation.numbers, torch.cat([rows[:-1] for rows in numbers]))
    assert torch.equal(following.numbers, torch.cat([rows[1:] for rows in numbers]))
    assert len(prepare.transitions(dataset, codec, limit=50)[-1]) == 50


@pytest.mark.integration
def test_reward_and_termination_are_fitted_with_the_base(cart: Cart) -> None:
    dataset, codec = cart.dataset, cart.codec
    model = replace(cart.model, members=4, head_steps=300)
    base, again = (prepare.fitted_base(dataset, codec, model, 0) for _ in range(2))
    states = zip(base.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for (_, a), (_, b) in states)
    metrics = base.metrics
    assert metrics["termination_steps"] > 0 and metrics["termination_held_out"] < 0.5
    assert not any(name.startswith("reward") for name in metrics), "CartPole's reward is constant"
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.integration
def test_codec_and_base_are_stored_for_a_resume(cart: Cart) -> None:
    storage, folder, path = cart.storage, "runs/checkpoints/x", "runs/checkpoints/x/base"
    codec = prepare.fitted_codec(storage, folder, cart.dataset, cart.model)
    assert json.loads(storage.read(f"{folder}/codec.json") or b"") == codec.to_json()
    assert prepare.read_base(storage, path, codec.spec, cart.model) is None
    first, second = (
        prepare.fit_base(storage, path, cart.dataset, codec, cart.model, seed).state_dict()
        for seed in (1, 2)
    )
    stored = prepare.read_base(storage, path, codec.spec, cart.model)
    assert stored is not None
    for name, value in stored.state_dict().items():
        for other in (first[name], second[name]):
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(other))
