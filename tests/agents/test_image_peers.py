"""Agents that see images without a world: model-free in reality, and cloned from logs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.agents import validation
from mesocosm.agents.cloning import CloneConfig
from mesocosm.agents.config import AgentConfig, BaselineConfig
from mesocosm.agents.network_cloning import logged_rows
from mesocosm.config import load
from mesocosm.data.tokens.reading import Tokenizers
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.pixels import CoinGrid
from mesocosm.errors import UsageError
from mesocosm.evaluate.judge import judge
from mesocosm.jobs import baseline, clone
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.policies.heads import ActionMap
from mesocosm.policies.image_policy import ImagePolicy
from mesocosm.policies.images import FRAMES, ImageEncoder
from mesocosm.policies.stored import load_policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

ENV = "mesocosm.envs.pixels:CoinGrid"
PPO = "algo=PPO num_envs=2 rollout=32 steps=70 params.minibatch_size=32"
SPACES: tuple[Any, Any] = CoinGrid().observation_space, spaces.Discrete(3)


@pytest.fixture
def stored(root: str, games: Dataset, dictionary: PatchDictionary) -> str:
    """A storage with the games `d0`, and the tokenizers `cells` and, of other images, `small`."""

    def copied(folder: Path) -> None:
        shutil.copytree(games.paths[0], folder, dirs_exist_ok=True)

    storage = Storage(root)
    storage.make("datasets", "d0", {}, copied)
    small = PatchDictionary((16, 16, 3), 8, dictionary.table)
    for name, one in (("cells", dictionary), ("small", small)):
        storage.make("tokenizers", name, {}, Tokenizers(("observation",), (one,)).save)
    return root


def baseline_config(root: str, *words: str) -> BaselineConfig:
    keys = [f"storage.root={root}", f"reality.env={ENV}", *PPO.split(), *words]
    return load(BaselineConfig, [], keys)


def clone_config(root: str, *words: str) -> CloneConfig:
    return load(CloneConfig, [], [f"storage.root={root}", "datasets=[d0]", *words])


def run_job(job: Any, config: Any) -> Artifact:
    with tracking.start(job.name, config, quiet=True) as run:
        artifact: Artifact = job.run(config, run)
    return artifact


@pytest.mark.parametrize("job", ["baseline", "clone"])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokenizer=null", r"tokenizer must name .* \(40, 40, 3\).*, got null.* tokenizer=ID"),
        ("tokenizer=small", r"tokenizer=tokenizers/small is for .*\[16, 16, 3\].*\[40, "),
        ("tokenizer=missing", "missing"),
    ],
)
def test_images_without_their_tokenizer_are_refused(
    stored: str, job: str, word: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        if job == "baseline":
            baseline.JOB.plan(baseline_config(stored, word))
        else:
            clone.JOB.plan(clone_config(stored, word))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_images_is_refused(stored: str, cart_root: Any, tmp_path: Path) -> None:
    message = "tokenizer must be null where no observation is an image, got cells"
    with pytest.raises(UsageError, match=message):
        baseline.JOB.plan(baseline_config(stored, "reality.env=CartPole-v1", "tokenizer=cells"))
    config = clone_config(cart_root(tmp_path), "datasets=[cart]", "tokenizer=cells")
    with pytest.raises(UsageError, match=message):
        clone.JOB.plan(config)


def test_the_algorithms_of_image_worlds_are_accepted_in_reality(stored: str) -> None:
    words = ("tokenizer=cells", "steps=3000", "num_envs=null", "rollout=null")

    def config(algo: str) -> BaselineConfig:
        return replace(baseline_config(stored, *words), algo=algo, params={})

    for algo in ("APPO", "IMPALA", "DQN"):
        assert baseline.JOB.plan(config(algo))["algo"] == algo
    for sac in (config("SAC"), replace(config("SAC"), tokenizer=None)):
        with pytest.raises(UsageError, match=r"algo must be PPO, APPO, IMPALA or DQN .* got SAC"):
            baseline.JOB.plan(sac)


@pytest.mark.integration
def test_the_tokenizer_decides_the_id(stored: str, dictionary: PatchDictionary) -> None:
    storage = Storage(stored)
    other = PatchDictionary((40, 40, 3), 8, dictionary.table[::-1].copy())
    storage.make("tokenizers", "other", {}, Tokenizers(("observation",), (other,)).save)
    for job, config_of in ((baseline.JOB, baseline_config), (clone.JOB, clone_config)):
        refs = ("cells", "tokenizers/cells", "cel", "other")
        plans = [job.resolve(config_of(stored, f"tokenizer={ref}"), storage) for ref in refs]
        assert plans[0].id == plans[1].id == plans[2].id != plans[3].id
        assert plans[2].inputs["tokenizers"] == ["cells"]


@pytest.mark.usefixtures("ray_local")
def test_an_agent_trains_on_codes_in_reality(stored: str, dictionary: PatchDictionary) -> None:
    artifact = run_job(baseline.JOB, baseline_config(stored, "tokenizer=cells", "judge_every=64"))
    curve = json.loads((artifact.path / baseline.CURVE).read_text())
    assert artifact.meta["inputs"] == {"tokenizers": ["cells"]}
    spent = Ledger(Storage(stored), curve["ledger"]).totals().purposes
    assert spent["baseline"].steps == curve["train_steps"] >= 64
    (judged,) = [point for point in curve["points"] if point["kind"] == "judge"]
    assert spent["judge"].steps == judged["judge_steps"] > 0
    shutil.rmtree(Path(stored) / "tokenizers")
    policy = load_policy(artifact.path / "policy")
    assert isinstance(policy, ImagePolicy) and policy.algo == "PPO"
    assert policy.encoder.id == ImageEncoder(SPACES[0], [dictionary]).id
    frame, _ = CoinGrid().reset(seed=0)
    assert policy.act_one(frame) in SPACES[1]


@pytest.mark.integration
def test_a_script_that_sees_frames_is_cloned(stored: str, dictionary: PatchDictionary) -> None:
    """An agent in a world of the same tokenizer may start from the clone."""
    words = ("share=1", "steps=150", "lr=3e-3", "episodes=2", "reality.kwargs.steps=12")
    config = clone_config(stored, "tokenizer=cells", f"reality.env={ENV}", *words)
    agent = run_job(clone.JOB, config)
    assert agent.meta["inputs"] == {"datasets": ["d0"], "tokenizers": ["cells"]}
    metrics = agent.meta["metrics"]
    assert metrics["accuracy"] > 0.55, "half are random: 2/3 at best"
    assert metrics["real_steps"] > 0
    policy = load_policy(agent.path)
    assert isinstance(policy, ImagePolicy) and policy.algo == "clone"
    reality = RealityConfig(env=ENV)
    judged = judge(policy, reality, Ledger(Storage(stored), "j"), episodes=5, seed=0)
    assert np.isfinite(judged.returns).all()
    encoder = ImageEncoder(SPACES[0], [dictionary])
    validation.check_spaces(AgentConfig(init=agent.name), SPACES, agent, encoder)


def test_a_cloned_row_has_frames_of_its_own_episode(
    games: Dataset, dictionary: PatchDictionary
) -> None:
    encoder = ImageEncoder(SPACES[0], [dictionary])
    rows, _ = logged_rows(games, ActionMap(SPACES[1], False), "train", 1.0, encoder)
    numbers = games.episodes("train")
    assert len(rows) == int(games.table["length"][numbers].sum())
    frames = rows.numpy().reshape(len(rows), FRAMES, encoder.widths[0])
    alike = (frames == frames[:, :1]).all((1, 2))
    assert int(alike.sum()) == len(numbers), "only a first row repeats its frame"
