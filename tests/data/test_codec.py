from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.model.spec import Spec
from mesocosm.model.tensors import Parts

from .goals import GOAL, Write, fitted, goal_episodes


def encoded(codec: Codec, dataset: Dataset, values: list[Any]) -> Parts:
    return codec.observation_parts(*dataset.observation_codec.encode_list(values))


def test_statistics_are_of_the_training_split(write: Write) -> None:
    codec, dataset = fitted(write, goal_episodes())
    train = list(dataset.iter_episodes("train"))
    body = np.concatenate([[o["body"] for o in e.observations] for e in train])
    numbers = (
        encoded(codec, dataset, [o for e in train for o in e.observations]).numbers.double().numpy()
    )
    # columns in the space's own order: goal.at, then the three of the body
    np.testing.assert_allclose(
        numbers[:, [1, 3]],
        (body[:, [0, 2]] - body[:, [0, 2]].mean(0)) / body[:, [0, 2]].std(0),
        atol=1e-6,
    )
    assert (numbers[:, 2] == 0).all()
    std = body.std(0)
    assert codec.spec.observation.bins[1] == pytest.approx(
        1e-3 / std[0]
    )  # 10**floor(log10(1e-4 * 50))
    assert codec.spec.observation.bins[3] == pytest.approx(
        10 ** np.floor(np.log10(1e-4 * std[2])) / std[2]
    )
    assert codec.spec.observation.bins[2] == pytest.approx(1e-4), "a constant has scale 1"
    change = np.concatenate([np.diff([o["body"] for o in e.observations], axis=0) for e in train])
    np.testing.assert_allclose(codec.to_json()["delta_scale"][1:], change.std(0), rtol=1e-9)
    ends = [e.outcome == "terminated" for e in train]
    assert codec.spec.terminal_rate == pytest.approx(sum(ends) / sum(map(len, train)))
    assert codec.spec.reward_values is None
    rewards = np.concatenate([e.rewards for e in train])
    assert (codec.spec.reward_mean, codec.spec.reward_scale) == pytest.approx(
        (rewards.mean(), rewards.std())
    )


def test_rare_large_rewards_leave_the_scale_of_the_others(write: Write) -> None:
    episodes = goal_episodes()
    plain = fitted(write, episodes)[0].spec
    for episode in episodes:
        episode.rewards[-1] = -1000.0 * plain.reward_scale
    codec, dataset = fitted(write, episodes)
    rewards = np.concatenate([e.rewards for e in dataset.iter_episodes("train")])
    others = rewards[rewards > -500.0 * plain.reward_scale]
    spec = Codec.from_json(codec.to_json()).spec
    assert len(others) < len(rewards) and plain.reward_rare is None
    assert (spec.reward_mean, spec.reward_scale) == pytest.approx((others.mean(), others.std()))
    assert spec.reward_rare is not None
    share, mean, scale = spec.reward_rare
    assert share == pytest.approx(1 - len(others) / len(rewards))
    assert mean == pytest.approx((rewards.min() - others.mean()) / others.std())
    assert scale == pytest.approx(1e-3 * -mean)


def test_integers_have_precision_one(counted_dataset: Callable[..., Dataset]) -> None:
    codec = Codec.fit(counted_dataset([30, 30, 30]))
    (first, second) = codec.spec.observation.bins
    assert codec.decode_observation(codec.observation(np.array([[0, 0], [1, 1]]))).tolist() == [
        [0, 0],
        [1, 1],
    ]
    steps = codec.observation(np.array([[0, 0], [1, 1]])).numbers.diff(dim=0)[0]
    assert steps.tolist() == pytest.approx([first, second]), "one bin is one unit"


def test_values_round_trip_also_far_outside_the_data(write: Write) -> None:
    codec, dataset = fitted(write, goal_episodes())
    values = [o for e in dataset.iter_episodes() for o in e.observations[:3]]
    values.append({**values[0], "body": np.array([1e6 + 5e5, -40.0, 1e4])})
    back = codec.decode_observation(encoded(codec, dataset, values))
    np.testing.assert_allclose(back["body"], [v["body"] for v in values], rtol=1e-6, atol=1e-4)
    assert back["word"] == tuple(v["word"] for v in values)
    assert back["lamp"].tolist() == [v["lamp"] for v in values]
    again = codec.observation(back)
    np.testing.assert_allclose(
        again.numbers, encoded(codec, dataset, values).numbers, rtol=1e-6, atol=1e-6
    )
    actions = np.array([[0.25, -3], [9, 0.5]], np.float32)
    decoded = codec.decode_action(codec.action(actions))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, actions, rtol=1e-6)


