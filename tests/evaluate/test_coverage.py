"""Coverage: known gaps are measured, entropies equal closed forms, and the page is drawn from the
summary alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.data.analysis.neighbours import effective, gaps, own_gaps
from mesocosm.datasets.dataset import Dataset, Environment
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.evaluate.metrics.coverage import compare, summarise
from mesocosm.evaluate.report import coverage_page

from . import worlds

MakeDataset = Callable[..., Dataset]
Rng = np.random.Generator


def episode(
    index: int, rng: Rng, act: Callable[[Any], int], *, shift: float = 0.0, behaviour: str = "b"
) -> Episode:
    """20 steps of uniform states in [0, 1]^2; `shift` is added to the second number."""
    states = rng.random((21, 2)) + np.array([0.0, shift])
    actions = [np.int64(act(state)) for state in states[:-1]]
    return Episode(index, index, behaviour, list(states), actions, np.ones(20), "terminated")


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """`make_dataset(train, valid, name)`: a dataset of these episodes in these splits."""

    def make(train: list[Episode], valid: Sequence[Episode] = (), name: str = "d") -> Dataset:
        writer = DatasetWriter(
            tmp_path / name,
            id=name,
            environment=Environment(id="Walk-v0"),
            observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float64),
            action_space=spaces.Discrete(4),
            seed=0,
        )
        for each in train:
            writer.add(each, None, "train")
        for each in valid:
            writer.add(each, None, "valid")
        writer.close()
        return Dataset([tmp_path / name])

    return make


def test_parts_that_training_lacks_are_named(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(0)

    def low(state: Any) -> int:
        return int(rng.integers(3))

    train = [episode(k, rng, low) for k in range(20)]
    same = [episode(k, rng, low) for k in range(20, 30)]
    alike = summarise(make_dataset(train, same, "alike"), name="x")
    assert alike["missing"]["beyond"] < 0.06 and not alike["missing"]["behaviours"]
    far = episode(20, rng, lambda state: 3, shift=5.0, behaviour="held")
    apart = summarise(make_dataset(train, [far, episode(21, rng, low)], "apart"), name="x")
    missing, worst = apart["missing"], apart["missing"]["episodes"][0]
    assert 0.45 < missing["beyond"] < 0.6 and missing["behaviours"] == ["held"]
    assert (worst["episode"], worst["beyond"], worst["most"]) == (20, 1.0, "observation[1]")
    assert worst["farthest"] > 5 and missing["outside"]["observation[1]"][1] > 5
    assert missing["outside"].get("observation[0]", (0, 0))[1] <= 2
    assert apart["categories"][0]["only_valid"] == [3] and apart["categories"][0]["seen"] == 3
    nats, number = effective(np.array([21, 1]))
    expected = {"nats": nats, "effective": number, "of": 2}
    assert apart["behaviour_entropy"] == pytest.approx(expected)


def test_entropies_are_those_of_closed_forms(make_dataset: MakeDataset) -> None:
    assert effective(np.array([1, 1, 1, 1])) == pytest.approx((np.log(4), 4))
    assert effective(np.array([7, 0])) == (0.0, 1.0)
    assert effective(np.array([3, 1]))[0] == pytest.approx(np.log(4) - 0.75 * np.log(3))
    rng = np.random.default_rng(1)

    def acts(name: str, act: Callable[[Any], int]) -> dict[str, Any]:
        return summarise(make_dataset([episode(k, rng, act) for k in range(60)], (), name), name="")

    free = acts("free", lambda state: int(rng.integers(4)))
    fixed = acts("fixed", lambda state: 2)
    half = acts("half", lambda state: int(state[0] > 0.5))["actions"]
    assert free["actions"]["entropy"] > 0.95 and free["actions"]["tried"] > 0.93
    assert fixed["actions"]["entropy"] == 0.0
    assert fixed["actions"]["tried"] == pytest.approx(0.25, abs=0.05)
    assert half["entropy"] < 0.2 and 0.24 < half["tried"] < 0.4
    medians = [summary["gaps"]["any_action"]["quantiles"]["0.5"] for summary in (fixed, free)]
    assert medians[0] > 3 * medians[1]
    assert fixed["missing"] is None
    assert any("no validation split" in note for note in fixed["notes"])


def test_gaps_are_to_other_episodes() -> None:
    values = np.array([[0.0], [0.01], [5.0], [5.01]])
    assert gaps(values, np.array([[0.0], [7.0]])) == pytest.approx([0.0, 1.99])
    assert own_gaps(values, np.array([0, 0, 1, 1]), seed=0) == pytest.approx([5.0, 4.99, 4.99, 5.0])
    assert np.isnan(own_gaps(values, np.zeros(4, int), seed=0)).all()


def test_two_datasets_are_compared(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(2)

    def walks(name: str, shift: float) -> Dataset:
        acts = lambda state: int(rng.integers(4))  # noqa: E731
        episodes = [episode(k, rng, acts, shift=shift * (k % 2)) for k in range(40)]
        return make_dataset(episodes, (), name)

    result = compare(walks("narrow", 0.0), walks("wide", 3.0))
    assert 0.45 < result["a_lacks"]["beyond"] < 0.55 and result["b_lacks"]["beyond"] < 0.05


@pytest.mark.integration
def test_the_page_is_the_same_for_the_same_data(make_dataset: MakeDataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    episodes = [episode(k, rng, lambda state: 1, behaviour="<b>") for k in range(10)]
    data, files = make_dataset(episodes[:9], episodes[9:]), []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        coverage_page.write(summarise(data, name="what <d> covers"), folder)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1] and files[0].keys() == {"coverage.html", "summary.json"}
    page, summary = files[0]["coverage.html"].decode(), json.loads(files[0]["summary.json"])
    assert page.count("<svg") == 3 and "what &lt;d&gt; covers" in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert coverage_page.render(summary) == page
    assert sum(summary["numbers"][0]["train"]) <= summary["sampled"]["train"]["of"] == 180


def test_little_data_has_a_page_too(make_dataset: MakeDataset, tmp_path: Path) -> None:
    one = episode(0, np.random.default_rng(4), lambda state: 1)
    one.observations = [np.array([1.0, 2.0])] * 21
    summary = summarise(make_dataset([one]), name="x")
    assert summary["gaps"]["threshold"] is None and summary["numbers"][0]["constant"]
    assert len(summary["notes"]) == 3
    coverage_page.write(summary, tmp_path)
    assert "always 1" in (tmp_path / "coverage.html").read_text()


@pytest.mark.integration
def test_a_written_dataset_of_texts_and_tasks(tmp_path: Path) -> None:
    goal = spaces.Box(-1, 1, (1,), np.float32)
    space = spaces.Dict({"word": spaces.Text(4, charset="ab"), "goal": goal})
    rng = np.random.default_rng(5)

    def make(k: int) -> Episode:
        goals = rng.uniform(-1, 1, (11, 1)).astype(np.float32)
        states = [{"word": "ab"[: 1 + k % 2], "goal": goal} for goal in goals]
        actions, task = [np.int64(i % 2) for i in range(10)], {"mass": 0.5 * k, "floor": "ice"}
        return Episode(k, k, "b", states, actions, np.ones(10), "truncated", task=task)

    environment = Environment(id="Talk-v0", task=["mass", "floor"])
    episodes = [make(k) for k in range(12)]
    data = worlds.dataset(tmp_path, episodes, environment, (space, spaces.Discrete(2)))
    summary = summarise(data, name="x")
    assert summary["tasks"] == [
        {"name": "mass", "low": 0.0, "high": 5.5},
        {"name": "floor", "values": {"ice": 12}},
    ]
    (number,), (category,) = summary["numbers"], summary["categories"]
    assert number["name"] == "observation.goal[0]" and number["space"] == [-1.0, 1.0]
    assert category["name"] == "action" and "ice" in coverage_page.render(summary)
