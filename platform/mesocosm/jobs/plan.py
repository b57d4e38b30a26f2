"""The plan job: a law and a budget -> how large a model, how much data, how much of it from
reality, and the config that pretrains it.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scipy.special import expit, logit

from mesocosm import config
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import fingerprint, identity
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model import counts
from mesocosm.model.config import ModelConfig
from mesocosm.model.ladder import RUNGS, dims, ensemble_dims
from mesocosm.runs import tracking
from mesocosm.scaling import plan_figure
from mesocosm.scaling.law import Law, interval_text
from mesocosm.scaling.optimum import (
    Budget,
    Point,
    Problem,
    along,
    at_size,
    beyond,
    counted,
    drawn,
    interval,
    problem_of,
)
from mesocosm.scaling.plan_config import PlanConfig
from mesocosm.scaling.sweep_config import CellTraining
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.train import prepare
from mesocosm.train.config import PretrainConfig
from mesocosm.train.schedule import share
from mesocosm.versions import VERSIONS

__all__ = ["PlanConfig", "plan", "run"]

PLAN, SUMMARY, PLOT = "plan.yaml", "plan.json", "plan.svg"
FAR = 10.0
"""A plan this many times beyond what was swept is said to be a guess."""
NEAR = 10.0
"""Rungs within such a factor of the best N are compared."""
MOST = max(dims(size).params for size in RUNGS)
"""Parameters of the ladder's end: where compute costs next to nothing beside reality, money would
buy models that no one can make.
"""
LADDER = 0.01
"""So much more loss than the best size's is worth a warning."""
STEP = 1e-3
"""Of what is spent on the lesser of the two: the step of a derivative by money."""
AROUND = (
    -8.0,
    -6.0,
    -5.0,
    -4.0,
    -3.0,
    -2.0,
    -1.5,
    -1.0,
    -0.5,
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    5.0,
    6.0,
    8.0,
)
"""Of the share's logit, about the optimum: what the plot shows."""
TELLING = (
    "baseline_not_beaten",
    "e_touches_zero",
    "approaches_disagree",
    "wide_interval",
    "few_groups",
    "no_held_out",
    "r_d_unmeasured",
    "r_n_unmeasured",
    "flops_not_6nd",
)
"""Codes of the law's own warnings that bear on a plan."""


@dataclass(frozen=True)
class _Question:
    config: PlanConfig
    """`data`, `model` and `train` filled from the law's sweep where they were left out."""
    law: Law
    source: str
    budget: Budget
    currency: str
    owned: int
    spec: Any
    """Of the datasets; None where there are none."""
    batch: float
    """Transitions a batch; 0 where there are no datasets."""
    sweep_warmup: int | None
    """Steps, where the sweep says them."""
    notes: list[dict[str, str]]
    """Warnings of how the plan's models differ from the law's."""


def plan(config: PlanConfig) -> dict[str, Any]:
    """What the budget would buy; nothing is written."""
    return _lines(_answer(_question(config, Storage(config.storage.root))))


def run(config: PlanConfig, run: tracking.Run) -> Artifact:
    """Write plan.yaml, plan.json and plan.svg. Raises UsageError for what cannot be planned."""
    question = _question(config, run.storage)
    id = fingerprint(
        "plans",
        identity(question.config, without=("law",)),
        question.law.model_dump(mode="json"),
        question.owned,
        VERSIONS["plan"],
        SCHEMA,
    )
    found = None if config.force else run.storage.find("plans", id)
    answer = _answer(question) if found is None else json.loads((found.path / SUMMARY).read_text())

    def fill(folder: Path) -> None:
        (folder / SUMMARY).write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n")
        (folder / PLAN).write_text(_yaml(question, answer))
        (folder / PLOT).write_text(
            plan_figure.figure(question.law, problem_of(question.law, question.budget), answer)
        )

    inputs = {
        "datasets": list(question.config.data.datasets),
        "laws": [question.source] if question.source.startswith("laws/") else [],
    }
    meta = {"inputs": inputs, "config": identity(question.config), "job": "plan", "run": run.id}
    artifact = found or run.storage.make("plans", id, meta, fill, force=config.force)
    run.record(artifact=artifact.name, inputs=inputs)
    run.log(
        {
            f"plan/{key}": float(answer["plan"][key])
            for key in ("params", "data", "unique", "epochs", "loss", "flops")
        },
        step=0,
    )
    for name in (PLAN, SUMMARY, PLOT):
        run.artifact(artifact.path / name)
    for key, value in _lines(answer).items():
        run.say(f"  {key:<15} {value}")
    run.say(f"  plot            {artifact.path / PLOT}")
    if answer["collect"]:
        run.say(
            f"first collect {answer['collect']:,} more real transitions, and add their dataset to"
            " data.datasets; then"
        )
    run.say(f"mesocosm pretrain -c {artifact.path / PLAN}")
    return artifact


