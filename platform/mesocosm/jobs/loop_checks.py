"""The checks of a loop's config before the start."""

from __future__ import annotations

from dataclasses import replace

from mesocosm.agents import validation as agents
from mesocosm.config import JobConfig
from mesocosm.data.collecting import config as collecting
from mesocosm.envs import config as reality_config
from mesocosm.errors import UsageError
from mesocosm.jobs import baseline as model_free
from mesocosm.jobs.loop_config import LoopConfig, acting, fill, refuse_filled, stage
from mesocosm.serve import config as serving

FILLED = {
    "collect": ("ledger",),
    "explore": ("ledger",),
    "pretrain": ("known",),
    "serve": ("world", "name"),
    "agent": ("world", "app", "rival"),
    "evaluate": ("world", "agent", "ledger"),
    "baselines": ("ledger", "tokenizer"),
}
"""Keys of the stages that only the loop can know."""


def check(cfg: LoopConfig) -> None:
    """Raise UsageError at the first invalid value of any stage."""
    if cfg.rounds < 1:
        raise UsageError(f"rounds must be >= 1, got {cfg.rounds}")
    if cfg.stop_at_target and cfg.target is None:
        raise UsageError("stop_at_target=true needs a target; set target to a mean return")
    if cfg.warm_start not in (True, False, "auto"):
        raise UsageError(f"warm_start must be true, false or auto, got {cfg.warm_start!r}")
    reality_config.check(cfg.reality)
    names = ("collect", "explore", "pretrain", "serve", "agent", "evaluate")
    blocks: dict[str, JobConfig] = {name: getattr(cfg, name) for name in names}
    blocks |= {f"baselines[{i}]": block for i, block in enumerate(cfg.baselines)}
    refuse_filled(blocks, FILLED, "loop")
    if cfg.pretrain.data.datasets:
        raise UsageError("pretrain.data.datasets must be empty in a loop; set datasets instead")
    budget = cfg.reality.budget.steps
    needed = (0 if cfg.datasets else cfg.collect.steps) + (cfg.rounds - 1) * cfg.explore.steps
    if budget is not None and needed > budget:
        raise UsageError(
            f"reality.budget.steps={budget} is less than the {needed} steps of {cfg.rounds} rounds;"
            " raise it, or lower rounds or explore.steps"
        )
    reality_config.check_affordable(cfg.reality, needed)
    # "?" stands for artifacts that the loop will make.
    with stage("collect"):
        collecting.check(fill(cfg.collect, cfg, 0))
    with stage("explore"):
        collecting.check(fill(acting(cfg.explore, "?"), cfg, 1))
    with stage("pretrain"):
        _check_pretrain(cfg)
    with stage("serve"):
        serving.check(cfg.serve)
    with stage("agent"):
        agents.check(cfg.agent)
    with stage("evaluate"):
        replace(cfg.evaluate, world="?", agent="?").validate()
    for i, block in enumerate(cfg.baselines):
        with stage(f"baselines[{i}]"):
            model_free.check(fill(block, cfg, i))


def _check_pretrain(cfg: LoopConfig) -> None:
    """Raise UsageError where the pretraining of any round would be refused."""
    weights = cfg.pretrain.data.weights
    for round in {0, cfg.rounds - 1}:
        count = len(cfg.datasets) + round + (0 if cfg.datasets else 1)
        if weights is not None and len(weights) != count:
            numbers = f"got {len(weights)} for the {count} datasets of round {round + 1}"
            key = "pretrain.data.weights"
            raise UsageError(f"{key} must have one entry per dataset, {numbers}; leave it out")
        data = replace(cfg.pretrain.data, datasets=["?"] * count)
        replace(cfg.pretrain, data=data).validate()
