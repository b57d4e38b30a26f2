"""The job `study`: does an agent's gain in a world reach reality?

    for each world: pretrain -> train-agent in it -> evaluate with `gain`
    -> imagined against real gains

Each stage is the job of that name, run as a child of this one. A study that is run again reuses the
artifacts of finished stages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from mesocosm.agents import training as agents
from mesocosm.agents import validation
from mesocosm.agents.config import AgentConfig
from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig, fingerprint, identity, override
from mesocosm.data.loading.text_batch import batch_codec
from mesocosm.datasets.horizon import MAX_EPISODE_STEPS, logged_horizon
from mesocosm.datasets.images import image_spaces
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.config import check as check_reality
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import EnvFacts, facts_of
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate import suite
from mesocosm.evaluate.config import EvaluateConfig, facts_for, sources_of
from mesocosm.evaluate.gain import words
from mesocosm.evaluate.judge import JudgeStore, judging
from mesocosm.evaluate.report import report, transfer
from mesocosm.evaluate.report.transfer import TransferPoint
from mesocosm.job import Job, Plan, Resources
from mesocosm.jobs import evaluate as evaluation
from mesocosm.jobs.loop_config import refuse_filled, share, stage
from mesocosm.runs.tracking import Run, console
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.train import pretrain as pretraining
from mesocosm.train.config import PretrainConfig
from mesocosm.versions import VERSIONS

AGENT = agents.TrainAgent(gated=False)
"""Agents also train in worlds that the gate refuses, because the study is about the gate."""
FEWEST = 2
"""Worlds that can be compared."""
FILLED = {"agent": ("world", "rival"), "evaluate": ("world", "agent", "ledger", "gain")}
"""Keys of the stages that only the study can know."""


@dataclass
class StudyConfig(JobConfig):
    """`reality`, `seed`, `storage`, `tracking` and `ray` are shared by the jobs."""

    reality: RealityConfig = field(default_factory=RealityConfig)
    worlds: list[str] = field(default_factory=list)
    """The worlds, from the poorest to the best. Each is `worlds/ID`, or how its pretraining differs
    from `pretrain`: "train.steps=50", "train.steps=200 data.unique=1000".
    """
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """The pretraining of the worlds that are not `worlds/ID`."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """The training of an agent in each world. Its gain is over `agent.init`, or else over the
    policy of its first snapshot.
    """
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The judgement of each agent. With `evaluate.policies` the study shows which worlds pass the
    gate of train-agent.
    """


@dataclass(frozen=True)
class StudyCell:
    """One world of a study."""

    name: str
    pretrain: PretrainConfig | None
    """None for a world that exists."""
    id: str
    """The world's id, which exists or will be made."""


@dataclass(frozen=True, kw_only=True)
class StudyPlan(Plan[StudyConfig]):
    cells: list[StudyCell]
    limit: int
    """The most steps of a judged episode."""

    @property
    def ledger(self) -> str:
        """The ledger of all judging."""
        return f"study-{self.id}"


