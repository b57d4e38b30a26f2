"""Evaluation of a world of images: its references, errors of frames, and policies in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agents.test_image_agent import encoder_of_games, policy_of_games
from factories import fit_world

from mesocosm.config import StorageConfig
from mesocosm.data.analysis.evidence import evidence
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.evaluate.metrics.images import CodeCounts, image_fidelity, moving_psnr
from mesocosm.evaluate.metrics.open_loop import most_frequent
from mesocosm.jobs.evaluate import JOB
from mesocosm.model.config import ModelConfig
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

from .lab import summary_of
from .test_report import parsed

MODEL = ModelConfig(size="10k", members=2, context=4, base=False)
ENV = "mesocosm.envs.pixels:CoinGrid"


def test_references_are_distributions() -> None:
    sizes = np.array([3, 2])
    rng = np.random.default_rng(0)
    before = np.stack([rng.integers(3, size=200), rng.integers(2, size=200)], 1)
    after = np.where(rng.random((200, 2)) < 0.7, before, (before + 1) % sizes)
    counts = CodeCounts(sizes)
    counts.add(before, after)
    every = np.array([[a, b] for a in range(3) for b in range(2)])
    for row in every:
        chances = np.exp(-counts.nats(np.repeat(row[None], 6, 0), every))
        np.testing.assert_allclose(chances.sum(0), 1.0)
    unigram, copy = counts.nats(before, after).mean(0)
    assert abs(unigram - np.log(6)) < 0.02 and copy < unigram - 0.3


def test_the_most_frequent_sample_and_the_smallest_of_equals() -> None:
    samples = np.array([[[5, 1], [2, 1], [5, 0], [2, 0], [7, 1]]])
    np.testing.assert_array_equal(most_frequent(samples), [[2, 1]])
    alone = np.random.default_rng(0).integers(0, 9, (4, 1, 3))
    np.testing.assert_array_equal(most_frequent(alone), alone[:, 0])


def test_psnr_is_of_moving_pixels() -> None:
    median = np.zeros((2, 2, 3))
    true = np.zeros((1, 2, 2, 3), np.uint8)
    true[0, 0, 0] = 100
    wrong_elsewhere = true.copy()
    wrong_elsewhere[0, 1, 1] = 255
    assert moving_psnr(true, wrong_elsewhere, median) is None
    psnr = moving_psnr(true, np.zeros_like(true), median)
    assert psnr == pytest.approx(20 * np.log10(255 / 100))


@pytest.mark.integration
def test_frames_are_compared_over_the_horizon(games: Dataset, dictionary: PatchDictionary) -> None:
    view = games.tokenized([dictionary])
    world = fit_world(view, MODEL, steps=3)
    about: dict[str, Any] = {"horizons": [1, 3, 900, "full"], "starts": 8, "seed": 0}
    measured = image_fidelity(world, view, {"dynamics": 12.5}, split="train", **about)
    assert measured is not None and measured.nats == 12.5
    assert 0 < measured.reference <= measured.unigram < 25 * np.log(9)
    ((name, rows, strips),) = measured.images
    assert name == "observation" and [row.steps for row in rows] == [1, 3]
    assert all(row.starts == 8 and row.tokenizer is None for row in rows), "a dictionary is exact"
    assert all(row.still is not None and row.still > 0 for row in rows)
    assert measured.notes == ("frames 900 ahead: no episode is that long.",)
    assert strips[0].steps == (1, 2, 3)
    assert strips[0].true.shape == strips[0].imagined.shape == (3, 40, 40, 3)
    again = image_fidelity(world, view, {"dynamics": 12.5}, split="train", **about)
    assert again is not None and again.images[0][1] == rows


@pytest.mark.integration
def test_a_world_of_images_and_its_agent_are_evaluated(
    root: str, games: Dataset, dictionary: PatchDictionary
) -> None:
    storage = Storage(root)

    def copied(folder: Path) -> None:
        shutil.copytree(games.paths[0], folder, dirs_exist_ok=True)

    view = games.tokenized([dictionary])
    facts = {"inputs": {"datasets": ["d0"]}, "evidence": evidence(view).to_json()}
    storage.make("datasets", "d0", {}, copied)
    storage.make("worlds", "w0", facts, fit_world(view, MODEL, steps=3).save)
    policy = policy_of_games(encoder_of_games(dictionary))
    storage.make("agents", "a0", {"config": {"iterations": 1}}, policy.save)
    other = PatchDictionary((40, 40, 3), 8, dictionary.table[:-1])
    changed = policy_of_games(encoder_of_games(other))
    storage.make("agents", "a1", {"config": {"iterations": 1}}, changed.save)
    config = EvaluateConfig(
        world="w0",
        agent="a0",
        storage=StorageConfig(root),
        reality=RealityConfig(env=ENV, kwargs={"steps": 10}, horizon=10),
        episodes=3,
        horizons=[1, 3],
        starts=8,
        samples=2,
        policies=[
            BehaviourConfig(kind="random"),
            BehaviourConfig(kind="scripted", function="mesocosm.envs.pixels:catch"),
        ],
        graded=1,
        policy_episodes=2,
        imagined=4,
    )
    with tracking.start("evaluate", config, quiet=True) as run:
        artifact = JOB.run(config, run)
        with pytest.raises(UsageError, match=r"agent sees images by another tokenizer .*worlds/w0"):
            JOB.plan(EvaluateConfig(**{**vars(config), "agent": "a1"}))
    suite = summary_of(artifact)["suite"]
    assert suite["images"]["unigram"] > 0 and suite["images"]["nats"] > 0
    assert len(suite["images"]["images"][0]["strips"]) == 3
    names = [row["name"] for row in suite["policy_value"]["policies"]]
    assert names[:3] == ["random", "scripted mesocosm.envs.pixels:catch", "agent"]
    assert any(name.startswith("agent, noise") for name in names)
    assert artifact.meta["figures"]["images/unigram"] == suite["images"]["unigram"]
    page = (artifact.path / "report.html").read_text()
    assert "True frames over imagined ones, 1, 2, 3 steps ahead." in page
    parsed(page)
