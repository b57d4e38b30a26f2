"""What an evaluation measures beyond fidelity on held-out data: policy value, errors away from the data, the task distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.policy import Acts, policy_of
from mesocosm.agents.rollout import imagined_returns
from mesocosm.data.dataset import Dataset
from mesocosm.data.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.evaluation import panel
from mesocosm.evaluation.config import EvaluateConfig
from mesocosm.evaluation.judge import check_spaces
from mesocosm.evaluation.off_policy import OffPolicy, off_policy
from mesocosm.evaluation.open_loop import codec_of
from mesocosm.evaluation.panel import Candidate
from mesocosm.evaluation.policy_value import PolicyValue, Value, policy_value
from mesocosm.evaluation.starts import task_distribution
from mesocosm.model.world import World
from mesocosm.reality.env import EnvFacts
from mesocosm.reality.ledger import Ledger
from mesocosm.serving.client import WorldVectorEnv
from mesocosm.storage import Artifact, Storage
from mesocosm.tracking import Run

MOST_BEHAVIOURS = 8
"""Of the off-policy table: those of the config, then of the agent's own."""
STARTS = 64
"""Logged states of each behaviour to start from, for each horizon."""


def compares(cfg: EvaluateConfig) -> bool:
    return bool(cfg.policies or cfg.graded or cfg.adversary)


def most_policies(cfg: EvaluateConfig, agent: Artifact | None) -> int:
    """Policies that will be judged, at most."""
    if not compares(cfg):
        return 0
    own = 0 if agent is None else 1 + len(list((agent.path / "snapshots").glob("*")))
    return len(cfg.policies) + own + cfg.graded + bool(cfg.adversary)


def most_episodes(cfg: EvaluateConfig, agent: Artifact | None) -> int:
    """Real episodes that judging will take, at most."""
    return (cfg.episodes if agent is not None else 0) + most_policies(cfg, agent) * cfg.policy_episodes


def check(cfg: EvaluateConfig, storage: Storage, agent: Artifact | None, datasets: Sequence[Artifact], facts: EnvFacts, limit: int) -> list[Candidate]:
    """The policies of the config and the agent's own. Raises UsageError, before a real step is spent, for a policy that is missing, of other
    spaces or of the world's own data, and where judging might take more than `judge_steps`."""
    most = most_episodes(cfg, agent) * limit
    if cfg.judge_steps is not None and most > cfg.judge_steps:
        raise UsageError(
            f"judge_steps={cfg.judge_steps} is less than the {most} real steps that {most_episodes(cfg, agent)} episodes of at most {limit} steps may take; "
            "raise it, or lower episodes, policy_episodes or graded"
        )
    if not compares(cfg):
        return []
    found = [panel.named(config, storage, *facts.spaces) for config in cfg.policies]
    refs = [config.policy for config in cfg.policies if config.policy is not None]
    if agent is not None:
        found += panel.snapshots(agent, storage)
        refs.append(agent.name)
    panel.held_out(refs, datasets)
    for candidate in found:
        check_spaces(candidate.policy, facts, cfg.reality)
    return found