class Study(Job[StudyConfig, StudyPlan]):
    """Train an agent in each world, and compare its gain there with its gain in reality.

    The artifact holds report.html, summary.json, table.csv and transfer.svg.

    Raises:
        UsageError: Before any work. The config is invalid, an artifact is missing, or the spaces of
            the data, the environment or the agent differ.
    """

    name, kind, config = "study", "evaluations", StudyConfig

    def resolve(self, config: StudyConfig, storage: Storage) -> StudyPlan:
        check(config)
        environment = facts_of(config.reality)
        if images := image_spaces(environment.spaces[0]):
            raise UsageError(
                f"study cannot use images yet, got {images[0]} of {config.reality.env}; train-agent"
                " in each world, and evaluate gain=true"
            )
        cells = [_cell(config, world, environment, storage) for world in config.worlds]
        if len({cell.id for cell in cells}) < len(cells):
            raise UsageError(f"worlds must all differ, got {config.worlds}; list each world once")
        former = None
        if config.agent.init is not None:
            former = storage.artifact("agents", config.agent.init)
            config = replace(config, agent=replace(config.agent, init=former.name))
        with stage("agent"):
            validation.check_spaces(config.agent, environment.spaces, former)
        limit = environment.max_episode_steps or _logged_limit(config, storage)
        with stage("evaluate"):
            suite.check_steps(_judging(config), 1 + config.agent.snapshots, limit)
        inputs = {
            "worlds": [cell.id for cell in cells],
            "agents": [] if former is None else [former.id],
        }
        facts = identity(config, without=["pretrain", "reality.budget"])
        sources = [environment.version, *sources_of(config.evaluate.policies)]
        return StudyPlan(
            config=config,
            inputs=inputs,
            facts=facts,
            id=fingerprint("study", facts, inputs, sources, VERSIONS, SCHEMA),
            cells=cells,
            limit=limit,
        )

    def summary(self, plan: StudyPlan) -> dict[str, Any]:
        config, agent = plan.config, plan.config.agent
        storage = Storage(config.storage.root)
        imagined = f"{agent.iterations * agent.num_envs * agent.rollout:,} imagined steps"
        most = suite.most_episodes(_judging(config), 1 + agent.snapshots)[1]
        shared = len(config.evaluate.policies) * config.evaluate.policy_episodes
        shared += 0 if agent.init is None else config.evaluate.episodes
        rows = list[dict[str, Any]]()
        for cell in plan.cells:
            world, trained, judged = _finished(plan, cell, storage)
            again = any(row["judged episodes"] for row in rows)
            episodes = 0 if judged else most - (shared if again else 0)
            rows.append(
                {
                    "world": cell.name,
                    "pretrain": "found" if world else "to train",
                    "agent": "found" if trained else imagined,
                    "judged episodes": episodes,
                    "real steps, at most": episodes * plan.limit,
                }
            )
        return {
            "study": f"{self.kind}/{plan.id}",
            "environment": config.reality.env,
            **judging(config.reality, sum(row["judged episodes"] for row in rows), plan.limit),
            "worlds": rows,
        }

    def resources(self, plan: StudyPlan) -> Resources:
        train, agent = plan.config.pretrain.train, plan.config.agent
        workers = train.workers if any(cell.pretrain for cell in plan.cells) else 0
        actors = agent.runners + agent.learners + int(agent.backend == "serve")
        return {
            f"pretrain.train.workers={train.workers}": (
                workers,
                workers * (train.gpus_per_worker or 0),
            ),
            "agent.runners, agent.learners and a served world": (actors, 0),
        }

    def make(self, plan: StudyPlan, run: Run) -> Artifact:
        config, price = plan.config, plan.config.reality.price
        ray_session.ensure(config.ray)
        for key, (cpus, gpus) in self.resources(plan).items():
            ray_session.preflight(key=key, cpus=cpus, gpus=gpus)
        points: list[TransferPoint] = []
        for number, cell in enumerate(plan.cells):
            title = f"world {number + 1} of {len(plan.cells)}: {cell.name}"
            run.say(title if run.quiet else f"[bold]{title}[/]")
            point = TransferPoint.read(cell.name, _judged(plan, cell, run))
            points.append(point)
            gains = {side: point.gain[side] for side in ("world", "real")}
            run.log({f"study/gain_{k}": gain["mean"] for k, gain in gains.items()}, step=number)
            run.say(
                f"  its agent gains {words(gains['world'])} in the world, and"
                f" {words(gains['real'])} in reality"
            )
        totals = Ledger(run.storage, plan.ledger, config.reality.budget, price).totals()
        judge = totals.purposes["judge"]
        cost = {"steps": judge.steps, "resets": judge.resets, "price": judge.price}
        title = f"Gains in {len(points)} worlds and in reality: {config.reality.env}"
        about = title, config.reality.env
        summary = transfer.summarise(
            *about, points, cost | {"currency": price.currency}, config.seed
        )
        statistics = {k: v for k, v in summary["statistics"].items() if isinstance(v, float)}
        run.log({f"study/{name}": value for name, value in statistics.items()})
        JudgeStore(run.storage, plan.id).remove()
        agent_ids = [point.agent.removeprefix("agents/") for point in points]
        plan = replace(plan, inputs=plan.inputs | {"agents": agent_ids})
        ledger = totals.to_json()
        return self.commit(
            plan, run, lambda folder: transfer.write(summary, points, folder), ledger=ledger
        )

    def report(self, artifact: Artifact, plan: StudyPlan, run: Run, *, made: bool) -> None:
        if not made:
            run.say(f"found {artifact.name}: the study was finished before")
        run.record(inputs=artifact.meta["inputs"], ledger=artifact.meta["ledger"])
        for name in (report.PAGE, report.SUMMARY, transfer.TABLE, transfer.PLOT):
            run.artifact(artifact.path / name)
        summary = json.loads((artifact.path / report.SUMMARY).read_text())
        if not run.quiet:
            console.print(_table(summary))
        for line in summary["findings"]:
            run.say(line)
        run.say(f"report: {artifact.path / report.PAGE}")


