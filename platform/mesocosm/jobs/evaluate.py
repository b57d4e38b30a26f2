"""The job `evaluate`: a world, an agent and validation data -> a report on the world's fidelity and
the agent's real return.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from mesocosm import __version__
from mesocosm.config import identity
from mesocosm.data.analysis.evidence import Evidence
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.text_batch import AnyBatchCodec, batch_codec
from mesocosm.data.loading.windows import coded
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import UsageError
from mesocosm.evaluate import gain, imagine, policy_set, suite
from mesocosm.evaluate.config import EvaluateConfig, agents_of, reality_of, sources_of
from mesocosm.evaluate.figures import log_figures, text_figures
from mesocosm.evaluate.judge import JudgeResult, JudgeStore, judging
from mesocosm.evaluate.metrics.fidelity import Fidelity, fidelity
from mesocosm.evaluate.metrics.images import image_fidelity
from mesocosm.evaluate.metrics.log import check_dataset
from mesocosm.evaluate.policy_value import policy_value
from mesocosm.evaluate.report import page, report
from mesocosm.evaluate.report.frames import images_json
from mesocosm.evaluate.text_world import NOT_MEASURED, check_text_config, measure
from mesocosm.evaluate.verdicts import verdicts
from mesocosm.job import Job, Plan
from mesocosm.model.any_world import AnyWorld, load_any
from mesocosm.model.language.world import TextWorld
from mesocosm.model.world import World
from mesocosm.policies.stored import StoredPolicy, candidates_of, load_policy
from mesocosm.runs.tracking import Run, console
from mesocosm.store.artifacts import Artifact, Storage

NOT_IN_ID = [
    "world",
    "agent",
    "datasets",
    "ledger",
    "judge_steps",
    "reality.budget",
    "reality.step_timeout_s",
    "reality.first_timeout_s",
    "reality.memory_gb",
    "reality.known",
]
"""Keys that do not change what is measured; inputs are hashed by their ids."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Plan[EvaluateConfig]):
    """A resolved evaluation. `config.reality` names the environment."""

    artifact: Artifact
    """The world's"""
    world: AnyWorld
    datasets: list[Artifact]
    dataset: Dataset
    codec: AnyBatchCodec
    agent: Artifact | None
    policy: StoredPolicy | None
    suite: suite.Prepared | None
    """None for an evaluation without real steps."""

    @property
    def horizons(self) -> list[Any]:
        return [*self.config.horizons, *(["full"] if self.config.full else [])]


