"""What may be collected next, as candidates that `propose` compares.

What `collect` can run is a candidate: random actions, agents at several levels of noise, behaviours
of the user's own; where tasks are reset options, each behaviour on each part of them too (start
states are among these where the environment takes them as reset options).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mesocosm import checks
from mesocosm.config import JobConfig
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.format.horizon import horizon_of
from mesocosm.data.loading.codec import Codec
from mesocosm.envs.config import PriceConfig, RealityConfig, TaskOption
from mesocosm.envs.make import EnvFacts, facts_of, source_hash
from mesocosm.errors import UsageError
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.config import reality_of
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.policy import Acts, policy_of
from mesocosm.store.artifacts import Artifact, Storage

PARTS = 3
"""The range of a reset option is cut into so many equal parts."""


@dataclass
class ProposeConfig(JobConfig):
    world: str = ""
    """`worlds/<id>`, or a unique prefix of the id."""
    steps: int = 1000
    """Real steps that may be bought."""
    agents: list[str] = field(default_factory=list)
    """`agents/<id>`, or `agents/<id>@<iteration>` for a snapshot: each acts at its best, with every
    level of `noises`.
    """
    noises: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.6])
    """As a behaviour's `noise`."""
    behaviours: list[BehaviourConfig] = field(default_factory=list)
    """More candidates, such as scripted ones (`weight` is not used). Random actions are always one.
    """
    even: float = 0.5
    """Share of the steps that is even over the candidates; the others go where disagreement and
    coverage say.
    """
    imagined: int = 64
    """Imagined episodes of each candidate."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """Where it would be collected; without `reality.env`, the environment that the world is of,
    with the tasks and the price of its newest data.
    """
    out: str | None = None
    """A file to write the config to, beside the artifact's own."""


@dataclass(frozen=True)
class Candidate:
    behaviour: BehaviourConfig
    policy: Acts

    @property
    def explore(self) -> bool:
        """As `collect` lets it act: trained policies draw from their own distribution."""
        return self.behaviour.kind == "trained"


@dataclass(frozen=True)
class Question:
    cfg: ProposeConfig
    """With `reality` filled in, and full names of agents"""
    world: Artifact
    datasets: list[Artifact]
    facts: EnvFacts
    horizon: int
    """Steps of an imagined episode at most."""
    members: int
    candidates: list[Candidate]
    sources: list[str]
    """Hashes of scripted behaviours' code"""

    def collection(self, behaviours: list[BehaviourConfig]) -> CollectConfig:
        """Another seed than those of the world's data, whose episodes would begin alike."""
        seeds = [int(artifact.meta.get("config", {}).get("seed", -1)) for artifact in self.datasets]
        return CollectConfig(
            seed=max(seeds, default=-1) + 1,
            reality=self.cfg.reality,
            steps=self.cfg.steps,
            behaviours=behaviours,
        )


def check(cfg: ProposeConfig) -> None:
    """Raise UsageError on the first wrong value. Reads nothing but the config."""
    if not cfg.world:
        raise UsageError("world is not set; give the world to improve, as in world=worlds/ab12")
    checks.at_least(cfg, 2, "steps")
    checks.within(cfg, 0, 1, "even")
    checks.at_least(cfg, 4, "imagined")
    if cfg.agents and not cfg.noises:
        raise UsageError("noises must name levels of noise for the agents, got []; try [0,0.3]")
    noisy = _noisy(cfg)
    if noisy:
        acting.check(noisy, "agents and noises")
    if cfg.behaviours:
        acting.check(cfg.behaviours)


def _noisy(cfg: ProposeConfig) -> list[BehaviourConfig]:
    """Each agent with each level of noise."""
    return [
        BehaviourConfig(kind="noisy", policy=agent, noise=noise)
        for agent in cfg.agents
        for noise in cfg.noises
    ]


