"""What to collect next: a small real ensemble, trained on data that lacks a region, sends the
budget there; the config is one that `collect` runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import fit_world

from mesocosm import config
from mesocosm.cli.main import main
from mesocosm.config import StorageConfig, fingerprint
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import DrawnOption, PriceConfig, RealityConfig
from mesocosm.evaluate.buying import Bought, Imagined, buy, weights
from mesocosm.jobs import collect, propose
from mesocosm.jobs.propose import ProposeConfig
from mesocosm.model.artifact import TEXTS
from mesocosm.model.config import ModelConfig
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train.export import calibrate

sys.path.insert(0, str(Path(__file__).parents[1] / "sample_envs"))
MODULE = "field"
"""Its file is part of every id here: editing it changes the golden digits."""


def reality(**more: Any) -> RealityConfig:
    return RealityConfig(
        env=f"{MODULE}:Field", horizon=12, price=PriceConfig(per_step=0.5, per_reset=1.0), **more
    )


BEHAVIOURS = [
    BehaviourConfig(kind="scripted", function=f"{MODULE}:{name}") for name in ("stay", "right")
]


def make_world(root: str, members: int = 3, **more: Any) -> Artifact:
    """A world of 300 random steps, near 0."""
    cfg = CollectConfig(
        seed=4, storage=StorageConfig(root), reality=reality(**more), steps=300, lanes=1, workers=0
    )
    with tracking.start("collect", cfg, quiet=True) as run:
        data = collect.JOB.run(cfg, run)
    dataset = Dataset([data.path])
    model = ModelConfig(family="ensemble", size="10k", members=members)
    world = fit_world(dataset, model, steps=60)
    calibrate(world, dataset, Codec.fit(dataset))
    id = fingerprint("test", members, data.id)
    return Storage(root).make("worlds", id, {"inputs": {"datasets": [data.id]}}, world.save)


def proposal(root: str, world: Artifact, **more: Any) -> tuple[dict[str, Any], CollectConfig, str]:
    more = {"behaviours": BEHAVIOURS, "reality": reality(), "imagined": 16, "steps": 203} | more
    cfg = ProposeConfig(storage=StorageConfig(root), world=world.id, **more)
    with tracking.start("propose", cfg, quiet=True) as run:
        result = propose.JOB.run(cfg, run)
    file = result.path / propose.NEXT
    return (
        json.loads((result.path / propose.PROPOSAL).read_text()),
        config.load(CollectConfig, [file]),
        file.read_text(),
    )


def steps_of(answer: dict[str, Any]) -> dict[str, int]:
    return {row["behaviour"].rpartition(":")[2]: row["steps"] for row in answer["candidates"]}


def test_the_shares_of_given_points(golden: Any) -> None:
    """The digits of a trained world's imagination are those of one kind of CPU; these are not."""
    rng = np.random.default_rng(0)
    episodes, logged = np.repeat(np.arange(16), 12), rng.normal(size=(300, 3))
    candidates = [
        Imagined(shift + rng.normal(size=(192, 3)), rng.gamma(2.0, size=192), episodes, 16)
        for shift in (0.0, 1.0, 3.0)
    ]
    bought = buy(candidates, logged, 0.5, 203, disagrees=True, seed=0)
    digits = {f"steps of {i}": float(count) for i, count in enumerate(bought.steps)}
    digits |= {f"worth of {i}": score.worth for i, score in enumerate(bought.scores)}
    golden.check("propose", {**digits, "left": bought.left})