def run(
    cfg: EvaluateConfig,
    run: Run,
    world: World,
    made: Artifact,
    logs: Dataset,
    agent: Artifact | None,
    candidates: list[Candidate],
    ledger: Ledger | None,
    limit: int,
) -> tuple[dict[str, Any], PolicyValue | None]:
    """{"starts", "policy_value", "off_policy"} as JSON, of what was asked for, and the values. `cfg.reality` is filled in."""
    with run.progress("starts", None) as update:
        starts = task_distribution(world, logs, seed=cfg.seed)
        update(1, "" if starts.auc is None else f"AUC {starts.auc:.2f}")
    found: dict[str, Any] = {"starts": starts.to_json()}
    if not compares(cfg):
        return found, None
    assert ledger is not None
    if cfg.adversary:
        candidates = [*candidates, _adversary(cfg, run, made)]
    grading = _grading(cfg, run.storage, agent, world)
    count = most_policies(cfg, agent)
    with run.progress("policy value", count) as update:
        values = policy_value(
            world,
            candidates,
            cfg.reality,
            ledger,
            more=grading,
            episodes=cfg.policy_episodes,
            imagined=cfg.imagined,
            horizon=limit,
            seed=cfg.seed,
            progress=update,
        )
        r = values.ranking.pearson
        update(count, f"{len(values.values)} policies, r {'undefined' if r is None else f'{r:.2f}'}, {values.steps} real steps")
    found["policy_value"] = values.to_json()
    with run.progress("off-policy", None) as update:
        away = _off_policy(cfg, world, logs, values)
        update(1, "" if away.auroc is None else f"AUROC of disagreement {away.auroc:.2f}")
    return found | {"off_policy": away.to_json()}, values


def imagined_mean(world: World, policy: Acts, episodes: int, horizon: int, seed: int) -> float:
    """Mean imagined return of one policy."""
    return float(imagined_returns([policy], WorldVectorEnv(episodes, world, horizon=horizon), seed).mean())


def _grading(cfg: EvaluateConfig, storage: Storage, agent: Artifact | None, world: World) -> Any:
    def more(judged: Sequence[tuple[Candidate, float]]) -> Candidate | None:
        if agent is None or sum(candidate.noise is not None for candidate, _ in judged) >= cfg.graded:
            return None
        space = codec_of(world).action_space
        noises = {candidate.noise: mean for candidate, mean in judged if candidate.noise is not None}
        noises[0.0] = next(mean for candidate, mean in judged if candidate.name == panel.AGENT)
        noise = panel.next_noise(noises, [mean for _, mean in judged], panel.most_noise(space))
        return None if noise is None else panel.graded(policy_of(storage, agent.name), space, noise)

    return more


def _adversary(cfg: EvaluateConfig, run: Run, world: Artifact) -> Candidate:
    """A policy trained in the world to go where its members do not agree; it learns to avoid an early end, too, and takes no real step."""
    from mesocosm.agents import train as agents  # imports RLlib: only where it trains

    config = AgentConfig(
        seed=cfg.seed,
        storage=cfg.storage,
        tracking=cfg.tracking,
        ray=cfg.ray,
        world=world.id,
        backend="local",
        iterations=cfg.adversary,
        snapshots=0,
        objective="disagreement",
        params={"minibatch_size": 256, "num_epochs": 8},
    )
    with run.child("train-agent", config) as child:
        artifact = agents.run(config, child)
    return Candidate("adversary", policy_of(run.storage, artifact.name))


def _off_policy(cfg: EvaluateConfig, world: World, logs: Dataset, found: PolicyValue) -> OffPolicy:
    """Random, noisy, half-trained, trained and adversarial, as far as they are there: the judged episodes are the data."""
    own = [v for v in found.values if v.candidate.iteration is not None]
    graded = sorted((v for v in found.values if v.candidate.noise is not None), key=lambda v: v.candidate.noise or 0.0)
    rest = [v for v in found.values if v not in own and v not in graded]
    middle = [v for v in (own[len(own) // 2 : len(own) // 2 + 1] + own[-1:] + graded[len(graded) // 2 : len(graded) // 2 + 1] + graded[-1:])]
    chosen = (rest + middle)[:MOST_BEHAVIOURS]
    episodes = [(v.candidate.name, _some(v)) for v in chosen]
    return off_policy(world, logs, episodes, horizons=cfg.horizons, starts=min(cfg.starts, STARTS), samples=cfg.samples, seed=cfg.seed)


def _some(value: Value) -> list[Episode]:
    """Numbered anew: the judged episodes of different policies have the same numbers."""
    return [replace(episode, index=k) for k, episode in enumerate(value.judged.episodes)]
