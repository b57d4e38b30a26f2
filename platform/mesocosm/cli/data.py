"""`mesocosm data list | show | diff`: datasets, what one holds and covers, how two differ. Light to
import; what it needs it imports when run.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from mesocosm import output
from mesocosm.cli.storage import size
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.versions import VERSIONS

if TYPE_CHECKING:
    from mesocosm.data.format.manifest import Manifest
    from mesocosm.store.artifacts import Artifact, Commit, Storage

EPILOG = {
    "list": (
        """\
examples:
  mesocosm data list                                     the datasets of .mesocosm, the oldest first
  mesocosm data list storage.root=s3://bucket/prefix --json
"""
    ),
    "show": (
        """\
examples:
  mesocosm data show ab12                                what it holds, what it was made of, what it covers, and a page of plots
  mesocosm data show ab12 --json
"""
    ),
    "diff": (
        """\
examples:
  mesocosm data diff ab12 cd34                           facts that differ, and what each one's transitions have that the other's lack
"""
    ),
}
HELP = {
    "list": "the datasets of a root",
    "show": "what a dataset holds, its lineage and its coverage; writes the page, once",
    "diff": "what two datasets have that is not the other's",
}
WORDS = {"list": (), "show": ("ID",), "diff": ("A", "B")}


def add(commands: Any) -> None:
    """Add the command, and its own, to argparse's `commands`."""
    said = "list datasets, show what one holds and covers, or how two differ"
    actions = commands.add_parser("data", help=said, description=said).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    for name, words in WORDS.items():
        parser = actions.add_parser(
            name,
            help=HELP[name],
            description=HELP[name],
            epilog=EPILOG[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for word in words:
            parser.add_argument(
                word.lower(), metavar=word, help="a dataset's id, or the beginning of one"
            )
        parser.add_argument(
            "-c",
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="a YAML config, for its storage.root",
        )
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="override a config key, such as storage.root=s3://bucket/prefix",
        )
        parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")


def run(options: argparse.Namespace) -> int:
    """Exit status 0. Raises UsageError where there is no such dataset."""
    from mesocosm import config
    from mesocosm.store.artifacts import Storage
    from mesocosm.store.files import use_cache

    given = config.load(config.JobConfig, options.config, options.overrides).storage
    use_cache(given.cache)
    storage = Storage(given.root)
    storage.check_readable()
    return {"list": _list, "show": _show, "diff": _diff}[options.action](storage, options)


# -- list
# --------------------------------------------------------------------------------------------------------------


def _list(storage: Storage, options: argparse.Namespace) -> int:
    rows, damaged = [], []
    for id in storage.list("datasets"):
        try:
            row = _listed(storage, id)
        except ArtifactError as error:
            damaged.append((id, str(error)))
            continue
        if row is not None:
            rows.append(row)
    rows.sort(key=lambda row: (row["created"], row["id"]))
    if options.json:
        rows += [{**dict.fromkeys(KEYS), "id": id, "error": text} for id, text in damaged]
        output.write(json.dumps(rows, indent=1))
        return 0
    head = (
        "id",
        "made by",
        "environment",
        "episodes",
        "transitions",
        "held out",
        "size",
        "created",
    )
    cells = [
        (
            row["id"],
            row["job"],
            row["environment"],
            f"{sum(row['episodes'].values()):,}",
            f"{sum(row['transitions'].values()):,}",
            f"{row['transitions']['valid']:,}",
            size(row["bytes"]),
            row["created"][:16].replace("T", " "),
        )
        for row in rows
    ]
    _print(head, cells, texts=(0, 1, 2, 7))
    for _, text in damaged:
        print(text)
    print(f"{len(rows)} dataset{'s' * (len(rows) != 1)} in {storage.root}; mesocosm data show ID")
    return 0


def _listed(storage: Storage, id: str) -> dict[str, Any] | None:
    """A row of `data list`; None of a dataset that is not finished.

    Raises:
        ArtifactError: Its COMMIT.json or its manifest is damaged.
    """
    from pydantic import ValidationError

    from mesocosm.data.format.manifest import MANIFEST, Manifest

    commit = storage.commit_of("datasets", id)
    if commit is None:
        return None
    path = "/".join(filter(None, ("datasets", id, commit.get("folder"), MANIFEST)))
    text = storage.read(path)
    if text is None:
        raise storage.damaged(commit, MANIFEST, missing=True)
    try:
        return _row(id, commit, Manifest.model_validate_json(text))
    except ValidationError as error:
        raise storage.damaged(commit, MANIFEST, missing=False) from error


FACTS = ("job", "environment", "episodes", "transitions", "behaviours", "bytes", "created")
KEYS = ("id", *FACTS, "error")
"""Of a row of `data list --json`. `error` is null, or the only one beside `id` that is not."""


def _row(id: str, commit: Commit, manifest: Manifest) -> dict[str, Any]:
    return {
        "id": id,
        "job": commit["meta"].get("job", "?"),
        "environment": manifest.environment.id,
        "episodes": manifest.counts.episodes,
        "transitions": manifest.counts.transitions,
        "behaviours": [behaviour.name for behaviour in manifest.behaviours],
        "bytes": sum(file["bytes"] for file in commit["files"].values()),
        "created": commit["created"],
        "error": None,
    }


# -- show
# --------------------------------------------------------------------------------------------------------------


def _show(storage: Storage, options: argparse.Namespace) -> int:
    from mesocosm.data.format.dataset import Dataset
    from mesocosm.evaluate.report import coverage_page

    artifact = storage.artifact("datasets", options.id)
    dataset = Dataset([artifact.path])
    manifest = dataset.manifests[0]
    commit = storage.commit_of("datasets", artifact.id)
    if commit is None:
        raise UsageError(f"{artifact.name} was removed meanwhile; see mesocosm data list")
    facts = _row(artifact.id, commit, manifest) | {
        "where": artifact.uri,
        "shards": len(manifest.shards),
        "observation_space": str(dataset.observation_space),
        "action_space": str(dataset.action_space),
        "task": manifest.environment.task,
        "seed": manifest.seed,
        "outcomes": manifest.counts.outcomes,
        "dropped": manifest.counts.dropped,
        "lineage": lineage(storage, artifact),
    }
    if not options.json:
        _say(facts)
    folder = covered(storage, artifact).path
    facts |= {
        "page": str(folder / coverage_page.PAGE),
        "summary": str(folder / coverage_page.SUMMARY),
    }
    if options.json:
        output.write(json.dumps(facts, indent=1))
        return 0
    summary = json.loads((folder / coverage_page.SUMMARY).read_text())
    print("\ncoverage")
    for line in coverage_page.verdict(summary):
        print(f"  {line}")
    for row in summary["behaviours"]:
        low, middle, high = row["returns"]
        print(
            f"  {row['name']}: {row['episodes']} episodes, {row['transitions']:,} transitions,"
            f" returns {low:g} to {high:g}, median {middle:g}"
        )
    print(f"  page: {facts['page']}")
    return 0


def covered(storage: Storage, artifact: Artifact) -> Artifact:
    """The page and summary.json of a dataset's coverage, `evaluations/ID`: made, or found."""
    from mesocosm.config import fingerprint
    from mesocosm.data.format.dataset import Dataset
    from mesocosm.evaluate.metrics import coverage
    from mesocosm.evaluate.report import coverage_page

    id = fingerprint("coverage", artifact.id, coverage.SCHEMA, VERSIONS["coverage"])
    meta = {"inputs": {"datasets": [artifact.id]}, "job": "data show", "config": {}}
    name = f"What {artifact.name} covers"
    return storage.make(
        "evaluations",
        id,
        meta,
        lambda folder: coverage_page.write(
            coverage.summarise(Dataset([artifact.path]), name=name), folder
        ),
    )


def lineage(storage: Storage, artifact: Artifact) -> list[dict[str, Any]]:
    """What a dataset was made of and how, itself first, each dataset once: {"dataset", "job",
    "from", "how"}; `how` is null where the root has it no more.
    """
    rows: list[dict[str, Any]] = []
    wanted = [artifact.id]
    for id in wanted:
        meta, how = _made(storage, id)
        parents = list(meta.get("inputs", {}).get("datasets", []))
        wanted += [parent for parent in parents if parent not in wanted]
        rows.append({"dataset": id, "job": meta.get("job"), "from": parents, "how": how})
    return rows


def _made(storage: Storage, id: str) -> tuple[dict[str, Any], list[str] | None]:
    """A dataset's meta, and what made it (None: the root has it no more)."""
    try:
        commit = storage.commit_of("datasets", id)
    except ArtifactError as error:
        return {}, [str(error)]
    return ({}, None) if commit is None else (commit["meta"], _how(commit["meta"]))


def _how(meta: Mapping[str, Any]) -> list[str]:
    """The operations, files or behaviours that made a dataset."""
    config = meta.get("config", {})
    if "operations" in config:
        return [
            _call(operation["op"], {k: v for k, v in operation.items() if k != "op"})
            for operation in config["operations"]
        ]
    if "files" in meta:
        return [file["name"] for file in meta["files"]]
    return [
        _call(b["kind"], {k: b[k] for k in ("policy", "function", "noise", "weight") if b.get(k)})
        for b in config.get("behaviours", [])
    ]


def _call(name: str, given: Mapping[str, Any]) -> str:
    said = ", ".join(f"{key}={value}" for key, value in given.items() if value not in (None, []))
    return f"{name}({said})" if said else name


def _say(facts: Mapping[str, Any]) -> None:
    episodes, transitions = facts["episodes"], facts["transitions"]
    outcomes = ", ".join(f"{count} {name}" for name, count in facts["outcomes"].items() if count)
    lines = {
        "where": (
            f"{facts['where']}, {size(facts['bytes'])} in {facts['shards']}"
            f" shard{'s' * (facts['shards'] != 1)}"
        ),
        "made": f"by {facts['job']} at {facts['created'][:16].replace('T', ' ')}",
        "environment": (
            facts["environment"] + (f", task {', '.join(facts['task'])}" if facts["task"] else "")
        ),
        "episodes": (
            f"{sum(episodes.values()):,}: {episodes['train']:,} to train on, {episodes['valid']:,}"
            f" held out; {outcomes}"
        ),
        "transitions": (
            f"{sum(transitions.values()):,}: {transitions['train']:,} to train on,"
            f" {transitions['valid']:,} held out"
        ),
        "observation": facts["observation_space"],
        "action": facts["action_space"],
    }
    print(f"datasets/{facts['id']}")
    for name, said in lines.items():
        print(f"  {name:<12} {said}")
    print("\nlineage")
    for row in facts["lineage"]:
        parents = f" of {', '.join(row['from'])}" if row["from"] else ""
        how = "is not in this root" if row["how"] is None else f"{row['job']}{parents}"
        print(f"  {row['dataset']}  {how}")
        for line in (row["how"] or [])[:20]:
            print(f"    {line}")
        if len(row["how"] or []) > 20:
            print(f"    and {len(row['how']) - 20} more")


# -- diff
# --------------------------------------------------------------------------------------------------------------


def _diff(storage: Storage, options: argparse.Namespace) -> int:
    from mesocosm.data.format.dataset import Dataset
    from mesocosm.evaluate.metrics.coverage import compare

    artifacts = [storage.artifact("datasets", ref) for ref in (options.a, options.b)]
    if artifacts[0].id == artifacts[1].id:
        raise UsageError(
            f"{options.a} and {options.b} are the same dataset, {artifacts[0].id}; give two"
        )
    a, b = (Dataset([artifact.path]) for artifact in artifacts)
    alike = (a.observation_space, a.action_space) == (b.observation_space, b.action_space)
    ours, theirs = _facts(a, artifacts[0]), _facts(b, artifacts[1])
    found: dict[str, Any] = {
        "a": artifacts[0].id,
        "b": artifacts[1].id,
        "differ": {
            name: [ours.get(name), theirs.get(name)]
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        },
        "episodes": _shared(a, b),
        "coverage": compare(a, b) if alike else None,
    }
    if options.json:
        output.write(json.dumps(found, indent=1))
        return 0
    _print(
        ("", found["a"], found["b"]),
        [(name, *map(_plain, pair)) for name, pair in found["differ"].items()],
        texts=(0, 1, 2),
    )
    both = found["episodes"]
    print(
        f"\n{both['both']:,} episodes are in both, {both['only_a']:,} only in {found['a']},"
        f" {both['only_b']:,} only in {found['b']}"
    )
    if found["coverage"] is None:
        print("their spaces differ, so that no distance between them has a meaning")
        return 0
    for key, one, other in (
        ("a_lacks", found["a"], found["b"]),
        ("b_lacks", found["b"], found["a"]),
    ):
        lacks = found["coverage"][key]
        if lacks["beyond"] is None:
            print(f"{one} is one episode or none to train on: what it lacks cannot be measured")
            continue
        print(
            f"{lacks['beyond']:.1%} of {other}'s transitions lie farther from {one} than 99% of its"
            " own do from other episodes (data alike: 1%); median gap"
            f" {lacks['quantiles']['0.5']:.3g} standard deviations"
        )
    return 0


def _facts(dataset: Any, artifact: Artifact) -> dict[str, Any]:
    manifest = dataset.manifests[0]
    meta = artifact.meta
    return {
        "environment": manifest.environment.id,
        "environment's version": manifest.environment.version,
        "task": manifest.environment.task,
        "observation": str(dataset.observation_space),
        "action": str(dataset.action_space),
        "made by": meta.get("job"),
        "from": meta.get("inputs", {}).get("datasets", []),
        "how": _how(meta),
        "seed": manifest.seed,
        "episodes": sum(manifest.counts.episodes.values()),
        "episodes held out": manifest.counts.episodes["valid"],
        "transitions": sum(manifest.counts.transitions.values()),
        "transitions held out": manifest.counts.transitions["valid"],
        **{f"episodes {name}": count for name, count in manifest.counts.outcomes.items()},
        **{
            f"episodes by {behaviour.name}": behaviour.episodes for behaviour in manifest.behaviours
        },
    }


def _shared(a: Any, b: Any) -> dict[str, int]:
    """Episodes of the same behaviour, seed, length, outcome and return are taken for the same."""

    def keys(dataset: Any) -> Counter[tuple[Any, ...]]:
        names = [behaviour.name for behaviour in dataset.manifests[0].behaviours]
        return Counter(
            (
                names[row["behaviour"]],
                *(row[k].item() for k in ("seed", "length", "outcome", "total_reward")),
            )
            for row in dataset.table
        )

    ours, theirs = keys(a), keys(b)
    both = (ours & theirs).total()
    return {"both": both, "only_a": ours.total() - both, "only_b": theirs.total() - both}


# -- pieces
# ------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> str:
    return (
        "–"
        if value in (None, [])
        else (
            "\n".join(map(str, value))
            if isinstance(value, list)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )
    )


def _print(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Sequence[int]) -> None:
    """Columns beside each other, however wide the terminal; a cell may have several lines. Those of
    `texts` are aligned left.
    """
    lines = [[cell.split("\n") for cell in row] for row in (head, *rows)]
    widths = [max(len(line) for row in lines for line in row[i]) for i in range(len(head))]
    for row in lines:
        for cells in zip_longest(*row, fillvalue=""):
            print(
                "  ".join(
                    c.ljust(w) if i in texts else c.rjust(w)
                    for i, (c, w) in enumerate(zip(cells, widths, strict=True))
                ).rstrip()
            )
