"""The job `evaluate`: is the world faithful on validation data, and what does an agent reach in
reality -> a report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from mesocosm import __version__
from mesocosm.config import fingerprint, identity
from mesocosm.data.analysis.evidence import Evidence
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import UsageError
from mesocosm.evaluate import imagine, policy_set, suite
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.evaluate.judge import JudgeResult, judge, judging
from mesocosm.evaluate.judge_store import JudgeStore
from mesocosm.evaluate.metrics.fidelity import Fidelity, fidelity
from mesocosm.evaluate.metrics.log import check_dataset, codec_of
from mesocosm.evaluate.report import page, report
from mesocosm.evaluate.report.verdicts import verdicts
from mesocosm.model.world import World
from mesocosm.policies.policy import Policy
from mesocosm.runs.tracking import Run, console
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.versions import VERSIONS

TRUSTED = ("", "mesocosm.envs.builtin")
"""Modules whose environments are made because a world says that it is of them: "" is Gymnasium's
registry.
"""


def plan(cfg: EvaluateConfig) -> dict[str, Any]:
    """What `run` would evaluate and judge. Takes no real step and writes nothing."""
    cfg.validate()
    storage = Storage(cfg.storage.root)
    world = storage.artifact("worlds", cfg.world)
    codec = Codec.from_json(json.loads((world.path / "codec.json").read_text()))
    for name in cfg.datasets:
        check_dataset(Dataset([storage.artifact("datasets", name).path]), codec)
    horizons = [*cfg.horizons, *(["full"] if cfg.full else [])]
    facts: dict[str, Any] = {"world": world.name, "horizons": horizons}
    if cfg.agent is None and not cfg.compares:
        return facts | {"real steps": 0}
    cfg = replace(cfg, reality=reality_of(cfg.reality, codec))
    agent = None if cfg.agent is None else storage.artifact("agents", cfg.agent)
    found = suite.prepare(cfg, storage, world, codec, agent)
    facts |= {
        "agent": None if agent is None else agent.name,
        "policies compared": f"at most {found.most_policies}",
    }
    facts["horizon"] = f"{found.limit} steps: {found.horizon.source}"
    return facts | judging(cfg.reality, found.most_episodes, found.limit)


def run(cfg: EvaluateConfig, run: Run) -> Artifact:
    """Evaluate, or find the evaluation that was made so before. The artifact holds summary.json and
    report.html.

    Raises UsageError before any real step: a wrong config, a missing artifact, datasets or an agent
    of other spaces.
    """
    cfg.validate()
    storage = run.storage
    made = storage.artifact("worlds", cfg.world)
    trained = storage.artifact("agents", cfg.agent) if cfg.agent is not None else None
    datasets = [
        storage.artifact("datasets", ref) for ref in cfg.datasets or made.meta["inputs"]["datasets"]
    ]
    world, dataset = World.load(made.path), Dataset([artifact.path for artifact in datasets])
    codec = codec_of(world)
    check_dataset(dataset, codec)
    policy, plan = None, None
    if trained is not None or cfg.compares:
        cfg = replace(cfg, reality=reality_of(cfg.reality, codec))
        policy = None if trained is None else Policy.load(trained.path)
        plan = suite.prepare(cfg, storage, made, codec, trained)
        cfg = plan.cfg
    agents = [] if plan is None else [*([] if trained is None else [trained.id]), *plan.agents]
    inputs = {
        "worlds": [made.id],
        "agents": agents,
        "datasets": [artifact.id for artifact in datasets],
    }
    what = identity(
        cfg,
        without=[
            "world",
            "agent",
            "datasets",
            "ledger",
            "judge_steps",
            "reality.budget",
            "reality.step_timeout_s",
        ],
    )
    known: list[Any] = [] if plan is None else [plan.facts.version, *plan.sources]
    if plan is not None and plan.horizon.inferred:
        known.append({"horizon": plan.limit})
    id = fingerprint("evaluations", what, inputs, known, VERSIONS["evaluate"], SCHEMA)
    with run.making("evaluations", id, cfg) as artifact:
        if artifact is None:
            question = _Question(
                cfg, id, inputs, made, datasets, world, dataset, codec, policy, plan
            )
            return _evaluate(question, run)
        page = artifact.path / report.PAGE
        run.say(f"found {artifact.name}: nothing was evaluated; the report is {page}")
        run.record(artifact=artifact.name, inputs=inputs)
        return artifact


@dataclass(frozen=True)
class _Question:
    """What is to be evaluated."""

    cfg: EvaluateConfig
    id: str
    inputs: dict[str, list[str]]
    made: Artifact
    datasets: list[Artifact]
    world: World
    dataset: Dataset
    codec: Codec
    policy: Policy | None
    plan: suite.Prepared | None


def _evaluate(question: _Question, run: Run) -> Artifact:
    cfg, id, inputs, storage = question.cfg, question.id, question.inputs, run.storage
    made, datasets, world, dataset = (
        question.made,
        question.datasets,
        question.world,
        question.dataset,
    )
    codec, policy, plan = question.codec, question.policy, question.plan
    with run.progress("fidelity", None) as update:

        def report_fidelity(text: str) -> None:
            update(0, text)

        faithful = fidelity(
            world,
            dataset,
            horizons=[*cfg.horizons, *(["full"] if cfg.full else [])],
            starts=cfg.starts,
            samples=cfg.samples,
            seed=cfg.seed,
            progress=report_fidelity,
        )
        update(1, f"{faithful.losses['total']:.3f} nats a transition")
    result, ledger, store = None, None, JudgeStore(storage, id)
    if plan is not None:
        ledger = _ledger(cfg, run, id, plan, store)
        if plan.horizon.inferred:
            run.say(f"episodes end after {plan.limit} steps: {plan.horizon.source}")
        if cfg.adversary:
            plan = suite.with_adversary(plan, run, made)
        if policy is not None:
            with run.progress("judge", cfg.episodes) as update:
                result = judge(
                    policy,
                    cfg.reality,
                    ledger,
                    episodes=cfg.episodes,
                    seed=cfg.seed,
                    max_episode_steps=plan.limit,
                    progress=update,
                    segments=store.segments(
                        policy_set.AGENT, policy, seed=cfg.seed, limit=plan.limit
                    ),
                )
    measured = suite.run(cfg, run, world, made, dataset, plan, ledger, store, result)
    agent = None
    if policy is not None and result is not None and plan is not None:
        agent = suite.agent_told(measured, result, world, policy, cfg, plan.limit, run)
    told = [
        verdict.to_json() for verdict in verdicts(measured, faithful.open_loop.to_json(), agent)
    ]
    _warn(run, measured, agent)
    measured |= {
        "verdicts": told,
        "agent": agent,
        "time_to_end": faithful.time_to_end.to_json(),
        "loss_intervals": faithful.loss_intervals,
    }
    spent = dataset.transitions + sum(
        int(drop["steps"]) for artifact in datasets for drop in artifact.meta.get("dropped", [])
    )
    about = replace(
        _report(cfg, codec, world, faithful, policy, result, ledger, spent, inputs), suite=measured
    )
    figures = _log(run, faithful, result, measured)
    meta = {
        "inputs": inputs,
        "config": identity(cfg),
        "job": "evaluate",
        "run": run.id,
        "figures": figures,
    }
    artifact = storage.make(
        "evaluations",
        id,
        meta,
        lambda folder: _ignore(report.write(about, folder)),
        force=cfg.force,
    )
    store.remove()
    run.artifact(artifact.path / report.PAGE)
    run.artifact(artifact.path / report.SUMMARY)
    run.record(
        artifact=artifact.name,
        inputs=inputs,
        **({} if ledger is None else {"ledger": ledger.totals().to_json()}),
    )
    if not run.quiet:
        console.print(_table(faithful, result))
    run.say(f"{artifact.name}: {artifact.path / report.PAGE}")
    return artifact


def reality_of(reality: RealityConfig, codec: Codec) -> RealityConfig:
    """`reality` as given, or where it names no environment the one that the world is of, at the
    given price and budget.

    Raises UsageError where that is a program: a world may be a stranger's, and runs nothing that
    its user did not name.
    """
    if reality.env:
        return reality
    own = codec.environment
    module, _, _ = own["id"].rpartition(":")
    if module not in TRUSTED:
        raise UsageError(
            f"the world is of {own['id']!r}, which is a program; where you trust it, set"
            f" reality.env={own['id']} and reality.kwargs={own['kwargs']}"
        )
    return replace(
        reality,
        env=own["id"],
        kwargs=own["kwargs"],
        task=own["task"],
        horizon=own["max_episode_steps"],
        success=own["success"],
    )


def _ledger(
    cfg: EvaluateConfig, run: Run, id: str, plan: suite.Prepared, store: JudgeStore
) -> Ledger:
    """Bounded by `judge_steps`: a ledger of this evaluation's own for all attempts at it together,
    one that is given for this attempt.

    Raises UsageError where too little is left of it for the episodes that are not stored yet.
    """
    ledger = Ledger(run.storage, cfg.ledger or id, cfg.reality.budget, cfg.reality.price)
    stored = store.confirm(ledger)
    if stored:
        run.say(
            f"goes on after {stored} judged episodes of an interrupted attempt; they are in storage"
        )
    if cfg.judge_steps is None:
        return ledger
    spent, most = (
        ledger.totals().purposes["judge"].steps,
        max(0, plan.most_episodes - stored) * plan.limit,
    )
    if cfg.ledger is None and spent + most > cfg.judge_steps:
        raise UsageError(
            f"judge_steps={cfg.judge_steps}: an attempt at this evaluation that was broken off"
            f" spent {spent}, and this one may take {most}; raise it to {spent + most}"
        )
    bound = cfg.judge_steps if cfg.ledger is None else spent + cfg.judge_steps
    ledger.bounds["judge"] = bound
    return ledger


def _report(
    cfg: EvaluateConfig,
    codec: Codec,
    world: World,
    faithful: Fidelity,
    policy: Policy | None,
    result: JudgeResult | None,
    ledger: Ledger | None,
    spent: int,
    inputs: dict[str, list[str]],
) -> report.ReportInput:
    found = faithful.to_json()
    parts = {name: value for name, value in faithful.losses.items() if name != "total"} | {
        "total": faithful.losses["total"]
    }
    about = report.ReportInput(
        title=f"Evaluation of worlds/{inputs['worlds'][0]}",
        environment=codec.environment["id"],
        target=cfg.target,
        losses=[{"round": None, "parts": parts, "intervals": faithful.loss_intervals}],
        open_loop=[{"round": None, "table": found["open_loop"]}],
        checks=[{"round": None, **found["one_step"]}],
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
        trajectories=[
            imagine.side_by_side(world, policy, result.episodes, title=name, seed=cfg.seed)
        ],
        notes=[f"episode dropped: {reason}" for reason in result.dropped],
    )


def _warn(run: Run, measured: dict[str, Any], agent: dict[str, Any] | None) -> None:
    """Say what the logs cannot show, or cannot explain."""
    shown = measured.get("evidence")
    unidentified = None if shown is None else Evidence(**shown).unidentified()
    if unidentified is not None:
        run.say(f"warning: {unidentified}")
    if agent is not None and agent["unexplained"] is not None:
        run.say(f"warning: the agent's return is not explained by the logs: {agent['unexplained']}")


def _log(
    run: Run, faithful: Fidelity, result: JudgeResult | None, measured: dict[str, Any]
) -> dict[str, float]:
    """The evaluation's figures, logged and returned; undefined ones are left out."""
    found: dict[str, float | None] = {
        f"valid/{name}": value for name, value in faithful.losses.items()
    }
    found |= {f"open_loop/{row.horizon}": row.ratio for row in faithful.open_loop.rows}
    one = faithful.one_step
    found |= {f"coverage/{row.horizon}": row.coverage for row in faithful.open_loop.rows}
    found |= {
        "termination/precision": one.precision,
        "termination/recall": one.recall,
        "termination/auc": one.auc,
    }
    found |= {
        f"termination/{name}": getattr(faithful.time_to_end, key)
        for name, key in (("late", "bias"), ("off", "error"), ("missed", "missed"))
    }
    found |= {"reward/accuracy": one.reward_accuracy, "reward/r2": one.reward_r2}
    found |= {
        "starts/auc": measured["starts"]["auc"],
        "starts/validity": measured["starts"]["validity"],
        "starts/coverage": measured["starts"]["coverage"],
    }
    if "policy_value" in measured:
        ranked = measured["policy_value"]["ranking"]
        found |= {
            f"policy_value/{name}": ranked[name]
            for name in (
                "policies",
                "pearson",
                "spearman",
                "spearman_top",
                "mmrv",
                "regret",
                "error",
                "bias",
            )
        }
        found |= {
            "policy_value/real_steps": measured["policy_value"]["real_steps"],
            "off_policy/auroc": measured["off_policy"]["auroc"],
        }
    if measured["agent"] is not None:
        found["return/imagined"] = measured["agent"]["world"]
        if measured["agent"]["success"] is not None:
            found |= {
                "success/real": measured["agent"]["success"]["real"],
                "success/world": measured["agent"]["success"]["world"],
            }
    if result is not None:
        found |= {"return/mean": result.mean, "real_steps/judge": float(result.steps)}
        if result.interval is not None:
            found |= {"return/low": result.interval[0], "return/high": result.interval[1]}
    figures = {name: value for name, value in found.items() if value is not None}
    run.log(figures)
    return figures


def _table(faithful: Fidelity, result: JudgeResult | None) -> Table:
    table = Table(
        "steps ahead",
        "RMSE / persistence's",
        "90% interval",
        "single rollout",
        box=None,
        header_style="dim",
        pad_edge=False,
    )
    for row in faithful.open_loop.rows:
        table.add_row(
            row.horizon,
            page.ratio(row.ratio),
            page.span(row.interval, page.ratio),
            page.ratio(row.single),
        )
    if result is not None:
        table.caption = (
            f"return in reality {page.number(result.mean)} ({page.span(result.interval)}),"
            f" {len(result.returns)} episodes, {result.steps} real steps"
        )
    return table


def _ignore(value: Any) -> None:
    return None