def ask(cfg: ProposeConfig, storage: Storage) -> Question:
    """Check the config, open the world and its data, and list the candidates."""
    check(cfg)
    world = storage.artifact("worlds", cfg.world)
    datasets = [storage.artifact("datasets", id) for id in world.meta["inputs"]["datasets"]]
    codec = Codec.from_json(json.loads((world.path / "codec.json").read_text()))
    reality = _reality(cfg.reality, codec, datasets)
    facts = facts_of(reality)
    for name, theirs, own in zip(
        ("observation", "action"),
        facts.spaces,
        (codec.observation_space, codec.action_space),
        strict=True,
    ):
        if theirs != own:
            raise UsageError(
                f"reality.env={reality.env!r} has the {name} space {theirs}, and {world.name}"
                f" {own}; propose for its own environment"
            )
    cfg = replace(
        cfg, reality=reality, agents=[acting.full_name(storage, agent) for agent in cfg.agents]
    )
    acting.check_tasks(cfg.behaviours, reality)
    candidates = [Candidate(b, _policy(b, storage, facts)) for b in _behaviours(cfg, storage)]
    sources = [
        source_hash(acting.load_function(c.behaviour.function))
        for c in candidates
        if c.behaviour.function is not None
    ]
    members = json.loads((world.path / "world.json").read_text())["config"]["members"]
    horizon = horizon_of(storage, world, facts.max_episode_steps, "reality.horizon").steps
    return Question(cfg, world, datasets, facts, horizon, members, candidates, sources)


def _reality(reality: RealityConfig, codec: Codec, datasets: list[Artifact]) -> RealityConfig:
    """Given, or that of the world, with what its newest data's collection says of tasks and price.
    Raises UsageError where nobody says how the task's reset options are drawn.
    """
    if not reality.env:
        said: dict[str, Any] = next(
            (
                a.meta["config"]["reality"]
                for a in reversed(datasets)
                if a.meta.get("job") == "collect"
            ),
            {},
        )
        reality = reality_of(reality, codec)
        if not reality.task_options:
            reality = replace(
                reality,
                task_options={
                    name: TaskOption(**option)
                    for name, option in said.get("task_options", {}).items()
                },
            )
        if reality.price == PriceConfig() and "price" in said:
            reality = replace(reality, price=PriceConfig(**said["price"]))
    lacking = [option.name for option in codec.options if option.name not in reality.task_options]
    if lacking:
        raise UsageError(
            f"the world's task has the reset option {lacking[0]!r}; say how it is drawn:"
            f" reality.task_options.{lacking[0]}.choices=[...]"
        )
    return reality


def _behaviours(cfg: ProposeConfig, storage: Storage) -> list[BehaviourConfig]:
    """Every candidate, each once."""
    plain = [BehaviourConfig(), *_noisy(cfg)]
    plain += [replace(policy_set.full(b, storage), weight=1.0) for b in cfg.behaviours]
    every = [
        *plain,
        *(
            replace(b, task_options=part)
            for b in plain
            if not b.task_options
            for part in _parts(cfg.reality.task_options)
        ),
    ]
    return list({acting.label(b): b for b in every}.values())


def _parts(options: dict[str, TaskOption]) -> list[dict[str, TaskOption]]:
    """One reset option at a time: each of its choices, or each third of its range."""
    found = []
    for name, option in options.items():
        if option.choices is not None:
            found += [
                {name: TaskOption(choices=[choice])}
                for choice in option.choices
                if len(option.choices) > 1
            ]
        else:
            assert option.low is not None and option.high is not None
            edges = [float(edge) for edge in np.linspace(option.low, option.high, PARTS + 1)]
            found += [
                {name: TaskOption(low=low, high=high)} for low, high in itertools.pairwise(edges)
            ]
    return found


def _policy(behaviour: BehaviourConfig, storage: Storage, facts: EnvFacts) -> Acts:
    acting.build(behaviour, *facts.spaces, storage)  # refuses a policy of other spaces
    if behaviour.kind == "trained":
        assert behaviour.policy is not None
        return policy_of(storage, behaviour.policy)
    return policy_set.named(behaviour, storage, *facts.spaces).policy
