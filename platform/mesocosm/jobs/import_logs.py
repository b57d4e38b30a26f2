"""The job `import`: logs of a documented schema (docs/import.md), with pictures -> a dataset.

Two passes stream over the files, with `workers` in parallel on Ray Data. The first checks and
counts every value, and the second writes. The same files and config give the same bytes for any
number of workers. A killed import continues from its last whole shard (`ingest.resume`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from mesocosm import checks
from mesocosm.config import JobConfig, fingerprint, identity
from mesocosm.data.ingest.episodes import Joiner, LoggedEpisode, read_batches
from mesocosm.data.ingest.frames import FrameDecoder, FrameStream
from mesocosm.data.ingest.readers.files import sha256
from mesocosm.data.ingest.readers.traces import REWARDS, TASKS, TraceConfig, TraceOptions
from mesocosm.data.ingest.report import ImportTally, Inspection
from mesocosm.data.ingest.resume import ImportProgress
from mesocosm.data.ingest.schema import Schema, read_schema
from mesocosm.data.ingest.sources import Source, sources
from mesocosm.data.parallel import ordered, resources, worker_count
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.images import image_names
from mesocosm.datasets.manifest import Environment
from mesocosm.datasets.spaces import SpaceCodec, check_spaces, shown_space
from mesocosm.datasets.writer import DatasetWriter, nothing
from mesocosm.envs.config import PAID, RealityConfig, check_bounds, parse_success
from mesocosm.envs.make import EnvFacts, facts_of
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.job import Job, Plan, Resources
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage

Array = NDArray[Any]
Space = gymnasium.Space[Any]
REPORT = "import.json"


@dataclass
class ImportConfig(JobConfig):
    paths: list[str] = field(default_factory=list)
    """Files, patterns or folders, in order. The command line takes them without a key."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """`env`: the logged environment. It gives the spaces, and every value is checked against them.
    Empty infers the spaces. No step is taken.
    """
    columns: dict[str, str] = field(default_factory=dict)
    """The file's column names that differ from the schema's, as in columns.observation=obs."""
    per_file: bool = False
    """Each file numbers its own episodes. Without an episode column each file is one."""
    traces: TraceConfig = field(default_factory=TraceConfig)
    """The rules for chats, OpenTelemetry spans and AgentWorldBench (docs/text.md). Keys such as
    `columns.reward=NAME` name the fields of a trace or a message.
    """
    bad: str = "refuse"
    """At a faulty episode: refuse (the import, naming file and row), or drop (the episode)."""
    workers: int | None = None
    """Parallel tasks of Ray Data; 0 reads in this process. Defaults to 0 below 256 MiB of input,
    and else to the cluster's CPU count.
    """
    valid_fraction: float = 0.1
    """Share of the episodes held out for validation. Fewer than 5 may all be trained on."""


@dataclass(frozen=True, kw_only=True)
class Import(Plan[ImportConfig]):
    files: list[Source]
    sums: list[str]
    """The sha256 of each file"""
    stamps: list[tuple[int, tuple[str, ...]]]
    """Sizes and marks that change when a file does"""


class ImportLogs(Job[ImportConfig, Import]):
    """Import logs, or find the dataset of the same files.

    Raises:
        UsageError: Before writing. No such file or environment, a missing column, a
            fault (with file and row), or no episode left.
    """

    name, kind, config = "import", "datasets", ImportConfig

    def check(self, cfg: ImportConfig) -> None:
        """Raise UsageError at the first invalid value. Reads no file."""
        checks.one_of(cfg, ("refuse", "drop"), "bad")
        checks.one_of(cfg.traces, TASKS, "task", prefix="traces.")
        checks.one_of(cfg.traces, REWARDS, "reward", prefix="traces.")
        checks.at_least(cfg, 0, "workers")
        checks.within(cfg, 0, 1, "valid_fraction", open="]")
        check_bounds(cfg.reality)
        if cfg.reality.success is not None:
            parse_success(cfg.reality.success)

    def preview(self, config: ImportConfig) -> tuple[dict[str, Any], Resources]:
        """The dataset that `run` would make. Reads the logs here, and remote ones in place:
        `resolve` would download Minari's and take the checksums of all.
        """
        self.check(config)
        files = sources(config.paths, fetch=False, traces=_trace_options(config))
        inspection = _inspect(config, files, 0, lambda rows: None)
        report = inspection.report()
        counts = {name: value for name, value in report["counts"].items() if value not in (0, {})}
        optional = {"left out": report["left_out"], "warnings": report["warnings"]}
        summary = {
            "environment": config.reality.env or "none given: the spaces are inferred",
            "files": len(files),
            **{name.replace("_", " "): value for name, value in counts.items()},
            "observation space": shown_space(inspection.spaces[0]),
            "action space": shown_space(inspection.spaces[1]),
            "price": "nothing: no real step is taken",
            "columns": report["columns"],
            **{name: rows for name, rows in optional.items() if rows},
        }
        return summary, resources(config.workers)

    def resolve(self, config: ImportConfig, storage: Storage) -> Import:
        self.check(config)
        files = sources(config.paths, fetch=True, traces=_trace_options(config))
        stamps = [source.stamp() for source in files]
        paths = list(dict.fromkeys(path for source in files for path in source.files))
        with ThreadPoolExecutor(4) as pool:  # cameras' videos may belong to several sources
            by_path = dict(zip(paths, pool.map(sha256, paths), strict=True))
        sums = [source.checksum(by_path) for source in files]
        # Without traces, so that ids are those of before there were any.
        unused = ["traces"] if config.traces == TraceConfig() else []
        settings = identity(config, without=["paths", "workers", *PAID, *unused])
        facts = _facts(config)
        return Import(
            config=config,
            inputs={"files": [fingerprint("files", sums)]},
            facts=identity(config),
            id=self.hash("import", settings, sums, "" if facts is None else facts.version),
            files=files,
            sums=sums,
            stamps=stamps,
        )

    def summary(self, plan: Import) -> dict[str, Any]:
        return self.plan(plan.config)

    def make(self, plan: Import, run: Run) -> Artifact:
        cfg, files = plan.config, plan.files
        # This run holds the dataset's lease, so no other process of this root uses the folder.
        progress = ImportProgress(run.storage.local_path("scratch") / f"import-{plan.id}")
        if cfg.force:
            progress.clear()
        workers = worker_count(cfg.workers, sum(size for size, _ in plan.stamps), cfg.ray)
        tally = progress.tally()
        if tally is not None:
            run.say("an earlier run has checked the logs; this one continues from there")
        with run.progress("check the logs") as update:

            def checked(rows: int) -> None:
                update(rows, f"{rows:,} rows")

            inspection = _inspect(cfg, files, workers, checked, tally)
        progress.save_tally(inspection.tally)
        report = inspection.report()
        for row in report["columns"]:
            how = f" ({row['how']})" if row["how"] else ""
            run.say(f"  {row['column']} {row['type']}: {row['became']}{how}")
        for row in report["left_out"]:
            lost = f"{row['episodes']} episodes of {row['rows']} rows"
            run.say(f"  left out: {lost}: {row['reason']} (first at {row['first']})")
        for warning in report["warnings"]:
            run.say(f"warning: {warning}")
        about: list[dict[str, Any]] = [
            {"name": source.name, "sha256": checksum, "bytes": size}
            for source, checksum, (size, _) in zip(files, plan.sums, plan.stamps, strict=True)
        ]
        counts = report["counts"]
        total = counts["transitions"]

        def fill(folder: Path) -> None:
            with run.progress("write the dataset", total) as update:

                def written(done: int) -> None:
                    update(done, f"{done:,}/{total:,} transitions")

                _write(progress, plan, inspection, workers, written)
            if [source.stamp() for source in files] != plan.stamps:
                progress.clear()
                raise MesocosmError(
                    "a file changed while it was imported; import again when nothing writes to the"
                    " logs"
                )
            progress.link(folder)
            names = [{**file, "name": Path(file["name"]).name} for file in about]
            (folder / REPORT).write_text(json.dumps({**report, "files": names}, indent=1))

        artifact = self.commit(plan, run, fill, counts=counts, files=about)
        shutil.rmtree(progress.folder, ignore_errors=True)
        size = f"{counts['episodes']} episodes of {total} transitions"
        run.say(f"{artifact.name}: {size}; no real step was taken")
        return artifact

    def report(self, artifact: Artifact, plan: Import, run: Run, *, made: bool) -> None:
        run.record(**json.loads((artifact.path / REPORT).read_text()))
        if not made:
            transitions = artifact.meta["counts"]["transitions"]
            run.say(f"found {artifact.name}: {transitions} transitions; nothing was imported")


def _trace_options(config: ImportConfig) -> TraceOptions:
    return TraceOptions(config.traces.task, config.traces.reward, dict(config.columns))


def _facts(cfg: ImportConfig) -> EnvFacts | None:
    if not cfg.reality.env:
        return None
    # The reset options come from the logs. They are not drawn.
    facts = facts_of(replace(cfg.reality, task=[], task_options={}))
    check_spaces(*facts.spaces)
    return facts


def _inspect(
    cfg: ImportConfig,
    files: list[Source],
    workers: int,
    update: Callable[[int], None],
    tally: ImportTally | None = None,
) -> Inspection:
    """The first pass. A given `tally` replaces reading the rows again."""
    facts = _facts(cfg)
    spaces = files[0].about.spaces if facts is None else facts.spaces
    schema = read_schema(files, cfg.columns, cfg.per_file, spaces, cfg.reality.bounds)
    pieces = [piece for i, source in enumerate(files) for piece in source.pieces(i)]
    pieces = [replace(piece, number=number) for number, piece in enumerate(pieces)]
    if tally is None:
        joiner = Joiner([source.name for source in files], schema, cfg.bad == "drop")
        tally = joiner.tally
        for batch in ordered(partial(read_batches, schema=schema), pieces, workers, cfg.ray):
            list(joiner.add(batch))
            update(sum(tally.rows.values()))
        list(joiner.close())
    if not tally.transitions:
        reason = next(iter(tally.examples.values()), "there is none")
        if tally.empty and not tally.examples:
            reason = (
                f"each of the {tally.empty} has one row, and nothing says what its action led to;"
                " give next_observation"
            )
        raise UsageError(f"no episode can be imported: {reason}")
    spaces = schema.build_spaces(tally.stats)
    check_spaces(*spaces)
    limit = cfg.reality.horizon if facts is None else facts.max_episode_steps
    return Inspection(pieces, schema, tally, spaces, limit, _task(cfg, schema, spaces[0]))


def _task(cfg: ImportConfig, schema: Schema, observation: Space) -> list[str]:
    """`reality.task`, and the reset options of the logs."""
    options = [leaf.path[0] for leaf in schema.task]
    codec = SpaceCodec(observation, "observation")
    for name in options:
        if codec.matching(name):
            raise UsageError(
                f"task.{name} is a reset option and {name!r} a key of the observation too; rename"
                " one of them"
            )
    for name in cfg.reality.task:
        if name not in options and not codec.matching(name):
            keys = [".".join(map(str, leaf.path)) for leaf in codec.leaves if leaf.path]
            raise UsageError(
                f"reality.task must name keys of the observation or fields of the column task, got"
                f" {name!r}{nearest(name, [*options, *keys])}"
            )
    return [*cfg.reality.task, *(name for name in options if name not in cfg.reality.task)]


def _write(
    progress: ImportProgress,
    plan: Import,
    inspection: Inspection,
    workers: int,
    update: Callable[[int], None],
) -> None:
    """The second pass."""
    cfg, reality, schema = plan.config, plan.config.reality, inspection.schema
    observation, action = inspection.spaces
    writer = DatasetWriter(
        progress.data,
        id=plan.id,
        environment=Environment(
            id=reality.env,
            version="",  # the logged version is unknown
            kwargs=dict(reality.kwargs),
            task=inspection.task,
            max_episode_steps=inspection.limit,
            success=reality.success,
        ),
        observation_space=observation,
        action_space=action,
        seed=cfg.seed,
        valid_fraction=cfg.valid_fraction,
    )
    joiner = Joiner(
        [source.name for source in plan.files],
        schema,
        cfg.bad == "drop",
        frozenset(inspection.tally.left_out_numbers),
    )
    progress.restore(writer, joiner)
    begin, skip = joiner.next
    pieces = inspection.pieces[begin:]
    if pieces:
        pieces[0] = replace(pieces[0], skip=skip)
    judge = None
    if reality.success is not None and not reality.success.strip().startswith("info"):
        judge = parse_success(reality.success)

    codecs = SpaceCodec(observation, "observation"), SpaceCodec(action, "action")

    def episodes() -> Iterator[LoggedEpisode]:
        encode = partial(read_batches, schema=schema, codecs=codecs)
        for batch in ordered(encode, pieces, workers, cfg.ray):
            yield from joiner.add(batch)
        joiner.next = len(inspection.pieces), 0
        yield from joiner.close()

    decoder = FrameDecoder()
    for logged in episodes():
        rows = _arrays(logged, codecs[0], decoder)
        rewards, timed = rows["reward"][:-1], not np.isnan(rows["duration"][0])
        success, outcome = logged.success, inspection.outcome(logged.outcome, logged.success)
        rows["terminated"] &= outcome == "terminated"
        if success is None and judge is not None:
            success = judge(float(rewards.sum()), {})
        episode = Episode(
            index=logged.key if isinstance(logged.key, int) else logged.number,
            seed=logged.rows["seed"][0],
            behaviour=logged.rows["behaviour"][0],
            observations=[],
            actions=[],
            rewards=rewards,
            outcome=outcome,  # type: ignore[arg-type]
            durations=rows["duration"][:-1] if timed else None,
            task=logged.rows["task"][0],
            success=success,
        )
        writer.add(episode, rows)
        if writer.whole:
            progress.save_shard(writer, joiner)
        update(writer.transitions)
    decoder.close()
    writer.close(dropped=sum(inspection.tally.left_out.values()))


def _arrays(
    episode: LoggedEpisode, observation: SpaceCodec, decoder: FrameDecoder
) -> dict[str, Any]:
    """`manifest.ARRAYS` and `texts.TEXTS` of an episode: T+1 rows, of which the last has only an
    observation. Images are a `FrameStream`.
    """
    logged, length = episode.rows, episode.length
    arrays: dict[str, Any] = {}
    images = image_names(len(observation.image_leaves))
    for kind in ("num", "cat", "text", *(name.removeprefix("obs_") for name in images)):
        observations = logged[f"obs_{kind}"][: length + 1]
        if len(observations) == length:
            last = logged[f"next_{kind}"][length - 1 : length]
            observations = np.concatenate([observations, last])
        arrays[f"obs_{kind}"] = observations
    for name, leaf in zip(images, observation.image_leaves, strict=True):
        where = f"{leaf.name} of episode {episode.key!r}"
        arrays[name] = FrameStream(arrays[name], leaf.shape, leaf.dtype, decoder, where)
    for name in ("act_num", "act_cat", "act_text", "reward", "terminated", "duration"):
        values = logged[name][:length]
        arrays[name] = np.concatenate([values, nothing(values)])
    if length and np.isnan(arrays["duration"][0]):
        arrays["duration"] = np.full(length + 1, np.nan)
    arrays["step"] = np.arange(length + 1, dtype=np.int32)
    return arrays


JOB = ImportLogs()
