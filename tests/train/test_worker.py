"""Parts of the worker that need no cluster: the feed, the base, the noise on histories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import UsageError
from mesocosm.model.base import Base
from mesocosm.model.net import unroll
from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint, prepare
from mesocosm.train.feed import Feed
from mesocosm.train.training import corrupted

DATASET = "cart"


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
    worker, driver = (
        Feed(Storage(root), "runs/checkpoints/x"),
        Feed(Storage(root), "runs/checkpoints/x"),
    )
    assert not worker.stopped
    worker.fail("the loss is nan at step 3")
    assert driver.take() == [{"failed": "the loss is nan at step 3"}]
    assert Feed(Storage(root), "runs/checkpoints/x").stopped
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
    storage = Storage(root)
    assert checkpoint.latest(storage, "w") is None
    storage.write("runs/checkpoints/w/checkpoint_manager_snapshot.json", torn)
    with pytest.raises(
        UsageError,
        match=(
            r"'runs/checkpoints/w/checkpoint_manager_snapshot.json' .* is damaged; use --force to"
            r" start again"
        ),
    ):
        checkpoint.latest(storage, "w")


def test_noise_is_on_the_inputs_and_the_same_for_any_number_of_workers(
    tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any]
) -> None:
    storage = Storage(cart_root(tmp_path, 200))
    dataset = prepare.open_datasets(storage, [DATASET])
    codec = Codec.fit(dataset)
    base = Base(codec.spec, load(storage.root).model)
    base.residual_scale.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    loader = Loader(dataset, codec, "train", 8, 8, 0)

    def noisy(step: int, rank: int, world_size: int) -> torch.Tensor:
        windows = corrupted(
            loader.batch(step, rank, world_size), base, 3.0, 0, step * 8 + rank * (8 // world_size)
        )
        transition, outcome = unroll(windows)
        assert torch.equal(outcome.observation.numbers, windows.observation.numbers[:, 1:]), (
            "the targets stay true"
        )
        assert torch.equal(
            transition.observation.numbers[windows.start][:, 0],
            windows.observation.numbers[windows.start][:, 0],
        ), "starts are exact"
        return transition.observation.numbers - windows.observation.numbers[:, :-1]

    whole = noisy(3, 0, 1)
    assert torch.equal(whole, torch.cat([noisy(3, rank, 4) for rank in range(4)]))
    assert not torch.equal(whole, noisy(4, 0, 1))
    spread = torch.cat([noisy(step, 0, 1)[:, 1:] for step in range(60)]).flatten(0, 1).std(0)
    torch.testing.assert_close(spread, 3.0 * base.residual_scale, rtol=0.1, atol=0.0)


def test_the_base_sees_every_training_transition_once(
    tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any]
) -> None:
    storage = Storage(cart_root(tmp_path, 200))
    dataset = prepare.open_datasets(storage, [DATASET])
    codec = Codec.fit(dataset)
    observation, action, _, following, episode = prepare.transitions(dataset, codec)
    assert len(episode) == dataset.count("train") == len(action.categories)
    encode = dataset.observation_codec.encode_list
    numbers = [
        codec.observation_parts(*encode(e.observations)).numbers
        for e in dataset.iter_episodes("train")
    ]
    assert torch.equal(observation.numbers, torch.cat([rows[:-1] for rows in numbers]))
    assert torch.equal(following.numbers, torch.cat([rows[1:] for rows in numbers]))
    assert len(prepare.transitions(dataset, codec, limit=50)[-1]) == 50


def test_codec_and_base_are_kept_for_a_resume(
    tmp_path: Path, cart_root: Callable[..., str], load: Callable[..., Any]
) -> None:
    storage = Storage(cart_root(tmp_path, 100))
    dataset = prepare.open_datasets(storage, [DATASET])
    config = load(storage.root).model
    codec = prepare.fitted_codec(storage, "runs/checkpoints/x", dataset)
    assert json.loads(storage.read("runs/checkpoints/x/codec.json") or b"") == codec.to_json()
    assert prepare.read_base(storage, "runs/checkpoints/x/base", codec.spec, config) is None
    prepare.fit_base(storage, "runs/checkpoints/x/base", dataset, codec, config, seed=1)
    first = prepare.read_base(storage, "runs/checkpoints/x/base", codec.spec, config)
    prepare.fit_base(storage, "runs/checkpoints/x/base", dataset, codec, config, seed=2)
    second = prepare.read_base(storage, "runs/checkpoints/x/base", codec.spec, config)
    assert first is not None and second is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