@pytest.mark.slow
def test_the_budget_goes_where_data_lack_and_members_disagree(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(root)
    answer, job, text = proposal(root, world)
    steps = steps_of(answer)
    assert sum(steps.values()) == 203 == job.steps and steps["right"] > 85 and steps["stay"] < 70
    row = answer["candidates"][0]
    assert row["behaviour"] == f"scripted {MODULE}:right" and row["gap"] > 1
    assert row["episodes"] == pytest.approx(row["steps"] / 12)
    assert answer["price"] == pytest.approx(203 * 0.5 + 203 / 12)
    assert job.seed == 5, "the seed of the world's data, 4, would begin alike"
    assert "worth" in text and sum(b.weight for b in job.behaviours) == pytest.approx(1, abs=1e-3)
    again, _, same = proposal(root, world, out=str(tmp_path / "next.yaml"))
    assert again == answer and same == text == (tmp_path / "next.yaml").read_text()
    forced, _, _ = proposal(root, world, force=True)
    assert forced == answer, "the same seed imagines the same"
    words = ["-c", str(tmp_path / "next.yaml"), f"storage.root={root}", "--dry-run", "--json"]
    assert main(["collect", *words]) == 0
    assert json.loads(capsys.readouterr().out)["real steps"] == 203
    with tracking.start("collect", job, quiet=True) as run:
        job.storage.root, job.workers = root, 0
        data = Dataset([collect.JOB.run(job, run).path])
    assert data.transitions == 203
    assert any(float(o[0]) > 2 for e in data.iter_episodes() for o in e.observations)


@pytest.mark.slow
def test_tasks_that_are_reset_options_are_candidates(root: str) -> None:
    """Data of both sides; the candidate of each is imagined from that side alone, and what is
    collected keeps to it.
    """
    task = {"task": ["side"], "task_options": {"side": DrawnOption(choices=[0.0, 6.0])}}
    world = make_world(root, **task)
    answer, job, _ = proposal(root, world, behaviours=[], reality=reality(**task))
    names = {row["behaviour"] for row in answer["candidates"]}
    assert names == {"random", "random side=0.0", "random side=6.0"}
    assert sum(steps_of(answer).values()) == 203
    only = CollectConfig(
        storage=StorageConfig(root), reality=job.reality, steps=60, lanes=1, workers=0
    )
    only.behaviours = [BehaviourConfig(task_options={"side": DrawnOption(choices=[6])})]
    with tracking.start("collect", only, quiet=True) as run:
        data = Dataset([collect.JOB.run(only, run).path])
    assert {e.task["side"] for e in data.iter_episodes()} == {6.0}
    assert data.options[0].values is None, "a number, as in the other data"


@pytest.mark.slow
def test_notes_name_the_reasons_for_a_weak_proposal(root: str) -> None:
    world = make_world(root, members=1)
    answer, _, text = proposal(root, world, behaviours=[])
    assert steps_of(answer) == {"random": 203} and "1 member" in answer["notes"][0]
    assert "only candidate" in answer["notes"][1]
    assert "# note: random actions are the only candidate" in text
    answer, _, _ = proposal(root, world)
    assert answer["candidates"][0]["behaviour"].endswith(":right")
    assert steps_of(answer)["right"] > 85, "coverage alone chooses"
    answer, _, text = proposal(root, world, steps=24)
    assert any("about 2 episodes, less than one of" in note for note in answer["notes"])
    assert "# note: the budget is about" in text
    answer, _, _ = proposal(root, world, steps=6)
    assert any("less than one episode (some 12 steps)" in note for note in answer["notes"])


def candidate(centre: float, disagreement: float = 1.0, spread: float = 0.3) -> Imagined:
    """Eight episodes of 20 steps about `centre`."""
    draw = np.random.default_rng(abs(int(10 * centre)))
    points = draw.normal(centre, spread, (160, 2)).astype(np.float32)
    return Imagined(points, np.full(160, disagreement), np.repeat(np.arange(8), 20), 8)


LOGGED = np.random.default_rng(0).normal(0, 0.3, (500, 2)).astype(np.float32)


def share(
    *candidates: Imagined, steps: int = 40, disagrees: bool = True, even: float = 0.5
) -> Bought:
    return buy(candidates, LOGGED, 0.5, steps, disagrees=disagrees, seed=0, even=even)


def test_steps_go_where_they_tell_the_most_of_all_candidates() -> None:
    """Twins share what one would get, and a candidate on the logs gets little. Disagreement counts,
    where there is any.
    """
    result = share(candidate(0), candidate(5), candidate(5), candidate(-5), steps=101)
    home, a, b, other = result.steps
    assert sum(result.steps) == 101 and home < 15 and min(a + b, other) > 25
    assert 0 < result.left < 0.5
    two = share(candidate(5), candidate(-5), candidate(-5.1), candidate(-4.9), steps=10)
    assert two.steps[0] < 5, "steps of one of three near each other tell of all three"
    pair = candidate(5, 0.1), candidate(-5, 3.0)
    seen, blind = share(*pair), share(*pair, disagrees=False)
    assert seen.steps[1] > blind.steps[1] and seen.scores[1].worth > 5 * seen.scores[0].worth
    lesser = share(candidate(5, 3.0, 1.0), candidate(-5, 0.3, 1.0), steps=100)
    assert lesser.scores[0].worth > 4 * lesser.scores[1].worth
    assert 25 <= lesser.steps[1] < 50, "half is even, the other half goes to the less known"
    pair = candidate(0), candidate(5, spread=1.0)
    assert share(*pair, steps=100, even=1.0).steps == [50, 50]
    assert share(*pair, steps=100, even=0.0).steps[1] > 80
    assert weights([100, 100], [10.0, 50.0]) == pytest.approx([5 / 6, 1 / 6], abs=1e-3)


def test_a_proposal_of_the_same_id_has_the_same_digits() -> None:
    """Also where the even share of a candidate is less than a step."""
    rng = np.random.default_rng(1)
    logged = rng.normal(size=(60, 3)).astype(np.float32)
    episode = np.repeat(np.arange(8), 10)
    candidates = [
        Imagined(
            (rng.normal(size=(80, 3)) * scale).astype(np.float32), rng.uniform(size=80), episode, 8
        )
        for scale in (1, 1.15, 1.3, 1.45)
    ]
    for even, steps in ((0.0, [10, 6, 14, 10]), (0.02, [10, 6, 14, 10])):
        bought = buy(candidates, logged, 0.5, 40, disagrees=True, seed=0, even=even)
        assert bought.steps == steps
        assert bought.left == pytest.approx(0.833581757)


def test_budgets_beyond_what_was_imagined_and_worlds_that_diverged() -> None:
    diverged = candidate(-5)
    diverged.disagreement[:] = np.inf
    result = share(candidate(0), candidate(5), diverged, steps=100_000)
    assert sum(result.steps) == 100_000
    assert all(np.isfinite([score.worth for score in result.scores]))
    assert result.steps[1] > 20_000 and result.steps[2] > 20_000
    assert share(candidate(5), candidate(0), steps=3).steps == [3, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=100"], "world is not set"),
        (["world=w0", "steps=1"], "steps must be >= 2, got 1"),
        (["world=w0", "imagined=1"], "imagined must be >= 4, got 1"),
        (["world=w0", "even=2"], "even must be in [0, 1], got 2"),
        (["world=w0", "agents=[a0]", "noises=[]"], "noises must name levels of noise"),
        (["world=w0", "agents=[a0]", "noises=[-1]"], "noise must be in [0, inf), got -1"),
        (["world=w0"], "worlds/w0"),
    ],
)
def test_wrong_use_is_refused(
    words: list[str], message: str, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["propose", *words, f"storage.root={root}", "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_world_of_texts_is_refused(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.dumps({TEXTS: True})
    meta = {"inputs": {"datasets": []}}
    Storage(root).make("worlds", "t0", meta, lambda to: (to / "world.json").write_text(about))
    assert main(["propose", "world=t0", f"storage.root={root}", "--dry-run"]) == 2
    assert "world=worlds/t0 must be of model.family ensemble or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("{colour: {choices: [1]}}", "must name one of reality.task_options"),
        ("{side: {choices: [2]}}", "must be within"),
        ("{side: {low: 0, high: 1}}", "must be within"),
    ],
)
def test_a_behaviour_draws_a_part_of_realitys_options(
    option: str, message: str, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"reality.env={MODULE}:Field",
        "reality.task=[side]",
        "reality.task_options={side: {choices: [0, 6]}}",
        f"storage.root={root}",
        f"behaviours=[{{kind: random, task_options: {option}}}]",
    ]
    assert main(["collect", *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
