"""From a law and a budget to a config: the optimum against closed forms, first-order conditions and
a global search; what is written can be run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import differential_evolution

from mesocosm import config
from mesocosm.cli.main import main
from mesocosm.errors import UsageError
from mesocosm.jobs import plan
from mesocosm.jobs import pretrain as pretraining
from mesocosm.scaling.law import Bootstrap, Flops, Law, Optimal, Provenance, optimal_of, theta_of
from mesocosm.scaling.optimum import PlanBudget, PlanProblem, beyond
from mesocosm.scaling.plan import answer, rates
from mesocosm.scaling.plan_config import LARGEST, PlanConfig
from mesocosm.store.artifacts import Storage
from mesocosm.train.config import PretrainConfig

CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
REPEATS = {"E": 1.0, "A": 300.0, "B": 800.0, "alpha": 0.35, "beta": 0.35, "r_n": 5.0, "r_d": 15.0}


def law_of(params: dict[str, float], flops: Flops | None = None, spread: float = 0.01) -> Law:
    """A law whose resamples scatter about known truth."""
    form = "data_constrained" if "r_d" in params else "chinchilla"
    rng = np.random.default_rng(0)
    draws = {
        name: [float(x) for x in value * np.exp(rng.normal(size=40) * spread)]
        for name, value in params.items()
    }
    counted = flops or Flops(source="6ND", k=6.0, p=1.0, q=1.0, max_rel_residual=0.0)
    best = optimal_of(theta_of(form, params), counted)
    return Law(
        form=form,
        params=params,
        interval={name: (0.9 * value, 1.1 * value) for name, value in params.items()},
        optimal=Optimal(**{name: float(value[0]) for name, value in best.items()}),
        flops=counted,
        objective=0.0,
        n_cells=40,
        residual=0.001,
        range={
            "params": (1e4, 1e6),
            "data": (1e4, 1e6),
            "unique": (1e4, 1e5),
            "flops": (6e8, 6e12),
            "loss": (1.0, 50.0),
        },
        correlation={"E,alpha": 0.0, "E,beta": 0.0},
        held_out=None,
        isoflop=None,
        without_E=None,
        dropped=[],
        warnings=[],
        bootstrap=Bootstrap(resamples=40, by="cell", groups=40, seed=0, draws=draws),
        provenance=Provenance(table="known.csv", sha256="", rows=40, command="", version=""),
    )


@pytest.mark.parametrize("flops", [1e15, 1e20, 5.76e23])
def test_with_6nd_and_fresh_data_the_search_finds_the_closed_form(flops: float) -> None:
    law = law_of(CHINCHILLA)
    point = PlanProblem.of(law, PlanBudget(flops, 1.0, None, 0, unlimited=True)).best()
    n, d = law.optimum(flops)
    assert point.params == pytest.approx(float(n), rel=1e-4) and point.data == pytest.approx(
        float(d), rel=1e-4
    )
    assert point.flops == pytest.approx(flops) and point.unique == point.data and point.epochs == 1


@pytest.mark.parametrize("step_price", [1e-3, 1e-2, 1.0])
def test_money_is_split_at_equal_rates(step_price: float) -> None:
    law = law_of(REPEATS, Flops(source="table", k=20.0, p=1.0, q=1.0, max_rel_residual=0.0))
    budget = PlanBudget(500.0, 1e-12, step_price, 10_000)
    problem = PlanProblem.of(law, budget)
    point = problem.best()
    assert point.compute + point.reality == pytest.approx(500, rel=1e-6)
    assert point.unique == pytest.approx(10_000 + point.reality / step_price)
    rate = rates(problem, point)
    assert rate["compute"] == pytest.approx(rate["reality"], rel=0.02), (
        "at an optimum inside, neither is worth more"
    )
    low = rates(problem, problem.best(0.01))
    assert low["reality"] > low["compute"], "too little reality was bought"
    search = differential_evolution(
        lambda x: float(problem.loss(x[:1], x[1:])[0]),
        [(4.0, 25.0), (0.0, 0.999999)],
        seed=0,
        tol=1e-12,
        popsize=30,
    )
    assert point.loss <= search.fun * (1 + 1e-7)


def test_expensive_steps_buy_less_reality() -> None:
    law = law_of(REPEATS, Flops(source="table", k=20.0, p=1.0, q=1.0, max_rel_residual=0.0))
    point = [
        PlanProblem.of(law, PlanBudget(500.0, 1e-9, price, 10_000)).best()
        for price in (1e-3, 1e-2, 1e-1, 1e6)
    ]
    bought = [p.unique for p in point]
    assert bought == sorted(bought, reverse=True) and bought[0] > 2 * bought[1]
    assert bought[-1] == pytest.approx(10_000, rel=1e-3) and [p.loss for p in point] == sorted(
        p.loss for p in point
    )
    assert PlanProblem.of(law, PlanBudget(500.0, 1e-9, None, 10_000)).best().unique == 10_000


def test_a_law_without_repeats_plans_no_repeats() -> None:
    problem = PlanProblem.of(law_of(CHINCHILLA), PlanBudget(100.0, 1e-15, 1e-3, 1_000))
    point = problem.best()
    assert point.data == pytest.approx(
        point.unique
    ) and point.compute + point.reality == pytest.approx(100, rel=1e-5)
    rate = rates(problem, point)
    assert rate["compute"] == pytest.approx(rate["reality"], rel=0.02)

    data = np.geomspace(100, 1e5 + 999, 20_000)  # along D alone: what is left of the money says N
    compute = 100 - np.maximum(0.0, data - 1_000) * 1e-3
    exact = law_of(CHINCHILLA).predict(compute / 1e-15 / 6 / data, data)
    assert point.loss == pytest.approx(float(exact.min()), rel=1e-6)
    n, d = law_of(CHINCHILLA).optimum(point.flops)
    assert point.data < float(d) and point.params > float(n), (
        "where data cost money too, a larger model on less of it"
    )


def test_a_budget_that_buys_nothing_is_refused() -> None:
    problem = PlanProblem.of(law_of(CHINCHILLA), PlanBudget(1.0, 1.0, None, 0, unlimited=True))
    with pytest.raises(UsageError, match="buys less than one transition"):
        problem.point(1e9, 0.0)


def test_beyond_compares_with_the_fitted_range() -> None:
    law = law_of(CHINCHILLA)
    point = PlanProblem.of(law, PlanBudget(6e16, 1.0, None, 0, unlimited=True)).best()
    far = beyond(law, point)
    assert far["params"] == pytest.approx(point.params / 1e6) and far["flops"] == pytest.approx(1e4)
    assert beyond(law, replace(point, params=1e5, data=1e5, unique=1e5, flops=6e10)) == {}


@pytest.fixture
def law_file(tmp_path: Path) -> Callable[..., str]:
    def write(law: Law) -> str:
        law.write(tmp_path / "law.json")
        return str(tmp_path / "law.json")

    return write


def _plan(law: str, root: str, *overrides: str) -> dict[str, Any]:
    cfg = config.load(PlanConfig, overrides=[f"law={law}", f"storage.root={root}", *overrides])
    return answer(plan.resolve(cfg, Storage(root)))


def test_a_plan_is_a_config_for_pretraining(
    law_file: Callable[..., str],
    cart_root: Callable[..., str],
    tmp_path: Path,
    capsys: Any,
    golden: Any,
) -> None:
    root = cart_root(tmp_path)
    law = law_file(
        law_of(REPEATS, Flops(source="table", k=20.0, p=1.0, q=1.0, max_rel_residual=0.0))
    )
    data = [
        "data.datasets=[cart]",
        "model.members=1",
        "model.context=8",
        "model.base_steps=20",
        "train.batch=8",
        "train.events=12",
    ]
    command = [
        "plan",
        "--law",
        law,
        "--money",
        "20",
        "price.per_step=0.01",
        "price.per_exaflop=1e9",
        f"storage.root={root}",
        *data,
    ]
    assert main([*command, "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["path"])
    answered = json.loads((path / "plan.json").read_text())
    chosen = answered["plan"]
    golden.check("plan", {name: chosen[name] for name in ("params", "data", "unique", "loss")})
    assert (
        answered["owned"] > 200
        and answered["flops_counted"]
        and answered["collect"] == round(chosen["unique"]) - answered["owned"] > 0
    )
    assert chosen["compute"] + chosen["reality"] == pytest.approx(20, rel=1e-6)
    assert (
        chosen["loss"] >= answered["optimum"]["loss"] * 0.98
        and chosen["interval"]["loss"][0] < chosen["loss"] < chosen["interval"]["loss"][1]
    )
    assert (path / "plan.svg").read_text().startswith("<?xml")

    job = config.load(PretrainConfig, [path / "plan.yaml"], [f"storage.root={root}"])
    summary = pretraining.JOB.plan(job)
    assert job.model.size == chosen["size"] and summary["params"] == chosen["params"]
    assert summary["transitions"] == pytest.approx(chosen["data"], rel=0.02), (
        "D is what the plan says, to half a batch"
    )
    assert summary["flops"] == pytest.approx(chosen["flops"], rel=0.02), "and costs what it says"


def test_flops_repeat_owned_data(law_file: Callable[..., str], tmp_path: Path) -> None:
    plan_json = _plan(law_file(law_of(REPEATS)), str(tmp_path), "flops=1e13", "owned=20000")
    assert (
        plan_json["plan"]["unique"] == 20_000
        and plan_json["plan"]["epochs"] > 2
        and plan_json["collect"] == 0
        and plan_json["next"] is None
    )
    fresh = _plan(law_file(law_of(CHINCHILLA)), str(tmp_path), "flops=1e16")
    assert fresh["plan"]["epochs"] == 1
    assert [w["code"] for w in fresh["warnings"]] == [
        "unknown_models",
        "far",
    ] and "times the largest" in fresh["warnings"][1]["sentence"]


def test_a_plan_names_what_limits_it(law_file: Callable[..., str], tmp_path: Path) -> None:
    """Owned data; and the ladder's end, where compute is next to free beside reality."""
    owned = _plan(law_file(law_of(CHINCHILLA)), str(tmp_path), "flops=1e16", "owned=5000")
    assert owned["plan"]["unique"] == 5000 and "owned_bind" in {
        w["code"] for w in owned["warnings"]
    }
    expensive = _plan(
        law_file(law_of(CHINCHILLA)),
        str(tmp_path),
        "money=500",
        "price.per_step=0.01",
        "price.per_exaflop=1e-9",
    )
    assert expensive["plan"]["size"] == "7b" and expensive["optimum"]["params"] == pytest.approx(
        LARGEST, rel=0.01
    )
    assert "ladder_end" in {w["code"] for w in expensive["warnings"]} and expensive["next"]["rows"]


