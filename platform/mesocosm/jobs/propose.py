"""The job `propose`: a world and a budget of real steps -> the config of the next collection, which
`mesocosm collect -c` runs.

The artifact holds next.yaml and proposal.json, which gives the reason for each part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesocosm.config import identity
from mesocosm.envs.amounts import time_price
from mesocosm.evaluate.candidates import CheckedProposal, ProposeConfig, ask
from mesocosm.evaluate.config import agents_of, sources_of
from mesocosm.evaluate.proposal import propose, table
from mesocosm.job import Job, Plan
from mesocosm.policies import behaviours as acting
from mesocosm.runs.tracking import Run, console
from mesocosm.store.artifacts import Artifact, Storage

NEXT, PROPOSAL = "next.yaml", "proposal.json"


@dataclass(frozen=True, kw_only=True)
class ProposePlan(Plan[ProposeConfig]):
    question: CheckedProposal


class Propose(Job[ProposeConfig, ProposePlan]):
    """Write next.yaml and proposal.json, or find the proposal of the same config.

    Raises:
        UsageError: Before imagining. The config is invalid, a world, dataset or agent is missing,
            or spaces differ from the world's.
    """

    name, kind, config = "propose", "plans", ProposeConfig

    def resolve(self, config: ProposeConfig, storage: Storage) -> ProposePlan:
        q = ask(config, storage)
        inputs = {
            "worlds": [q.world.id],
            "datasets": [a.id for a in q.datasets],
            "agents": agents_of(q.behaviours),
        }
        facts = identity(q.cfg, without=["world", "out"])
        return ProposePlan(
            config=config,
            inputs=inputs,
            facts=identity(q.cfg),
            id=self.hash("propose", facts, inputs, sources_of(q.behaviours), q.facts.version),
            question=q,
        )

    def summary(self, plan: ProposePlan) -> dict[str, Any]:
        q, steps = plan.question, plan.config.steps
        price = q.cfg.reality.price
        proposed = f"{steps * price.per_step:g} {price.currency}{time_price(price, steps)}"
        proposed += f", and {price.per_reset:g} a reset"
        return {
            "world": q.world.name,
            "environment": q.cfg.reality.env,
            "candidates": [acting.label(behaviour) for behaviour in q.behaviours],
            "imagined steps": f"at most {len(q.candidates) * plan.config.imagined * q.horizon}",
            "real steps": 0,
            "real steps proposed": steps,
            "price proposed": proposed,
        }

    def make(self, plan: ProposePlan, run: Run) -> Artifact:
        answer, text = propose(plan.question, run)

        def fill(folder: Path) -> None:
            (folder / PROPOSAL).write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n")
            (folder / NEXT).write_text(text)

        return self.commit(plan, run, fill)

    def report(self, artifact: Artifact, plan: ProposePlan, run: Run, *, made: bool) -> None:
        answer = json.loads((artifact.path / PROPOSAL).read_text())
        run.record(proposal={key: answer[key] for key in ("steps", "price", "currency", "notes")})
        if not run.quiet:
            console.print(table(answer))
        for note in answer["notes"]:
            run.say(f"note: {note}")
        path = artifact.path / NEXT
        run.artifact(path)
        if plan.config.out is not None:
            copy = Path(plan.config.out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
            path = copy
        run.say(f"mesocosm collect -c {path}")


JOB = Propose()