def check(config: StudyConfig) -> None:
    """Raise UsageError at the first invalid value. Reads no storage."""
    check_reality(config.reality)
    blocks = {"pretrain": config.pretrain, "agent": config.agent, "evaluate": config.evaluate}
    refuse_filled(blocks, FILLED, "study")
    if len(config.worlds) < FEWEST:
        raise UsageError(
            f"worlds must name at least {FEWEST}, got {config.worlds}; try"
            " worlds=[train.steps=50,train.steps=200], or worlds=[ID,ID]"
        )
    with stage("agent"):
        validation.check(share(config.agent, config))
    if config.agent.objective != "return":
        raise UsageError(
            f"agent.objective must be return in a study, got {config.agent.objective}: an adversary"
            " seeks no gain"
        )
    if config.agent.init is None and config.agent.snapshots == 0:
        raise UsageError(
            "agent.snapshots must be >= 1 without agent.init, got 0: the gain is over the first"
            " snapshot"
        )
    with stage("evaluate"):
        replace(_judging(config), world="?", agent="?").validate()


def _cell(config: StudyConfig, world: str, environment: EnvFacts, storage: Storage) -> StudyCell:
    """The world of one entry of `worlds`. Raises UsageError where it cannot be made, or has other
    spaces than the environment.
    """
    if "=" not in world:
        artifact = storage.artifact("worlds", world)
        codec = batch_codec(json.loads((artifact.path / "codec.json").read_text()))
        facts_for(config.reality, artifact.name, codec)
        return StudyCell(artifact.name, None, artifact.id)
    with stage(f"worlds, {world}"):
        pretrain = override(share(config.pretrain, config), world.split())
        plan = pretraining.JOB.resolve(pretrain, storage)
    if (plan.dataset.observation_space, plan.dataset.action_space) != environment.spaces:
        raise UsageError(
            f"pretrain.data.datasets={pretrain.data.datasets} has other spaces than"
            f" reality.env={config.reality.env!r}; use data of that environment"
        )
    return StudyCell(world, pretrain, plan.id)


def _logged_limit(config: StudyConfig, storage: Storage) -> int:
    """The most steps of an episode in an environment without a time limit."""
    logged = logged_horizon(storage, config.pretrain.data.datasets)
    return MAX_EPISODE_STEPS if logged is None else logged.steps


def _training(config: StudyConfig, world: str) -> AgentConfig:
    agent = share(config.agent, config)
    return replace(agent, world=world, horizon=agent.horizon or config.reality.horizon)


def _judging(config: StudyConfig, **filled: Any) -> EvaluateConfig:
    return replace(share(config.evaluate, config), gain=True, **filled)


def _finished(
    plan: StudyPlan, cell: StudyCell, storage: Storage
) -> tuple[Artifact | None, Artifact | None, Artifact | None]:
    """The world, the agent and the evaluation of a cell, as far as they exist."""
    if plan.config.force or (world := storage.find("worlds", cell.id)) is None:
        return None, None, None
    training = AGENT.resolve(_training(plan.config, world.id), storage)
    agent = storage.find("agents", training.id)
    if agent is None:
        return world, None, None
    judging = _judging(plan.config, world=world.id, agent=agent.id, ledger=plan.ledger)
    judged = evaluation.JOB.resolve(judging, storage)
    return world, agent, storage.find("evaluations", judged.id)


def _judged(plan: StudyPlan, cell: StudyCell, run: Run) -> Artifact:
    """The evaluation of a cell. Makes what is missing."""
    config, world = plan.config, cell.id
    if cell.pretrain is not None:
        world = _stage(run, pretraining.JOB, cell.pretrain).id
    agent = _stage(run, AGENT, _training(config, world)).id
    judging = _judging(config, world=world, agent=agent, ledger=plan.ledger)
    # The start and the policies of the config play their real episodes once for all worlds.
    return _stage(run, evaluation.Evaluate(shared=plan.id), judging)


def _stage(run: Run, job: Job[Any, Any], config: JobConfig) -> Artifact:
    """Run a job as a child of this run."""
    try:
        with run.child(job.name, config) as child:
            return job.run(config, child)
    except UsageError as error:  # the study's own config was checked
        raise MesocosmError(f"{job.name}: {error}") from error


def _table(summary: dict[str, Any]) -> Table:
    head = ("world", "nats", "gain in the world", "gain in reality", "r of policies", "gate")
    table = Table(*head, box=None, header_style="dim", pad_edge=False)
    gate = {None: "-", True: "passes", False: "refused"}
    for point in summary["points"]:
        gains = [words(point["gain"][side]) for side in ("world", "real")]
        r = "-" if point["pearson"] is None else f"{point['pearson']:.2f}"
        table.add_row(point["name"], f"{point['nats']:.3f}", *gains, r, gate[point["passes"]])
    return table


JOB = Study()