# -- the question
# -----------------------------------------------------------------------------------------------------


def _question(config: PlanConfig, storage: Storage) -> _Question:
    config.validate()
    law, source, meta = _law(config.law, storage)
    warmup = None
    if meta is not None:
        config, warmup = _as_swept(config, meta)
    notes = _not_as_swept(config, meta)
    spec, batch, have = None, 0.0, 0
    if config.data.datasets:
        try:
            dataset = prepare.open_datasets(storage, config.data.datasets)
        except ArtifactError as error:
            raise UsageError(str(error)) from error
        dataset = prepare.narrowed(dataset, config.data.unique, config.seed)
        codec = prepare.fit_codec(dataset)
        loader = Loader(
            dataset, codec, "train", config.model.context, config.train.batch, config.seed
        )
        spec, have = codec.spec, loader.transitions_per_epoch
        batch = config.train.batch * loader.transitions_per_epoch / loader.windows_per_epoch
    owned = have if config.owned is None else config.owned
    cluster = None if config.cluster is None else cluster_spec.read(config.cluster)
    currency = config.price.currency if cluster is None else cluster.currency
    return _Question(
        config,
        law,
        source,
        _budget(config, cluster, owned),
        currency,
        owned,
        spec,
        batch,
        warmup,
        notes,
    )


def _law(name: str, storage: Storage) -> tuple[Law, str, dict[str, Any] | None]:
    """(the law, its path or artifact, the artifact's meta)."""
    if Path(name).is_file() or name.endswith(".json"):
        law = Law.read(name)
        return law, name, law.provenance.swept and {"config": law.provenance.swept}
    try:
        artifact = storage.artifact("laws", name)
    except UsageError as error:
        raise UsageError(
            f"law={name!r} is neither a file nor a sweep's artifact: {error}"
        ) from error
    if not (artifact.path / "law.json").exists():
        raise UsageError(
            f"{artifact.name} holds a table but no law, which its cells could not say; mesocosm fit"
            f" {artifact.path / 'table.csv'} --out law.json says why"
        )
    return Law.read(artifact.path / "law.json"), artifact.name, artifact.meta


def _as_swept(config: PlanConfig, meta: dict[str, Any]) -> tuple[PlanConfig, int | None]:
    """The config with the sweep's data, model and training where it says none of its own, and the
    sweep's warm-up in steps.
    """
    default, said = PlanConfig(), meta.get("config", {})
    warmup = None
    if config.data.datasets == default.data.datasets and "inputs" in meta:
        config = replace(
            config, data=replace(config.data, datasets=list(meta["inputs"]["datasets"]))
        )
    if config.model == default.model and "model" in said:
        config = replace(config, model=ModelConfig(**said["model"]))
    if config.train == default.train and "train" in said:
        cell = CellTraining(**said["train"])
        warmup = cell.warmup
        shared = {
            name: value for name, value in vars(cell).items() if name not in ("warmup", "decay")
        }
        config = replace(
            config, train=replace(default.train, **shared, warmup=0.0, decay=cell.decay)
        )
    return config, warmup


