"""The config of the job `loop`, and how its stages get theirs from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mesocosm.agents.config import AgentConfig, BaselineConfig
from mesocosm.config import JobConfig
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.serve.config import ServeConfig
from mesocosm.train.config import PretrainConfig

J = TypeVar("J", bound=JobConfig)


@dataclass
class LoopConfig(JobConfig):
    """Each job has a block. `reality`, `seed`, `storage`, `tracking` and `ray` are shared."""

    reality: RealityConfig = field(default_factory=RealityConfig)
    rounds: int = 3
    target: float | None = None
    """The mean real return of "real steps to target", which the report draws."""
    stop_at_target: bool = False
    """End after the first round whose judged mean return reaches the target."""
    datasets: list[str] = field(default_factory=list)
    """Logs that replace the first round's collection (`datasets/ID`). With rounds=1 training then
    takes no real step, for any `reality.budget.steps`. Judging has its own meter.
    """
    collect: CollectConfig = field(default_factory=CollectConfig)
    """The first round's collection. Not used with `datasets`."""
    explore: CollectConfig = field(
        default_factory=lambda: CollectConfig(
            steps=500, behaviours=[BehaviourConfig(kind="trained")]
        )
    )
    """The collection of later rounds, by default with draws of the agent's policy. A behaviour that
    needs a policy and names none gets the last round's agent.
    """
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    warm_start: bool | str = True
    """`true` trains the last round's agent further, `false` a new one in each round. `auto` does
    both and keeps the better by imagined return.
    """
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    baselines: list[BaselineConfig] = field(default_factory=list)
    """Model-free training on reality, for comparison."""


FREE = ("rounds", "target", "stop_at_target", "baselines")
"""Keys of the loop's length and of its comparisons. A loop that changes them keeps its ledger."""
SHARED = ("reality", "seed", "storage", "tracking", "ray", "stop", "force", "wait")


def refuse_filled(
    blocks: Mapping[str, JobConfig], filled: Mapping[str, Sequence[str]], by: str
) -> None:
    """Raise UsageError where a block sets a key that is shared, or that only its job can know.

    Args:
        blocks: The stages' configs by name; `baselines[0]` is one of `baselines`.
        filled: The keys of each stage that are filled in.
        by: The job that fills them in, for the message.
    """
    for name, block in blocks.items():
        default = type(block)()
        for key in (*SHARED, *filled.get(name.partition("[")[0], ())):
            if hasattr(block, key) and getattr(block, key) != getattr(default, key):
                fix = f"set {key} at the top of the config" if key in SHARED else "leave it out"
                fix = "set reality.known" if key == "known" else fix
                raise UsageError(f"{name}.{key} is set by the {by}; {fix}")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name the stage in the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        if str(error).startswith(f"{name}."):
            raise
        raise UsageError(f"{name}: {error}") from error


def acting(block: CollectConfig, policy: str) -> CollectConfig:
    """Give `policy` to behaviours that need a policy and name none."""
    named = [
        b if b.kind == "random" or b.function or b.policy else replace(b, policy=policy)
        for b in block.behaviours
    ]
    return replace(block, behaviours=named)


def with_tokenizer(block: BaselineConfig, cfg: LoopConfig) -> BaselineConfig:
    """A baseline that sees images as the loop's agent does."""
    return replace(block, tokenizer=cfg.pretrain.data.tokenizer)


def fill(block: J, cfg: LoopConfig, round: int) -> J:
    """A stage's config with the loop's shared keys. Each round has another seed."""
    return replace(share(block, cfg), seed=cfg.seed * 1000 + round)


def share(block: J, cfg: JobConfig) -> J:
    """A stage's config with the shared keys of the job that runs it."""
    return replace(block, **{key: getattr(cfg, key) for key in SHARED if hasattr(block, key)})
