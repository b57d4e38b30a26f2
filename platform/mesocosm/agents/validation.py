"""Checks of `train-agent`: its config, the spaces, the data and the members of the world."""

from __future__ import annotations

import json
import math
from typing import Any

from mesocosm import checks
from mesocosm.agents import rllib, settings
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.encoders import Spaces, seen_spaces, tokenizers_of
from mesocosm.agents.rllib import check_agent, check_init
from mesocosm.data.loading.text_batch import AnyBatchCodec
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.model.any_world import is_text
from mesocosm.policies.candidates import INFOS
from mesocosm.policies.images import ImageEncoder, check_tokenizer
from mesocosm.policies.stored import load_policy
from mesocosm.serve.world_env import BACKENDS
from mesocosm.store.artifacts import Artifact, Storage

STARTS = ("logged", "generated")
OBJECTIVES = ("return", "disagreement")
SAC_KEYS = ("branch", "real_share", "updates_per_real_step")


def check(config: AgentConfig) -> None:
    """Raise UsageError at the first invalid value. Reads no storage."""
    rllib.check(config)
    checks.at_least(config, 1, "iterations", "num_envs", "rollout", "horizon")
    checks.at_least(config, 0, "snapshots", "runners", "learners")
    if config.learners and config.algo == "SAC":
        fix = "leave it out, or use PPO, APPO, IMPALA or DQN"
        message = f"learners must be 0 with algo=SAC, got {config.learners}"
        raise UsageError(f"{message}; SAC in a world learns in the job's process: {fix}")
    if config.starts is not None:
        checks.one_of(config, STARTS, "starts")
    checks.at_least(config, 1, "branch")
    checks.within(config, 0, 1, "real_share", open="]")
    checks.within(config, 0, math.inf, "updates_per_real_step", open="[]")
    for name, value in config.params.items() if config.algo == "SAC" else ():
        if name not in settings.WORLD_SAC_PARAMS:
            names = ", ".join(settings.WORLD_SAC_PARAMS)
            raise UsageError(f"params.{name} is not used by SAC in a world; use one of {names}")
        if isinstance(value, list):
            raise UsageError(f"params.{name} must be one value for SAC in a world, got {value}")
    checks.one_of(config, BACKENDS, "backend")
    checks.one_of(config, OBJECTIVES, "objective")
    checks.within(config, 0, math.inf, "penalty", open="]")
    checks.within(config, 0, 1, "gamma", open="[")
    if config.max_disagreement is not None:
        checks.within(config, 0, math.inf, "max_disagreement", open="[")
    if config.init is not None and config.rival is not None:
        raise UsageError(
            f"rival must be null with init, got {config.rival}; the agent of init is one already"
        )
    steps = config.num_envs * config.rollout * max(config.runners, 1)
    steps //= max(config.learners, 1)
    minibatch = config.params.get("minibatch_size")
    if config.algo in settings.ON_POLICY and isinstance(minibatch, int) and minibatch > steps:
        fix = "lower it, or raise num_envs or rollout"
        each = " for each learner" if config.learners > 1 else ""
        message = f"params.minibatch_size must be <= the {steps} steps of an iteration{each}"
        raise UsageError(f"{message}, got {minibatch}; {fix}")


def check_spaces(
    config: AgentConfig,
    spaces: Spaces,
    former: Artifact | None,
    encoder: ImageEncoder | None = None,
) -> Spaces:
    """Raise UsageError if an agent cannot be trained on (observation, action) spaces.

    Args:
        config: Of the training.
        spaces: The environment's.
        former: The initial agent or the rival.
        encoder: How it sees images.

    Returns:
        The spaces between which its network acts.
    """
    seen = seen_spaces(spaces, encoder)
    module = check_agent(settings.imagined(config), seen)
    if former is None:
        return seen
    policy, key = load_policy(former.path), "rival" if config.init is None else "init"
    if (policy.observation_space, policy.action_space) != spaces:
        fix = "use an agent of this environment"
        raise UsageError(f"{key}={former.name} was trained on other spaces; {fix}")
    if encoder is not None:
        check_tokenizer(policy, encoder.tokenizers, f"{key}={former.name}", "the world")
    if config.init is not None:
        check_init(module, former.path, former.name)
    return seen


def check_world(config: AgentConfig, world: Artifact) -> None:
    """Raise UsageError where an option needs a world whose members can disagree."""
    if is_text(world.path):
        _check_text_world(config, world)
        return
    options: dict[str, Any] = {
        "max_disagreement": config.max_disagreement,
        "objective": None if config.objective == "return" else config.objective,
    }
    model = json.loads((world.path / "world.json").read_text())["config"]
    if model["members"] == 1:
        for key, value in options.items():
            if value is not None:
                raise UsageError(
                    f"{key}={value} needs members that can disagree, and {world.name} has one;"
                    f" pretrain with model.members=4, or leave {key} out"
                )


def _check_text_world(config: AgentConfig, world: Artifact) -> None:
    """Check a text world. Its disagreement is also defined with one member: the nats of the least
    likely token.
    """
    if config.candidates == INFOS:
        raise UsageError(
            "candidates must be module:function in a world, which lists no commands, got 'infos'"
        )
    if config.algo == "SAC":
        raise UsageError(
            f"algo must be PPO in {world.name}, got SAC: its branches begin"
            " within logged episodes, whose texts depend on those before; use PPO"
        )


def datasets_of(
    config: AgentConfig, storage: Storage, world: Artifact, codec: AnyBatchCodec
) -> tuple[list[str], Dataset | None]:
    """The data of logged starts and of SAC's real transitions: their ids, and the datasets opened
    as one; ([], None) if none is used.

    Raises:
        UsageError: The data is needed and unknown, has other spaces than the world, or is too short
            for a branch.
    """
    sac = config.algo == "SAC"
    if starts_of(config, codec) != "logged" and not sac:
        return [], None
    names = config.datasets or world.meta.get("inputs", {}).get("datasets", [])
    if not names:
        key, fix = ("algo=SAC", "") if sac else ("starts='logged'", " or starts=generated")
        raise UsageError(
            f"{key} needs the data that {world.name} was trained on, which it does not name; set"
            f" datasets{fix}"
        )
    artifacts = [storage.artifact("datasets", name) for name in names]
    data = Dataset([artifact.path for artifact in artifacts])
    if (data.observation_space, data.action_space) != (codec.observation_space, codec.action_space):
        of_data = ", ".join(artifact.name for artifact in artifacts)
        fix = f"use data of the environment of {world.name}"
        raise UsageError(f"datasets: {of_data} has other spaces than the world; {fix}")
    longest = int(data.table["length"].max(initial=0)) if sac else config.branch
    if config.branch > longest:
        raise UsageError(
            f"branch must be <= {longest}, the longest episode of the data, got {config.branch}; a"
            " longer branch leaves the data behind"
        )
    return [artifact.id for artifact in artifacts], data


def starts_of(config: AgentConfig, codec: AnyBatchCodec) -> str:
    """The source of the first observations of imagined episodes: `generated` or `logged`, the
    default for SAC and in a world of images.
    """
    if config.starts is not None:
        return config.starts
    return "logged" if config.algo == "SAC" or tokenizers_of(codec) else "generated"
