"""The model-free baseline: real RLlib, a real ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesocosm.agents.config import BaselineConfig
from mesocosm.config import load
from mesocosm.envs.amounts import LedgerTotals
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import make_env
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.jobs import baseline
from mesocosm.policies.policy import Policy
from mesocosm.policies.scorer import CandidatePolicy, CandidateScorer
from mesocosm.policies.stored import load_policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

pytestmark = pytest.mark.integration

CARTPOLE = "reality.env=CartPole-v1 model.fcnet_hiddens=[32]"


def run_baseline(root: str, overrides: str) -> tuple[Artifact, dict[str, Any], LedgerTotals]:
    """The artifact, its curve and the ledger's totals."""
    words = [f"storage.root={root}", *CARTPOLE.split(), *overrides.split()]
    config = load(BaselineConfig, [], words)
    with tracking.start("baseline", config, quiet=True) as run:
        artifact = baseline.JOB.run(config, run)
    curve = json.loads((artifact.path / baseline.CURVE).read_text())
    return artifact, curve, Ledger(Storage(root), curve["ledger"]).totals()


def test_every_real_step_of_a_baseline_is_in_the_ledger(ray_local: None, root: str) -> None:
    config = (
        "num_envs=4 rollout=32 steps=700 target=5 select_episodes=2 select_every=100"
        " params.minibatch_size=64 reality.price.per_step=0.5 reality.price.per_reset=2"
    )
    artifact, curve, totals = run_baseline(root, config)
    trained, selected = curve["train_steps"], curve["select_steps"]
    spent = {name: purpose.steps for name, purpose in totals.purposes.items()}
    assert spent == {"collect": 0, "baseline": trained, "select": selected, "judge": 0, "play": 0}
    assert not totals.unconfirmed and curve["steps"] == trained + selected <= 700
    # Any policy survives 5 steps in CartPole: the target is reached, and its confirmation paid for.
    assert curve["reached"] == curve["steps"] and selected > 0 and not curve["censored"]
    kinds = [point["kind"] for point in curve["points"]]
    assert kinds[-1] == "select" and "train" in kinds
    steps = [point["steps"] for point in curve["points"]]
    assert steps == sorted(steps)
    resets = sum(totals.purposes[name].resets for name in ("baseline", "select"))
    assert curve["points"][-1]["price"] == 0.5 * curve["steps"] + 2 * resets
    Policy.load(artifact.path / "policy")
    again, _, totals = run_baseline(root, config)
    assert again.id == artifact.id
    assert totals.steps == curve["steps"], "the finished artifact is reused"


def test_judging_does_not_count_as_baseline_steps(ray_local: None, root: str) -> None:
    config = "steps=500 target=500 num_envs=2 rollout=50 judge_every=150 judge_episodes=2"
    _, curve, totals = run_baseline(root, config)
    judged = [point for point in curve["points"] if point["kind"] == "judge"]
    assert [point["steps"] // 50 * 50 for point in judged] == [200, 400]
    assert all(len(point["returns"]) == 2 for point in judged)
    assert curve["steps"] == curve["train_steps"] == totals.purposes["baseline"].steps <= 500
    assert curve["select_steps"] == 0
    total_return = sum(sum(point["returns"]) for point in judged)  # CartPole: one reward a step
    assert totals.purposes["judge"].steps == curve["judge_steps"] == total_return


@pytest.mark.slow
def test_an_agent_trains_on_candidate_commands_in_reality(ray_local: None, root: str) -> None:
    words = (
        "reality.env=mesocosm.envs.text:ChoresEasy-v0 reality.success=info.success num_envs=4"
        " rollout=40 steps=500 params.minibatch_size=80 max_candidates=8 judge_every=200"
        " judge_episodes=3 target=2 candidates=mesocosm.envs.text.household_text:candidates"
    )
    config = load(BaselineConfig, [], [f"storage.root={root}", *words.split()])
    with tracking.start("baseline", config, quiet=True) as run:
        artifact = baseline.JOB.run(config, run)
    curve = json.loads((artifact.path / baseline.CURVE).read_text())
    judged = [point for point in curve["points"] if point["kind"] == "judge"]
    assert judged and all(len(point["returns"]) == 3 for point in judged)
    spent = Ledger(Storage(root), curve["ledger"]).totals().purposes
    assert spent["baseline"].text_bytes > 40 * spent["baseline"].steps, "texts are counted"
    loaded = load_policy(artifact.path / "policy")
    assert isinstance(loaded, CandidatePolicy) and loaded.shape.candidates == 8
    text, info = make_env(config.reality).reset(seed=0)
    assert loaded.act_one(text) in info["admissible_commands"]
    fresh = CandidateScorer(loaded.shape).state_dict()
    last = loaded.network.state_dict()["score.2.weight"]
    assert float(last.abs().max()) > 0.01 * float(fresh["score.2.weight"].abs().max())


PPO = "num_envs=3 rollout=40 params.minibatch_size=60"
DQN = (
    "algo=DQN num_envs=2 rollout=1 iteration_steps=60"
    " params.num_steps_sampled_before_learning_starts=50"
)


@pytest.mark.parametrize("algo", [PPO, pytest.param(DQN, marks=pytest.mark.slow)])
def test_a_baseline_never_exceeds_its_cap_and_ends_censored(
    ray_local: None, root: str, algo: str
) -> None:
    config = f"{algo} steps=400 target=500 ledger=shared reality.budget.steps=10"
    _, curve, totals = run_baseline(root, config)
    assert curve["ledger"] == "shared" and not totals.unconfirmed
    assert curve["reached"] is None and curve["censored"] and 250 < curve["steps"] <= 400
    assert totals.purposes["baseline"].steps == curve["steps"]


@pytest.mark.slow
def test_a_larger_batch_is_counted_before_it_is_taken(ray_local: None, root: str) -> None:
    batch = "params.train_batch_size_per_learner=240"
    _, curve, _ = run_baseline(root, f"{PPO} {batch} steps=400 target=500")
    assert 240 <= curve["steps"] <= 244 and curve["censored"], "a second would pass the cap"


@pytest.mark.slow
def test_an_environment_that_always_crashes(
    ray_local: None, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sample_envs"))
    config = "reality.env=ownenvs:Line reality.kwargs.trouble.None=crash reality.horizon=20"
    with pytest.raises(MesocosmError, match=r"'ownenvs:Line' failed 5 times in a row .*fell off"):
        run_baseline(root, f"{config} num_envs=2 rollout=64")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=100", r"steps must be >= .* one iteration, got 100"),
        ("reality.env=CartPol-v1", "CartPol-v1"),
    ],
)
def test_a_wrong_baseline(root: str, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_baseline(root, override)
