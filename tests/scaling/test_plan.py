"""From a law and a budget to a config: the optimum against closed forms, first-order conditions and
a global search; pretraining reads the config.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest import approx
from scipy.optimize import differential_evolution

from mesocosm import config
from mesocosm.cli.main import main
from mesocosm.errors import UsageError
from mesocosm.jobs import plan
from mesocosm.jobs import pretrain as pretraining
from mesocosm.scaling.law import Bootstrap, Flops, Law, Optimal, Provenance, optimal_of, theta_of
from mesocosm.scaling.optimum import PlanBudget, PlanProblem, beyond
from mesocosm.scaling.plan import answer, rates
from mesocosm.scaling.plan_config import LARGEST, PlanConfig, PlanPrice
from mesocosm.store.artifacts import Storage
from mesocosm.train.config import PretrainConfig

Make = Callable[..., Any]
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
REPEATS = {"E": 1.0, "A": 300.0, "B": 800.0, "alpha": 0.35, "beta": 0.35, "r_n": 5.0, "r_d": 15.0}


FLOPS = Flops(source="table", k=20.0, p=1.0, q=1.0, max_rel_residual=0.0)
SIX_ND = FLOPS.model_copy(update={"source": "6ND", "k": 6.0})
RANGE = {"params": (1e4, 1e6), "data": (1e4, 1e6), "unique": (1e4, 1e5), "flops": (6e8, 6e12)}


def law_of(params: dict[str, float], flops: Flops = SIX_ND) -> Law:
    """A law whose resamples scatter about known truth."""
    form = "data_constrained" if "r_d" in params else "chinchilla"
    rng = np.random.default_rng(0)
    draws = {
        name: (value * np.exp(rng.normal(size=40) * 0.01)).tolist()
        for name, value in params.items()
    }
    best = optimal_of(theta_of(form, params), flops)
    return Law(
        form=form,
        params=params,
        interval={name: (0.9 * value, 1.1 * value) for name, value in params.items()},
        optimal=Optimal(**{name: float(value[0]) for name, value in best.items()}),
        flops=flops,
        objective=0.0,
        n_cells=40,
        residual=0.001,
        range=RANGE | {"loss": (1.0, 50.0)},
        correlation={"E,alpha": 0.0, "E,beta": 0.0},
        held_out=None,
        isoflop=None,
        without_E=None,
        dropped=[],
        warnings=[],
        bootstrap=Bootstrap(resamples=40, by="cell", groups=40, seed=0, draws=draws),
        provenance=Provenance(table="known.csv", sha256="", rows=40, command="", version=""),
    )


def fresh(flops: float) -> PlanProblem:
    """A budget of FLOPs, with free data."""
    return PlanProblem.of(law_of(CHINCHILLA), PlanBudget(flops, 1.0, None, 0, unlimited=True))


@pytest.mark.parametrize("flops", [1e15, 1e20, 5.76e23])
def test_with_6nd_and_fresh_data_the_optimum_is_the_closed_form(flops: float) -> None:
    point = fresh(flops).best()
    n, d = law_of(CHINCHILLA).optimum(flops)
    assert (point.params, point.data) == approx((float(n), float(d)), rel=1e-4)
    assert point.flops == approx(flops) and point.unique == point.data and point.epochs == 1


@pytest.mark.parametrize("step_price", [1e-3, 1e-2, 1.0])
def test_money_is_split_at_equal_rates(step_price: float) -> None:
    budget = PlanBudget(500.0, 1e-12, step_price, 10_000)
    problem = PlanProblem.of(law_of(REPEATS, FLOPS), budget)
    point = problem.best()
    assert point.compute + point.reality == approx(500, rel=1e-6)
    assert point.unique == approx(10_000 + point.reality / step_price)
    rate, low = rates(problem, point), rates(problem, problem.best(0.01))
    assert rate["compute"] == approx(rate["reality"], rel=0.02), "neither is worth more"
    assert low["reality"] > low["compute"], "too little reality was bought"

    def loss(x: np.ndarray) -> float:
        return float(problem.loss(x[:1], x[1:])[0])

    bounds = [(4.0, 25.0), (0.0, 0.999999)]
    search = differential_evolution(loss, bounds, seed=0, tol=1e-12, popsize=30)
    assert point.loss <= search.fun * (1 + 1e-7)


def test_expensive_steps_buy_less_reality() -> None:
    law = law_of(REPEATS, FLOPS)
    *points, unpriced = (
        PlanProblem.of(law, PlanBudget(500.0, 1e-9, price, 10_000)).best()
        for price in (1e-3, 1e-2, 1e-1, 1e6, None)
    )
    bought, losses = [p.unique for p in points], [p.loss for p in points]
    assert bought == sorted(bought, reverse=True) and bought[0] > 2 * bought[1]
    assert bought[-1] == approx(10_000, rel=1e-3) and losses == sorted(losses)
    assert unpriced.unique == 10_000


def test_a_law_without_repeats_plans_no_repeats() -> None:
    law = law_of(CHINCHILLA)
    problem = PlanProblem.of(law, PlanBudget(100.0, 1e-15, 1e-3, 1_000))
    point = problem.best()
    assert point.data == approx(point.unique)
    assert point.compute + point.reality == approx(100, rel=1e-5)
    rate = rates(problem, point)
    assert rate["compute"] == approx(rate["reality"], rel=0.02)

    data = np.geomspace(100, 1e5 + 999, 20_000)  # along D alone: the rest of the money decides N
    compute = 100 - np.maximum(0.0, data - 1_000) * 1e-3
    exact = law.predict(compute / 1e-15 / 6 / data, data)
    assert point.loss == approx(float(exact.min()), rel=1e-6)
    n, d = law.optimum(point.flops)
    assert point.data < float(d) and point.params > float(n), "data cost money too"


def test_a_budget_that_buys_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="buys less than one transition"):
        fresh(1.0).point(1e9, 0.0)


def test_beyond_compares_with_the_fitted_range() -> None:
    law, point = law_of(CHINCHILLA), fresh(6e16).best()
    far = beyond(law, point)
    assert far["params"] == approx(point.params / 1e6) and far["flops"] == approx(1e4)
    assert beyond(law, replace(point, params=1e5, data=1e5, unique=1e5, flops=6e10)) == {}


def test_resampled_problems_scatter_about_the_law() -> None:
    law = law_of(CHINCHILLA)
    many = PlanProblem.resampled(law, PlanBudget(1e18, 1.0, None, 0, unlimited=True))
    sizes = [problem.best().params for problem in many]
    assert len(many) == 40 and min(sizes) < float(law.optimum(1e18)[0]) < max(sizes)


@pytest.fixture
def planned(tmp_path: Path) -> Make:
    """`planned(law, *overrides)`"""

    def of(law: Law, *overrides: str) -> dict[str, Any]:
        file, root = tmp_path / "law.json", str(tmp_path)
        law.write(file)
        keys = [f"law={file}", f"storage.root={root}", *overrides]
        return answer(plan.resolve(config.load(PlanConfig, overrides=keys), Storage(root)))

    return of


def codes(answered: dict[str, Any]) -> list[str]:
    return [warning["code"] for warning in answered["warnings"]]


@pytest.mark.integration
def test_a_plan_is_a_config_for_pretraining(
    cart_root: Make, tmp_path: Path, capsys: Any, golden: Any
) -> None:
    root, law = cart_root(tmp_path), tmp_path / "law.json"
    law_of(REPEATS, FLOPS).write(law)
    command = ["plan", "--law", str(law), "--money", "20", "price.per_step=0.01"]
    command += ["price.per_exaflop=1e9", f"storage.root={root}", "data.datasets=[cart]"]
    command += ["model.members=1", "model.context=8", "model.base_steps=20"]
    assert main([*command, "train.batch=8", "model.head_steps=20", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["path"])
    answered = json.loads((path / "plan.json").read_text())
    chosen, owned = answered["plan"], answered["owned"]
    golden.check("plan", {name: chosen[name] for name in ("params", "data", "unique", "loss")})
    assert owned > 200 and answered["flops_counted"]
    assert answered["collect"] == round(chosen["unique"]) - owned > 0
    assert chosen["compute"] + chosen["reality"] == approx(20, rel=1e-6)
    low, high = chosen["interval"]["loss"]
    assert chosen["loss"] >= answered["optimum"]["loss"] * 0.98 and low < chosen["loss"] < high
    assert (path / "plan.svg").read_text().startswith("<?xml")

    job = config.load(PretrainConfig, [path / "plan.yaml"], [f"storage.root={root}"])
    summary = pretraining.JOB.plan(job)
    assert job.model.size == chosen["size"] and summary["params"] == chosen["params"]
    assert summary["transitions"] == approx(chosen["data"], rel=0.02), "to half a batch"
    assert summary["flops"] == approx(chosen["flops"], rel=0.02)


def test_flops_repeat_owned_data(planned: Make) -> None:
    repeated = planned(law_of(REPEATS), "flops=1e13", "owned=20000")
    assert repeated["plan"]["unique"] == 20_000 and repeated["plan"]["epochs"] > 2
    assert repeated["collect"] == 0 and repeated["next"] is None
    new = planned(law_of(CHINCHILLA), "flops=1e16")
    assert new["plan"]["epochs"] == 1 and codes(new) == ["unknown_models", "far"]
    assert "times the largest" in new["warnings"][1]["sentence"]


@pytest.mark.integration
def test_a_plan_names_its_limit(planned: Make) -> None:
    """Owned data; and the ladder's end, where compute is next to free beside reality."""
    law = law_of(CHINCHILLA)
    owned = planned(law, "flops=1e16", "owned=5000")
    assert owned["plan"]["unique"] == 5000 and "owned_bind" in codes(owned)
    expensive = planned(law, "money=500", "price.per_step=0.01", "price.per_exaflop=1e-9")
    assert expensive["plan"]["size"] == "7b" and "ladder_end" in codes(expensive)
    assert expensive["optimum"]["params"] == approx(LARGEST, rel=0.01) and expensive["next"]["rows"]