def test_few_reward_values_are_exact_categories(write: Write) -> None:
    values = np.array([-1 / 3, 0.0, 0.1, 1e9])
    codec, _ = fitted(write, goal_episodes(rewards=values[np.arange(20) % 4], outcome="terminated"))
    assert codec.spec.reward_values == tuple(values)
    codes = codec.reward(values[[2, 0, 3]])
    assert codes.dtype == torch.float32 and codes.tolist() == [2, 0, 3]
    assert codec.reward(np.array([0.09, -7.0, 1e12])).tolist() == [2, 0, 3], (
        "an unseen reward is the nearest"
    )


def test_the_64th_reward_value_is_a_category_and_the_65th_is_not(write: Write) -> None:
    for distinct in (64, 65):
        episodes = goal_episodes(count=24)
        for i, episode in enumerate(episodes):
            episode.rewards = (np.arange(20) + 20 * i) % distinct + 0.25
        codec, _ = fitted(write, episodes, id=f"r{distinct}")
        assert (codec.spec.reward_values is not None) == (distinct == 64)
        raw = np.array([3.25, 50.25])
        normalised = (raw - codec.spec.reward_mean) / codec.spec.reward_scale
        expected = [3, 50] if distinct == 64 else normalised
        assert codec.reward(raw).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_reward_that_only_validation_holds_is_a_category(write: Write) -> None:
    episodes = goal_episodes(rewards=np.arange(20) % 2 + 0.0)
    held_out = Dataset(
        [write(episodes, id="split", observation_space=GOAL, action_space=spaces.Box(-1, 1, (2,)))]
    ).episodes("valid")
    episodes[held_out[0]].rewards = np.arange(20) % 3 + 0.0
    codec, dataset = fitted(write, episodes)
    assert 2.0 not in np.concatenate([e.rewards for e in dataset.iter_episodes("train")])
    assert codec.spec.reward_values == (0.0, 1.0, 2.0)
    assert (codec.spec.reward_mean, codec.spec.reward_scale) == (0.5, 0.5), (
        "the other statistics are the training split's"
    )


def test_the_precision_is_of_the_first_dataset(write: Write) -> None:
    """A deviation that grows from .999 to 1.001 must not change the loss by ln 10 a dimension."""

    def scaled(std: float, id: str) -> Path:
        episodes = goal_episodes(seed=len(id))
        for k, episode in enumerate(episodes):
            wave = std * np.where(
                np.arange(21) % 2, 1.0, -1.0
            )  # of this very deviation, but for an odd row
            episode.observations = [
                {**o, "body": np.array([w, 7.0, w])}
                for o, w in zip(episode.observations, wave, strict=True)
            ]
            episode.actions = [np.array([w, w], np.float32) for w in wave[1:]]
            episode.rewards = wave[1:] + k / 1e3 + np.arange(20) / 1e6
            episode.durations = 2 * std + wave[1:]
            episode.task = {"mass": std * (-1.0) ** k}
        return write(
            episodes,
            id=id,
            observation_space=GOAL,
            action_space=spaces.Box(-1, 1, (2,)),
            task=["mass"],
            valid_fraction=0.0,
        )

    paths = [scaled(0.99, "a"), scaled(1.2, "bb")]
    one, grown, turned = (Codec.fit(Dataset(p)) for p in (paths[:1], paths, paths[::-1]))

    def precision(codec: Codec) -> list[float]:
        every = codec.to_json()["scalings"]
        spec = codec.spec
        rest = [spec.reward_bin * spec.reward_scale, spec.duration_bin * spec.duration_scale]
        return [
            *every["observation"]["precision"][1:],
            *every["action"]["precision"],
            *every["options"]["precision"],
            *rest,
        ]

    assert precision(one) == pytest.approx([1e-5, 1e-4, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5])
    assert precision(grown) == pytest.approx(precision(one))
    assert grown.spec.observation.bins != one.spec.observation.bins
    assert precision(turned) == pytest.approx([1e-4] * 8)
    np.testing.assert_allclose(
        grown._scalings["observation"].scale[1], np.sqrt((0.99**2 + 1.2**2) / 2), rtol=1e-2
    )


