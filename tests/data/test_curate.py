"""Operations of curate: the episodes that each drops, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.store.artifacts import Artifact

from .walks import indices, origins, reasons, report, rows_of, seen, stored, walk

Write = Callable[..., str]
Curate = Callable[..., Artifact]


def test_one_copy_remains_validation_first(write_walks: Write, curate: Curate, root: str) -> None:
    write_walks([walk(k) for k in range(40)])
    split = stored(root).table["split"]
    held = int(np.flatnonzero(split == 1)[0])
    train = [int(k) for k in np.flatnonzero(split == 0)[:2]]
    copies = [walk(0, seed=held), walk(1, seed=train[0])]
    twins = [walk(2, seed=99), walk(3, seed=99, behaviour="other")]
    write_walks([*copies, *twins], "d1", valid_fraction=0.0)
    operation = {"op": "exact_duplicates"}
    artifact = curate(operation, datasets=("d0", "d1"))
    assert origins(artifact) == [*(("d0", k) for k in range(40)), ("d1", 2)]
    names = ("episode", "of_dataset", "of_episode")
    dropped = [tuple(row[name] for name in names) for row in rows_of(artifact, "dropped")]
    assert dropped == [(0, "d0", held), (1, "d0", train[0]), (3, "d1", 2)]
    assert report(artifact)["operations"][0]["reasons"][0]["first"][0] == f"d1/0 of d0/{held}"
    one_reward = walk(5, seed=train[1])
    one_reward.rewards = one_reward.rewards + np.eye(30)[-1] * 1e-9
    write_walks([one_reward], "d2", valid_fraction=0.0)
    differing = curate(operation, datasets=("d0", "d2"))
    assert ("d2", 5) in origins(differing), "the last reward tells them apart"
    swapped = origins(curate(operation, datasets=("d1", "d0")))
    assert ("d0", held) in swapped and ("d1", 0) not in swapped, "validation before order"
    assert ("d1", 1) in swapped


def test_near_duplicates_agree_with_a_full_comparison(write_walks: Write, curate: Curate) -> None:
    rng = np.random.default_rng(0)
    episodes = [walk(k, length=int(rng.integers(20, 60))) for k in range(60)]
    for k in range(60, 120):  # noisy copies, nearer and further than the tolerance
        copy = walk(k, length=len(episodes[k - 60]), seed=k - 60)
        noise = 10.0 ** rng.uniform(-3, 0) * rng.normal(size=(len(copy) + 1, 3))
        copy.observations = list(np.array(copy.observations) + noise)
        episodes.append(copy)
    write_walks(episodes, valid_fraction=0.0)
    artifact = curate({"op": "near_duplicates", "tolerance": 0.02})
    numbers = np.concatenate([np.array(e.observations) for e in episodes])
    scale = np.array([*numbers.std(0), np.concatenate([e.rewards for e in episodes]).std()])

    def vector(e: Episode) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        at = [[(i * last + 7) // 15 for i in range(16)] for last in (len(e), len(e) - 1)]
        values = np.concatenate([np.array(e.observations)[at[0]], e.rewards[at[1], None]], 1)
        return values / scale, np.array(e.actions)[at[1]]

    def near(e: Episode, other: Episode) -> bool:
        (a, b), (c, d) = vector(e), vector(other)
        distance = np.sqrt((((a - c) ** 2).sum() + (b != d).sum()) / (16 * 5))
        alike = abs(len(e) - len(other)) <= 0.02 * max(len(e), len(other))
        return bool(distance <= 0.02 and alike)

    expected: list[int] = []
    for e in episodes:
        if not any(near(e, episodes[other]) for other in expected):
            expected.append(e.index)
    assert indices(artifact) == expected and 60 < len(expected) < 115


def test_a_stuck_sensor_is_a_fault_and_a_constant_is_not(
    write_walks: Write, curate: Curate
) -> None:
    # The third number is a goal: constant in an episode.
    episodes = [seen(walk(k), 2, float(k)) for k in range(20)]
    seen(episodes[3], 1, lambda o: o[12, 1], 12, 23)
    seen(episodes[4], 1, lambda o: o[12, 1], 12, 22)  # one step less
    seen(episodes[5], 0, 0.0, 0, 31)
    write_walks(episodes)
    artifact = curate({"op": "stuck", "steps": 10})
    names = {3: "observation[1]", 5: "observation[0]"}
    expected = {k: f"{name} does not change for 10 steps" for k, name in names.items()}
    assert reasons(artifact) == expected
    (note,) = report(artifact)["operations"][0]["notes"]
    assert note.startswith("observation[2] is unchanged for 10 steps in 20 of 20 episodes")
    cut = curate({"op": "stuck", "steps": 10, "keep": "before"})
    assert indices(cut) == [k for k in range(20) if k != 5], "stuck from the start: dropped"
    dataset = Dataset([cut.path])
    episode = next(e for e in dataset.iter_episodes() if e.index == 3)
    assert len(episode) == 12 and episode.outcome == "unfinished"
    assert np.array_equal(episode.observations, episodes[3].observations[:13])
    assert episode.total_reward == episodes[3].rewards[:12].sum()
    assert not episode.terminated.any()
    message = r"operations\[0\] \(stuck\): dimensions names 'observation\[4\]'.*did you mean"
    with pytest.raises(UsageError, match=rf"{message} 'observation\[\d\]'"):
        curate({"op": "stuck", "dimensions": ["observation[4]"]})
    assert 4 in reasons(curate({"op": "stuck", "steps": 9, "dimensions": ["observation[1]"]}))


def test_a_saturated_sensor_is_a_fault_and_a_contact_is_not(
    write_walks: Write, curate: Curate
) -> None:
    episodes = [seen(walk(k), 2, lambda o: o[:, 0] > 0) for k in range(20)]
    for k, end in ((6, 10), (7, 4)):
        seen(episodes[k], 0, 50.0, end=end)
    write_walks(episodes)
    artifact = curate({"op": "saturated", "share": 0.2})
    assert list(reasons(artifact)) == [6] and "observation[0] is at" in reasons(artifact)[6]
    note = report(artifact)["operations"][0]["notes"][0]
    assert "observation[2] is at its limits in 20 of 20" in note


def test_filters_drop_with_a_reason(write_walks: Write, curate: Curate, root: str) -> None:
    episodes = [
        walk(
            k,
            length=k + 1,
            behaviour="ab"[k % 2],
            success=[True, False, None][k % 3],
            outcome=["terminated", "truncated"][k % 2],
        )
        for k in range(30)
    ]
    write_walks(episodes)
    artifact = curate(
        {"op": "length", "min": 5, "max": 25},
        {"op": "return", "min": 1.0},
        {"op": "where", "by": "behaviour", "keep": ["a"]},
    )
    assert all(5 <= k + 1 <= 25 and k % 2 == 0 for k in indices(artifact))
    why = reasons(artifact)
    assert (why[0], why[29]) == ("length below 5", "length above 25")
    assert (why[11], why[5]) == ("behaviour b", "return below 1")
    successes = curate({"op": "where", "by": "success", "drop": ["failure"]})
    assert all(k % 3 != 1 for k in indices(successes))
    truncated = curate({"op": "where", "by": "outcome", "keep": ["truncated"]})
    assert all(k % 2 for k in indices(truncated))
    before, after = (
        dict(zip(table["index"].tolist(), table["split"].tolist(), strict=True))
        for table in (stored(root).table, Dataset([artifact.path]).table)
    )
    assert after.items() <= before.items(), "an episode stays in its split"
    with pytest.raises(UsageError, match=r"operations\[0\] \(length\): nothing to train on"):
        curate({"op": "length", "min": 500})


def test_balance_and_mix_choose_among_training_episodes(
    write_walks: Write, curate: Curate, root: str
) -> None:
    write_walks([walk(k, length=10, behaviour="few" if k % 5 == 0 else "many") for k in range(100)])
    write_walks([walk(k, length=10, seed=500 + k) for k in range(50)], "d1")
    artifact = curate({"op": "balance", "by": "behaviour", "most": 2})
    data = Dataset([artifact.path])
    behaviours = data.table["behaviour"][data.episodes("train")]
    names = [behaviour.name for behaviour in data.manifests[0].behaviours]
    sizes = {name: int((behaviours == i).sum()) for i, name in enumerate(names)}
    assert sizes["many"] == 2 * sizes["few"] > 20
    valid = report(artifact)["operations"][0]["splits"]["valid"]
    assert valid["episodes"] == len(data.episodes("valid")) > 0
    both = ("d0", "d1")
    mixed = curate({"op": "mix", "weights": [1, 2]}, datasets=both)
    report(mixed)
    train = [origins(mixed)[i][0] for i in Dataset([mixed.path]).episodes("train")]
    all_of_d1 = len(stored(root, "d1").episodes("train"))
    assert train.count("d1") == all_of_d1
    assert 2 * train.count("d0") in (all_of_d1 - 1, all_of_d1), "half as much of d0"
    fewer = curate({"op": "mix", "weights": [1, 2], "transitions": 300}, datasets=both)
    assert Dataset([fewer.path]).count("train") == 300
    assert set(origins(fewer)) <= set(origins(mixed))
    with pytest.raises(UsageError, match=r"weights must be .* each of data\.datasets"):
        curate({"op": "mix", "weights": [1]}, datasets=both)


def test_failures_are_put_back_unless_they_are_broken(write_walks: Write, curate: Curate) -> None:
    episodes = [walk(k, length=40 if k % 2 else 20, success=bool(k % 2)) for k in range(40)]
    seen(episodes[0], 0, 0.0)
    write_walks(episodes, valid_fraction=0.0)
    filters = {"op": "stuck", "steps": 15}, {"op": "length", "min": 30}
    artifact = curate(*filters, {"op": "failures", "share": 0.2})
    remaining = indices(artifact)
    assert sum(k % 2 == 0 for k in remaining) == 5
    assert len(remaining) == 25 and 0 not in remaining
    assert report(artifact)["operations"][2]["put_back"] == {"episodes": 5, "transitions": 100}
    message = r"share=0.6 needs .* failed episodes, got 0 and 19 to put back"
    with pytest.raises(UsageError, match=message):
        curate(*filters, {"op": "failures", "share": 0.6})
    successes = curate({"op": "where", "by": "success", "keep": ["success"]})
    assert "no failed episode is left" in report(successes)["warnings"][-1]


@pytest.mark.integration
def test_hold_out_by_task_behaviour_and_time(write_walks: Write, curate: Curate) -> None:
    tasks = [{"mass": 0.1 * k, "map": ["big", "small", "round"][k % 3]} for k in range(30)]
    episodes = [walk(k, task=task, behaviour="ab"[k % 2]) for k, task in enumerate(tasks)]
    write_walks(episodes, task=["mass", "map"])

    def held(**params: Any) -> list[int]:
        artifact = curate({"op": "exact_duplicates"}, {"op": "hold_out", **params})
        data = Dataset([artifact.path])
        assert [e.task for e in data.iter_episodes()] == tasks
        assert not report(artifact)["operations"][1]["dropped"]["episodes"]
        return [int(k) for k in data.table["index"][data.episodes("valid")]]

    assert held(by="map", values=["round"]) == list(range(2, 30, 3))
    assert held(by="behaviour", values=["b"]) == list(range(1, 30, 2))
    assert held(by="time", share=0.1) == [27, 28, 29]
    fifth, tenth = held(by="random", share=0.2), held(by="random", share=0.1)
    assert len(fifth) == 6 and len(tenth) == 3 and set(tenth) <= set(fifth)
    assert {k % 3 for k in held(by="map", share=0.4)} in ({0}, {1}, {2})
    assert held(by="mass", values=["2.32..2.9"]) == list(range(24, 30))
    message = "values names 'rond', which is no map of these episodes; did you mean 'round'"
    with pytest.raises(UsageError, match=message):
        held(by="map", values=["rond"])
    with pytest.raises(UsageError, match=r"by must be one of .* got 'mas'; did you mean 'mass'"):
        held(by="mas")