class Evaluate(Job[EvaluateConfig, Evaluation]):
    """Judge a world, and its agent in reality. The artifact holds summary.json and report.html.

    Raises:
        UsageError: Before any real step. The config is invalid, an artifact is missing, or the
            spaces of datasets or agent differ.
    """

    name, kind, config = "evaluate", "evaluations", EvaluateConfig

    def __init__(self, shared: str | None = None):
        """`shared` names the judged episodes of several evaluations of the same reality, which its
        maker removes. By default an evaluation has its own, until it is committed.
        """
        self.shared = shared

    def resolve(self, config: EvaluateConfig, storage: Storage) -> Evaluation:
        config.validate()
        artifact = storage.artifact("worlds", config.world)
        agent = None if config.agent is None else storage.artifact("agents", config.agent)
        names = config.datasets or artifact.meta["inputs"]["datasets"]
        datasets = [storage.artifact("datasets", name) for name in names]
        world, dataset = load_any(artifact.path), Dataset([d.path for d in datasets])
        codec = batch_codec(world.codec)
        if isinstance(world, TextWorld):
            check_text_config(config)
        check_dataset(dataset, codec)
        if isinstance(codec, Codec):
            dataset = coded(dataset, codec)
        prepared, agents = None, list[str]()
        identities: list[Any] = []
        if agent is not None or config.compares:
            config = replace(config, reality=reality_of(config.reality, codec.environment))
            prepared = suite.prepare(config, storage, artifact, codec, agent)
            config = prepared.cfg
            agents = [*([] if agent is None else [agent.id]), *agents_of(config.policies)]
            identities = [prepared.facts.version, *sources_of(config.policies)]
            refs = [policy.policy for policy in config.policies]
            refs.append(None if agent is None else agent.name)
            identities += candidates_of(storage, refs)
            if prepared.horizon.inferred:
                identities.append({"horizon": prepared.limit})
        inputs = {"worlds": [artifact.id], "agents": agents, "datasets": [d.id for d in datasets]}
        return Evaluation(
            config=config,
            inputs=inputs,
            facts=identity(config),
            id=self.hash(identity(config, without=NOT_IN_ID), inputs, identities),
            artifact=artifact,
            world=world,
            datasets=datasets,
            dataset=dataset,
            codec=codec,
            agent=agent,
            policy=None if agent is None else load_policy(agent.path),
            suite=prepared,
        )

    def summary(self, plan: Evaluation) -> dict[str, Any]:
        facts: dict[str, Any] = {"world": plan.artifact.name, "horizons": plan.horizons}
        prepared = plan.suite
        if prepared is None:
            return facts | {"real steps": 0}
        return {
            **facts,
            "agent": None if plan.agent is None else plan.agent.name,
            "policies compared": f"at most {prepared.most_policies}",
            "horizon": f"{prepared.limit} steps: {prepared.horizon.source}",
            **judging(plan.config.reality, prepared.most_episodes, prepared.limit),
        }

    def make(self, plan: Evaluation, run: Run) -> Artifact:
        if isinstance(plan.world, TextWorld):
            return _evaluate_text(self, plan, plan.world, run)
        return _evaluate(self, plan, plan.world, run)

    def report(self, artifact: Artifact, plan: Evaluation, run: Run, *, made: bool) -> None:
        page = artifact.path / report.PAGE
        if made:
            run.artifact(page)
            run.artifact(artifact.path / report.SUMMARY)
            run.say(f"{artifact.name}: {page}")
        else:
            run.say(f"found {artifact.name}: nothing was evaluated; the report is {page}")


def _evaluate(job: Evaluate, plan: Evaluation, world: World, run: Run) -> Artifact:
    cfg, dataset = plan.config, plan.dataset
    policy, prepared, id = plan.policy, plan.suite, plan.id
    with run.progress("fidelity", None) as update:
        faithful = fidelity(
            world,
            dataset,
            horizons=plan.horizons,
            starts=cfg.starts,
            samples=cfg.samples,
            seed=cfg.seed,
            progress=partial(update, 0),
        )
        frames = image_fidelity(
            world,
            dataset,
            faithful.losses,
            horizons=plan.horizons,
            starts=cfg.starts,
            seed=cfg.seed,
            split=faithful.open_loop.split,
            progress=partial(update, 0),
        )
        update(1, f"{faithful.losses['total']:.3f} nats a transition")
    result, ledger, store = None, None, JudgeStore(run.storage, job.shared or id)
    if prepared is not None:
        ledger = _ledger(cfg, run, id, prepared, store)
        if prepared.horizon.inferred:
            run.say(f"episodes end after {prepared.limit} steps: {prepared.horizon.source}")
        if cfg.adversary:
            from mesocosm.agents import training  # imports RLlib: only where it trains

            prepared = suite.with_adversary(prepared, run, plan.artifact, training.JOB.run)
        if policy is not None:
            result = suite.judge_one(policy_set.AGENT, policy, prepared, ledger, store, run)
    measured = suite.run(cfg, run, world, plan.artifact, dataset, prepared, ledger, store, result)
    if frames is not None:
        measured["images"] = images_json(frames)
    agent = None
    if policy is not None and result is not None and prepared is not None and ledger is not None:
        agent = suite.agent_summary(measured, result, world, policy, prepared, ledger, store, run)
    logs = measured.get("evidence")
    unidentified = None if logs is None else Evidence(**logs).unidentified()
    if unidentified is not None:
        run.say(f"warning: {unidentified}")
    if agent is not None and agent["unexplained"] is not None:
        run.say(f"warning: the agent's return is not explained by the logs: {agent['unexplained']}")
    answers = verdicts(measured, asdict(faithful.open_loop), agent)
    measured |= {
        "verdicts": [asdict(verdict) for verdict in answers],
        "agent": agent,
        "time_to_end": asdict(faithful.time_to_end),
        "loss_intervals": faithful.loss_intervals,
    }
    drops = [drop for artifact in plan.datasets for drop in artifact.meta.get("dropped", [])]
    spent = dataset.transitions + sum(int(drop["steps"]) for drop in drops)
    about = _report(plan, world, faithful, result, ledger, spent)
    about = replace(about, suite=measured, imagined=_imagined(plan, run))
    figures = log_figures(run, faithful, result, measured)

    def fill(folder: Path) -> None:
        report.write(about, folder)

    artifact = job.commit(plan, run, fill, figures=figures)
    if job.shared is None:
        store.remove()
    if ledger is not None:
        run.record(ledger=ledger.totals().to_json())
    if not run.quiet:
        console.print(_table(faithful, result))
    return artifact


