"""Coverage: gaps that were made are found, entropies are those of closed forms, and the page is
drawn from the summary alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.data.analysis.neighbours import effective, gaps, own_gaps
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.evaluate.metrics.coverage import compare, summarise
from mesocosm.evaluate.report import coverage_page

MakeDataset = Callable[..., Dataset]


def episode(
    index: int,
    rng: np.random.Generator,
    act: Callable[[np.ndarray[Any, Any]], int],
    *,
    shift: float = 0.0,
    behaviour: str = "b",
) -> Episode:
    """20 steps of uniform states in [0, 1]^2; `shift` is added to the second number."""
    observations = rng.random((21, 2)) + np.array([0.0, shift])
    facts: dict[str, Any] = {"seed": index, "behaviour": behaviour, "outcome": "terminated"}
    return Episode(
        index=index,
        observations=list(observations),
        actions=[np.int64(act(o)) for o in observations[:-1]],
        rewards=np.ones(20),
        **facts,
    )


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """`made([(episode, split), ...])`; splits as they are given."""

    def make(episodes: list[tuple[Episode, str]], name: str = "d") -> Dataset:
        from mesocosm.datasets.writer import DatasetWriter

        box, four = spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Discrete(4)
        writer = DatasetWriter(
            tmp_path / name,
            id=name,
            environment=Environment(id="Walk-v0"),
            observation_space=box,
            action_space=four,
            seed=0,
        )
        for each, split in episodes:
            writer.add(each, None, split)
        writer.close()
        return Dataset([tmp_path / name])

    return make


def test_what_is_held_out_and_not_in_training_is_found(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(0)

    def any(o: np.ndarray[Any, Any]) -> int:
        return int(rng.integers(3))

    train = [(episode(k, rng, any), "train") for k in range(20)]
    alike = summarise(
        make_dataset([*train, *((episode(k, rng, any), "valid") for k in range(20, 30))], "alike"),
        name="x",
    )
    assert alike["missing"]["beyond"] < 0.06 and not alike["missing"]["behaviours"]
    far = episode(20, rng, lambda o: 3, shift=5.0, behaviour="held")
    apart = summarise(
        make_dataset([*train, (far, "valid"), (episode(21, rng, any), "valid")], "apart"), name="x"
    )
    missing = apart["missing"]
    assert 0.45 < missing["beyond"] < 0.6 and missing["behaviours"] == ["held"]
    (worst, *_) = missing["episodes"]
    assert (worst["episode"], worst["beyond"], worst["most"]) == (
        20,
        1.0,
        "observation[1]",
    ) and worst["farthest"] > 5
    assert missing["outside"]["observation[1]"][1] > 5 and "observation[0]" not in {
        k for k, v in missing["outside"].items() if v[1] > 2
    }
    assert apart["categories"][0]["only_valid"] == [3] and apart["categories"][0]["seen"] == 3
    assert apart["behaviour_entropy"] == pytest.approx(
        {
            "nats": effective(np.array([21, 1]))[0],
            "effective": effective(np.array([21, 1]))[1],
            "of": 2,
        }
    )


def test_entropies_are_those_of_closed_forms(make_dataset: MakeDataset) -> None:
    assert effective(np.array([1, 1, 1, 1])) == pytest.approx((np.log(4), 4)) and effective(
        np.array([7, 0])
    ) == (0.0, 1.0)
    assert effective(np.array([3, 1]))[0] == pytest.approx(np.log(4) - 0.75 * np.log(3))
    rng = np.random.default_rng(1)
    free = summarise(
        make_dataset(
            [(episode(k, rng, lambda o: int(rng.integers(4))), "train") for k in range(60)], "free"
        ),
        name="x",
    )
    fixed = summarise(
        make_dataset([(episode(k, rng, lambda o: 2), "train") for k in range(60)], "fixed"),
        name="x",
    )
    half = summarise(
        make_dataset(
            [(episode(k, rng, lambda o: int(o[0] > 0.5)), "train") for k in range(60)], "half"
        ),
        name="x",
    )
    assert free["actions"]["entropy"] > 0.95 and free["actions"]["tried"] > 0.93
    assert fixed["actions"]["entropy"] == 0.0 and fixed["actions"]["tried"] == pytest.approx(
        0.25, abs=0.05
    )
    assert half["actions"]["entropy"] < 0.2 and 0.24 < half["actions"]["tried"] < 0.4
    assert (
        fixed["gaps"]["any_action"]["quantiles"]["0.5"]
        > 3 * free["gaps"]["any_action"]["quantiles"]["0.5"]
    )
    assert fixed["missing"] is None and any(
        "no validation split" in note for note in fixed["notes"]
    )


def test_gaps_are_to_other_episodes() -> None:
    values = np.array([[0.0], [0.01], [5.0], [5.01]])
    assert gaps(values, np.array([[0.0], [7.0]])) == pytest.approx([0.0, 1.99])
    assert own_gaps(values, np.array([0, 0, 1, 1]), seed=0) == pytest.approx([5.0, 4.99, 4.99, 5.0])
    assert np.isnan(own_gaps(values, np.zeros(4, int), seed=0)).all()


def test_two_datasets_are_held_against_each_other(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(2)
    narrow = make_dataset(
        [(episode(k, rng, lambda o: int(rng.integers(4))), "train") for k in range(40)], "narrow"
    )
    wide = make_dataset(
        [
            (episode(k, rng, lambda o: int(rng.integers(4)), shift=3.0 * (k % 2)), "train")
            for k in range(40)
        ],
        "wide",
    )
    result = compare(narrow, wide)
    assert 0.45 < result["a_lacks"]["beyond"] < 0.55 and result["b_lacks"]["beyond"] < 0.05


def test_the_page_is_the_same_for_the_same_data(make_dataset: MakeDataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    data = make_dataset(
        [
            (episode(k, rng, lambda o: 1, behaviour="<b>"), "valid" if k > 8 else "train")
            for k in range(10)
        ]
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        coverage_page.write(summarise(data, name="what <d> covers"), tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two and one.keys() == {"coverage.html", "summary.json"}
    page = one["coverage.html"].decode()
    assert (
        page.count("<svg") == 3
        and "&lt;b&gt;" in page
        and "<b>" not in page
        and "what &lt;d&gt; covers" in page
    )
    summary = json.loads(one["summary.json"])
    assert coverage_page.render(summary) == page
    assert sum(summary["numbers"][0]["train"]) <= summary["sampled"]["train"]["of"] == 180


def test_little_data_has_a_page_too(make_dataset: MakeDataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    one = episode(0, rng, lambda o: 1)
    one.observations = [np.array([1.0, 2.0])] * 21
    summary = summarise(make_dataset([(one, "train")]), name="x")
    assert (
        summary["gaps"]["threshold"] is None
        and summary["numbers"][0]["constant"]
        and len(summary["notes"]) == 3
    )
    coverage_page.write(summary, tmp_path)
    assert "always 1" in (tmp_path / "coverage.html").read_text()


def test_a_written_dataset_of_texts_and_tasks(tmp_path: Path) -> None:
    space = spaces.Dict(
        {"said": spaces.Text(4, charset="ab"), "goal": spaces.Box(-1, 1, (1,), np.float32)}
    )
    rng = np.random.default_rng(5)

    def make(k: int) -> Episode:
        seen = [
            {"said": "ab"[: 1 + k % 2], "goal": np.array([rng.uniform(-1, 1)], np.float32)}
            for _ in range(11)
        ]
        return Episode(
            k,
            k,
            "b",
            seen,
            [np.int64(i % 2) for i in range(10)],
            np.ones(10),
            "truncated",
            task={"mass": 0.5 * k, "floor": "ice"},
        )  # type: ignore[arg-type]

    environment = Environment(id="Talk-v0", task=["mass", "floor"])
    write_dataset(
        tmp_path,
        [make(k) for k in range(12)],
        id="t",
        environment=environment,
        observation_space=space,
        action_space=spaces.Discrete(2),
        seed=0,
    )
    summary = summarise(Dataset([tmp_path]), name="x")
    assert summary["tasks"] == [
        {"name": "mass", "low": 0.0, "high": 5.5},
        {"name": "floor", "values": {"ice": 12}},
    ]
    assert [row["name"] for row in summary["numbers"]] == ["observation.goal[0]"] and summary[
        "numbers"
    ][0]["space"] == [-1.0, 1.0]
    assert [row["name"] for row in summary["categories"]] == [
        "action"
    ] and "ice" in coverage_page.render(summary)
