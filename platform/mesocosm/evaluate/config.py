"""The config of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mesocosm import checks
from mesocosm.config import ADDED, JobConfig
from mesocosm.datasets.manifest import current_id
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import EnvFacts, facts_of
from mesocosm.errors import UsageError
from mesocosm.policies import behaviours
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.store.artifacts import Artifact
from mesocosm.user_code import source_hash

if TYPE_CHECKING:  # a config needs no torch
    from mesocosm.data.loading.text_batch import AnyBatchCodec

HORIZONS: tuple[int | str, ...] = (1, 5, 15, 50, "full")
"""Steps ahead of the open-loop error; `full` is whole episodes."""


@dataclass
class EvaluateConfig(JobConfig):
    world: str = ""
    """`worlds/ID`, or a unique prefix of the id."""
    agent: str | None = None
    """`agents/ID` to judge in reality and in the world. None evaluates only the world and takes no
    real step.
    """
    datasets: list[str] = field(default_factory=list)
    """Datasets whose validation split is used. Defaults to those that trained the world."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """The environment that judges the agent. Defaults to the world's environment."""
    episodes: int = 20
    """Judged episodes."""
    target: float | None = None
    """Return to reach, for the report."""
    horizons: list[int] = field(default_factory=lambda: [h for h in HORIZONS if isinstance(h, int)])
    """Steps ahead, for the open-loop error."""
    full: bool = True
    """Also roll out whole validation episodes."""
    starts: int = 128
    """Logged states to start from, for each horizon."""
    samples: int = 19
    """Sampled rollouts from each start; their range is a (samples - 1) / (samples + 1) interval,
    90% for 19.
    """
    policies: list[BehaviourConfig] = field(default_factory=list)
    """Policies whose value in the world is compared with reality's, each at its best (`weight` is
    not used). With any of these, or `graded`, the agent and its snapshots are compared too.
    """
    graded: int = 0
    """Noisy versions of the agent to compare, at most. Noise is bisected until each fifth of the
    range of real returns holds some.
    """
    policy_episodes: int = 5
    """Real episodes of each policy."""
    imagined: int = 32
    """Imagined episodes of each policy."""
    adversary: int = 0
    """Training iterations, in the world, of one more policy that seeks disagreement. 0 for none."""
    gain: bool = field(default=False, metadata=ADDED)
    """Judge the policy that the agent's training began with in the same `episodes` too (its `init`,
    or else snapshot 0). The report shows the gain over it, in the world and in reality.
    """
    judge_steps: int | None = None
    """Most real steps of all judging together. An evaluation that might take more is refused before
    it starts.
    """
    ledger: str | None = None
    """The ledger that counts the real steps. Defaults to one with the evaluation's id."""

    @property
    def compares(self) -> bool:
        """True if policies are compared in the world and in reality."""
        return bool(self.policies or self.graded or self.adversary)

    def validate(self) -> None:
        """Raise UsageError on the first wrong value. Reads nothing but the config."""
        if not self.world:
            raise UsageError("world is not set; try world=worlds/ID, the world to evaluate")
        checks.at_least(self, 1, "starts", "samples", "imagined")
        # An interval needs two episodes.
        checks.at_least(self, 1 if self.agent is None else 2, "episodes")
        checks.at_least(self, 2 if self.compares else 1, "policy_episodes")
        checks.at_least(self, 0, "graded", "adversary")
        for key in ("graded", "adversary"):
            value = getattr(self, key)
            if value and self.agent is None:
                raise UsageError(f"{key} must be 0 without an agent, got {value}; set agent")
        if self.gain and self.agent is None:
            raise UsageError("gain must be false without an agent, got true; set agent")
        if self.policies:
            behaviours.check(self.policies, "policies")
        for i, policy in enumerate(self.policies):
            if policy.task_options:
                raise UsageError(
                    f"policies[{i}].task_options must be empty, got {policy.task_options}: every"
                    " policy plays the same episodes"
                )
        if not self.horizons and not self.full:
            raise UsageError("horizons must not be [] with full=false; try horizons=[1,5,15,50]")
        if any(horizon < 1 for horizon in self.horizons):
            raise UsageError(f"horizons must be >= 1, got {self.horizons}")


TRUSTED = ("", "mesocosm.envs.builtin", "mesocosm.envs.text")
"""Modules whose environments a world may name; "" is Gymnasium's registry."""


def reality_of(reality: RealityConfig, known: Mapping[str, Any]) -> RealityConfig:
    """`reality`, completed by the environment of a world or dataset where it names none.

    Args:
        reality: Of the user's config.
        known: `manifest.Environment` as JSON.

    Raises:
        UsageError: That environment is a program. A world or dataset may come from a stranger, so
            only programs that its user names are run.
    """
    if reality.env:
        return reality
    if current_id(known["id"]).rpartition(":")[0] not in TRUSTED:
        kwargs = f" reality.kwargs={known['kwargs']}" if known["kwargs"] else ""
        raise UsageError(
            f"reality.env must be set: the logged environment {known['id']!r} is a program; if you"
            f" trust it, try reality.env={known['id']}{kwargs}"
        )
    return replace(
        reality,
        env=known["id"],
        kwargs=known["kwargs"],
        task=known["task"],
        horizon=reality.horizon or known["max_episode_steps"],
        success=reality.success or known["success"],
    )


def facts_for(reality: RealityConfig, world: str, codec: AnyBatchCodec) -> EnvFacts:
    """The facts of `reality`. Raises UsageError where its spaces differ from those of the codec of
    `world`.
    """
    facts = facts_of(reality)
    spaces = (codec.observation_space, codec.action_space)
    for name, real, expected in zip(("observation", "action"), facts.spaces, spaces, strict=True):
        if real != expected:
            raise UsageError(
                f"reality.env={reality.env!r} has the {name} space {real}, and {world}"
                f" {expected}; use the world's own environment"
            )
    return facts


def members_of(world: Artifact) -> int:
    """The number of the world's members."""
    config = json.loads((world.path / "world.json").read_text())["config"]
    return int(config["members"])


def sources_of(policies: Sequence[BehaviourConfig]) -> list[str]:
    """Hashes of the code of scripted policies."""
    functions = [policy.function for policy in policies if policy.function is not None]
    return [source_hash(behaviours.load_function(function)) for function in functions]


def agents_of(policies: Sequence[BehaviourConfig]) -> list[str]:
    """Ids of the agents that `policies`, with full names, refer to."""
    refs = [policy.policy for policy in policies if policy.policy is not None]
    return sorted({ref.removeprefix("agents/").partition("@")[0] for ref in refs})
