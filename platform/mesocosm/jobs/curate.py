"""The job `curate`: datasets and a list of operations -> one dataset, and a reason for every
dropped transition.

The operations run in order on a table of the episodes; writing starts after the last one. The same
datasets and operations give the same bytes for any number of workers. Dropped steps remain spent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mesocosm import checks
from mesocosm.config import JobConfig, identity
from mesocosm.data import parallel
from mesocosm.data.curation.operations import Named, parse, work
from mesocosm.data.curation.scan import Scan, size
from mesocosm.data.curation.table import EpisodeTable
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.manifest import OUTCOMES, SPLITS
from mesocosm.datasets.writer import DatasetWriter, nothing
from mesocosm.errors import UsageError
from mesocosm.job import Job, Plan, Resources
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage

Array = NDArray[Any]
REPORT, DROPPED, ORIGIN = "curate.json", "dropped.parquet", "origin.parquet"
DROPPED_SCHEMA = pa.schema(
    {
        "dataset": pa.string(),
        "episode": pa.int64(),
        "operation": pa.int64(),
        "op": pa.string(),
        "what": pa.string(),
        "reason": pa.string(),
        "transitions": pa.int64(),
        "of_dataset": pa.string(),
        "of_episode": pa.int64(),
    }
)


@dataclass
class CurateData:
    datasets: list[str] = field(default_factory=list)
    """Dataset ids (or unique prefixes); several are opened as one."""


@dataclass
class CurateConfig(JobConfig):
    data: CurateData = field(default_factory=CurateData)
    operations: list[dict[str, Any]] = field(default_factory=list)
    """In order, each {op: NAME, ...its parameters}: exact_duplicates, near_duplicates, stuck,
    saturated, length, return, where, balance, mix, failures, hold_out; docs/curate.md lists
    their parameters. An empty list joins the datasets.
    """
    workers: int | None = None
    """Parallel tasks of Ray Data; 0 measures in this process. Defaults to 0 below 256 MiB of data,
    and else to the CPU count.
    """


@dataclass(frozen=True, kw_only=True)
class Curation(Plan[CurateConfig]):
    datasets: list[Artifact]
    operations: list[Named]


class Curate(Job[CurateConfig, Curation]):
    """Curate, or find the dataset of the same operations and datasets.

    Raises:
        UsageError: Before writing. A dataset or operation is unknown, environments differ, or an
            operation leaves no episode to train on.
    """

    name, kind, config = "curate", "datasets", CurateConfig

    def resolve(self, config: CurateConfig, storage: Storage) -> Curation:
        if not config.data.datasets:
            raise UsageError("data.datasets must name a dataset, got []; try data.datasets=[ID]")
        checks.at_least(config, 0, "workers")
        operations = parse(config.operations)
        datasets = [storage.artifact("datasets", ref) for ref in config.data.datasets]
        ids = [artifact.id for artifact in datasets]
        lineage = [{"op": o.name, **o.params()} for o in operations]
        agents = {a for d in datasets for a in d.meta.get("inputs", {}).get("agents", [])}
        facts = identity(config, without=["workers", "data", "operations"])
        return Curation(
            config=config,
            inputs={"datasets": ids, **({"agents": sorted(agents)} if agents else {})},
            facts={**identity(config), "operations": lineage},
            id=self.hash("curate", facts, ids, lineage),
            datasets=datasets,
            operations=operations,
        )

    def summary(self, plan: Curation) -> dict[str, Any]:
        """The retained and dropped episodes. Reads all that the operations need in this process."""
        table, report = _curate(plan, 0, lambda done, total: None, lambda text: None)
        entries = [(f"{e['operation']} {e['op']}", e) for e in report["operations"]]
        optional = {
            "operations": [
                {
                    "operation": name,
                    "episodes": e["in"]["episodes"],
                    "transitions": e["in"]["transitions"],
                    "dropped": e["dropped"]["episodes"],
                    "of transitions": e["dropped"]["transitions"],
                    "cut": e["cut"],
                    "put back": e["put_back"]["episodes"],
                    "kept": e["kept"]["episodes"],
                }
                for name, e in entries
            ],
            "reasons": [
                {"operation": name, **row, "first": ", ".join(row["first"])}
                for name, e in entries
                for row in e["reasons"]
            ],
            "notes": [f"{name}: {note}" for name, e in entries for note in e["notes"]],
            "warnings": report["warnings"],
        }
        return {
            "dataset": f"datasets/{plan.id}",
            "from": ", ".join(table.dataset.ids),
            **{
                f"{name} kept": f"{size['episodes']} episodes, {size['transitions']} transitions"
                for name, size in report["splits"].items()
            },
            "price": "nothing: no real step is taken",
            **{name: rows for name, rows in optional.items() if rows},
        }

    def resources(self, plan: Curation) -> Resources:
        return parallel.resources(plan.config.workers)

    def make(self, plan: Curation, run: Run) -> Artifact:
        cfg = plan.config
        with run.progress("curate") as update:

            def measured(done: int, total: int) -> None:
                update(done, f"{done}/{total} pieces of an operation measured")

            table, report = _curate(plan, cfg.workers, measured, lambda text: run.say(f"  {text}"))
        entries, retained = report["operations"], report["kept"]["transitions"]
        for entry in entries:
            for note in entry["notes"]:
                run.say(f"  note: {entry['op']}: {note}")
        for warning in report["warnings"]:
            run.say(f"warning: {warning}")

        def fill(folder: Path) -> None:
            with run.progress("write the dataset", retained) as update:

                def written(done: int) -> None:
                    update(done, f"{done:,}/{retained:,} transitions")

                _write(folder, plan, table, written)
            pq.write_table(_dropped(table), folder / DROPPED)
            (folder / REPORT).write_text(json.dumps(report, indent=1))

        # Evaluation counts the real steps of dropped transitions as spent.
        dropped = [drop for artifact in plan.datasets for drop in artifact.meta.get("dropped", [])]
        signs = {"dropped": 1, "cut": 1, "put back": -1}
        dropped += [
            {
                "reason": f"{entry['op']}: {row['reason']}",
                "steps": signs[row["what"]] * row["transitions"],
            }
            for entry in entries
            for row in entry["reasons"]
        ]
        counts = {**report["kept"], "splits": report["splits"]}
        artifact = self.commit(plan, run, fill, counts=counts, dropped=dropped)
        run.say(
            f"{artifact.name}: {report['kept']['episodes']} episodes of {retained} transitions, of"
            f" {report['in']['transitions']}; why the others went: {REPORT}"
        )
        return artifact

    def report(self, artifact: Artifact, plan: Curation, run: Run, *, made: bool) -> None:
        run.record(**json.loads((artifact.path / REPORT).read_text()))
        if not made:
            transitions = artifact.meta["counts"]["transitions"]
            run.say(f"found {artifact.name}: {transitions} transitions; nothing was curated")


def _curate(
    plan: Curation,
    workers: int | None,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> tuple[EpisodeTable, dict[str, Any]]:
    """Run the operations. Returns the table and the report."""
    cfg, dataset = plan.config, Dataset([artifact.path for artifact in plan.datasets])
    workers = parallel.worker_count(workers, size(dataset), cfg.ray)
    table = EpisodeTable(dataset, cfg.seed)
    scan = Scan(dataset, cfg.storage.root, workers, cfg.ray, progress)
    entries = work(table, scan, plan.operations, say)
    lengths = dataset.table["length"]
    inputs = [lengths[dataset.part == i] for i in range(len(dataset.ids))]
    return table, {
        "datasets": [
            {"id": id, "episodes": len(some), "transitions": int(some.sum())}
            for id, some in zip(dataset.ids, inputs, strict=True)
        ],
        "lineage": plan.facts["operations"],
        "in": {"episodes": len(lengths), "transitions": int(lengths.sum())},
        "operations": entries,
        "kept": table.size(),
        "splits": table.sizes(),
        "warnings": _warnings(table, plan.operations),
    }


def _warnings(table: EpisodeTable, operations: list[Named]) -> list[str]:
    warnings = []
    names = [named.name for named in operations]
    first = names[: names.index("hold_out")] if "hold_out" in names else None
    if first is not None and not {"exact_duplicates", "near_duplicates"} & set(first):
        warnings.append(
            "hold_out comes before any duplicates are removed, so copies may be in both splits;"
            " put exact_duplicates first"
        )
    if not table.sizes()["valid"]["episodes"]:
        warnings.append("no episode is left for validation; add {op: hold_out, share: 0.1}")
    success = table.dataset.table["success"]
    if (success == 0).any() and not (success[table.retained] == 0).any():
        warnings.append(
            "no failed episode is left: a world that never saw a failure promises agents that there"
            " is none; add {op: failures, share: 0.1}"
        )
    return warnings


def _write(
    folder: Path, plan: Curation, table: EpisodeTable, update: Callable[[int], None]
) -> None:
    dataset = table.dataset
    versions = {manifest.environment.version for manifest in dataset.manifests}
    rules = {manifest.environment.success for manifest in dataset.manifests}
    same = {
        "version": versions.pop() if len(versions) == 1 else "",
        "success": rules.pop() if len(rules) == 1 else None,
    }
    retained = np.flatnonzero(table.retained)
    writer = DatasetWriter(
        folder,
        id=plan.id,
        environment=dataset.environment.model_copy(update=same),
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        seed=plan.config.seed,
        valid_fraction=float(np.mean(table.split[retained] == SPLITS.index("valid"))),
    )
    outcomes, successes, index = table.outcome(), table.success(), dataset.table["index"][retained]
    numbers = index if len(dataset.ids) == 1 else np.arange(len(retained))
    for new, number in zip(numbers.tolist(), retained.tolist(), strict=True):
        record = dataset.table[number]
        rows = _rows(dataset, number, int(table.length[number]))
        manifest = dataset.manifests[int(dataset.part[number])]
        episode = Episode(
            index=new,
            seed=int(record["seed"]),
            behaviour=manifest.behaviours[int(record["behaviour"])].name,
            observations=[],
            actions=[],
            rewards=rows["reward"][:-1],
            outcome=OUTCOMES[int(outcomes[number])],  # type: ignore[arg-type]
            durations=None if np.isnan(rows["duration"]).any() else rows["duration"][:-1],
            task=dataset.task(number),
            success=None if successes[number] < 0 else bool(successes[number]),
        )
        writer.add(episode, rows, SPLITS[int(table.split[number])])
        update(writer.transitions)
    writer.close()
    ids = np.array(dataset.ids, object)[dataset.part[retained]]
    origin = {"episode": numbers, "dataset": pa.array(ids, pa.string()), "index": index}
    pq.write_table(pa.table(origin), folder / ORIGIN)


def _rows(dataset: Dataset, number: int, length: int) -> dict[str, Array]:
    """The rows of the first `length` transitions of an episode, as they are stored. The last row
    has only an observation.
    """
    rows = dataset.rows(number, length)
    for name in ("act_num", "act_cat", "act_text", "reward", "terminated"):
        rows[name][-1:] = nothing(rows[name])
    if not np.isnan(rows["duration"][-1]):
        rows["duration"][-1] = 0.0
    return rows


def _dropped(table: EpisodeTable) -> pa.Table:
    """One row for each episode and operation that dropped, cut or put it back.

    `transitions` (negative if put back) sum to the missing transitions.
    """
    dataset, index = table.dataset, table.dataset.table["index"]
    ids = np.array(dataset.ids, object)[dataset.part]
    parts = [DROPPED_SCHEMA.empty_table()]
    for event in table.events:
        count, of = len(event.episodes), event.of
        columns = {
            "dataset": ids[event.episodes],
            "episode": index[event.episodes],
            "operation": np.full(count, event.operation),
            "op": [event.op] * count,
            "what": [event.kind] * count,
            "reason": [event.reason] * count,
            "transitions": event.transitions * (-1 if event.kind == "put back" else 1),
            "of_dataset": [None] * count if of is None else ids[of],
            "of_episode": [None] * count if of is None else index[of],
        }
        parts.append(pa.table(columns, DROPPED_SCHEMA))
    return pa.concat_tables(parts)


JOB = Curate()
plan, run = JOB.plan, JOB.run
