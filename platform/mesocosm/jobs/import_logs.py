"""The job `import`: logs that others made, Parquet or JSONL of a documented schema
(docs/import.md), into a dataset.

Two passes over the files, both streaming and, with `workers`, parallel on Ray Data: the first finds
what is wrong and what the values are, the second writes. Nothing is written before the first is
through. The same files and config make the same bytes, whoever reads them; an import that was
killed goes on from its last whole shard when it is run again (progress.py). No ledger is touched:
whoever made the logs has paid for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig, fingerprint, identity
from mesocosm.data.format.episode import Episode
from mesocosm.data.format.manifest import Environment
from mesocosm.data.format.spaces import SpaceCodec, check_spaces
from mesocosm.data.format.writer import DatasetWriter
from mesocosm.data.ingest.assemble import Closed, Joiner, Tally, Work, stream
from mesocosm.data.ingest.findings import Looked
from mesocosm.data.ingest.progress import Progress, progress
from mesocosm.data.ingest.readers import Source, sources
from mesocosm.data.ingest.readers.files import sha256, stamp
from mesocosm.data.ingest.schema import Schema, read_schema
from mesocosm.envs.config import PAID, RealityConfig, check_bounds, parse_success
from mesocosm.envs.make import EnvFacts, facts_of
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import SCHEMA, Artifact
from mesocosm.versions import VERSIONS

Array = NDArray[Any]
Space = gymnasium.Space[Any]
REPORT = "import.json"
MANY = 1 << 28
"""Bytes of input from which on all CPUs are used, unless `workers` says otherwise."""


@dataclass
class ImportConfig(JobConfig):
    paths: list[str] = field(default_factory=list)
    """Files, patterns or folders, in order; on the command line they need no key."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """`env`: the environment that the logs are of, which gives the spaces and against which every
    value is checked; empty infers the spaces. Nothing is stepped and nothing paid.
    """
    columns: dict[str, str] = field(default_factory=dict)
    """What the files call a column of the schema, where they call it otherwise:
    columns.observation=obs.
    """
    per_file: bool = False
    """Each file numbers its episodes for itself; without an episode column each is one."""
    bad: str = "refuse"
    """What is done with an episode in which something is wrong: refuse (the import, naming file and
    row), or drop (the episode, counting why).
    """
    workers: int | None = None
    """Tasks of Ray Data at a time; 0 reads in this process; null is 0 below 256 MiB of input, and
    else as many as there are CPUs.
    """
    valid_fraction: float = 0.1
    """Share of the episodes held out for validation; 0 holds none out. Fewer than 5 episodes may
    all be trained on.
    """


def check(cfg: ImportConfig) -> None:
    """Raise UsageError on the first value that cannot be meant. Reads no file."""
    if cfg.bad not in ("refuse", "drop"):
        raise UsageError(
            f"bad={cfg.bad!r} is unknown; use 'refuse' or"
            f" 'drop'{nearest(cfg.bad, ['refuse', 'drop'])}"
        )
    if cfg.workers is not None and cfg.workers < 0:
        raise UsageError(f"workers={cfg.workers} cannot be; give at least 0")
    if not 0 <= cfg.valid_fraction < 1:
        raise UsageError(
            f"valid_fraction={cfg.valid_fraction} is no share; give a number from 0 to below 1"
        )
    check_bounds(cfg.reality)
    if cfg.reality.success is not None:
        parse_success(cfg.reality.success)


def plan(cfg: ImportConfig) -> dict[str, Any]:
    """What `run` would make. Reads all of the files in this process, and writes nothing."""
    check(cfg)
    looked = _look(cfg, sources(cfg.paths, fetch=False), 0, lambda rows: None)
    report = looked.report()
    counts = {name: value for name, value in report["counts"].items() if value not in (0, {})}
    return {
        "environment": cfg.reality.env or "none given: the spaces are inferred",
        "files": len(looked.files),
        **{name.replace("_", " "): value for name, value in counts.items()},
        "observation space": str(looked.spaces[0]),
        "action space": str(looked.spaces[1]),
        "price": "nothing: no real step is taken",
        "columns": report["columns"],
        **({"left out": report["left_out"]} if report["left_out"] else {}),
        **({"warnings": report["warnings"]} if report["warnings"] else {}),
    }


def run(cfg: ImportConfig, run: Run) -> Artifact:
    """Import, or find the dataset that the same files made before.

    Raises UsageError before anything is written: no such file or environment, a column that is
    missing, anything wrong with a row (named with its file), no episode that can be kept.
    """
    check(cfg)
    files = sources(cfg.paths, fetch=True)
    stamps = _stamps(files)
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(_checksum, files))
    what = identity(cfg, without=["paths", "workers", *PAID])
    known = _facts(cfg)
    id = fingerprint(
        "datasets",
        "import",
        what,
        sums,
        "" if known is None else known.version,
        VERSIONS["import"],
        SCHEMA,
    )
    with run.making("datasets", id, cfg) as artifact:
        if artifact is None:
            with progress(run.storage.local_path("scratch"), id, anew=cfg.force) as kept:
                return _import(cfg, run, id, kept, files, sums, stamps)
        transitions = artifact.meta["counts"]["transitions"]
        run.say(f"found {artifact.name}: {transitions} transitions; nothing was imported")
        report = json.loads((artifact.path / REPORT).read_text())
        run.record(artifact=artifact.name, inputs=artifact.meta["inputs"], **report)
        return artifact


def _import(
    cfg: ImportConfig,
    run: Run,
    id: str,
    kept: Progress,
    files: list[Source],
    sums: list[str],
    stamps: list[tuple[int, tuple[str, ...]]],
) -> Artifact:
    workers = _workers(cfg, files)
    found = kept.looked()
    if found is None:
        with run.progress("look at the logs") as update:
            looked = _look(cfg, files, workers, lambda rows: update(rows, f"{rows:,} rows"))
        kept.keep_looked(looked.tally)
    else:
        run.say("the logs were looked at before: goes on from there")
        looked = _look(cfg, files, workers, lambda rows: None, found)
    report = looked.report()
    for row in report["columns"]:
        run.say(
            f"  {row['column']} {row['type']}: {row['became']}"
            + (f" ({row['how']})" if row["how"] else "")
        )
    for row in report["left_out"]:
        run.say(
            f"  left out: {row['episodes']} episodes of {row['rows']} rows: {row['reason']} (first"
            f" at {row['first']})"
        )
    for warning in report["warnings"]:
        run.say(f"warning: {warning}")
    about: list[dict[str, Any]] = [
        {"name": f.name, "sha256": s, "bytes": size}
        for f, s, (size, _) in zip(files, sums, stamps, strict=True)
    ]
    counts, inputs = looked.counts(), {"files": [fingerprint("files", sums)]}
    meta = {
        "inputs": inputs,
        "config": identity(cfg),
        "job": "import",
        "run": run.id,
        "counts": counts,
        "files": about,
    }

    def fill(folder: Path) -> None:
        with run.progress("write the dataset", counts["transitions"]) as update:
            _write(
                kept,
                cfg,
                id,
                looked,
                workers,
                lambda done: update(done, f"{done:,}/{counts['transitions']:,} transitions"),
            )
        if _stamps(files) != stamps:
            kept.forget()
            raise MesocosmError(
                "a file changed while it was imported; import again when nothing writes to the logs"
            )
        kept.give(folder)
        (folder / REPORT).write_text(
            json.dumps(
                {**report, "files": [{**f, "name": Path(f["name"]).name} for f in about]}, indent=1
            )
        )

    artifact = run.storage.make("datasets", id, meta, fill, force=cfg.force)
    run.record(artifact=artifact.name, inputs=inputs, **report)
    run.say(
        f"{artifact.name}: {counts['episodes']} episodes of {counts['transitions']} transitions;"
        " nothing was paid"
    )
    return artifact


def _stamps(sources: Sequence[Source]) -> list[tuple[int, tuple[str, ...]]]:
    """Of each its bytes, and what changes when it does."""
    found = [[stamp(path) for path in source.files] for source in sources]
    return [
        (sum(size for size, _ in stamps), tuple(mark for _, mark in stamps)) for stamps in found
    ]


def _checksum(source: Source) -> str:
    """Of one file its sha256; of several what those make together."""
    sums = [sha256(path) for path in source.files]
    return sums[0] if len(sums) == 1 else fingerprint("source", sums)


def _facts(cfg: ImportConfig) -> EnvFacts | None:
    if not cfg.reality.env:
        return None
    facts = facts_of(
        replace(cfg.reality, task=[], task_options={})
    )  # the reset options are the logs', not drawn
    check_spaces(*facts.spaces)
    return facts


def _workers(cfg: ImportConfig, files: Sequence[Source]) -> int:
    if cfg.workers is not None:
        return cfg.workers
    if sum(size for size, _ in _stamps(files)) < MANY:
        return 0
    import ray

    ray_session.ensure(cfg.ray)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _look(
    cfg: ImportConfig,
    files: list[Source],
    workers: int,
    update: Callable[[int], None],
    found: Tally | None = None,
) -> Looked:
    """`found`: what an earlier process found, which is not looked for again."""
    known = _facts(cfg)
    schema = read_schema(
        files,
        cfg.columns,
        cfg.per_file,
        files[0].spaces if known is None else known.spaces,
        cfg.reality.bounds,
    )
    pieces = [
        replace(piece, number=n)
        for n, piece in enumerate(
            piece for i, source in enumerate(files) for piece in source.pieces(i)
        )
    ]
    joiner = Joiner([source.name for source in files], schema.layout, cfg.bad == "drop")
    for batch in (
        stream(Work(schema, cfg.per_file), pieces, workers, cfg.ray) if found is None else ()
    ):
        for _ in joiner.add(batch):
            pass
        update(sum(joiner.tally.rows.values()))
    for _ in joiner.close():
        pass
    tally = joiner.tally if found is None else found
    if not tally.transitions:
        none = (
            f"each of the {tally.empty} has one row, and nothing says what its action led to; give"
            " next_observation"
        )
        first = next(iter(tally.examples.values()), none if tally.empty else "there is none")
        raise UsageError(f"no episode can be kept: {first}")
    spaces = schema.spaces_of(tally.stats)
    check_spaces(*spaces)
    limit = cfg.reality.horizon if known is None else known.max_episode_steps
    return Looked(files, pieces, schema, tally, spaces, limit, _task(cfg, schema, spaces[0]))


def _task(cfg: ImportConfig, schema: Schema, observation: Space) -> list[str]:
    """`reality.task`, and the reset options that the logs have."""
    options = [leaf.path[0] for leaf in schema.layout.task]
    codec = SpaceCodec(observation, "observation")
    for name in options:
        if codec.matching(name):
            raise UsageError(
                f"task.{name} is a reset option and {name!r} a key of the observation too; rename"
                " one of them"
            )
    for name in cfg.reality.task:
        if name not in options and not codec.matching(name):
            known = [
                *options,
                *(".".join(map(str, leaf.path)) for leaf in codec.leaves if leaf.path),
            ]
            raise UsageError(
                f"reality.task names {name!r}, which is no key of the observation and no field of"
                f" the column task{nearest(name, known)}"
            )
    return [*cfg.reality.task, *(name for name in options if name not in cfg.reality.task)]


def _write(
    kept: Progress,
    cfg: ImportConfig,
    id: str,
    looked: Looked,
    workers: int,
    update: Callable[[int], None],
) -> None:
    reality = cfg.reality
    environment = Environment(
        id=reality.env,
        version="",  # of the environment that is installed here it is known, of the one that was logged it is not
        kwargs=dict(reality.kwargs),
        task=looked.task,
        max_episode_steps=looked.limit,
        success=reality.success,
    )
    writer = DatasetWriter(
        kept.data,
        id=id,
        environment=environment,
        observation_space=looked.spaces[0],
        action_space=looked.spaces[1],
        seed=cfg.seed,
        valid_fraction=cfg.valid_fraction,
    )
    codecs = SpaceCodec(looked.spaces[0], "observation"), SpaceCodec(looked.spaces[1], "action")
    joiner, done = kept.restore(
        writer, [source.name for source in looked.files], looked.schema.layout, cfg.bad == "drop"
    )
    begin, skip = joiner.next
    pieces = [
        replace(piece, skip=skip if piece.number == begin else 0) for piece in looked.pieces[begin:]
    ]
    succeeded = (
        None
        if reality.success is None or reality.success.strip().startswith("info")
        else parse_success(reality.success)
    )

    def batches() -> Iterator[Closed]:
        for batch in stream(Work(looked.schema, cfg.per_file, codecs), pieces, workers, cfg.ray):
            yield from joiner.add(batch)
        joiner.next = len(looked.pieces), 0
        yield from joiner.close()

    for closed in batches():
        rows = _rows(closed)
        known, rewards = closed.known, rows["reward"][:-1]
        success, outcome = known["success"], looked.outcome(closed)
        rows["terminated"] &= outcome == "terminated"
        if success is None and succeeded is not None:
            success = succeeded(float(rewards.sum()), {})
        episode = Episode(
            index=closed.key if isinstance(closed.key, int) else closed.number,
            seed=known["seed"],
            behaviour=known["behaviour"],
            observations=[],
            actions=[],
            rewards=rewards,
            outcome=outcome,  # type: ignore[arg-type]
            durations=None if np.isnan(rows["duration"][0]) else rows["duration"][:-1],
            task=known["task"],
            success=success,
        )
        writer.add(episode, rows)
        if writer.whole:
            kept.keep(writer, joiner)
        done += closed.length
        update(done)
    writer.close(dropped=sum(looked.tally.left_out.values()))


def _rows(episode: Closed) -> dict[str, Array]:
    """`manifest.ARRAYS` of an episode: T+1 rows, the last one an observation alone."""
    joined = {
        name: np.concatenate([part[name] for part in episode.parts]) for name in episode.parts[0]
    }
    length = episode.length
    rows: dict[str, Array] = {}
    for kind in ("num", "cat"):
        seen = joined[f"obs_{kind}"][: length + 1]
        rows[f"obs_{kind}"] = (
            seen
            if len(seen) == length + 1
            else np.concatenate([seen, joined[f"next_{kind}"][length - 1 : length]])
        )
    for name in ("act_num", "act_cat", "reward", "terminated"):
        kept = joined[name][:length]
        rows[name] = np.concatenate([kept, np.zeros((1, *kept.shape[1:]), kept.dtype)])
    timed = "duration" in joined and not np.isnan(joined["duration"][0])
    rows["duration"] = (
        np.concatenate([joined["duration"][:length], np.zeros(1)])
        if timed
        else np.full(length + 1, np.nan)
    )
    rows["step"] = np.arange(length + 1, dtype=np.int32)
    return rows