def _not_as_swept(config: PlanConfig, meta: dict[str, Any] | None) -> list[dict[str, str]]:
    """Warnings of a law that speaks of other models than those that would be trained, or does not
    say of which it speaks.
    """
    if meta is None or "model" not in meta.get("config", {}):
        said = (
            f"model.family={config.model.family}, members={config.model.members},"
            f" base={str(config.model.base).lower()}, context={config.model.context}"
        )
        sentence = (
            f"Nothing says what models the law is of: the plan is for {said},"
            f" train.batch={config.train.batch}; give them as they were swept."
        )
        return [{"code": "unknown_models", "sentence": sentence}]
    told = {"model": meta["config"]["model"], "train": meta["config"].get("train", {})}
    skip = ("size", "warmup", "decay", "precision", "validate_windows")
    apart = [
        f"{block}.{key}={getattr(getattr(config, block), key)} (swept: {value})"
        for block, values in told.items()
        for key, value in values.items()
        if key not in skip
        and hasattr(getattr(config, block), key)
        and getattr(getattr(config, block), key) != value
    ]
    if not apart:
        return []
    return [
        {
            "code": "other_models",
            "sentence": (
                f"The law is of other models than the plan's: {', '.join(apart)}; it says nothing"
                " of these."
            ),
        }
    ]


def _budget(config: PlanConfig, cluster: ClusterConfig | None, owned: int) -> Budget:
    if config.flops is not None:
        return Budget(config.flops, 1.0, None, owned, unlimited=owned == 0)
    assert config.money is not None
    if config.price.per_exaflop is not None:
        flop = config.price.per_exaflop / 1e18
    else:
        assert cluster is not None
        flop = cluster.price_per_hour / 3600 / (cluster.nodes[0].flops_per_s * cluster.slots)
        if not flop > 0:
            where = f"clusters/{config.cluster}.yaml"
            raise UsageError(
                f"cluster={config.cluster!r} states no price an hour; set price_per_hour of its"
                f" nodes in {where}, or give price.per_exaflop"
            )
    if config.price.per_step is None and not owned:
        raise UsageError(
            "money buys no real step without price.per_step, and no transition is owned; give"
            " price.per_step=..., data.datasets=[...] or owned=..."
        )
    return Budget(config.money, flop, config.price.per_step, owned, most=MOST)


# -- the answer
# -------------------------------------------------------------------------------------------------------


def _answer(q: _Question) -> dict[str, Any]:
    """Everything that plan.json says; None where a figure is undefined."""
    law, budget = q.law, q.budget
    problem = problem_of(law, budget)
    best = problem.best()
    resampled = drawn(law, budget)
    spread = [other.best() for other in resampled]
    size, chosen = _rung(q, problem, best)
    again = [
        at_size(counted(other, chosen.params, chosen.flops / chosen.data), chosen.params)
        for other in resampled
    ]
    warnings = [*q.notes, *(note.model_dump() for note in law.warnings if note.code in TELLING)]
    far = beyond(law, chosen)
    if any(max(x, 1 / x) > FAR for x in far.values()):
        listed = ", ".join(f"{name} {_times(x)}" for name, x in far.items())
        warnings.append(
            {
                "code": "far",
                "sentence": (
                    f"The plan lies far beyond what was fitted ({listed}): take it for a guess, and"
                    " sweep nearer to it first."
                ),
            }
        )
    elif far:
        listed = ", ".join(f"{name} {_times(x)}" for name, x in far.items())
        warnings.append(
            {"code": "beyond", "sentence": f"The plan lies beyond what was fitted: {listed}."}
        )
    if best.params > 0.99 * budget.most:
        said = (
            "Larger models than the ladder has would be foretold less: compute costs next to"
            " nothing beside reality here."
        )
        warnings.append({"code": "ladder_end", "sentence": said})
    if budget.step_price is None and not budget.unlimited and best.unique > 0.999 * budget.owned:
        said = (
            f"The {budget.owned:,.0f} transitions that are owned are all used, and the budget is"
            " not: it buys more once more are collected."
        )
        warnings.append({"code": "owned_bind", "sentence": said})
    if law.form == "chinchilla" and not budget.unlimited:
        said = (
            "The law was fitted without repeated data, so that none is planned to be seen twice; a"
            " sweep over grid.unique shows what repeats are worth."
        )
        warnings.append({"code": "one_epoch", "sentence": said})
    if chosen.loss > best.loss * (1 + LADDER):
        said = (
            f"No rung of the ladder comes near: {size} is foretold"
            f" {chosen.loss / best.loss - 1:.1%} more loss than {best.params:.3g} parameters."
        )
        warnings.append({"code": "ladder", "sentence": said})
    paid = budget.step_price is not None
    return {
        "schema": 1,
        "law": q.source,
        "form": law.form,
        "budget": {"flops": q.config.flops, "money": q.config.money, "currency": q.currency},
        "prices": {
            "per_step": budget.step_price,
            "per_exaflop": None if q.config.flops is not None else budget.compute_price * 1e18,
        },
        "owned": q.owned,
        "optimum": _said(best) | {"interval": _spans(spread, law.interval_level)},
        "plan": {
            "size": size,
            **_said(chosen),
            "interval": {"loss": interval([p.loss for p in again], law.interval_level)},
        },
        "flops_counted": q.spec is not None,
        "collect": max(0, round(chosen.unique) - q.owned) if paid or budget.unlimited else 0,
        "next": _next(problem, best, resampled, spread, law.interval_level) if paid else None,
        "shares": (
            [
                {
                    "share": p.share,
                    "loss": p.loss,
                    "params": p.params,
                    "data": p.data,
                    "unique": p.unique,
                }
                for p in along(problem, _shares(best))
            ]
            if paid
            else None
        ),
        "beyond": far,
        "warnings": warnings,
    }


