"""The job `clone`: logs -> an agent that chooses as their best episodes did, judged in reality
where its config asks for episodes.

The artifact is an agent like those of `train-agent`, which may start from it with `init`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Text
from numpy.typing import NDArray
from rich.table import Table
from safetensors.torch import save_file

from mesocosm.agents.cloning import CloneConfig, best_episodes, check, clone
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.encoders import seen_spaces, stored_encoder
from mesocosm.agents.network_cloning import clone_network
from mesocosm.agents.rllib import check_agent
from mesocosm.agents.settings import imagined
from mesocosm.config import identity
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.horizon import MAX_EPISODE_STEPS
from mesocosm.envs.config import PAID
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of
from mesocosm.errors import UsageError
from mesocosm.evaluate import judge
from mesocosm.evaluate.config import reality_of
from mesocosm.evaluate.metrics.stats import Interval
from mesocosm.job import Job, Plan
from mesocosm.policies.candidates import Candidates, CandidateShape, check_spaces, load_source
from mesocosm.policies.images import ImageEncoder
from mesocosm.policies.policy import TRAINING_STATE
from mesocosm.policies.stored import StoredPolicy
from mesocosm.runs.tracking import Run, console
from mesocosm.store.artifacts import Artifact, Storage

REAL = "agent, in reality"
"""The row of the judged episodes."""


@dataclass(frozen=True, kw_only=True)
class ClonePlan(Plan[CloneConfig]):
    """`config.reality` names the environment where episodes are judged."""

    dataset: Dataset
    candidates: Candidates | None
    """None if the logs hold no texts."""
    encoder: ImageEncoder | None
    """How the agent sees images."""


class CloneJob(Job[CloneConfig, ClonePlan]):
    """Clone the best episodes of logs, and judge the agent in `episodes` real episodes.

    Raises:
        UsageError: The config is invalid, a dataset or the tokenizer of images is missing, or no
            logged action is a candidate. Before a real step, where reality has other spaces.
    """

    name, kind, config = "clone", "agents", CloneConfig

    def resolve(self, config: CloneConfig, storage: Storage) -> ClonePlan:
        check(config)
        artifacts = [storage.artifact("datasets", name) for name in config.datasets]
        dataset = Dataset([artifact.path for artifact in artifacts])
        encoder, tokenizers = stored_encoder(config.tokenizer, dataset.observation_space, storage)
        candidates = _candidates(config, dataset, encoder)
        without, versions = ["datasets", "tokenizer"], list[str]()
        if config.episodes:
            known = dataset.environment.model_dump()
            # A task such as a chat's system prompt is not an option of the environment, and the
            # agent does not see tasks that are in no text.
            options = {option.name for option in dataset.options}
            known["task"] = [name for name in known["task"] if name not in options]
            config = replace(config, reality=reality_of(config.reality, known))
            environment = facts_of(config.reality)
            judge.check_spaces(dataset, environment, config.reality)
            without, versions = [*without, *PAID], [environment.version]
        facts = identity(config, without=without)
        if candidates is not None:
            facts |= {"candidates": candidates.source.identity}
        inputs = {"datasets": [artifact.id for artifact in artifacts]}
        if tokenizers:
            inputs["tokenizers"] = tokenizers
        return ClonePlan(
            config=config,
            inputs=inputs,
            facts=facts,
            id=self.hash("clone", facts, inputs, *versions),
            dataset=dataset,
            candidates=candidates,
            encoder=encoder,
        )

    def summary(self, plan: ClonePlan) -> dict[str, Any]:
        config, episodes = plan.config, len(plan.dataset.episodes("train"))
        judged: dict[str, Any] = {"real steps": 0}
        if config.episodes:
            judged = judge.judging(config.reality, config.episodes)
        return {
            "datasets": [f"datasets/{id}" for id in plan.inputs["datasets"]],
            "episodes": f"the best {config.share:g} of {episodes}",
            "updates": config.steps,
            **judged,
        }

    def make(self, plan: ClonePlan, run: Run) -> Artifact:
        config, dataset = plan.config, plan.dataset
        if plan.candidates is None:
            cloned = clone_network(config, dataset, plan.encoder, run)
        else:
            cloned = clone(config, dataset, plan.candidates, run)
        policy, metrics = cloned.policy, dict(cloned.metrics)
        logged = dataset.episodes("train")
        rows = [_row("logs", dataset, logged)]
        best = best_episodes(dataset, "train", config.share)
        rows.append(_row(f"the best {config.share:g} of them", dataset, best))
        store = judge.JudgeStore(run.storage, plan.id)
        if config.episodes:
            result = _judged(plan, policy, store, run)
            rows.append(_row_of(REAL, result.returns, result.successes, result.interval))
            metrics |= {"return": result.mean, "real_steps": float(result.steps)}

        def fill(folder: Path) -> None:
            policy.save(folder)
            save_file(cloned.weights, folder / TRAINING_STATE)

        run.log({f"clone/{name}": value for name, value in metrics.items()})
        artifact = self.commit(plan, run, fill, metrics=metrics, rows=rows)
        store.remove()
        return artifact

    def report(self, artifact: Artifact, plan: ClonePlan, run: Run, *, made: bool) -> None:
        run.say(artifact.name if made else f"found {artifact.name}; nothing was made")
        if not run.quiet:
            head = ("", "episodes", "return", "90% interval", "success")
            table = Table(*head, box=None, header_style="dim", pad_edge=False)
            for row in artifact.meta.get("rows", []):
                table.add_row(*row)
            console.print(table)


def _candidates(
    config: CloneConfig, dataset: Dataset, encoder: ImageEncoder | None
) -> Candidates | None:
    """The source of commands for logs of texts; None for other logs. Raises UsageError if
    `candidates` does not fit the logs.
    """
    spaces = dataset.observation_space, dataset.action_space
    if config.candidates is None:
        if isinstance(spaces[1], Text):
            raise UsageError(
                "candidates must be module:function with logs of texts, got None; give the function"
                " that lists their commands"
            )
        seen = seen_spaces(spaces, encoder)
        check_agent(replace(imagined(AgentConfig()), spaces=seen), seen)
        return None
    check_spaces(*spaces, "candidates")
    shape = CandidateShape(candidates=config.max_candidates)
    return Candidates(load_source(config.candidates), shape)


def _judged(
    plan: ClonePlan, policy: StoredPolicy, store: judge.JudgeStore, run: Run
) -> judge.JudgeResult:
    """Judge the agent in reality, after the stored episodes of an interrupted attempt."""
    config = plan.config
    ledger = Ledger(run.storage, plan.id, config.reality.budget, config.reality.price)
    store.confirm(ledger)
    limit = facts_of(config.reality).max_episode_steps or MAX_EPISODE_STEPS
    with run.progress("judge", config.episodes) as update:
        result = judge.judge(
            policy,
            config.reality,
            ledger,
            episodes=config.episodes,
            seed=config.seed,
            progress=update,
            segments=store.segments("agent", policy, seed=config.seed, limit=limit),
        )
    run.record(ledger=ledger.totals().to_json())
    return result


def _row(name: str, dataset: Dataset, episodes: NDArray[np.int64]) -> list[str]:
    """The row of logged episodes: their mean return, and the share of successes where known."""
    successes = dataset.table["success"][episodes]
    known = int((successes > 0).sum()) if (successes >= 0).all() else None
    return _row_of(name, dataset.table["total_reward"][episodes].tolist(), known, None)


def _row_of(
    name: str, returns: Sequence[float], successes: int | None, interval: Interval | None
) -> list[str]:
    """Texts: the name, episodes, mean return, its interval, and the share of successes."""
    span = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
    share = "" if successes is None else f"{successes / len(returns):.0%}"
    return [name, f"{len(returns):,}", f"{np.mean(returns):.2f}", span, share]


JOB = CloneJob()
