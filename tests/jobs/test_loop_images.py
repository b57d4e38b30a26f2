"""The whole loop on an environment that is seen as pictures."""

from __future__ import annotations

import json

import pytest

from mesocosm.config import load
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.errors import UsageError
from mesocosm.jobs import collect, loop, tokenize
from mesocosm.jobs.loop_config import LoopConfig
from mesocosm.jobs.tokenize import TokenizeConfig
from mesocosm.policies.image_policy import ImagePolicy
from mesocosm.policies.images import encoder_of
from mesocosm.policies.stored import load_policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

REALITY = ["reality.env=mesocosm.envs.pixels:CoinGrid", "reality.horizon=10"]
LOOP = "rounds=1 collect.steps=200 collect.workers=0 pretrain.train.steps=5 evaluate.episodes=2"
LOOP += " pretrain.model.base_steps=50 pretrain.model.head_steps=50"
LOOP += " pretrain.model.family=sequence pretrain.model.size=10k pretrain.model.context=4"
LOOP += " agent.iterations=1 agent.num_envs=8 agent.rollout=32 agent.snapshots=0"
LOOP += " agent.backend=local evaluate.starts=8 evaluate.horizons=[1] evaluate.full=false"
PEER = "{num_envs: 2, rollout: 32, steps: 70, judge_every: 64, judge_episodes: 2}"


def loop_of(root: str, *overrides: str) -> LoopConfig:
    words = [*REALITY, *LOOP.split(), f"storage.root={root}", "tracking.uri=none", *overrides]
    return load(LoopConfig, [], words)


def test_a_loop_of_images_needs_a_tokenizer_and_its_baselines_have_the_same(root: str) -> None:
    for overrides, message in (
        ([f"baselines=[{PEER}]"], r"pretrain.*data\.tokenizer"),
        (["baselines=[{tokenizer: t0}]"], r"baselines\[0\]\.tokenizer is set by the loop"),
    ):
        with pytest.raises(UsageError, match=message):
            loop.JOB.resolve(loop_of(root, *overrides), Storage(root))


@pytest.mark.slow
def test_a_loop_sees_by_a_tokenizer_that_was_fitted_before(ray_local: None, root: str) -> None:
    cfg = loop_of(root, f"baselines=[{PEER}]")
    logs = load(CollectConfig, [], [*REALITY, "steps=200", "workers=0", f"storage.root={root}"])
    with tracking.start("collect", logs, quiet=True) as run:
        data = collect.JOB.run(logs, run)
    tokens = load(TokenizeConfig, [], [f"data.datasets=[{data.id}]", f"storage.root={root}"])
    with tracking.start("tokenize", tokens, quiet=True) as run:
        tokenizer = tokenize.JOB.run(tokens, run)
    cfg.pretrain.data.tokenizer = tokenizer.id
    with tracking.start("loop", cfg, quiet=True) as run:
        artifact = loop.JOB.run(cfg, run)
    curves = json.loads((artifact.path / "summary.json").read_text())["curves"]
    (point,) = curves["world"][0]["points"]
    assert point["real_steps"] == 200
    storage = Storage(root)
    (agent,) = storage.list("agents")
    policies = [load_policy(storage.artifact("agents", agent).path)]
    for id in storage.list("evaluations"):
        made = storage.artifact("evaluations", id)
        if made.meta["job"] == "baseline":
            assert made.meta["inputs"] == {"tokenizers": [tokenizer.id]}
            policies.append(load_policy(made.path / "policy"))
    assert len(policies) == 2, "an agent of the world, and a model-free one"
    encoders = {encoder.id for encoder in map(encoder_of, policies) if encoder is not None}
    assert len(encoders) == 1 and all(isinstance(policy, ImagePolicy) for policy in policies)
