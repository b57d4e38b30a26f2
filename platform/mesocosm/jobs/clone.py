"""The job `clone`: logs -> an agent that chooses as their best episodes did.

The artifact is an agent like those of `train-agent`, which may start from it with `init`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mesocosm.agents.cloning import CloneConfig, check, clone
from mesocosm.config import identity
from mesocosm.datasets.dataset import Dataset
from mesocosm.job import Job, Plan
from mesocosm.policies.candidates import Candidates, CandidateShape, check_spaces, load_source
from mesocosm.policies.policy import TRAINING_STATE
from mesocosm.policies.scorer import SCORER
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage


@dataclass(frozen=True, kw_only=True)
class ClonePlan(Plan[CloneConfig]):
    dataset: Dataset
    candidates: Candidates


class CloneJob(Job[CloneConfig, ClonePlan]):
    """Clone the best episodes of logs. Takes no step, neither real nor imagined.

    Raises:
        UsageError: The config is invalid, a dataset is missing or holds no texts, or no logged
            action is a candidate.
    """

    name, kind, config = "clone", "agents", CloneConfig

    def resolve(self, config: CloneConfig, storage: Storage) -> ClonePlan:
        check(config)
        assert config.candidates is not None
        source = load_source(config.candidates)
        artifacts = [storage.artifact("datasets", name) for name in config.datasets]
        dataset = Dataset([artifact.path for artifact in artifacts])
        check_spaces(dataset.observation_space, dataset.action_space, "candidates")
        facts = identity(config, without=["datasets"]) | {"candidates": source.identity}
        inputs = {"datasets": [artifact.id for artifact in artifacts]}
        return ClonePlan(
            config=config,
            inputs=inputs,
            facts=facts,
            id=self.hash("clone", facts, inputs),
            dataset=dataset,
            candidates=Candidates(source, CandidateShape(candidates=config.max_candidates)),
        )

    def summary(self, plan: ClonePlan) -> dict[str, Any]:
        episodes = len(plan.dataset.episodes("train"))
        return {
            "datasets": [f"datasets/{id}" for id in plan.inputs["datasets"]],
            "episodes": f"the best {plan.config.share:g} of {episodes}",
            "updates": plan.config.steps,
            "real steps": 0,
        }

    def make(self, plan: ClonePlan, run: Run) -> Artifact:
        policy, metrics = clone(plan.config, plan.dataset, plan.candidates, run)

        def fill(folder: Path) -> None:
            policy.save(folder)
            state = policy.network.state_dict().items()
            weights = {f"{SCORER}.{name}": tensor.detach().contiguous() for name, tensor in state}
            save_file(weights, folder / TRAINING_STATE)

        run.log({f"clone/{name}": value for name, value in metrics.items()})
        return self.commit(plan, run, fill, metrics=metrics)


JOB = CloneJob()
