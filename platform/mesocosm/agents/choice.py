"""Which policy of a training is the agent, and whether the logs explain what it earns."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesocosm.agents import rllib
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.rollout import imagined_episodes, imagined_returns
from mesocosm.config import fingerprint
from mesocosm.data.analysis.evidence import Evidence
from mesocosm.policies.policy import POLICY_JSON, SNAPSHOTS, WEIGHTS, Policy
from mesocosm.runs.tracking import Run
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.store.artifacts import Artifact

COMPARED = 64
"""Imagined episodes of each policy, by which the best of a training is chosen."""


def choose_best(
    config: AgentConfig,
    run: Run,
    arguments: Mapping[str, Any],
    former: Artifact | None,
    folder: Path,
) -> dict[str, float]:
    """Put what earns most in this world in the agent's place: itself, a snapshot, or the agent it
    began with; of equals the latest. PPO collapses now and then after the world is solved, and the
    world predicts the failure.
    """
    taken = sorted((int(path.name) for path in (folder / SNAPSHOTS).glob("*")), reverse=True)
    taken = [i for i in taken if i or former is None]  # the first is the agent that it began with
    options = [
        folder,
        *(folder / SNAPSHOTS / str(i) for i in taken),
        *([] if former is None else [former.path]),
    ]
    iterations = [config.iterations, *taken, *([] if former is None else [-1])]
    if len(options) == 1:
        return {}
    policies, seed = (
        [Policy.load(option) for option in options],
        int(fingerprint("compared", config.seed)[:8], 16),
    )
    with run.progress("train-agent: which policy", None) as update:
        env = WorldVectorEnv(len(policies) * COMPARED, **arguments)

        def report(steps: int) -> None:
            update(0, f"imagining, step {steps} of at most {arguments['horizon']}")

        means = imagined_returns(policies, env, seed, report).mean(1)
        update(1, f"imagined {means[0]:.1f} at the end, {np.nanmax(means):.1f} at best")
    best = int(np.nan_to_num(means, nan=-np.inf).argmax())
    seen = {
        "greedy_return": float(means[0]),
        "best_return": float(means[best]),
        "kept_iteration": float(iterations[best]),
    }
    if former is not None:
        seen |= {"former_return": float(means[-1]), "kept_former": float(best == len(options) - 1)}
    if best:
        for name in (POLICY_JSON, WEIGHTS, rllib.TRAINING_STATE):
            shutil.copyfile(options[best] / name, folder / name)
        kept = (
            f"its policy after {taken[best - 1]} iterations"
            if best <= len(taken)
            else f"{former.name if former else ''}, with which it began"
        )
        run.say(
            f"the last policy earns {means[0]:.1f} in the world, {kept}, {means[best]:.1f}: that"
            " one is kept"
        )
    if seen.get("kept_former"):
        shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)  # of a training that led elsewhere
    run.log({f"agent/{name}": value for name, value in seen.items()}, step=config.iterations)
    return seen


def explain(
    config: AgentConfig, run: Run, arguments: Mapping[str, Any], world: Artifact, folder: Path
) -> dict[str, str]:
    """{"actions", "return"}: "passed", or what the world's logs do not show, which is a warning.

    Empty for an adversary, whose return is no claim, and for a world that records no evidence.
    """
    recorded = world.meta.get("evidence")
    if recorded is None or config.objective != "return":
        return {}
    shown = Evidence(**recorded)
    env = WorldVectorEnv(COMPARED, **{**arguments, "penalty": 0.0})
    seed = int(fingerprint("explained", config.seed)[:8], 16)
    returns, lengths = imagined_episodes([Policy.load(folder)], env, seed)
    unidentified = shown.unidentified()
    unexplained = shown.unexplained(float(returns.mean()), float(lengths.mean()))
    if unidentified is not None:
        run.say(f"warning: {unidentified}")
    if unexplained is not None:
        run.say(f"warning: the agent's return is not explained by the logs: {unexplained}")
    return {"actions": unidentified or "passed", "return": unexplained or "passed"}