def _rung(q: _Question, problem: Problem, best: Point) -> tuple[str, Point]:
    """The rung of the ladder whose best point has the least loss; its FLOPs are counted where the
    datasets say the spaces.
    """
    found: list[tuple[float, str, Point]] = []
    rungs = {
        size: (ensemble_dims(size) if q.config.model.family == "ensemble" else dims(size)).params
        for size in RUNGS
    }
    nearest = min(rungs, key=lambda size: abs(math.log(rungs[size] / best.params)))
    for size, params in rungs.items():
        if size != nearest and not best.params / NEAR <= params <= best.params * NEAR:
            continue
        at = problem
        if q.spec is not None:
            model = replace(q.config.model, size=size)
            params = counts.params(q.spec, model).n
            each = prepare.step_flops(q.spec, model, q.config.train) / q.batch
            at = counted(problem, params, each)
        try:
            point = at_size(at, params)
        except UsageError:
            continue  # too large for the budget
        found.append((point.loss, size, point))
    if not found:
        raise UsageError(
            f"the budget of {q.budget.money:g} buys not one transition at any rung near the best"
            f" size, {best.params:.3g} parameters; raise it"
        )
    _, size, point = min(found)
    return size, point


def _next(
    problem: Problem, best: Point, resampled: list[Problem], spread: list[Point], level: float
) -> dict[str, Any]:
    """What the next unit of money takes off the loss, spent on compute or on real steps, in nats a
    unit, at the optimum and to either side: the two agree at an optimum that spends on both.
    `reality_first`: the share of the law's resamples in which reality is worth more there.
    """
    places = [("at the optimum", best.share)]
    if best.reality > 0:
        places = [
            ("half the reality", best.share / 2),
            *places,
            ("half the compute", 1 - (1 - best.share) / 2),
        ]
    rows = []
    for name, part in places:
        with suppress(UsageError):
            at = best if part == best.share else problem.best(part)
            rows.append({"at": name, "share": at.share, "loss": at.loss, **_rates(problem, at)})
    rates = [_rates(other, other.point(best.params, best.share)) for other in resampled]
    return {
        "rows": rows,
        "reality_first": (
            sum(rate["reality"] > rate["compute"] for rate in rates) / len(rates) if rates else None
        ),
        "share_interval": interval([point.share for point in spread], level),
    }


