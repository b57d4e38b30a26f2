"""`mesocosm data`: datasets, what they hold and cover, and how two of them differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesocosm import config, output
from mesocosm.cli import options
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.versions import VERSIONS

if TYPE_CHECKING:
    from mesocosm.datasets.dataset import Dataset
    from mesocosm.datasets.manifest import Manifest
    from mesocosm.store.artifacts import Artifact, Commit, Storage

PARAMS = (options.overrides(), options.CONFIG, options.JSON)
MOST_LINES = 20
"""Lines of a dataset's recipe that `data show` prints."""


def _dataset(name: str) -> click.Argument:
    return click.Argument([name], metavar=name.upper(), shell_complete=options.complete_datasets)


@click.group()
def data() -> None:
    """List, show and compare datasets."""


@data.command("list", params=[*PARAMS])
def list_datasets(files: Sequence[str], overrides: Sequence[str], as_json: bool) -> None:
    """List the datasets of a root, the oldest first.

    \b
    Examples:
      mesocosm data list
      mesocosm data list storage.root=s3://bucket/prefix --json
    """
    storage = options.open_storage(files, overrides)
    rows, damaged = [], []
    for id in storage.list("datasets"):
        try:
            if row := _listed(storage, id):
                rows.append(row)
        except ArtifactError as error:
            damaged.append((id, str(error)))
    rows.sort(key=lambda row: (row["created"], row["id"]))
    if as_json:
        keys = ("id", "job", "environment", "episodes", "transitions", "behaviours", "bytes")
        nothing = dict.fromkeys((*keys, "created", "error"))
        output.write_json([*rows, *(nothing | {"id": id, "error": text} for id, text in damaged)])
        return
    cells = [
        {
            "id": row["id"],
            "made by": row["job"],
            "environment": row["environment"],
            "episodes": sum(row["episodes"].values()),
            "transitions": sum(row["transitions"].values()),
            "held out": row["transitions"]["valid"],
            "size": output.size(row["bytes"]),
            "created": _minute(row["created"]),
        }
        for row in rows
    ]
    if cells:
        print(output.table(cells))
    for _, text in damaged:
        print(text)
    print(f"{len(rows)} dataset{'s' * (len(rows) != 1)} in {storage.root}; mesocosm data show ID")


@data.command(params=[_dataset("id"), *PARAMS])
def show(id: str, files: Sequence[str], overrides: Sequence[str], as_json: bool) -> None:
    """Show what a dataset holds, its lineage and its coverage, and write a page of plots.

    \b
    Examples:
      mesocosm data show ID
      mesocosm data show ID --json
    """
    from mesocosm.datasets.dataset import Dataset
    from mesocosm.datasets.spaces import shown_space
    from mesocosm.evaluate.report import coverage_page

    storage = options.open_storage(files, overrides)
    artifact = storage.artifact("datasets", id)
    dataset = Dataset([artifact.path])
    manifest = dataset.manifests[0]
    commit = storage.commit_of("datasets", artifact.id)
    if commit is None:
        raise UsageError(f"{artifact.name} was removed meanwhile; see mesocosm data list")
    facts = _row(artifact.id, commit, manifest) | {
        "where": artifact.uri,
        "shards": len(manifest.shards),
        "observation_space": shown_space(dataset.observation_space),
        "action_space": shown_space(dataset.action_space),
        "task": manifest.environment.task,
        "seed": manifest.seed,
        "outcomes": manifest.counts.outcomes,
        "dropped": manifest.counts.dropped,
        "lineage": _lineage(storage, artifact.id),
    }
    if not as_json:
        _print_facts(facts)
    folder = _coverage(storage, artifact, dataset)
    page, summary_file = folder / coverage_page.PAGE, folder / coverage_page.SUMMARY
    if as_json:
        output.write_json(facts | {"page": str(page), "summary": str(summary_file)})
        return
    summary = json.loads(summary_file.read_text())
    lines = ["\ncoverage", *coverage_page.verdict(summary)]
    for row in summary["behaviours"]:
        low, median, high = row["returns"]
        lines.append(
            f"{row['name']}: {row['episodes']} episodes, {row['transitions']:,} transitions,"
            f" returns {low:g} to {high:g}, median {median:g}"
        )
    print("\n  ".join([*lines, f"page: {page}"]))


