"""What a user says of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mesocosm.config import JobConfig
from mesocosm.data.loading.codec import Codec
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import UsageError
from mesocosm.evaluate.metrics.open_loop import HORIZONS
from mesocosm.policies import behaviours
from mesocosm.policies.behaviours import BehaviourConfig


@dataclass
class EvaluateConfig(JobConfig):
    world: str = ""
    """`worlds/<id>`, or a unique prefix of the id."""
    agent: str | None = None
    """`agents/<id>` to judge in reality and to imagine in the world; None evaluates the world alone
    and takes no real step.
    """
    datasets: list[str] = field(default_factory=list)
    """Datasets whose validation split is used; none: those that the world was trained on."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """Where the agent is judged; without `reality.env`, the environment that the world is of."""
    episodes: int = 20
    """Judged episodes."""
    target: float | None = None
    """A return to reach, for the report."""
    horizons: list[int] = field(default_factory=lambda: [h for h in HORIZONS if isinstance(h, int)])
    """Steps ahead, for the open-loop error."""
    full: bool = True
    """Roll out whole validation episodes, too."""
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
    """So many policies more: the agent with noise, the levels bisected until each fifth of the
    range of real returns holds some.
    """
    policy_episodes: int = 5
    """Real episodes that judge each of them."""
    imagined: int = 32
    """Imagined episodes of each of them."""
    adversary: int = 0
    """Iterations of training, in the world, of one policy more that seeks disagreement; 0 leaves it
    out.
    """
    judge_steps: int | None = None
    """Real steps that this evaluation may take at most, all judging together; one that might take
    more is refused beforehand.
    """
    ledger: str | None = None
    """The ledger that counts the real steps; None is one named as the evaluation."""

    @property
    def compares(self) -> bool:
        """Whether values of policies in the world are compared with reality's."""
        return bool(self.policies or self.graded or self.adversary)

    def validate(self) -> None:
        """Raises UsageError naming the key, its value and the fix. Looks at nothing but the config."""
        if not self.world:
            raise UsageError(
                "world is not set; give the world to evaluate, as in world=worlds/ab12"
            )
        for key in ("episodes", "starts", "samples", "policy_episodes", "imagined"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("graded", "adversary"):
            if getattr(self, key) < 0:
                raise UsageError(f"{key}={getattr(self, key)} must be at least 0; 0 leaves it out")
            if getattr(self, key) and self.agent is None:
                raise UsageError(
                    f"{key}={getattr(self, key)} needs an agent; set agent, or {key}=0"
                )
        for key, judged in (
            ("episodes", self.agent is not None),
            ("policy_episodes", self.compares),
        ):
            if judged and getattr(self, key) < 2:
                raise UsageError(
                    f"{key}={getattr(self, key)} gives no interval; judge by at least 2 episodes"
                )
        if self.policies:
            behaviours.check(self.policies, "policies")
            for i, policy in enumerate(self.policies):
                if policy.task_options:
                    raise UsageError(
                        f"policies[{i}].task_options is not used: every policy plays the same"
                        " episodes; remove it"
                    )
        if not self.horizons and not self.full:
            raise UsageError(
                "horizons=[] and full=false leave nothing to measure; give horizons such as"
                " [1,5,15,50]"
            )
        for horizon in self.horizons:
            if horizon < 1:
                raise UsageError(
                    f"horizons={self.horizons}: {horizon} steps ahead is no horizon; give numbers"
                    " of at least 1"
                )


TRUSTED = ("", "mesocosm.envs.builtin")
"""Modules whose environments are made because a world says that it is of them: "" is Gymnasium's
registry.
"""


def reality_of(reality: RealityConfig, codec: Codec) -> RealityConfig:
    """`reality` as given, or where it names no environment the one that the world is of, at the
    given price and budget.

    Raises UsageError where that is a program: a world may be a stranger's, and runs nothing that
    its user did not name.
    """
    if reality.env:
        return reality
    own = codec.environment
    module, _, _ = own["id"].rpartition(":")
    if module not in TRUSTED:
        raise UsageError(
            f"the world is of {own['id']!r}, which is a program; where you trust it, set"
            f" reality.env={own['id']} and reality.kwargs={own['kwargs']}"
        )
    return replace(
        reality,
        env=own["id"],
        kwargs=own["kwargs"],
        task=own["task"],
        horizon=own["max_episode_steps"],
        success=own["success"],
    )
