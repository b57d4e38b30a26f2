"""The job `loop`: rounds of all jobs on one machine or a cluster, and a report.

    collect -> pretrain -> serve -> train-agent -> evaluate in reality -> collect with the new agent
    -> ... -> report

Each stage is the job of that name, run as a child of this one. A loop that is run again reuses the
artifacts of finished stages. One ledger counts the steps of data collection, another one those of
model-free training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mesocosm.agents.config import BaselineConfig
from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig, fingerprint, identity
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.horizon import UNKNOWN, logged_horizon
from mesocosm.envs import config as reality_config
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate import policy_set, suite
from mesocosm.evaluate.report import report
from mesocosm.job import Job, Plan, Resources
from mesocosm.jobs import baseline as model_free
from mesocosm.jobs import collect as collecting
from mesocosm.jobs import evaluate as evaluation
from mesocosm.jobs import pretrain as pretraining
from mesocosm.jobs import train_agent as agents
from mesocosm.jobs.loop_config import FREE, LoopConfig, acting, fill, with_tokenizer
from mesocosm.jobs.loop_preflight import Ready, check_port, preflight, stage_resources, stage_table
from mesocosm.runs.tracking import Run, console
from mesocosm.serve.deployment import deploy, undeploy
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.versions import VERSIONS


@dataclass(frozen=True, kw_only=True)
class LoopPlan(Plan[LoopConfig]):
    ready: Ready


class LoopJob(Job[LoopConfig, LoopPlan]):
    """Run `rounds` rounds and write the report. An interrupted loop resumes."""

    name, kind, config = "loop", "evaluations", LoopConfig

    def resolve(self, config: LoopConfig, storage: Storage) -> LoopPlan:
        ready = preflight(config, storage)
        config = replace(config, datasets=[artifact.name for artifact in ready.datasets])
        facts = identity(config)
        del facts["reality"]["known"], facts["pretrain"]["known"]
        for block in facts["baselines"]:
            del block["tokenizer"]  # of pretrain.data
        if ready.known:
            facts["known"] = {part: function.identity for part, function in ready.known.items()}
        return LoopPlan(
            config=config,
            inputs={"datasets": [artifact.id for artifact in ready.datasets]},
            facts=facts,
            id=fingerprint("loop", facts, ready.facts.version, VERSIONS, SCHEMA),
            ready=ready,
        )

    def summary(self, plan: LoopPlan) -> dict[str, Any]:
        cfg, ready = plan.config, plan.ready
        check_port(cfg)
        price, horizon = cfg.reality.price, ready.warning
        bought = (0 if cfg.datasets else cfg.collect.steps) + (cfg.rounds - 1) * cfg.explore.steps
        limit = cfg.reality.budget.steps
        budget = (
            f"{bought:,} of {'unlimited' if limit is None else f'{limit:,}'} steps, for collect"
        )
        budget += " and explore"
        if cfg.reality.budget.money is not None:
            budget += f"; their price at most {cfg.reality.budget.money:g} {price.currency}"
        prices = f"{price.per_step:g} {price.currency} a step, {price.per_reset:g} a reset"
        prices += f", {price.per_second:g} a second" if price.per_second else ""
        if ready.horizon is not None:
            horizon = f"{ready.limit} steps: {ready.horizon.source}"
        return {
            "environment": cfg.reality.env,
            "rounds": cfg.rounds,
            "horizon": horizon,
            "price": f"{prices}, by reality.price; the resets of collect, explore and baselines are"
            " not known yet",
            "budget": budget,
            "stages": stage_table(cfg, ready.limit),
        }

    def resources(self, plan: LoopPlan) -> Resources:
        return stage_resources(plan.config)

    def make(self, plan: LoopPlan, run: Run) -> Artifact:
        cfg, ready = plan.config, plan.ready
        check_port(cfg)
        ray_session.ensure(cfg.ray)
        for key, (cpus, gpus) in stage_resources(cfg).items():
            ray_session.preflight(key=key, cpus=cpus, gpus=gpus)
        if ready.warning is not None:
            run.say(f"warning: {ready.warning}")
        return _Loop(self, plan, run).run_all()

    def report(self, artifact: Artifact, plan: LoopPlan, run: Run, *, made: bool) -> None:
        if not made:
            run.say(f"found {artifact.name}: the loop was finished before")
        summary = json.loads((artifact.path / report.SUMMARY).read_text())
        run.record(inputs=artifact.meta["inputs"], ledger=artifact.meta["ledger"])
        for name in (report.PAGE, report.SUMMARY):
            run.artifact(artifact.path / name)
        if not run.quiet:
            console.print(report.curves_table(summary))
        run.say(f"report: {artifact.path / report.PAGE}")


class _Loop:
    """The stages of one loop, and their artifacts so far."""

    def __init__(self, job: LoopJob, plan: LoopPlan, run: Run):
        self.job, self.plan, self.run = job, plan, run
        self.cfg = cfg = plan.config
        # A larger budget, more rounds or more workers keep the ledger, so a loop that is run again
        # has still spent its steps.
        free = [*FREE, *reality_config.PAID, "collect.workers", "explore.workers"]
        experiment = identity(cfg, without=free), plan.ready.facts.version
        self.ledger_id = f"loop-{fingerprint('ledger', *experiment)}"
        self.ledger = Ledger(run.storage, self.ledger_id, cfg.reality.budget, cfg.reality.price)
        self.stages: list[report.Stage] = []
        self.lineage: list[tuple[str, str]] = []
        kinds = ("datasets", "worlds", "agents", "evaluations")
        self.inputs: dict[str, list[str]] = {kind: [] for kind in kinds}
        self.steps = 0
        """Real steps behind the datasets."""
        self.imagined: list[dict[str, Any]] = []
        self.app, self.served = f"loop-{run.id}", False  # unique among loops that share a Ray
        for dataset in plan.ready.datasets:
            self._add("given", dataset)

    def run_all(self) -> Artifact:
        """Run all rounds and the baselines, and write the report."""
        cfg, run = self.cfg, self.run
        points: list[report.Point] = []
        judged: list[dict[str, Any]] = []
        agent: Artifact | None = None
        try:
            for round in range(cfg.rounds):
                title = f"round {round + 1} of {cfg.rounds}"
                run.say(title if run.quiet else f"[bold]{title}[/]")
                if round or not cfg.datasets:
                    self.collect(round, agent)
                world = self.pretrain(round)
                agent = self.train_agent(round, world, agent)
                spent = self._spent(round)
                evaluated = self.evaluate(round, world, agent)
                judged.append(json.loads((evaluated.path / report.SUMMARY).read_text()))
                returns = judged[-1]["curves"]["world"][0]["points"][0]["returns"]
                seconds = sum(stage.seconds for stage in self.stages)
                point = report.Point.of(spent, returns, round=round + 1, wall_seconds=seconds)
                points.append(point)
                run.log({"loop/real_steps": spent, "loop/return": point.mean}, step=round)
                run.say(f"  after {spent} real steps: mean return {point.mean:.1f} in reality")
                if cfg.stop_at_target and cfg.target is not None and point.mean >= cfg.target:
                    break
        finally:
            if self.served:
                undeploy(self.app)
        curves = [self.baseline(i, block) for i, block in enumerate(cfg.baselines)]
        return self._report(points, judged, curves)

    def collect(self, round: int, agent: Artifact | None) -> Artifact:
        block = self.cfg.collect if agent is None else acting(self.cfg.explore, agent.name)
        config = replace(fill(block, self.cfg, round), ledger=self.ledger_id)
        return self._stage(collecting.JOB, config, round)

    def pretrain(self, round: int) -> Artifact:
        config = fill(self.cfg.pretrain, self.cfg, round)
        data = replace(config.data, datasets=list(self.inputs["datasets"]))
        config = replace(config, data=data, known=self.cfg.reality.known)
        return self._stage(pretraining.JOB, config, round)

    def train_agent(self, round: int, world: Artifact, former: Artifact | None) -> Artifact:
        cfg = self.cfg

        def serve() -> None:
            if not self.served and cfg.agent.backend == "serve":
                deploy(replace(fill(cfg.serve, cfg, round), world=world.id, name=self.app))
                self.served = True

        config = replace(fill(cfg.agent, cfg, round), world=world.id, app=self.app)
        config.horizon = config.horizon or self._reality().horizon
        if former is None or not cfg.warm_start:
            return self._stage(agents.JOB, config, round, first=serve)
        continued = replace(config, init=former.name)
        agent = self._stage(agents.JOB, continued, round, first=serve)
        if cfg.warm_start == "auto":
            new = replace(config, init=None, rival=agent.name)
            agent = self._stage(agents.JOB, new, round, "train-agent, new")
        return agent

    def evaluate(self, round: int, world: Artifact, agent: Artifact) -> Artifact:
        cfg, storage = self.cfg, self.run.storage
        config = replace(
            fill(cfg.evaluate, cfg, round), world=world.id, agent=agent.id, ledger=self.ledger_id
        )
        config.reality = self._reality()
        alone = replace(config, policies=[], graded=0, adversary=0)
        data = [storage.artifact("datasets", id) for id in self.inputs["datasets"]]
        if config.compares and policy_set.collected(agent.name, storage, data) is not None:
            self.run.say(
                f"  {agent.name}, which was kept, collected some of this world's data: it is"
                " judged, and no policies are compared with it"
            )
            config = alone
        try:
            return self._stage(evaluation.JOB, config, round)
        except suite.TooFewPolicies as error:  # the agent was paid for, so judge it
            self.run.say(f"  policies are not compared: {error}")
        return self._stage(evaluation.JOB, alone, round)

    def baseline(self, index: int, block: BaselineConfig) -> report.Curve:
        config = fill(with_tokenizer(block, self.cfg), self.cfg, index)
        # The same ledger, under another purpose. Without selection the curve is the cost of
        # training alone.
        config = replace(config, ledger=self.ledger_id, select_episodes=0)
        config.target = self.cfg.target if config.target is None else config.target
        config.reality = self._reality()
        artifact = self._stage(model_free.JOB, config, name=f"baseline {config.algo}")
        curve = json.loads((artifact.path / "curve.json").read_text())
        # Greedy episodes, as the world's agent is judged by; the mean of training lags behind.
        kind = "judge" if config.judge_every else "train"
        points = [_point(point) for point in curve["points"] if point["kind"] == kind]
        return report.Curve(
            f"model-free {config.algo}",
            points,
            censored=config.target is not None and curve["reached"] is None,
            steps=curve["steps"],
            wall_seconds=points[-1].wall_seconds if points else None,
            settings=", ".join(f"{key} {value}" for key, value in config.params.items()),
        )

    def _reality(self) -> RealityConfig:
        """`reality` for stages that have a horizon.

        It is `UNKNOWN` if neither the environment nor the data so far shows one.
        """
        reality = self.cfg.reality
        timed = self.plan.ready.facts.max_episode_steps is not None
        if timed or logged_horizon(self.run.storage, self.inputs["datasets"]) is not None:
            return reality
        return replace(reality, horizon=UNKNOWN)

    def _stage(
        self,
        job: Job[Any, Any],
        config: JobConfig,
        round: int | None = None,
        name: str = "",
        first: Callable[[], None] = lambda: None,
    ) -> Artifact:
        """Run a job as a child of this run, after `first`, and record the time that both took."""
        name, began = name or job.name, time.monotonic()
        try:
            first()
            with self.run.child(job.name, config) as child:
                artifact = job.run(config, child)
        except suite.TooFewPolicies:
            raise
        except UsageError as error:  # a failure: real steps have been spent
            raise MesocosmError(f"{name}: {error}") if self.stages else error from error
        seconds = time.monotonic() - began
        key = f"{artifact.kind}-{artifact.id}-{artifact.meta['run']}"
        number = None if round is None else round + 1
        self.stages.append(report.Stage(name, self._once(key, seconds, "seconds"), number))
        self._add(name if round is None else f"{name}, round {number}", artifact)
        return artifact

    def _add(self, origin: str, artifact: Artifact) -> None:
        """Add an artifact to the lineage, and the real steps of a dataset to the sum."""
        self.lineage.append((origin, artifact.name))
        self.inputs[artifact.kind].append(artifact.id)
        if artifact.kind == "agents":
            self.imagined.append(report.imagined_row(origin, artifact.meta["metrics"]))
        if artifact.kind == "datasets":
            steps = artifact.meta.get("counts", {}).get("steps")
            self.steps += Dataset([artifact.path]).transitions if steps is None else int(steps)

    def _spent(self, round: int) -> int:
        """Real steps behind this round's agent: those of all datasets so far, or the ledger's if it
        has more (steps that a crash lost are spent too).
        """
        spent = int(self._once(f"spent-{round}", self.ledger.totals().spent, self.ledger_id))
        return max(spent, self.steps)

    def _once(self, name: str, value: float, folder: str) -> float:
        """The value of the first call. A resumed loop does not measure it again."""
        path = f"runs/loop/{folder}/{name}.json"
        self.run.storage.create(path, json.dumps(value).encode())
        raw = self.run.storage.read(path)
        assert raw is not None
        return float(json.loads(raw))

    def _report(
        self, points: list[report.Point], judged: list[dict[str, Any]], curves: list[report.Curve]
    ) -> Artifact:
        cfg, totals = self.cfg, self.ledger.totals()
        reached = cfg.target is not None and any(p.mean >= cfg.target for p in points)
        world = report.Curve(
            "the world's agent",
            points,
            censored=cfg.target is not None and not reached,
            wall_seconds=sum(s.seconds for s in self.stages if s.round is not None),
            settings=f"{cfg.pretrain.model.family} {cfg.pretrain.model.size}, {cfg.agent.algo}",
        )
        reused = self.steps - totals.purposes["collect"].steps
        note = f"{reused} real steps were collected and paid for by an earlier run: their datasets"
        notes = [f"{note} were found"] if reused > 0 else []
        contents = report.ReportInput(
            title=f"From reality to a better agent: {cfg.reality.env}",
            environment=cfg.reality.env,
            target=cfg.target,
            agent=[world],
            model_free=curves,
            purposes=report.purpose_rows(totals),
            currency=cfg.reality.price.currency,
            budget=cfg.reality.budget.steps,
            remaining=totals.remaining,
            money_budget=cfg.reality.budget.money,
            money_remaining=totals.remaining_money,
            imagined=self.imagined,
            losses=_by_round(judged, "losses"),
            open_loop=_by_round(judged, "open_loop"),
            checks=_by_round(judged, "checks"),
            trajectories=judged[-1]["trajectories"],
            stages=self.stages,
            wall_seconds=sum(s.seconds for s in self.stages),
            lineage=self.lineage,
            notes=notes,
            suite=judged[-1]["suite"],
        )

        plan = replace(self.plan, inputs=self.inputs)
        ledger = totals.to_json()
        return self.job.commit(
            plan, self.run, lambda folder: report.write(contents, folder), ledger=ledger
        )


def _point(point: dict[str, Any]) -> report.Point:
    """A point of a baseline's curve: judged, or the mean of its training episodes."""
    if "returns" in point:
        return report.Point.of(point["steps"], point["returns"], wall_seconds=point["seconds"])
    return report.Point(point["steps"], point["return"], wall_seconds=point["seconds"])


def _by_round(judged: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [{**row, "round": i} for i, summary in enumerate(judged, 1) for row in summary[key]]


JOB = LoopJob()
