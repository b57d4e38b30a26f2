"""The tables of `make bench-agents` and `make bench-domains` from their cells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import agent_report
import bench_domains
import domain_report
import domain_tasks


def cell(points: list[list[float]], reached: int | None) -> dict[str, Any]:
    return {"points": points, "reached": reached, "judged": 10, "price": 7.0, "seconds": 60.0}


@pytest.fixture
def curves(tmp_path: Path) -> agent_report.Curves:
    rows = ["method,task,step,return,seed"]
    for seed, values in enumerate(((0, 700, 850), (0, 850, 860), (0, 100, 200))):
        for step, value in zip((0, 100_000, 200_000), values, strict=True):
            rows.append(f"tdmpc2,cartpole-swingup,{step},{value},{seed}")
    (tmp_path / "curves.csv").write_text("\n".join([*rows, "other,walker-walk,0,1,0"]))
    return agent_report.published(tmp_path)


def printed(
    results: agent_report.Results, curves: agent_report.Curves, capsys: Any
) -> list[list[str]]:
    agent_report.tables(results, curves)
    lines = capsys.readouterr().out.splitlines()
    return [[text.strip() for text in line.strip("|").split("|")] for line in lines if line]


def test_decisions_of_a_suite_task_count_twice_and_censored_runs_are_the_longest(
    curves: agent_report.Curves, capsys: Any
) -> None:
    runs = ([[1500, 200.0], [2500, 840.0]], 2500), ([[25_000, 300.0]], None), ([[500, 850.0]], 500)
    results = {f"cartpole-swingup/world/{i}": cell(*run) for i, run in enumerate(runs)}
    rows = printed(results, curves, capsys)
    assert ["2 of 3", "5,000 (5,000, > 50,000, 1,000)", "7", "60"] in [row[2:] for row in rows]
    published = next(row for row in rows if row[1:2] == ["TD-MPC2, published"])
    assert published[2:4] == ["2 of 3", "200,000 (200,000, 100,000, > 200,000)"]
    assert published[4] == "1,020"  # 100,000 decisions at .01 and 200 resets at .1


def test_a_return_at_fixed_steps_is_the_last_one_measured_within_them(
    curves: agent_report.Curves, capsys: Any
) -> None:
    points = [[2000, 100.0], [4000, 180.0], [4500, 300.0]]
    rows = printed({"Hopper-v5/world/0": cell(points, None)}, {}, capsys)
    assert [row for row in rows if row[0] == "Hopper-v5"] == [
        ["Hopper-v5", "4,000", "190", "180 (180)", "-"]
    ]


def test_without_published_curves_the_tables_have_none(tmp_path: Path) -> None:
    assert agent_report.published(tmp_path) == {}


def domain_cell(reached: int | None, *points: tuple[int, float, float, float]) -> dict[str, Any]:
    keys = ("real_steps", "price", "seconds", "return")
    rows = [dict(zip(keys, each, strict=True)) | {"error": 0.5} for each in points]
    return {"points": rows, "reached": reached, "wall_seconds": 60.0, "others": {}}


def test_a_domain_s_spending_is_that_at_the_target_or_more_than_all(capsys: Any) -> None:
    early, late = (600, 0.05, 90.0, 12.0), (900, 0.1, 180.0, 14.0)
    results = {
        "training/world/0": domain_cell(900, early, late),
        "training/world/1": domain_cell(600, early, late),
        "training/PPO/0": domain_cell(None, early, late),
        "training/expert/0": domain_cell(0, (0, 0.0, 0.0, 13.8)),
    }
    domain_report.table(results)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["training", name] for name in ("expert", "PPO", "world")]
    assert rows[1][2:6] == ["0 of 1", "> 900", "> 180", "> 0.1"]
    assert rows[2][2:7] == ["2 of 2", "900, 600", "135", "0.075", "14.00 ± 0.50, 12.00 ± 0.50"]


ITEMS = """
reality: {env: "mesocosm.envs.items:Items", horizon: 20, price: {per_step: 0.1, per_reset: 1.0}}
rounds: 2
collect:
  steps: 60
  behaviours: [{kind: scripted, function: "mesocosm.envs.items:expert"}]
  workers: 0
explore: {steps: 40}
agent: {backend: local}
"""


@pytest.mark.integration
def test_the_script_and_the_clone_of_a_domain_are_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The clone takes as many logged steps as both rounds of the world, and they are in the bill.
    Without the expert's return there is no target, which is said before any cost.
    """
    (tmp_path / "items.yaml").write_text(ITEMS)
    expert = "mesocosm.envs.items:expert"
    domain = domain_tasks.Domain(
        tmp_path / "items.yaml", expert, {}, None, 3, steps=9, every=9, clone=["steps=5"]
    )
    monkeypatch.setitem(domain_tasks.DOMAINS, "items", domain)
    monkeypatch.setattr(bench_domains, "ROOT", tmp_path / "root")
    monkeypatch.setattr(bench_domains, "RESULTS", tmp_path / "results.json")
    script, clone = (bench_domains.Cell("items", method, 0) for method in ("expert", "clone"))
    with pytest.raises(SystemExit, match="items/clone/0 needs items/expert/0"):
        bench_domains.run(clone)
    assert not (tmp_path / "root").exists()
    bench_domains.run(script)
    bench_domains.run(clone)
    results = bench_domains.read()
    assert results["items/expert/0"]["points"][0]["return"] > 0.8
    assert results["items/expert/0"]["others"]["uniform actions"]["mean"] < 0.5
    (point,) = results["items/clone/0"]["points"]
    assert 100 <= point["real_steps"] < 120 and point["price"] > 0.1 * point["real_steps"] + 10
    assert bench_domains.left_minutes(clone, results) == 0.0
    domain_report.table(results)
    assert "| items | clone |" in capsys.readouterr().out