def test_the_precision_of_a_column_constant_in_the_first_dataset_is_of_all(write: Write) -> None:
    def constant(value: float, id: str) -> Path:
        episodes = goal_episodes()
        for episode in episodes:
            episode.observations = [
                {**o, "body": np.array([value, 7.0, 1.0])} for o in episode.observations
            ]
        return write(
            episodes,
            id=id,
            observation_space=GOAL,
            action_space=spaces.Box(-1, 1, (2,)),
            valid_fraction=0.0,
        )

    codec = Codec.fit(Dataset([constant(0.0, "a"), constant(4e-9, "b")]))
    assert codec.to_json()["scalings"]["observation"]["precision"][1:] == pytest.approx(
        [1e-13, 1e-4, 1e-4]
    )


def test_small_units_are_not_constants(write: Write) -> None:
    """Columns of deviation 4e-9 around 0 and 1e-3, one beyond float64's reach around 1e6, and one
    that is 0 throughout.
    """
    rng = np.random.default_rng(0)
    at = np.array([0.0, 1e-3, 1e6, 0.0])
    spread = np.array([4e-9, 4e-9, 4e-9, 0.0])
    episodes = [
        Episode(
            k,
            k,
            "random",
            list(at + spread * rng.normal(size=(30, 4))),
            [np.int64(0)] * 29,
            np.zeros(29),
            "truncated",
            None,
            {},
            None,
        )
        for k in range(8)
    ]
    dataset = Dataset(
        [write(episodes, observation_space=spaces.Box(-np.inf, np.inf, (4,), np.float64))]
    )
    codec = Codec.fit(dataset)
    values = [o for e in dataset.iter_episodes("train") for o in e.observations]
    numbers = encoded(codec, dataset, values).numbers
    assert numbers.std(0, correction=0).tolist() == pytest.approx([1, 1, 0, 0], abs=1e-5)
    assert codec.spec.observation.bins[:2] == pytest.approx([1e-13 / 4e-9] * 2, rel=0.2)


def test_durations(write: Write) -> None:
    durations = np.linspace(0.5, 1.5, 20)
    codec, _ = fitted(write, goal_episodes(durations=durations))
    assert codec.spec.durations
    assert codec.duration(durations).mean().item() == pytest.approx(0, abs=1e-6)
    assert codec.duration(durations).std(correction=0).item() == pytest.approx(1)
    without, _ = fitted(write, goal_episodes(), id="without")
    assert not without.spec.durations and without.duration(durations).tolist() == [0.0] * 20


def test_durations_that_span_factors_of_a_hundred_are_learned_by_their_logarithm(
    write: Write,
) -> None:
    durations = np.geomspace(1e-3, 3.0, 20)
    codec, _ = fitted(write, goal_episodes(durations=durations))
    spec = codec.spec
    assert spec.duration_log and spec.duration_mean == pytest.approx(np.log(durations).mean())
    back = spec.seconds(codec.duration(durations))
    assert back.numpy() == pytest.approx(durations, rel=1e-5)
    assert codec.duration(np.zeros(1)).isfinite().all()
    assert Spec.from_json(spec.to_json()) == spec
    for linear in (np.linspace(0.5, 40.0, 20), np.append(0.0, durations[1:])):
        plain, _ = fitted(write, goal_episodes(durations=linear), id=f"{linear[0]}")
        assert not plain.spec.duration_log and "duration_log" not in plain.spec.to_json()


def test_the_id_is_of_the_content(write: Write) -> None:
    codec, dataset = fitted(write, goal_episodes(), task=["goal"])
    text = json.dumps(codec.to_json(), allow_nan=False)
    back = Codec.from_json(json.loads(text))
    assert back.id == codec.id and back.spec == codec.spec
    assert json.dumps(back.to_json(), allow_nan=False) == text
    assert back.environment == {
        "id": "Counted-v0",
        "version": "",
        "kwargs": {},
        "task": ["goal"],
        "max_episode_steps": None,
        "success": None,
    }
    assert Codec.fit(dataset).id == codec.id
    assert fitted(write, goal_episodes(seed=1), id="other", task=["goal"])[0].id != codec.id
    assert fitted(write, goal_episodes(), id="without")[0].id != codec.id
    with pytest.raises(UsageError, match="schema 0"):
        Codec.from_json({**codec.to_json(), "schema": 0})