@data.command(params=[_dataset("a"), _dataset("b"), *PARAMS])
def diff(a: str, b: str, files: Sequence[str], overrides: Sequence[str], as_json: bool) -> None:
    """Show the facts and transitions that two datasets do not share.

    \b
    Example:
      mesocosm data diff ID OTHER_ID
    """
    from mesocosm.data.analysis.texts import compare_texts
    from mesocosm.datasets.dataset import Dataset
    from mesocosm.evaluate.metrics.coverage import compare

    storage = options.open_storage(files, overrides)
    artifacts = [storage.artifact("datasets", ref) for ref in (a, b)]
    ids = [artifact.id for artifact in artifacts]
    if ids[0] == ids[1]:
        raise UsageError(f"{a} and {b} are the same dataset, {ids[0]}; give two")
    first, second = (Dataset([artifact.path]) for artifact in artifacts)
    left, right = _facts(first, artifacts[0]), _facts(second, artifacts[1])
    pairs = {name: [left.get(name), right.get(name)] for name in left | right}
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    shared = _shared_episodes(first, second)
    spaces = [(data.observation_space, data.action_space) for data in (first, second)]
    coverage = compare(first, second) if spaces[0] == spaces[1] else None
    texts = compare_texts(first, second, seed=0)
    if as_json:
        facts = {"differ": differ, "episodes": shared, "coverage": coverage, "texts": texts}
        output.write_json({"a": ids[0], "b": ids[1]} | facts)
        return
    lines = [
        {"": name * (i == 0), ids[0]: one, ids[1]: other}
        for name, pair in differ.items()
        for i, (one, other) in enumerate(zip_longest(*map(_lines, pair), fillvalue=""))
    ]
    print(output.table(lines) if lines else "no fact that is shown differs")
    print(
        f"\n{shared['both']:,} episodes are in both, {shared['only_a']:,} only in {ids[0]},"
        f" {shared['only_b']:,} only in {ids[1]}"
    )
    for name, lacks in texts.items():
        for key, one, other in (("a_lacks", *ids), ("b_lacks", *reversed(ids))):
            shares = [(unit, share) for unit, share in lacks[key].items() if share is not None]
            new = ", ".join(f"{share:.1%} of the {unit}" for unit, share in shares)
            print(f"{name}: {new} of {other} are not in {one}")
    if coverage is None:
        alike = spaces[0] == spaces[1]
        reason = "only images are observed" if alike else "their spaces differ"
        print(f"{reason}, so distances between them have no meaning")
        return
    for key, one, other in (("a_lacks", *ids), ("b_lacks", *reversed(ids))):
        lacks = coverage[key]
        if lacks["beyond"] is None:
            print(f"{one} has at most one training episode: its gaps cannot be measured")
            continue
        print(
            f"{lacks['beyond']:.1%} of {other}'s transitions are farther from {one} than 99% of its"
            " own are from other episodes (1% for equal distributions); median gap"
            f" {lacks['quantiles']['0.5']:.3g} standard deviations"
        )


def _listed(storage: Storage, id: str) -> dict[str, Any] | None:
    """A row of `data list`; None for an unfinished dataset. A damaged one is an ArtifactError."""
    from pydantic import ValidationError

    from mesocosm.datasets.manifest import MANIFEST, Manifest

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


def _coverage(storage: Storage, artifact: Artifact, dataset: Dataset) -> Path:
    """The folder of the coverage page, `evaluations/ID`. It is made once."""
    from mesocosm.evaluate.metrics import coverage
    from mesocosm.evaluate.report import coverage_page

    def make(folder: Path) -> None:
        name = f"What {artifact.name} covers"
        coverage_page.write(coverage.summarise(dataset, name=name), folder)

    id = config.fingerprint("coverage", artifact.id, coverage.SCHEMA, VERSIONS["coverage"])
    meta = {"inputs": {"datasets": [artifact.id]}, "job": "data show", "config": {}}
    return storage.make("evaluations", id, meta, make).path


def _lineage(storage: Storage, id: str) -> list[dict[str, Any]]:
    """How a dataset and its ancestors were made, itself first.

    `how` is null for a dataset that the root no longer has.
    """
    rows: list[dict[str, Any]] = []
    ids = [id]
    for id in ids:
        meta: dict[str, Any] = {}
        how = None
        try:
            if commit := storage.commit_of("datasets", id):
                meta = commit["meta"]
                how = _recipe(meta)
        except ArtifactError as error:
            how = [str(error)]
        parents = list(meta.get("inputs", {}).get("datasets", []))
        ids += [parent for parent in parents if parent not in ids]
        rows.append({"dataset": id, "job": meta.get("job"), "from": parents, "how": how})
    return rows