def _shares(best: Point) -> list[float]:
    """Shares of the money about the best one, closer to it and to both ends."""
    centre = float(logit(best.share)) if 0 < best.share < 1 else -6.0
    return [float(expit(centre + step)) for step in AROUND]


def _rates(problem: Problem, at: Point) -> dict[str, float]:
    """Nats that a unit of money takes off, as compute and as reality, at `at`."""
    little = STEP * min(spent for spent in (at.compute, at.reality) if spent > 0)
    return {
        "compute": (at.loss - problem.more(at, compute=little)) / little,
        "reality": (at.loss - problem.more(at, reality=little)) / little,
    }


def _said(point: Point) -> dict[str, float]:
    return asdict(point) | {"epochs": point.epochs}


def _spans(points: list[Point], level: float) -> dict[str, tuple[float, float]]:
    return {
        name: interval([getattr(p, name) for p in points], level)
        for name in ("params", "data", "unique", "loss", "share")
    }


def _times(x: float) -> str:
    return f"{x:.3g} times the largest" if x > 1 else f"{1 / x:.3g} times below the least"


# -- what is shown and written
# ------------------------------------------------------------------------------------------


def _lines(answer: dict[str, Any]) -> dict[str, Any]:
    best, made, spans, coin = (
        answer["optimum"],
        answer["plan"],
        answer["optimum"]["interval"],
        answer["budget"]["currency"],
    )
    lines = {
        "law": f"{answer['law']} ({answer['form']})",
        "optimum": (
            f"N {_within(best['params'], spans['params'])}, D"
            f" {_within(best['data'], spans['data'])}, U {_within(best['unique'], spans['unique'])}"
            f" ({best['epochs']:.3g} epochs), loss {_within(best['loss'], spans['loss'])}"
        ),
        "plan": (
            f"{made['size']}: N {made['params']:.4g}, D {made['data']:.4g}, U {made['unique']:.4g}"
            f" ({made['epochs']:.3g} epochs), loss"
            f" {_within(made['loss'], made['interval']['loss'])}, {made['flops']:.3g}"
            f" FLOPs{' counted' if answer['flops_counted'] else ''}"
        ),
    }
    if answer["next"] is not None:
        more = f"{answer['collect']:,} real transitions more than the {answer['owned']:,} owned"
        lines["spend"] = (
            f"{made['compute']:.4g} {coin} on compute, {made['reality']:.4g} {coin} on {more}"
        )
        for row in answer["next"]["rows"]:
            lines[row["at"]] = (
                f"loss {row['loss']:.4g}; the next {coin} takes off {row['compute']:.3g} nats as"
                f" compute, {row['reality']:.3g} as reality"
            )
    return lines | {
        f"warning {i}": warning["sentence"] for i, warning in enumerate(answer["warnings"], 1)
    }


def _within(value: float, pair: tuple[float, float]) -> str:
    return f"{value:.4g} ({interval_text(pair)})"


def _yaml(q: _Question, answer: dict[str, Any]) -> str:
    """The pretrain job's config."""
    made = answer["plan"]
    train = q.config.train
    steps = max(1, round(made["data"] / q.batch)) if q.batch else None
    if q.sweep_warmup is not None and steps is not None:
        train = replace(train, warmup=share(q.sweep_warmup, steps))
    train = replace(train, steps=steps, epochs=None if steps else made["epochs"])
    job = PretrainConfig(
        seed=q.config.seed,
        data=q.config.data,
        model=replace(q.config.model, size=made["size"]),
        train=train,
    )
    said = config.to_yaml(job, ("seed", "data", "model", "train"))
    head = [
        f"# {made['size']}: {made['data']:.4g} transitions, {made['unique']:.4g} different ones.",
        f"# The law {q.source} foretells {_within(made['loss'], made['interval']['loss'])} nats.",
    ]
    if answer["collect"]:
        head.append(
            f"# {answer['collect']} of them are still to be collected: add their dataset to"
            " data.datasets."
        )
    if not q.config.data.datasets:
        head.append("# mesocosm pretrain -c plan.yaml data.datasets=[<id that collect printed>]")
    return "\n".join(head) + "\n" + said