def test_flops_grow_with_n_beyond_the_largest_size(planned: Make) -> None:
    flops = Flops(source="table", k=705.0, p=0.7, q=1.0, max_rel_residual=0.1, params_most=3e6)
    each = np.exp(flops.log_each(np.log([3e5, 3e6, 3e9])))
    assert each[0] == approx(705 * 3e5**0.7) and each[2] / each[1] == approx(1000)
    chosen = planned(law_of(CHINCHILLA, flops), "flops=1e20")["plan"]
    assert chosen["flops"] >= 6 * chosen["params"] * chosen["data"]


def test_a_plan_warns_of_other_models_than_the_laws(planned: Make) -> None:
    law = law_of(CHINCHILLA)
    model = {"family": "sequence", "size": "1m", "members": 1, "context": 8, "base": False}
    train = {"batch": 16, "lr": 0.006, "warmup": 20}
    law.provenance.swept = {"model": model, "train": train}
    same = planned(law, "flops=1e12")
    assert not {"unknown_models", "other_models"} & set(codes(same))
    keys = ("model.family=ensemble", "model.members=1", "model.context=8", "model.base=false")
    other = planned(law, "flops=1e12", *keys)
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
def test_bad_plans_are_refused(planned: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(law_of(CHINCHILLA), *overrides)


@pytest.mark.integration
def test_the_price_of_a_cluster(
    planned: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "expensive.yaml").write_text(
        "nodes: [{name: gpus, count: 2, cpus: 1, gpus: 0, price_per_hour: 3.6, flops_per_s: 1e9}]"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mesocosm.cluster.spec.FOLDERS", (Path("clusters"),))
    keys = ("money=5e6", "cluster=expensive", "price.per_step=0.01")
    prices = planned(law_of(REPEATS), *keys)["prices"]
    assert prices == approx({"per_exaflop": 2 * 3.6 / 3600 / (2 * 1e9) * 1e18, "per_step": 0.01})


def test_time_has_a_price_by_the_mean_duration_of_the_data() -> None:
    config = PlanConfig(law="law.json", money=5.0, price=PlanPrice(0.01, per_second=2.0))
    assert config.step_price(0.5) == approx(1.01)
    assert PlanConfig(price=PlanPrice(per_second=2.0)).step_price(0.5) == 1.0
    with pytest.raises(UsageError, match=r"price.per_second=2 needs datasets with durations"):
        config.step_price(None)
    with pytest.raises(UsageError, match=r"price.per_second must be above 0 and finite, got -1"):
        PlanConfig(law="x", money=5.0, price=PlanPrice(0.01, 1.0, per_second=-1.0)).validate()
    with pytest.raises(UsageError, match=r"price.per_second=2.0 has no meaning with a budget"):
        PlanConfig(law="x", flops=1e9, price=PlanPrice(per_second=2.0)).validate()
