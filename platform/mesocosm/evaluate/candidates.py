"""The candidates that `propose` compares: random actions, agents at several levels of noise, and
behaviours of the user, each also on every part of the tasks that are reset options.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace

import numpy as np

from mesocosm import checks
from mesocosm.config import JobConfig
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.text_batch import refuse_images
from mesocosm.datasets.horizon import horizon_of
from mesocosm.envs.config import DrawnOption, PriceConfig, RealityConfig
from mesocosm.envs.make import EnvFacts
from mesocosm.errors import UsageError
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.config import facts_for, reality_of
from mesocosm.model.any_world import is_text
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.policy import Acts
from mesocosm.store.artifacts import Artifact, Storage

PARTS = 3
"""Equal parts of the range of a reset option."""


@dataclass
class ProposeConfig(JobConfig):
    world: str = ""
    """`worlds/ID`, or a unique prefix of the id."""
    steps: int = 1000
    """Real steps that may be bought."""
    agents: list[str] = field(default_factory=list)
    """`agents/ID`, or `agents/ID@ITERATION` for a snapshot. Each acts greedily, with every
    level of `noises`.
    """
    noises: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.6])
    """The noise of the candidates, like a behaviour's `noise`."""
    behaviours: list[BehaviourConfig] = field(default_factory=list)
    """More candidates, such as scripted ones (`weight` is not used). Random actions are always one.
    """
    even: float = 0.5
    """Share of the steps that is even over the candidates. Disagreement and coverage choose the
    others.
    """
    imagined: int = 64
    """Imagined episodes of each candidate."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """The environment of the steps. Defaults to the world's environment, with the tasks and
    the price of its newest data.
    """
    out: str | None = None
    """Another file to write the config to."""


@dataclass(frozen=True)
class CollectCandidate:
    """A behaviour and its policy."""

    behaviour: BehaviourConfig
    policy: Acts
    """Explores if the behaviour is of kind trained, as in `collect`."""


@dataclass(frozen=True)
class CheckedProposal:
    """A checked proposal, before anything is imagined."""

    cfg: ProposeConfig
    """The config with `reality` completed and the full names of agents."""
    world: Artifact
    datasets: list[Artifact]
    facts: EnvFacts
    horizon: int
    """Steps of an imagined episode at most."""
    candidates: list[CollectCandidate]

    @property
    def behaviours(self) -> list[BehaviourConfig]:
        return [candidate.behaviour for candidate in self.candidates]

    def collection(self, behaviours: list[BehaviourConfig]) -> CollectConfig:
        """The collection's config. Its seed differs from that of the world's data: with the same
        seed, episodes would have the same starts.
        """
        seeds = [int(artifact.meta.get("config", {}).get("seed", -1)) for artifact in self.datasets]
        seed, cfg = max(seeds, default=-1) + 1, self.cfg
        return CollectConfig(seed=seed, reality=cfg.reality, steps=cfg.steps, behaviours=behaviours)


def check(cfg: ProposeConfig) -> None:
    """Raise UsageError on the first wrong value. Reads nothing but the config."""
    if not cfg.world:
        raise UsageError("world is not set; try world=worlds/ID, the world to improve")
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
    """One candidate for each agent and level of noise."""
    pairs = itertools.product(cfg.agents, cfg.noises)
    return [BehaviourConfig(kind="noisy", policy=agent, noise=noise) for agent, noise in pairs]


def ask(cfg: ProposeConfig, storage: Storage) -> CheckedProposal:
    """Check the config, open the world and its data, and list the candidates."""
    check(cfg)
    world = storage.artifact("worlds", cfg.world)
    if is_text(world.path):
        raise UsageError(
            f"world={world.name} must be of model.family ensemble or sequence, got language, whose"
            " next steps propose cannot weigh yet"
        )
    datasets = [storage.artifact("datasets", id) for id in world.meta["inputs"]["datasets"]]
    codec = Codec.from_json(json.loads((world.path / "codec.json").read_text()))
    refuse_images(codec, "propose")
    reality = _reality(cfg.reality, codec, datasets)
    facts = facts_for(reality, world.name, codec)
    agents = [acting.full_name(storage, agent) for agent in cfg.agents]
    cfg = replace(cfg, reality=reality, agents=agents)
    acting.check_tasks(cfg.behaviours, reality)
    plain = [BehaviourConfig(), *_noisy(cfg)]
    plain += [replace(policy_set.full(b, storage), weight=1.0) for b in cfg.behaviours]
    parts = _parts(reality.task_options)
    every = plain + [replace(b, task_options=p) for b in plain if not b.task_options for p in parts]
    unique = {acting.label(behaviour): behaviour for behaviour in every}.values()
    candidates = []
    for behaviour in unique:
        acting.build(behaviour, *facts.spaces, storage)  # refuses a policy of other spaces
        policy = policy_set.named(behaviour, storage, *facts.spaces).policy
        candidates.append(CollectCandidate(behaviour, policy))
    horizon = horizon_of(storage, world, facts.max_episode_steps, "reality.horizon").steps
    return CheckedProposal(cfg, world, datasets, facts, horizon, candidates)


def _reality(reality: RealityConfig, codec: Codec, datasets: list[Artifact]) -> RealityConfig:
    """`reality`, completed by the world's environment and the tasks and price of its newest
    collection. Raises UsageError where the draw of a reset option is unknown.
    """
    if not reality.env:
        collected = [a.meta["config"] for a in datasets if a.meta.get("job") == "collect"]
        newest = collected[-1]["reality"] if collected else {}
        reality = reality_of(reality, codec.environment)
        if not reality.task_options:
            options = newest.get("task_options", {})
            drawn = {name: DrawnOption(**option) for name, option in options.items()}
            reality = replace(reality, task_options=drawn)
        if reality.price == PriceConfig() and "price" in newest:
            reality = replace(reality, price=PriceConfig(**newest["price"]))
    for option in codec.options:
        if option.name not in reality.task_options:
            key = f"reality.task_options.{option.name}"
            raise UsageError(f"{key} must be set: the world's task has it; try {key}.choices=[...]")
    return reality


def _parts(options: dict[str, DrawnOption]) -> list[dict[str, DrawnOption]]:
    """One reset option at a time: each of its choices, or each third of its range."""
    parts = []
    for name, option in options.items():
        if option.choices is None:
            assert option.low is not None and option.high is not None
            edges = np.linspace(option.low, option.high, PARTS + 1).tolist()
            pairs = itertools.pairwise(edges)
            parts += [{name: DrawnOption(low=low, high=high)} for low, high in pairs]
        elif len(option.choices) > 1:
            parts += [{name: DrawnOption(choices=[choice])} for choice in option.choices]
    return parts
