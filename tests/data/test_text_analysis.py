"""Texts of datasets: lengths, vocabulary, duplicates, novelty, and the operations on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.cli.main import main
from mesocosm.data.analysis.texts import (
    TextIndex,
    compare_texts,
    describe,
    grams,
    text_leaves,
    vocabulary,
    words,
)
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.evaluate.metrics.coverage import summarise
from mesocosm.evaluate.report import coverage_page
from mesocosm.store.artifacts import Artifact, Storage

from .walks import origins, stored

Write = Callable[..., str]
Curate = Callable[..., Artifact]
TEXT = spaces.Text(5000, min_length=0, charset="abcdefghijklmnopqrstuvwxyz 0123456789.日本")


def talk(index: int, observations: list[str], actions: list[str] | None = None) -> Episode:
    """An episode of texts; its rewards do not depend on them."""
    acts = actions or [f"do {i}" for i in range(len(observations) - 1)]
    return Episode(
        index, index, "random", list(observations), acts, np.ones(len(acts)), "terminated"
    )


@pytest.fixture
def write_talks(write_walks: Write) -> Write:
    """`write_talks(episodes, id)` writes episodes of texts into storage."""

    def write(episodes: list[Episode], id: str = "d0", **facts: Any) -> str:
        return write_walks(episodes, id, observation_space=TEXT, action_space=TEXT, **facts)

    return write


def test_words_and_their_n_grams() -> None:
    assert words("A red, cup_2! 日本x") == ["a", "red", ",", "cup_2", "!", "日", "本", "x"]
    assert len(grams("a b c d e f", 5)) == 2 and len(grams("a b a b a b", 2)) == 2
    assert set(grams("a b c d e", 5)) < set(grams("x a b c d e", 5))
    assert len(grams("a b", 5)) == 1 and len(grams("", 5)) == 0
    assert grams("a b", 5).tolist() != grams("b a", 5).tolist()


def test_the_vocabulary_grows_as_a_law() -> None:
    """All words are new (exponent 1), or none after the first text (0)."""
    new = vocabulary([f"w{i} v{i}" for i in range(500)])
    assert new["growth"]["exponent"] == pytest.approx(1) and new["once"] == 1
    old = vocabulary(["a b c"] * 500)
    assert old["growth"]["exponent"] == pytest.approx(0)
    assert (old["words"], old["vocabulary"], old["once"]) == (1500, 3, 0)
    assert vocabulary([])["growth"] == {"words": [], "distinct": [], "exponent": None}


def test_what_other_texts_lack() -> None:
    index = TextIndex(["a b c d e f\nline", "a b c d e f\nline", "x"])
    same = index.lacks(TextIndex(["x", "x"]))
    assert same == {"texts": 0, "lines": 0, "words": 0, "ngrams": 0}
    partly = index.lacks(TextIndex(["a b c d e g\nline"]))
    assert partly["texts"] == 1 and partly["lines"] == 0.5
    assert partly["words"] == pytest.approx(1 / 7) and partly["ngrams"] == pytest.approx(2 / 3)
    assert index.lacks(TextIndex([""]))["words"] is None


def test_facts_of_texts(write_talks: Write, root: str) -> None:
    episodes = [talk(k, ["hello", "", f"room {k} 日", "end"]) for k in range(20)]
    write_talks(episodes, valid_fraction=0.2, shard_rows=30)
    dataset = stored(root)
    observation, action = text_leaves(dataset)
    facts = describe(dataset, observation, seed=0)
    assert facts["texts"] == 80 and facts["distinct"] == 23 and facts["empty"] == 0.25
    assert (facts["lengths"]["0"], facts["lengths"]["1"]) == (0, len("room 10 日".encode()))
    assert facts["episodes"] == {"all": 20, "distinct": 20}
    assert facts["common"][0] == {"text": "", "count": 20}
    assert facts["valid"]["texts"] == pytest.approx(0.25)
    acted = describe(dataset, action, seed=0)
    assert acted["texts"] == 60, "none after the last observation"
    assert acted["distinct"] == 3 and acted["episodes"] == {"all": 20, "distinct": 1}
    json.dumps(facts, allow_nan=False)


@pytest.mark.integration
def test_coverage_of_long_texts(write_talks: Write, root: str, tmp_path: Path) -> None:
    """Distances are of words, held-out texts that are new are far, and the page shows them."""
    rooms = ["a red cup", "a blue pan", "a green pot"]
    episodes = [talk(k, [rooms[k % 3], "you go", rooms[(k + 1) % 3]]) for k in range(30)]
    odd = [talk(30 + k, ["quite other words", f"never seen {k}", "x"]) for k in range(10)]
    write_talks(episodes + odd, valid_fraction=0.0)
    dataset = stored(root)
    dataset.table["split"][30:] = 1
    summary = summarise(dataset, name="x")
    assert summary["missing"]["beyond"] == 1 and summary["gaps"]["any_action"]["curve"] is None
    lines = coverage_page.verdict(summary)
    assert any(line.startswith("observation: 120 texts") for line in lines)
    coverage_page.write(summary, tmp_path)
    page = (tmp_path / "coverage.html").read_text()
    assert "Each text" in page and "observation" in page


def test_two_datasets_are_compared_by_texts(
    write_talks: Write, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_talks([talk(k, ["a b c d e", "f"]) for k in range(6)])
    write_talks([talk(k, ["a b c d e", "g h"], ["other"]) for k in range(6)], "d1")
    a, b = (Dataset([Storage(root).artifact("datasets", id).path]) for id in ("d0", "d1"))
    result = compare_texts(a, b, seed=0)
    assert result["observation"]["a_lacks"] == pytest.approx(
        {"texts": 0.5, "lines": 0.5, "words": 2 / 7, "ngrams": 0.5}
    )
    assert result["action"]["b_lacks"]["texts"] == 1
    assert main(["data", "diff", "d0", "d1", f"storage.root={root}"]) == 0
    text = capsys.readouterr().out
    assert "observation: 50.0% of the texts, 50.0% of the lines, 28.6% of the words" in text


def test_exact_duplicates_see_long_texts(write_talks: Write, curate: Curate) -> None:
    episodes = [talk(k, ["a" * 3000, "b"]) for k in range(3)]
    episodes += [talk(3, ["a" * 2999 + "c", "b"]), talk(4, ["a" * 3000, "b"], ["do 1"])]
    write_talks(episodes, valid_fraction=0.0)
    assert origins(curate({"op": "exact_duplicates"})) == [("d0", 0), ("d0", 3), ("d0", 4)]


def test_near_duplicates_see_long_texts(write_talks: Write, curate: Curate) -> None:
    """Episodes with equal rewards and other texts are no copies."""
    write_talks([talk(k, [f"room {k // 2}", "b"]) for k in range(8)], valid_fraction=0.0)
    assert origins(curate({"op": "near_duplicates"})) == [("d0", k) for k in (0, 2, 4, 6)]


def test_text_length(write_talks: Write, curate: Curate) -> None:
    write_talks([talk(k, ["日" * k, "b"]) for k in range(1, 9)], valid_fraction=0.0)
    kept = curate({"op": "text_length", "min": 6, "max": 12})
    assert origins(kept) == [("d0", k) for k in (2, 3, 4)]
    acted = curate({"op": "text_length", "part": "action", "min": 4, "max": 4})
    assert len(origins(acted)) == 8, "do 0"


def test_text_novelty(write_talks: Write, curate: Curate) -> None:
    texts = ["a b c d e f g h", "a b c d e f g h", "a b c d e f g x", "k l m n o p q r"]
    write_talks([talk(k, [text, ""]) for k, text in enumerate(texts)], valid_fraction=0.0)
    assert origins(curate({"op": "text_novelty", "share": 0.5})) == [("d0", 0), ("d0", 3)]
    assert origins(curate({"op": "text_novelty", "share": 0.2})) == [("d0", k) for k in (0, 2, 3)]


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ({"op": "text_length"}, ["operations[0]", "min or max"]),
        ({"op": "text_length", "part": "reward", "min": 1}, ["observation or action", "'reward'"]),
        ({"op": "text_novelty", "n": 0}, ["n must be at least 1", "got 0"]),
        ({"op": "text_length", "part": "action", "max": 3}, ["part=action has no Text"]),
    ],
)
def test_operations_that_cannot_be_are_refused(
    write_walks: Write, curate: Curate, operation: dict[str, Any], words: list[str]
) -> None:
    write_walks([talk(k, ["a", "b"], [0]) for k in range(3)], observation_space=TEXT)  # type: ignore[list-item]
    with pytest.raises(UsageError) as caught:
        curate(operation)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_groups_by_a_text_of_the_task(write_walks: Write, curate: Curate) -> None:
    space = spaces.Dict(goal=TEXT, say=TEXT)
    episodes = [
        talk(k, [{"goal": ("cup", "pan")[k % 2], "say": "x"}] * 2, ["a"])  # type: ignore[list-item]
        for k in range(6)
    ]
    write_walks(
        episodes, observation_space=space, action_space=TEXT, task=["goal"], valid_fraction=0.0
    )
    kept = curate({"op": "where", "by": "goal", "keep": ["pan"]})
    assert origins(kept) == [("d0", k) for k in (1, 3, 5)]