def test_flops_grow_with_n_beyond_the_largest_size(
    law_file: Callable[..., str], tmp_path: Path
) -> None:
    flops = Flops(source="table", k=705.0, p=0.7, q=1.0, max_rel_residual=0.1, params_most=3e6)
    each = np.exp(flops.log_each(np.log([3e5, 3e6, 3e9])))
    assert each[0] == pytest.approx(705 * 3e5**0.7) and each[2] / each[1] == pytest.approx(1000)
    plan_json = _plan(law_file(law_of(CHINCHILLA, flops)), str(tmp_path), "flops=1e20")
    assert plan_json["plan"]["flops"] >= 6 * plan_json["plan"]["params"] * plan_json["plan"]["data"]


def test_a_plan_warns_of_other_models_than_the_laws(
    law_file: Callable[..., str], tmp_path: Path
) -> None:
    law = law_of(CHINCHILLA)
    law.provenance.swept = {
        "model": {"family": "sequence", "size": "1m", "members": 1, "context": 8, "base": False},
        "train": {"batch": 16, "lr": 0.006, "warmup": 20},
    }
    path = law_file(law)
    assert not {"unknown_models", "other_models"} & {
        w["code"] for w in _plan(path, str(tmp_path), "flops=1e12")["warnings"]
    }
    other = _plan(
        path,
        str(tmp_path),
        "flops=1e12",
        "model.family=ensemble",
        "model.members=1",
        "model.context=8",
        "model.base=false",
    )
    message = next(w["sentence"] for w in other["warnings"] if w["code"] == "other_models")
    assert "model.family=ensemble (swept: sequence)" in message and "members" not in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["law=''"], "law is not set"),
        ([], "neither flops nor money is set"),
        (["flops=1e9", "money=3"], "both set"),
        (["flops=-1"], r"flops must be above 0 and finite, got -1\.0"),
        (["money=5"], "money needs the price of compute"),
        (["money=5", "price.per_exaflop=1"], "money buys no real step without price.per_step"),
        (["money=5", "price.per_exaflop=1", "cluster=local"], "both set the price of compute"),
        (["money=5", "cluster=local", "price.per_step=1"], "cluster='local' has no price"),
        (["flops=1e9", "price.per_step=0.1"], "has no meaning with a budget of FLOPs"),
        (["flops=1e9", "train.steps=5"], "are set by the plan"),
        (["flops=1e9", "law=nowhere.json"], "cannot be read"),
        (["flops=1e9", "law=ab12"], "law='ab12' is neither a file nor a sweep's artifact"),
        (["flops=10"], "buys less than one transition|buys no transition"),
    ],
)
def test_bad_plans_are_refused(
    law_file: Callable[..., str], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _plan(law_file(law_of(CHINCHILLA)), str(tmp_path), *overrides)


def test_the_price_of_a_cluster(
    law_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "expensive.yaml").write_text(
        "nodes: [{name: gpus, count: 2, cpus: 1, gpus: 0, price_per_hour: 3.6, flops_per_s: 1e9}]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mesocosm.cluster.spec.FOLDERS", (Path("clusters"),))
    plan_json = _plan(
        law_file(law_of(REPEATS)),
        str(tmp_path),
        "money=5e6",
        "cluster=expensive",
        "price.per_step=0.01",
    )
    assert plan_json["prices"]["per_exaflop"] == pytest.approx(2 * 3.6 / 3600 / (2 * 1e9) * 1e18)
    assert math.isclose(plan_json["prices"]["per_step"], 0.01)


def test_resampled_problems_scatter_about_the_law() -> None:
    law = law_of(CHINCHILLA)
    many = PlanProblem.resampled(law, PlanBudget(1e18, 1.0, None, 0, unlimited=True))
    assert len(many) == 40 and all(isinstance(p, PlanProblem) for p in many)
    sizes = [p.best().params for p in many]
    n, _ = law.optimum(1e18)
    assert min(sizes) < float(n) < max(sizes)
