"""The job `evaluate` on a text world: exact texts, likelihood, the checker, and policy values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from mesocosm import config
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.evaluate.text_world import check_text_config, likelihood
from mesocosm.jobs import collect
from mesocosm.jobs.evaluate import JOB
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import new_text_net
from mesocosm.model.language.world import TextWorld
from mesocosm.model.mup import init_
from mesocosm.policies.candidates import CandidateShape, load_source
from mesocosm.policies.scorer import CandidatePolicy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train.texts import TextCorpus

EXPERT = "mesocosm.envs.text.chores_policies:ChoresExpert"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with 100 steps of household tasks and an untrained text world."""
    folder = tmp_path_factory.mktemp("texts")
    keys = (f"storage.root={folder}", "reality.env=mesocosm.envs.text:ChoresEasy-v0", "steps=100")
    expert = f'behaviours=[{{kind: noisy, noise: 0.2, function: "{EXPERT}"}}]'
    logs = config.load(collect.CollectConfig, overrides=(*keys, "workers=0", expert))
    with tracking.start("collect", logs, quiet=True) as run:
        data = collect.JOB.run(logs, run)
    model = ModelConfig("language", "10k", members=1, context=768, vocabulary=300)
    corpus = TextCorpus.fit(Dataset([data.path]), model)
    net = new_text_net(corpus.spec, model)
    init_(net, 0)
    sizes = {"window": 768, "longest": corpus.longest, "longest_start": corpus.longest_start}
    world = TextWorld(net, corpus.tokenizer, **sizes, codec=corpus.codec.to_json())  # type: ignore[arg-type]
    Storage(str(folder)).make("worlds", "w0", {"inputs": {"datasets": [data.id]}}, world.save)
    return folder


def evaluate(root: Path, *overrides: str) -> Artifact:
    keys = (f"storage.root={root}", "world=w0", "starts=2", *overrides)
    loaded = config.load(EvaluateConfig, overrides=keys)
    with tracking.start("evaluate", loaded, quiet=True) as run:
        return JOB.run(loaded, run)


@pytest.mark.integration
def test_a_text_world_is_judged_by_texts(root: Path) -> None:
    artifact = evaluate(root)
    summary = json.loads((artifact.path / "summary.json").read_text())
    texts = summary["texts"]
    assert texts["predicted"] == 2 and 0 < texts["bits_per_byte"] < 10
    parts = ("dynamics", "reward", "termination", "task")
    assert texts["losses"]["total"] == pytest.approx(sum(texts["losses"][p] for p in parts))
    steps = texts["steps"]
    assert steps["determined"]["of"] + steps["revealed"]["of"] == steps["exact"]["of"] > 0
    assert texts["episodes"]["valid_starts"]["of"] == 2
    novelty = texts["novelty"]
    assert novelty["copies"]["of"] >= 2 > novelty["copies"]["count"], (
        "an untrained world draws noise"
    )
    assert novelty["copies_real"]["of"] > 0
    assert summary["policy_value"] is None and "Not measured" in summary["not_measured"]
    page = (artifact.path / "report.html").read_text()
    assert "exact, where the text is determined" in page and "Not measured" in page
    figures = artifact.meta["figures"]
    assert figures["valid/bits_per_byte"] == texts["bits_per_byte"]
    assert figures["text/exact"] == steps["exact"]["count"] / steps["exact"]["of"]


def test_bits_do_not_depend_on_the_tokenizer_alone(root: Path) -> None:
    """The likelihood of the job equals the losses of the rows."""
    world = TextWorld.load(Storage(str(root)).artifact("worlds", "w0").path)
    data = Dataset([Storage(str(root)).artifact("datasets", d).path for d in _datasets(root)])
    corpus = TextCorpus.fit(data, ModelConfig("language", "10k", 1, context=768, vocabulary=300))
    losses, bits = likelihood(world, data, corpus.codec)
    model = ModelConfig("language", "10k", members=1, context=768)
    (rows,) = corpus.loader(data, "valid", model, 8, 0).eval_batches()
    direct = world.losses(rows)
    assert bits == pytest.approx(float(direct.bits_per_byte), rel=1e-5)
    count = float(direct.transitions)
    assert losses["dynamics"] == pytest.approx(float(direct.nats["dynamics"]) / count, rel=1e-5)


@pytest.mark.integration
def test_policies_are_compared_in_the_world_and_in_reality(root: Path) -> None:
    noisy = ", ".join(f'{{kind: noisy, noise: {k / 4}, function: "{EXPERT}"}}' for k in (1, 2, 3))
    keys = (f"policies=[{noisy}]", "policy_episodes=2", "imagined=2", "starts=1")
    summary = json.loads((evaluate(root, *keys).path / "summary.json").read_text())
    values = summary["policy_value"]
    assert len(values["policies"]) == 3 and all(row["held_out"] for row in values["policies"])
    assert values["real_steps"] > 0 and values["ranking"]["policies"] == 3


def test_candidates_of_other_code_are_another_evaluation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent's id has its weights; the function that lists its candidates runs as it is now."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "commands_1.py").write_text("def candidates(first, text):\n    return ['look']\n")
    source, storage = load_source("commands_1:candidates"), Storage(str(root))
    spaces: Any = facts_of(RealityConfig(env="mesocosm.envs.text:ChoresEasy-v0")).spaces
    agent = CandidatePolicy("PPO", *spaces, source, CandidateShape(candidates=4))
    storage.make("agents", "cc01", {"inputs": {}, "config": {}}, agent.save)
    noisy = [f'{{kind: noisy, noise: {k / 4}, function: "{EXPERT}"}}' for k in (1, 2, 3)]
    trained = f"policies=[{', '.join([*noisy, '{kind: trained, policy: cc01}'])}]"
    for words in (["agent=cc01"], [trained]):
        keys = [f"storage.root={root}", "world=w0", *words]
        ids = []
        for commands in ("['look']", "['look', 'go to table']"):
            code = f"def candidates(first, text):\n    return {commands}\n"
            (tmp_path / "commands_1.py").write_text(code)
            ids.append(JOB.resolve(config.load(EvaluateConfig, overrides=keys), storage).id)
        assert ids[0] != ids[1]


def test_the_adversary_is_refused() -> None:
    with pytest.raises(UsageError, match="adversary must be 0 for a world of texts, got 1"):
        check_text_config(EvaluateConfig(adversary=1))


def _datasets(root: Path) -> list[str]:
    return [artifact for artifact in Storage(str(root)).list("datasets") if "." not in artifact]
