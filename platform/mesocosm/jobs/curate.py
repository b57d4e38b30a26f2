"""The job `curate`: datasets and a list of operations -> one dataset, and a reason for every
dropped transition.

The operations run in order on a table of the episodes. They measure transitions in this process or
on Ray Data (`curation/`). Writing starts after the last operation. The same datasets and operations
give the same bytes in both cases. The ledger does not change: dropped steps remain spent.
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
from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig, identity
from mesocosm.data.curation.operations import Named, parse, work
from mesocosm.data.curation.scan import MANY, Scan, size
from mesocosm.data.curation.table import EpisodeTable
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.manifest import ARRAYS, OUTCOMES, SPLITS
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.errors import UsageError
from mesocosm.job import Job, Plan
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage

Array = NDArray[Any]
REPORT, DROPPED, ORIGIN = "curate.json", "dropped.parquet", "origin.parquet"


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
            raise UsageError("data.datasets must name a dataset, got []; try data.datasets=[ab12]")
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
        cfg = plan.config
        dataset = Dataset([artifact.path for artifact in plan.datasets])
        table = EpisodeTable(dataset, cfg.seed)
        scan = Scan(dataset, cfg.storage.root, tuple(dataset.ids), 0, cfg.ray)
        entries = work(table, scan, plan.operations, lambda text: None)
        report = _report(plan, table, entries)
        operations = [
            {
                "operation": f"{e['operation']} {e['op']}",
                "episodes": e["in"]["episodes"],
                "transitions": e["in"]["transitions"],
                "dropped": e["dropped"]["episodes"],
                "of transitions": e["dropped"]["transitions"],
                "cut": e["cut"],
                "put back": e["put_back"]["episodes"],
                "kept": e["kept"]["episodes"],
            }
            for e in entries
        ]
        reasons = [
            {
                "operation": f"{e['operation']} {e['op']}",
                **{k: v if k != "first" else ", ".join(v) for k, v in row.items()},
            }
            for e in entries
            for row in e["reasons"]
        ]
        optional = {
            "operations": operations,
            "reasons": reasons,
            "notes": [
                f"{e['operation']} {e['op']}: {note}" for e in entries for note in e["notes"]
            ],
            "warnings": report["warnings"],
        }
        return {
            "dataset": f"datasets/{plan.id}",
            "from": ", ".join(dataset.ids),
            **{
                f"{name} kept": f"{size['episodes']} episodes, {size['transitions']} transitions"
                for name, size in report["splits"].items()
            },
            "price": "nothing: no real step is taken",
            **{name: rows for name, rows in optional.items() if rows},
        }

    def make(self, plan: Curation, run: Run) -> Artifact:
        cfg = plan.config
        dataset = Dataset([artifact.path for artifact in plan.datasets])
        table = EpisodeTable(dataset, cfg.seed)
        with run.progress("curate", table.size()["transitions"]) as update:

            def progress(done: int, total: int) -> None:
                update(done, f"{done}/{total} pieces of an operation measured")

            workers = _workers(cfg, dataset)
            scan = Scan(dataset, cfg.storage.root, tuple(dataset.ids), workers, cfg.ray, progress)
            entries = work(table, scan, plan.operations, lambda text: run.say(f"  {text}"))
        report = _report(plan, table, entries)
        for entry in entries:
            for note in entry["notes"]:
                run.say(f"  note: {entry['op']}: {note}")
        for warning in report["warnings"]:
            run.say(f"warning: {warning}")

        def fill(folder: Path) -> None:
            retained = table.size()["transitions"]
            with run.progress("write the dataset", retained) as update:

                def progress(done: int) -> None:
                    update(done, f"{done:,}/{retained:,} transitions")

                _write(folder, cfg, plan.id, table, progress)
            pq.write_table(_dropped(table), folder / DROPPED)
            (folder / REPORT).write_text(json.dumps(report, indent=1))

        # Evaluation counts the real steps of dropped transitions as spent.
        dropped = [drop for artifact in plan.datasets for drop in artifact.meta.get("dropped", [])]
        counts = {**table.size(), "splits": report["splits"]}
        artifact = self.commit(
            plan, run, fill, counts=counts, dropped=dropped + _dropped_steps(entries)
        )
        size = table.size()
        run.say(
            f"{artifact.name}: {size['episodes']} episodes of {size['transitions']} transitions, of"
            f" {report['in']['transitions']}; why the others went: {REPORT}"
        )
        return artifact

    def report(self, artifact: Artifact, plan: Curation, run: Run, *, made: bool) -> None:
        run.record(**json.loads((artifact.path / REPORT).read_text()))
        if not made:
            transitions = artifact.meta["counts"]["transitions"]
            run.say(f"found {artifact.name}: {transitions} transitions; nothing was curated")


def _workers(cfg: CurateConfig, dataset: Dataset) -> int:
    if cfg.workers is not None:
        return cfg.workers
    if size(dataset) < MANY:
        return 0
    import ray

    ray_session.ensure(cfg.ray)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _report(plan: Curation, table: EpisodeTable, entries: list[dict[str, Any]]) -> dict[str, Any]:
    dataset = table.dataset
    every = np.arange(len(table.retained))
    before = [np.flatnonzero(dataset.part == i) for i in range(len(dataset.ids))]
    lengths = dataset.table["length"]
    return {
        "datasets": [
            {"id": id, "episodes": len(some), "transitions": int(lengths[some].sum())}
            for id, some in zip(dataset.ids, before, strict=True)
        ],
        "lineage": plan.facts["operations"],
        "in": {"episodes": len(every), "transitions": int(lengths.sum())},
        "operations": entries,
        "kept": table.size(),
        "splits": table.sizes(),
        "warnings": _warnings(table, plan.operations),
    }


def _warnings(table: EpisodeTable, operations: list[Named]) -> list[str]:
    warnings = []
    names = [named.name for named in operations]
    if "hold_out" in names and not {"exact_duplicates", "near_duplicates"} & set(
        names[: names.index("hold_out")]
    ):
        warnings.append(
            "hold_out comes before any duplicates are removed, so copies may lie in both splits;"
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


def _dropped_steps(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    signs = {"dropped": 1, "cut": 1, "put back": -1}
    return [
        {"reason": f"{e['op']}: {row['reason']}", "steps": signs[row["what"]] * row["transitions"]}
        for e in entries
        for row in e["reasons"]
    ]


def _write(
    folder: Path, cfg: CurateConfig, id: str, table: EpisodeTable, update: Callable[[int], None]
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
        id=id,
        environment=dataset.environment.model_copy(update=same),
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        seed=cfg.seed,
        valid_fraction=float(np.mean(table.split[retained] == SPLITS.index("valid"))),
    )
    outcomes, successes = table.outcome(), table.success()
    alone = len(dataset.ids) == 1
    done = 0
    for new, number in enumerate(retained):
        record = dataset.table[number]
        length = int(table.length[number])
        rows = _rows(dataset, int(record["shard"]), int(record["first_row"]), length)
        manifest = dataset.manifests[int(dataset.part[number])]
        episode = Episode(
            index=int(record["index"]) if alone else new,
            seed=int(record["seed"]),
            behaviour=manifest.behaviours[int(record["behaviour"])].name,
            observations=[],
            actions=[],
            rewards=rows["reward"][:-1],
            outcome=OUTCOMES[int(outcomes[number])],  # type: ignore[arg-type]
            durations=None if np.isnan(rows["duration"]).any() else rows["duration"][:-1],
            task=dataset.task(int(number)),
            success=None if successes[number] < 0 else bool(successes[number]),
        )
        writer.add(episode, rows, SPLITS[int(table.split[number])])
        done += length
        update(done)
    writer.close()
    ids = np.array(dataset.ids)
    origin = {
        "episode": pa.array(
            dataset.table["index"][retained] if alone else np.arange(len(retained))
        ),
        "dataset": pa.array(ids[dataset.part[retained]], pa.string()),
    }
    pq.write_table(
        pa.table({**origin, "index": pa.array(dataset.table["index"][retained])}), folder / ORIGIN
    )


def _rows(dataset: Dataset, shard: int, first: int, length: int) -> dict[str, Array]:
    """`manifest.ARRAYS` of the first `length` transitions of an episode. The last row has only an
    observation.
    """
    rows = {
        name: np.array(dataset.array(shard, name)[first : first + length + 1]) for name in ARRAYS
    }
    for name in ("act_num", "act_cat", "reward", "terminated"):
        rows[name][-1] = 0
    if not np.isnan(rows["duration"][-1]):
        rows["duration"][-1] = 0.0
    return rows


def _dropped(table: EpisodeTable) -> pa.Table:
    """One row for each episode and operation that dropped, cut or put it back.

    `transitions` (negative if put back) sum to the missing transitions.
    """
    dataset, ids = table.dataset, np.array(table.dataset.ids)
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "dataset",
            "episode",
            "operation",
            "op",
            "what",
            "reason",
            "transitions",
            "of_dataset",
            "of_episode",
        )
    }
    for event in table.events:
        count, sign = len(event.episodes), -1 if event.kind == "put back" else 1
        columns["dataset"].append(pa.array(ids[dataset.part[event.episodes]], pa.string()))
        columns["episode"].append(pa.array(dataset.table["index"][event.episodes]))
        columns["operation"].append(pa.array(np.full(count, event.operation, np.int64)))
        for name, text in (("op", event.op), ("what", event.kind), ("reason", event.reason)):
            columns[name].append(pa.repeat(pa.scalar(text, pa.string()), count))
        columns["transitions"].append(pa.array(sign * event.transitions))
        of = event.of
        columns["of_dataset"].append(
            pa.nulls(count, pa.string())
            if of is None
            else pa.array(ids[dataset.part[of]], pa.string())
        )
        columns["of_episode"].append(
            pa.nulls(count, pa.int64()) if of is None else pa.array(dataset.table["index"][of])
        )
    types = {
        "episode": pa.int64(),
        "operation": pa.int64(),
        "transitions": pa.int64(),
        "of_episode": pa.int64(),
    }
    return pa.table(
        {
            name: pa.chunked_array(parts, types.get(name, pa.string()))
            for name, parts in columns.items()
        }
    )


JOB = Curate()
