"""The job runner: resolve, identify, find, lease, make, record.

A job is a module `mesocosm.jobs.NAME` with a `JOB`, an instance of `Job`. `JOB.run(config, run)`
makes one artifact, or finds the one that the same config, inputs and job version made before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from mesocosm.config import JobConfig, fingerprint
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.versions import VERSIONS

C = TypeVar("C", bound=JobConfig)
Resources = Mapping[str, tuple[float, float]]
"""(CPUs, GPUs) by the config key and value that asks for them."""


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[C]):
    """A resolved config, with checked values and open inputs.

    The plan of a job adds fields for its `make`.
    """

    config: C
    inputs: dict[str, list[str]]
    """Ids of the input artifacts, by kind."""
    facts: dict[str, Any]
    """The part of the config that results depend on. It is stored with the artifact."""
    id: str
    """The artifact's id, from `Job.hash`."""


P = TypeVar("P", bound=Plan[Any])


class Job(ABC, Generic[C, P]):
    """A job declares its name, the kind of its artifact, its config, and the methods below."""

    name: ClassVar[str]
    kind: ClassVar[str]
    config: type[C]

    @abstractmethod
    def resolve(self, config: C, storage: Storage) -> P:
        """Check the config and open its inputs. Takes no real step and starts nothing.

        Raises:
            UsageError: A value or an input is invalid.
        """

    @abstractmethod
    def summary(self, plan: P) -> dict[str, Any]:
        """The work of a run, its size and its price, for `--dry-run`."""

    def make(self, plan: P, run: Run) -> Artifact:
        """Do the work and `commit` the artifact. Called by one process at a time."""
        raise NotImplementedError

    def report(self, artifact: Artifact, plan: P, run: Run, *, made: bool) -> None:
        """Print the artifact, which this run `made` or found."""
        if not made:
            run.say(f"found {artifact.name}; nothing was made")

    def resources(self, plan: P) -> Resources:
        """The CPUs and GPUs that the job needs, for `--dry-run` and for submissions."""
        return {}

    def hash(self, *parts: Any) -> str:
        """The id of an artifact: a hash of its kind, `parts`, the job's version and the schema."""
        return fingerprint(self.kind, *parts, VERSIONS[self.name], SCHEMA)

    def preview(self, config: C) -> tuple[dict[str, Any], Resources]:
        """The summary and resources of a config, without side effects. Raises UsageError as
        `resolve` does.
        """
        plan = self.resolve(config, Storage(config.storage.root))
        return self.summary(plan), self.resources(plan)

    def plan(self, config: C) -> dict[str, Any]:
        """The summary of a config, without side effects."""
        return self.preview(config)[0]

    def run(self, config: C, run: Run) -> Artifact:
        """`resolve` a config and `execute` it."""
        return self.execute(self.resolve(config, run.storage), run)

    def execute(self, plan: P, run: Run) -> Artifact:
        """Make the artifact of a plan, or find it.

        Raises:
            Held: Another process makes the artifact, and `config.wait` is False.
        """
        # `jobs status` names the artifact of a job that still runs, or that was stopped.
        run.record(inputs=plan.inputs, artifact=f"{self.kind}/{plan.id}")
        with run.making(self.kind, plan.id, plan.config) as existing:
            artifact = existing or self.make(plan, run)
        self.report(artifact, plan, run, made=existing is None)
        return artifact

    def commit(self, plan: P, run: Run, fill: Callable[[Path], object], **meta: Any) -> Artifact:
        """Write the artifact with `fill(folder)`. `meta` is stored in its COMMIT.json."""
        common = {"inputs": plan.inputs, "config": plan.facts, "job": self.name, "run": run.id}
        force = plan.config.force
        return run.storage.make(self.kind, plan.id, common | meta, fill, force=force)