def _evaluate_text(job: Evaluate, plan: Evaluation, world: TextWorld, run: Run) -> Artifact:
    """Evaluate a text world, its agent and its policy values."""
    cfg, prepared, policy = plan.config, plan.suite, plan.policy
    with run.progress("fidelity", None) as update:
        texts = measure(world, plan.dataset, cfg, partial(update, 0))
        update(1, f"{texts.bits_per_byte:.4f} bits a byte")
    measured: dict[str, Any] = {"policy_value": None, "agent": None}
    ledger, store = None, JudgeStore(run.storage, job.shared or plan.id)
    if prepared is not None:
        ledger, result = _ledger(cfg, run, plan.id, prepared, store), None
        if policy is not None:
            result = suite.judge_one(policy_set.AGENT, policy, prepared, ledger, store, run)
        if cfg.compares:
            with run.progress("policy value", prepared.most_policies) as update:
                measured["policy_value"] = policy_value(
                    world,
                    prepared.candidates,
                    cfg,
                    ledger,
                    store=store,
                    agent=result,
                    more=lambda judged: None,
                    horizon=prepared.limit,
                    progress=update,
                ).to_json()
        if policy is not None and result is not None:
            values = {k: v for k, v in measured.items() if v is not None}
            about = (prepared, ledger, store, run)
            measured["agent"] = suite.agent_summary(values, result, world, policy, *about)
    figures = texts.figures() | text_figures(measured)
    run.log(figures)
    bill = report.bill_lines(None if ledger is None else ledger.totals(), _imagined(plan, run))
    summary = {
        "schema": 1,
        "title": f"Evaluation of worlds/{plan.inputs['worlds'][0]}",
        "environment": plan.codec.environment["id"],
        "texts": texts.to_json(),
        "predicted": texts.predicted,
        "rows": [*texts.rows(), *bill],
        "not_measured": NOT_MEASURED,
        "lineage": [(kind, f"{kind}/{id}") for kind, ids in plan.inputs.items() for id in ids]
        + [("code", f"mesocosm {__version__}")],
        **measured,
    }

    def fill(folder: Path) -> None:
        (folder / report.SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        (folder / report.PAGE).write_text(page.render_text(summary), encoding="utf-8")

    artifact = job.commit(plan, run, fill, figures=figures)
    if job.shared is None:
        store.remove()
    if ledger is not None:
        run.record(ledger=ledger.totals().to_json())
    if not run.quiet:
        table = Table("figure", "value", box=None, header_style="dim", pad_edge=False)
        for row in [*texts.rows(), *bill]:
            table.add_row(*row)
        table.caption = NOT_MEASURED
        if measured["agent"] is not None and measured["agent"]["gain"] is not None:
            table.add_row("the agent", gain.sentence(measured["agent"]["gain"]))
        console.print(table)
    return artifact


def _imagined(plan: Evaluation, run: Run) -> list[dict[str, Any]]:
    """The use that the agent's training made of its world."""
    agents = [run.storage.artifact("agents", id) for id in plan.inputs.get("agents", [])]
    trained = [agent for agent in agents if "imagined_steps" in agent.meta.get("metrics", {})]
    return [report.imagined_row("train-agent", agent.meta["metrics"]) for agent in trained]


def _ledger(
    cfg: EvaluateConfig, run: Run, id: str, plan: suite.Prepared, store: JudgeStore
) -> Ledger:
    """The ledger of judging. `judge_steps` bounds all attempts at this evaluation together, or this
    attempt if the config names a ledger.

    Raises:
        UsageError: The remaining steps are too few for the missing episodes.
    """
    ledger = Ledger(run.storage, cfg.ledger or id, cfg.reality.budget, cfg.reality.price)
    stored = store.confirm(ledger)
    if stored:
        run.say(f"continues after {stored} judged episodes that earlier attempts stored")
    if cfg.judge_steps is None:
        return ledger
    spent = ledger.totals().purposes["judge"].steps
    most = max(0, plan.most_episodes - stored) * plan.limit
    if cfg.ledger is None and spent + most > cfg.judge_steps:
        raise UsageError(
            f"judge_steps must be >= {spent + most}, got {cfg.judge_steps}: interrupted attempts at"
            f" this evaluation took {spent} steps, and this one may take {most}; raise it"
        )
    ledger.bounds["judge"] = cfg.judge_steps + (0 if cfg.ledger is None else spent)
    return ledger


def _report(
    plan: Evaluation,
    world: World,
    faithful: Fidelity,
    result: JudgeResult | None,
    ledger: Ledger | None,
    spent: int,
) -> report.ReportInput:
    cfg, policy, inputs = plan.config, plan.policy, plan.inputs
    about = report.ReportInput(
        title=f"Evaluation of worlds/{inputs['worlds'][0]}",
        environment=plan.codec.environment["id"],
        target=cfg.target,
        losses=[{"round": None, "parts": faithful.losses, "intervals": faithful.loss_intervals}],
        open_loop=[{"round": None, "table": asdict(faithful.open_loop)}],
        checks=[{"round": None, **asdict(faithful.one_step)}],
        lineage=[(kind, f"{kind}/{id}") for kind, ids in inputs.items() for id in ids]
        + [("code", f"mesocosm {__version__}")],
    )
    if ledger is None:
        return about
    totals = ledger.totals()
    about = replace(about, purposes=report.purpose_rows(totals), currency=totals.currency)
    if policy is None or result is None:
        return about
    name = f"{policy.algo} in the world"
    return replace(
        about,
        agent=[report.Curve(name, [report.Point.of(spent, result.returns)])],
        trajectories=imagine.side_by_side(
            world, policy, result.episodes, title=name, seed=cfg.seed
        ),
        notes=[f"episode dropped: {reason}" for reason in result.dropped],
    )


def _table(faithful: Fidelity, result: JudgeResult | None) -> Table:
    head = ("steps ahead", "RMSE / persistence's", "90% interval", "single rollout")
    table = Table(*head, box=None, header_style="dim", pad_edge=False)
    for row in faithful.open_loop.rows:
        interval, single = page.span(row.interval, page.ratio), page.ratio(row.single)
        table.add_row(row.horizon, page.ratio(row.ratio), interval, single)
    if result is not None:
        table.caption = (
            f"return in reality {page.number(result.mean)} ({page.span(result.interval)}),"
            f" {len(result.returns)} episodes, {result.steps} real steps"
        )
    return table


JOB = Evaluate()
