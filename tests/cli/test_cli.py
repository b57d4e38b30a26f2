"""The command line's contract: exit status, one sentence for what is wrong, help and dry runs that
start nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mesocosm.cli.main import main
from mesocosm.jobs.registry import JOBS

REPOSITORY = Path(__file__).resolve().parents[2]


def test_an_unknown_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pretrian"]) == 2
    assert "Did you mean 'pretrain'?" in capsys.readouterr().err


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_an_example_and_the_keys(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([job, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example:\n  mesocosm {job} " in out
    sections = re.findall(r"^([a-z -]+):$", out, re.MULTILINE)
    assert (sections[0], sections[-1]) == (job, "every job") and len({*sections}) == len(sections)
    assert "\n  # A folder, or `s3://bucket/prefix`.\n  storage.root = " in out


def test_help_is_on_standard_output_with_json_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--json", "--help"]) == 0
    assert "every job:" in capfd.readouterr().out


def test_help_of_the_loop_leaves_out_what_its_stages_get_from_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["loop", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  explore.steps = 500" in lines, "the loop's own default, not collect's"
    assert not [
        line
        for line in lines
        if line.startswith(
            ("  collect.storage", "  collect.seed", "  evaluate.reality", "  agent.force")
        )
    ]


@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_key_is_status_2_and_one_sentence(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([job, "storage.rot=/tmp/x"]) == 2
    err = capsys.readouterr().err
    assert "storage.rot" in err and "storage.root" in err and len(err.strip().splitlines()) == 1


SHIPPED = sorted(REPOSITORY.glob("configs/*/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_config_can_be_planned(
    path: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"agent": "train-agent"}.get(path.parent.name, path.parent.name)
    wanted = {
        "curate": ["data.datasets=[d0]"],
        "pretrain": ["data.datasets=[d0]"],
        "sweep": ["data.datasets=[d0]"],
        "train-agent": ["world=w0"],
        "serve": ["world=w0"],
        "evaluate": ["world=w0", "agent=a0"],
        "loop/logs": ["datasets=[d0]", "reality.env=CartPole-v1"],
    }.get(f"{job}/{path.stem}" if path.stem == "logs" else job, [])
    status = main([job, "-c", str(path), f"storage.root={root}", "--dry-run", *wanted])
    error = capsys.readouterr().err
    # Only what earlier jobs would have made may be missing.
    assert (
        status == 0
        if not wanted
        else status == 2 and re.search(r"(datasets/d0|worlds/w0|agents/a0|'w0')", error)
    ), error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["loop", "-c", "configs/loop/quickstart.yaml", "train.steps=10"],
            "did you mean 'pretrain.train.steps'",
        ),
        (["pretrain", "data.datasets=abc"], "try 'data.datasets=[abc]'"),
        (
            ["collect", "-c", "configs/collect/pendulum.yaml", "steps", "=", "100"],
            "write steps=100",
        ),
        (["import", "logs.csv", "seed", "=", "3"], "write key=value"),
        (
            ["train-agent", "-c", "configs/agent/pendulum-ppo.yaml"],
            "world is not set; give the world to train in, as in world=worlds/",
        ),
    ],
)
def test_a_newcomers_mistake_is_answered(
    words: list[str],
    message: str,
    root: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main([*words, f"storage.root={root}", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_overrides_may_stand_anywhere(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "collect",
                "steps=7",
                "--dry-run",
                f"storage.root={root}",
                "--json",
                "reality.env=CartPole-v1",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["real steps"] == 7
    assert main(["collect", "--dry-rum", "reality.env=CartPole-v1"]) == 2
    assert "No such option '--dry-rum'. Did you mean '--dry-run'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agent.algo=PPPO", r"agent: algo must be .*got 'PPPO'; did you mean 'PPO'"),
        ("agent.params.lrr=1", "agent: params.lrr .*did you mean 'lr'"),
        ("agent.starts=bogus", "agent: starts must be one of logged, generated; got 'bogus'"),
        ("evaluate.episodes=0", "evaluate: episodes must be >= "),
        ("serve.replicas=0", "mesocosm: serve.replicas must be >= 1, got 0"),
        ("explore.behaviours=[{kind: nosy}]", "explore: .*nosy.*did you mean 'noisy'"),
        ("baselines=[{algo: PP0}]", r"baselines.0.: algo must be .*got 'PP0'"),
        ("baselines=[{alg: PPO}]", "unknown config key 'alg'; did you mean 'algo'"),
        ("reality.env=CartPol-v1", "CartPol-v1.*CartPole-v1"),
        ("pretrain.train.steps=0", "train.steps must be >= 1, got 0"),
    ],
)
def test_a_loop_is_checked_whole_before_it_starts(
    override: str, message: str, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "loop",
                "-c",
                str(REPOSITORY / "configs/loop/quickstart.yaml"),
                f"storage.root={root}",
                "--dry-run",
                override,
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert re.search(message, err) and len(err.strip().splitlines()) == 1, err


def test_a_dry_run_of_a_loop_prices_each_stage(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loop", "-c", "quickstart", f"storage.root={root}", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [(row["stage"], row["real steps"], row["price"]) for row in rows] == [
        ("collect", 500, "5.00 USD"),
        ("explore", 250, "2.50 USD"),
        ("pretrain", 0, "-"),
        ("train-agent", 0, "-"),
        ("baseline PPO", 12_000, "at most 120.00 USD"),
        # 2 rounds and 12 measurements of the baseline, 10 episodes of at most 1000 steps each, at
        # 0.01 a step and 0.1 a reset
        ("judging", 140_000, "at most 1,414.00 USD"),
        ("total", 152_750, "at most 1,541.50 USD"),
    ]


def test_a_dry_run_prints_words(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["collect", "-c", "pendulum", "behaviours=[{kind: random},{kind: random, weight: 2}]"]
    assert main([*words, f"storage.root={root}", "--dry-run"]) == 0
    assert re.search(r"^behaviours +random, random", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "words",
    [
        ["collect", "reality.env=CartPole-v1", "steps=0"],
        ["collect", "reality.env=CartPole-v1", "behaviours=[{kind: nosy}]"],
        ["collect", "reality.env=CartPole-v1", "steps=10", "reality.budget.steps=5"],
        ["pretrain", "data.datasets=[none]"],
        ["loop", "-c", "quickstart", "evaluate.episodes=0"],
        ["serve", "world=none"],
        ["evaluate", "-c", "pendulum", "world=none"],
    ],
)
def test_a_wrong_value_is_reported_before_a_run_begins(
    words: list[str], root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, f"storage.root={root}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not Path(root).exists()


@pytest.mark.parametrize(
    ("job", "name", "other"),
    [("pretrain", "sweep/quickstart", "sweep"), ("loop", "collect/pendulum", "collect")],
)
def test_a_config_of_another_job_is_recognized(
    job: str, name: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([job, "-c", name]) == 2
    message = capsys.readouterr().err
    assert f"looks like a config of '{other}'" in message and f"mesocosm {other} -c" in message


def test_a_dry_run_says_size_and_price_and_does_nothing(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "collect",
        f"storage.root={root}",
        "reality.env=CartPole-v1",
        "steps=500",
        "reality.price.per_step=0.5",
        "--dry-run",
        "--json",
    ]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["real steps"] == 500 and plan["price"] == "250 USD"
    assert not Path(root).exists()


def test_no_such_environment_is_status_2(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", f"storage.root={root}", "reality.env=CartPol-v1", "workers=0"]) == 2
    err = capsys.readouterr().err
    assert "CartPol-v1" in err and "CartPole-v1" in err


def test_collect_by_the_command_line(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "collect",
        f"storage.root={root}",
        "reality.env=CartPole-v1",
        "steps=60",
        "workers=0",
        "--json",
    ]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["artifact"].startswith("datasets/") and first["ledger"]["spent"] == 60
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["artifact"] == first["artifact"]
    assert main(["pretrain", f"storage.root={root}", "data.datasets=[nonesuch]", "--json"]) == 2
    assert "nonesuch" in capsys.readouterr().err
