"""The plan job: a law and a budget into a model size, an amount of data, how much of it is to come
from reality, and the config that pretrains the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesocosm import config
from mesocosm.cluster import spec as cluster_spec
from mesocosm.config import identity
from mesocosm.data.loading.normalize import mean_duration
from mesocosm.errors import UsageError
from mesocosm.job import Job, Plan
from mesocosm.model import counts
from mesocosm.runs.tracking import Run
from mesocosm.scaling import plan as planning
from mesocosm.scaling import plan_figure
from mesocosm.scaling.law import Law
from mesocosm.scaling.optimum import PlanProblem
from mesocosm.scaling.plan import PlanRequest
from mesocosm.scaling.plan_config import PlanConfig
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train import prepare
from mesocosm.train.config import PretrainConfig
from mesocosm.train.prepare import AnyCodec
from mesocosm.train.schedule import share

PLAN, SUMMARY, PLOT = "plan.yaml", "plan.json", "plan.svg"


@dataclass(frozen=True, kw_only=True)
class BudgetPlan(Plan[PlanConfig]):
    request: PlanRequest


class PlanJob(Job[PlanConfig, BudgetPlan]):
    """Write plan.yaml, plan.json and plan.svg. Raises UsageError where there is no plan."""

    name, kind, config = "plan", "plans", PlanConfig

    def resolve(self, config: PlanConfig, storage: Storage) -> BudgetPlan:
        request = resolve(config, storage)
        facts = identity(request.config, without=("law",))
        law = request.law.model_dump(mode="json")
        laws = [request.source] if request.source.startswith("laws/") else []
        data = request.config.data
        inputs = {"datasets": list(data.datasets), "laws": laws}
        if data.datasets and data.tokenizer is not None:
            inputs["tokenizers"] = [data.tokenizer]
        return BudgetPlan(
            config=config,
            inputs=inputs,
            facts=identity(request.config),
            id=self.hash(facts, law, request.owned),
            request=request,
        )

    def summary(self, plan: BudgetPlan) -> dict[str, Any]:
        return planning.lines(planning.answer(plan.request))

    def make(self, plan: BudgetPlan, run: Run) -> Artifact:
        request = plan.request
        answer = planning.answer(request)

        def fill(folder: Path) -> None:
            (folder / SUMMARY).write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n")
            (folder / PLAN).write_text(pretrain_yaml(request, answer))
            problem = PlanProblem.of(request.law, request.budget)
            (folder / PLOT).write_text(plan_figure.figure(request.law, problem, answer))

        return self.commit(plan, run, fill)

    def report(self, artifact: Artifact, plan: BudgetPlan, run: Run, *, made: bool) -> None:
        answer = json.loads((artifact.path / SUMMARY).read_text())
        names = ("params", "data", "unique", "epochs", "loss", "flops")
        run.log({f"plan/{name}": float(answer["plan"][name]) for name in names}, step=0)
        for name in (PLAN, SUMMARY, PLOT):
            run.artifact(artifact.path / name)
        for key, value in planning.lines(answer).items():
            run.say(f"  {key:<15} {value}")
        run.say(f"  plot            {artifact.path / PLOT}")
        if answer["collect"]:
            count = f"{answer['collect']:,} more real transitions"
            run.say(f"first collect {count}, and add their dataset to data.datasets; then")
        run.say(f"mesocosm pretrain -c {artifact.path / PLAN}")


def resolve(config: PlanConfig, storage: Storage) -> PlanRequest:
    """Read the law, open the datasets, and fill the config from the law's sweep.

    Raises:
        UsageError: a wrong value, law, dataset or cluster.
    """
    config.validate()
    law, source, swept, datasets = _read_law(config.law, storage)
    tokenizer = law.provenance.tokenizer
    config, warmup = config.as_swept(swept, datasets, tokenizer)
    count, batch, transitions, duration = None, 0.0, 0, None
    if config.data.datasets:
        data = prepare.open_data(storage, config.data, config.model)
        config = replace(config, data=data.config)
    config.check_tokenizer(swept, tokenizer)
    if config.data.datasets:
        dataset = prepare.narrowed(data.dataset, config.data.unique, config.seed)
        codec, windows = prepare.fit_codec(dataset, config.model), config.train.batch
        shape = config.model, windows, config.seed
        loader = prepare.make_loader(dataset, codec, "train", *shape)
        transitions = loader.transitions_per_epoch
        batch = windows * transitions / loader.windows_per_epoch
        if config.price.per_second is not None:
            duration = mean_duration(dataset)
        count = _counter(config, codec, batch)
    owned = transitions if config.owned is None else config.owned
    cluster = None if config.cluster is None else cluster_spec.read(config.cluster)
    return PlanRequest(
        config=config,
        law=law,
        source=source,
        budget=config.budget(cluster, owned, duration),
        currency=config.price.currency if cluster is None else cluster.currency,
        owned=owned,
        count=count,
        notes=config.model_notes(swept),
        batch=batch,
        sweep_warmup=warmup,
    )


def _counter(config: PlanConfig, codec: AnyCodec, batch: float) -> planning.Counter:
    """Count the parameters of a size, and its FLOPs for a transition, in the datasets' spaces."""

    def count(size: str) -> tuple[int, float]:
        model = replace(config.model, size=size)
        flops = prepare.step_flops(codec.spec, model, config.train)
        return counts.params(codec.spec, model).n, flops / batch

    return count


def _read_law(name: str, storage: Storage) -> tuple[Law, str, dict[str, Any], list[str]]:
    """(the law, its path or artifact, its sweep's config, its sweep's datasets)."""
    if Path(name).is_file() or name.endswith(".json"):
        law = Law.read(name)
        return law, name, law.provenance.swept or {}, []
    try:
        artifact = storage.artifact("laws", name)
    except UsageError as error:
        message = f"law={name!r} is neither a file nor a sweep's artifact: {error}"
        raise UsageError(message) from error
    if not (artifact.path / "law.json").exists():
        message = f"{artifact.name} holds a table that determined no law"
        command = f"mesocosm fit {artifact.path / 'table.csv'} --out law.json"
        raise UsageError(f"{message}; run {command} for the reason")
    law = Law.read(artifact.path / "law.json")
    return law, artifact.name, artifact.meta["config"], artifact.meta["inputs"]["datasets"]


def pretrain_yaml(request: PlanRequest, answer: dict[str, Any]) -> str:
    """The config of the pretrain job."""
    plan, data, train = answer["plan"], request.config.data, request.config.train
    steps = max(1, round(plan["data"] / request.batch)) if request.batch else None
    if request.sweep_warmup is not None and steps is not None:
        train = replace(train, warmup=share(request.sweep_warmup, steps))
    train = replace(train, steps=steps, epochs=None if steps else plan["epochs"])
    model = replace(request.config.model, size=plan["size"])
    job = PretrainConfig(seed=request.config.seed, data=data, model=model, train=train)
    loss = planning.value_text(plan["loss"], plan["interval"]["loss"])
    head = [
        f"# {plan['size']}: {plan['data']:.4g} transitions, {plan['unique']:.4g} different ones.",
        f"# The law {request.source} predicts {loss} {request.law.unit}.",
    ]
    if answer["collect"]:
        head.append(f"# First collect {answer['collect']} of them: add their dataset to datasets.")
    if not data.datasets:
        head.append("# mesocosm pretrain -c plan.yaml data.datasets=[ID]")
    return "\n".join([*head, config.to_yaml(job, ("seed", "data", "model", "train"))])


JOB = PlanJob()