def _recipe(meta: Mapping[str, Any]) -> list[str]:
    """The operations, files or behaviours that made a dataset."""
    made = meta.get("config", {})
    if "operations" in made:
        return [_call(dict(operation), "op") for operation in made["operations"]]
    if "files" in meta:
        return [file["name"] for file in meta["files"]]
    keys = ("kind", "policy", "function", "noise", "weight")
    return [_call({k: b[k] for k in keys if b.get(k)}, "kind") for b in made.get("behaviours", [])]


def _call(values: dict[str, Any], name: str) -> str:
    """`name(key=value, ...)`; the values hold the name under the key `name`."""
    title = values.pop(name)
    text = ", ".join(f"{k}={value}" for k, value in values.items() if value not in (None, []))
    return f"{title}({text})" if text else str(title)


def _print_facts(facts: Mapping[str, Any]) -> None:
    outcomes = ", ".join(f"{count} {name}" for name, count in facts["outcomes"].items() if count)
    shards = f"{facts['shards']} shard{'s' * (facts['shards'] != 1)}"
    lines = {
        "dataset": facts["id"],
        "where": f"{facts['where']}, {output.size(facts['bytes'])} in {shards}",
        "made": f"by {facts['job']} at {_minute(facts['created'])}",
        "environment": facts["environment"],
        "task": facts["task"],
        "episodes": f"{_splits(facts['episodes'])}; {outcomes}",
        "transitions": _splits(facts["transitions"]),
        "observation": facts["observation_space"],
        "action": facts["action_space"],
    }
    output.facts(lines, as_json=False)
    print("\nlineage")
    for row in facts["lineage"]:
        parents = f" of {', '.join(row['from'])}" if row["from"] else ""
        recipe = row["how"] or []
        made = "is not in this root" if row["how"] is None else f"{row['job']}{parents}"
        more = [f"and {len(recipe) - MOST_LINES} more"] if len(recipe) > MOST_LINES else []
        print("\n    ".join([f"  {row['dataset']}  {made}", *recipe[:MOST_LINES], *more]))


def _splits(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return f"{total:,}: {counts['train']:,} to train on, {counts['valid']:,} held out"


def _minute(created: str) -> str:
    return created[:16].replace("T", " ")


def _facts(dataset: Dataset, artifact: Artifact) -> dict[str, Any]:
    """The facts of a dataset that `data diff` compares."""
    from mesocosm.datasets.spaces import shown_space

    manifest = dataset.manifests[0]
    counts, meta = manifest.counts, artifact.meta
    return {
        "environment": manifest.environment.id,
        "environment's version": manifest.environment.version,
        "task": manifest.environment.task,
        "observation": shown_space(dataset.observation_space),
        "action": shown_space(dataset.action_space),
        "made by": meta.get("job"),
        "from": meta.get("inputs", {}).get("datasets", []),
        "how": _recipe(meta),
        "seed": manifest.seed,
        "episodes": sum(counts.episodes.values()),
        "episodes held out": counts.episodes["valid"],
        "transitions": sum(counts.transitions.values()),
        "transitions held out": counts.transitions["valid"],
        **{f"episodes {name}": count for name, count in counts.outcomes.items()},
        **{f"episodes by {made.name}": made.episodes for made in manifest.behaviours},
    }


def _shared_episodes(a: Dataset, b: Dataset) -> dict[str, int]:
    """Counts of episodes with the same behaviour, seed, length, outcome and return."""

    def keys(dataset: Dataset) -> Counter[tuple[Any, ...]]:
        names = [behaviour.name for behaviour in dataset.manifests[0].behaviours]
        columns = ("seed", "length", "outcome", "total_reward")
        return Counter(
            (names[row["behaviour"]], *(row[column].item() for column in columns))
            for row in dataset.table
        )

    left, right = keys(a), keys(b)
    both = (left & right).total()
    return {"both": both, "only_a": left.total() - both, "only_b": right.total() - both}


def _lines(value: Any) -> list[str]:
    if value in (None, []):
        return ["–"]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [f"{value:,}" if isinstance(value, int) else str(value)]
