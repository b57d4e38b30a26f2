"""The job `study`: agents in several worlds, and whether their gains reach reality."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any

import pytest
from numpy.random import default_rng

from mesocosm import config
from mesocosm.agents.config import AgentConfig
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.evaluate.report import transfer
from mesocosm.evaluate.report.transfer import TransferPoint
from mesocosm.jobs.study import JOB, StudyConfig, check

from .lab import WALK, Lab, summary_of
from .test_report import parsed

DATA = "pretrain.data.datasets=[walks]"
TWO = "worlds=[train.steps=5,train.steps=20 data.unique=50]"


def study(lab: Lab, *words: str) -> StudyConfig:
    """A study in `Walk`, with small agents."""
    keys = (
        f"storage.root={lab.root}",
        f"reality.env={WALK}",
        "reality.horizon=12",
        "reality.price.per_step=0.5",
        "pretrain.model.size=10k",
        "agent.backend=local",
        "agent.iterations=1",
        "agent.num_envs=8",
        "agent.rollout=16",
        "agent.params.minibatch_size=32",
        "agent.snapshots=1",
        "evaluate.episodes=3",
        "evaluate.imagined=4",
        "evaluate.starts=8",
        "evaluate.samples=2",
        "evaluate.horizons=[1]",
        "evaluate.full=false",
    )
    other = any(word.startswith("reality.env=") for word in words)
    limit = [] if other else ["reality.kwargs.limit=12"]
    return config.load(StudyConfig, [], [*keys, *limit, *words])


def test_a_dry_run_names_the_worlds_and_the_price(lab: Lab) -> None:
    facts = JOB.plan(study(lab, DATA, TWO))
    assert [row["world"] for row in facts["worlds"]] == [
        "train.steps=5",
        "train.steps=20 data.unique=50",
    ]
    assert [row["pretrain"] for row in facts["worlds"]] == ["to train"] * 2
    assert facts["judged episodes"] == 12, "the agent and its start, in each of two worlds"
    assert facts["judged real steps"] == "at most 144"
    assert facts["price of judging"] == "at most 72 USD"


def test_overrides_change_the_world_and_not_the_other(lab: Lab) -> None:
    cells = JOB.resolve(study(lab, DATA, TWO), lab.storage).cells
    first, second = (cell.pretrain for cell in cells)
    assert first is not None and second is not None and cells[0].id != cells[1].id
    assert (first.train.steps, first.data.unique) == (5, None)
    assert (second.train.steps, second.data.unique) == (20, 50)
    assert first.model.size == second.model.size == "10k"


def test_worlds_that_exist_are_studied_and_found_again(
    lab: Lab, ray_local: None, golden: Any
) -> None:
    lab.copy_world("w1", ["walks"])
    cfg = study(lab, "worlds=[w0,w1]")
    artifact = JOB.run(cfg, lab.run)
    summary = summary_of(artifact)
    assert [point["name"] for point in summary["points"]] == ["worlds/w0", "worlds/w1"]
    point = summary["points"][0]
    assert point["gain"]["start"] == f"{point['agent']}@0"
    assert (point["gain"]["real"]["pairs"], point["gain"]["world"]["pairs"]) == (3, 4)
    assert point["passes"] is None and point["nats"] > 0
    digits = {name: point[name] for name in ("nats", "imagined", "real")}
    golden.check("study", digits, tolerance=golden.TRAINED)
    assert summary["statistics"]["pearson"] is None, "two worlds are no correlation"
    plan = JOB.resolve(cfg, lab.storage)
    totals = Ledger(lab.storage, plan.ledger).totals().purposes["judge"]
    assert totals.resets == summary["cost"]["resets"] == 6, "the worlds are equal"
    assert not lab.storage.list(f"runs/episodes/{plan.id}"), "removed at the end"
    assert summary["cost"]["price"] == summary["cost"]["steps"] / 2 > 0
    rows = list(csv.DictReader((artifact.path / "table.csv").read_text().splitlines()))
    assert float(rows[0]["gain_real"]) == point["gain"]["real"]["mean"]
    assert (artifact.path / "transfer.svg").read_text().startswith("<?xml")
    text = " ".join(parsed((artifact.path / "report.html").read_text()).texts)
    assert all(line in text for line in summary["findings"]) and "What reality cost" in text
    assert set(artifact.meta["inputs"]) == {"worlds", "agents"}
    assert JOB.run(cfg, lab.run).id == artifact.id
    assert Ledger(lab.storage, plan.ledger).totals().purposes["judge"].resets == 6
    facts = JOB.plan(cfg)
    assert [row["agent"] for row in facts["worlds"]] == ["found", "found"]
    assert facts["judged episodes"] == 0, "nothing is paid twice"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["worlds=[w0]"], r"worlds must name at least 2, got \['w0'\]"),
        (["worlds=[w0,worlds/w0]"], "worlds must all differ"),
        (["worlds=[w0,nothing]"], "no artifact"),
        ([TWO], "worlds, train.steps=5: data.datasets must not be empty"),
        ([DATA, "worlds=[train.stps=5,w0]"], "did you mean 'train.steps'"),
        (["worlds=[w0,w1]", "evaluate.gain=true"], "evaluate.gain is set by the study"),
        (["worlds=[w0,w1]", "agent.seed=3"], "agent.seed is set by the study; set seed at"),
        (["worlds=[w0,w1]", "agent.snapshots=0"], "agent.snapshots must be >= 1 without"),
        (["worlds=[w0,w1]", "agent.objective=disagreement"], "agent.objective must be return"),
        (["worlds=[w0,w1]", "agent.algo=PPPO"], "agent: algo must be"),
        (["worlds=[w0,w1]", "agent.init=none"], "no artifact"),
        (["worlds=[w0,w1]", "evaluate.episodes=1"], "evaluate: episodes must be >= 2"),
        (["worlds=[w0,w1]", "evaluate.judge_steps=9"], "evaluate: judge_steps must be >= 72"),
        (["worlds=[w0,w1]", "reality.env=CartPole-v1"], "has the observation space"),
        ([DATA, TWO, "reality.env=CartPole-v1"], "has other spaces than reality.env"),
        (
            ["worlds=[w0,w1]", "reality.env=mesocosm.envs.pixels:CoinGrid"],
            r"study cannot use images yet, got Box.* of mesocosm\.envs\.pixels:CoinGrid",
        ),
    ],
)
def test_a_study_that_cannot_be_made_is_refused(
    lab: Lab, words: Sequence[str], message: str
) -> None:
    if lab.storage.find("worlds", "w1") is None:
        lab.copy_world("w1", ["walks"])
    with pytest.raises(UsageError, match=message):
        JOB.resolve(study(lab, *words), lab.storage)


def test_reality_must_be_named() -> None:
    blocks = {"agent": AgentConfig(), "evaluate": EvaluateConfig(), "reality": RealityConfig()}
    with pytest.raises(UsageError, match=r"reality\.env must be"):
        check(StudyConfig(worlds=["a", "b"], **blocks))


def point(name: str, imagined: float, real: float, *, passes: bool | None = None) -> TransferPoint:
    """A point whose intervals are .1 on either side."""
    sides = {
        side: {"mean": gain, "interval": (gain - 0.1, gain + 0.1), "start": 0.5, "pairs": 20}
        for side, gain in (("world", imagined), ("real", real))
    }
    unconfirmed = imagined - 0.1 > 0 >= real - 0.1
    gain = {"start": "agents/c", "unconfirmed": unconfirmed, **sides}
    r = None if passes is None else 0.95 if passes else 0.3
    about = {"world": f"worlds/{name}", "agent": "agents/a", "evaluation": "evaluations/e"}
    values: dict[str, Any] = {"nats": 2.0, "pearson": r, "regret": r and 0.02, "passes": passes}
    returns = {"imagined": 0.5 + imagined, "real": 0.5 + real}
    return TransferPoint(name, **about, **values, **returns, gain=gain)


def summarise(points: Sequence[TransferPoint]) -> dict[str, Any]:
    cost = {"steps": 10, "resets": 2, "price": 0.0, "currency": "USD"}
    return transfer.summarise("title", "env", points, cost, 0)


def test_a_world_that_flatters_and_is_refused_is_named() -> None:
    points = [
        point("poor", 0.25, 0.0, passes=False),
        point("middle", 0.2, 0.15, passes=False),
        point("good", 0.3, 0.28, passes=True),
    ]
    summary = summarise(points)
    findings = summary["findings"]
    assert findings[0].startswith("Imagined and real gains of 3 agents correlate with r = ")
    assert "loses 0% of the range" in findings[0], "the greatest imagined gain is the greatest real"
    assert findings[1] == "1 of 3 worlds show a gain that reality does not show: poor."
    assert findings[2].endswith(
        "passes good, and refuses 2, of which 1 show a gain that reality does not show."
    )
    json.dumps(summary, allow_nan=False)
    drawing = transfer.plot(summary)
    for label in ("poor", "good", "gain in reality", "gain in the world"):
        assert label in drawing
    assert len(parsed(transfer.render(summary)).texts) > 20


def test_choosing_by_a_flattering_world_is_regretted() -> None:
    statistics = summarise([point("a", 0.9, 0.0), point("b", 0.2, 0.2), point("c", 0.4, 0.4)])
    assert statistics["statistics"]["regret"] == pytest.approx(1.0)
    assert statistics["statistics"]["bias"] == pytest.approx(0.3)
    assert not any("gate" in line for line in statistics["findings"]), "no policies were compared"


def test_equal_gains_have_no_correlation() -> None:
    summary = summarise([point(name, 0.0, 0.0) for name in "abc"])
    assert "have no correlation" in summary["findings"][0]
    assert "0 of 3 worlds" in summary["findings"][1]
    parsed(transfer.render(summary))


def test_many_worlds_are_drawn() -> None:
    rng = default_rng(0)
    points = [point(f"w{k}", float(rng.normal()), float(rng.normal())) for k in range(9)]
    assert transfer.plot(summarise(points)).count("w8") >= 1
