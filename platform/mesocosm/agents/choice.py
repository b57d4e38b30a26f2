"""Selection of a training's best policy, and whether the logs explain its return."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import fingerprint
from mesocosm.data.analysis.evidence import Evidence
from mesocosm.policies.policy import POLICY_JSON, SNAPSHOTS, TRAINING_STATE, WEIGHTS
from mesocosm.policies.stored import load_policy
from mesocosm.policies.value import VALUE_JSON, VALUE_WEIGHTS
from mesocosm.runs.tracking import Run
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Artifact

COMPARED = 64
"""Imagined episodes of each policy in a comparison"""


def choose_best(
    config: AgentConfig,
    run: Run,
    arguments: Mapping[str, Any],
    former: Artifact | None,
    folder: Path,
) -> dict[str, float]:
    """Replace the agent in `folder` by the policy with the highest return in this world.

    Candidates are the last policy, the snapshots, and `former`, the initial agent or the rival;
    among equals the latest wins. PPO sometimes collapses after it has solved the world.

    Returns:
        The metrics of the comparison; {} without other candidates.
    """
    snapshots = {int(path.name): path for path in (folder / SNAPSHOTS).glob("*")}
    if former is not None:
        if config.init is not None:
            snapshots.pop(0, None)  # it is `former`
        snapshots[-1] = former.path
    candidates = {config.iterations: folder, **dict(sorted(snapshots.items(), reverse=True))}
    if len(candidates) == 1:
        return {}
    policies = [load_policy(path) for path in candidates.values()]
    seed = int(fingerprint("compared", config.seed)[:8], 16)
    with run.progress("train-agent: which policy", None) as update:
        env = WorldVectorEnv(len(policies) * COMPARED, **arguments)

        def report(steps: int) -> None:
            update(0, f"imagining, step {steps} of at most {arguments['horizon']}")

        means = imagined_episodes(policies, env, seed, report)[0].mean(1)
        update(1, f"imagined {means[0]:.1f} at the end, {np.nanmax(means):.1f} at best")
    best = int(np.nan_to_num(means, nan=-np.inf).argmax())
    iteration = list(candidates)[best]
    metrics = {
        "greedy_return": float(means[0]),
        "best_return": float(means[best]),
        "kept_iteration": float(iteration),
    }
    if former is not None:
        metrics |= {"former_return": float(means[-1]), "kept_former": float(iteration == -1)}
    if best:
        replace_policy(folder, candidates[iteration])
        source = f"its policy after {iteration} iterations"
        if former is not None and iteration == -1:
            source = former.name
            shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)  # of the discarded training
        run.say(
            f"the last policy earns {means[0]:.1f} in the world, {source}, {means[best]:.1f}: that"
            " one is kept"
        )
    run.log({f"agent/{name}": value for name, value in metrics.items()}, step=config.iterations)
    return metrics


def replace_policy(folder: Path, better: Path) -> None:
    """Replace the files of the policy in `folder` by those of `better`. If `better` has no value
    function (a clone, a scorer of commands), `folder` has none afterwards.
    """
    for name in (POLICY_JSON, WEIGHTS, VALUE_JSON, VALUE_WEIGHTS, TRAINING_STATE):
        (folder / name).unlink(missing_ok=True)
        if (better / name).is_file():
            shutil.copyfile(better / name, folder / name)


def explain(
    config: AgentConfig, run: Run, arguments: Mapping[str, Any], world: Artifact, folder: Path
) -> dict[str, str]:
    """Check the agent against the evidence in the world's logs, and warn.

    Returns:
        {"actions", "return"}: "passed" or the warning. {} for an adversary, whose return claims
        nothing, and for a world without recorded evidence.
    """
    recorded = world.meta.get("evidence")
    if recorded is None or config.objective != "return":
        return {}
    evidence = Evidence(**recorded)
    env = WorldVectorEnv(COMPARED, **{**arguments, "penalty": 0.0})
    seed = int(fingerprint("explained", config.seed)[:8], 16)
    returns, lengths = imagined_episodes([load_policy(folder)], env, seed)
    unidentified = evidence.unidentified()
    unexplained = evidence.unexplained(float(returns.mean()), float(lengths.mean()))
    if unidentified is not None:
        run.say(f"warning: {unidentified}")
    if unexplained is not None:
        run.say(f"warning: the agent's return is not explained by the logs: {unexplained}")
    return {"actions": unidentified or "passed", "return": unexplained or "passed"}
