"""The command line's contract: exit status, one sentence for what is wrong, help and dry runs that
start nothing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from mesocosm.cli.main import main
from mesocosm.jobs import import_logs
from mesocosm.jobs.registry import JOBS

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONAL = ("gymnasium_robotics", "metaworld", "miniwob", "minigrid", "sklearn")
"""Modules of environments that an extra, or `make browser`, installs."""
SHIPPED = sorted(REPOSITORY.glob("configs/*/*.yaml"))
Command = Callable[..., str]


@pytest.fixture
def command(root: str, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command(*words)` runs words on the root `root`: the standard output, or the one line of
    standard error where the exit status is 2.
    """

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main([*words, f"storage.root={root}"]) == status, capsys.readouterr().err
        out, err = capsys.readouterr()
        if status != 2:
            return out
        (line,) = err.splitlines()
        return line

    return run


@pytest.mark.parametrize("words", [[], ["data"]])
def test_without_a_command_the_help_is_printed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out.startswith("Usage: mesocosm") and not err


def test_an_unknown_command_or_option_gets_the_nearest(command: Command) -> None:
    assert "Did you mean 'pretrain'?" in command("pretrian", status=2)
    message = command("collect", "--dry-rum", status=2)
    assert "No such option '--dry-rum'. Did you mean '--dry-run'?" in message


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_an_example_and_the_keys(job: str, command: Command) -> None:
    out = command(job, "--help")
    assert f"Example:\n  mesocosm {job} " in out
    sections = re.findall(r"^([a-z -]+):$", out, re.MULTILINE)
    assert sections[-1] == "every job" and len({*sections}) == len(sections)
    assert ":\n  \n" not in out, "a section without keys"
    assert "\n  # A folder, or `s3://bucket/prefix`.\n  storage.root = " in out


def test_help_is_on_standard_output_with_json_too(command: Command) -> None:
    assert "every job:" in command("collect", "--json", "--help")


def test_help_of_the_loop_omits_the_keys_that_its_stages_share(command: Command) -> None:
    out = command("loop", "--help")
    assert "\n  explore.steps = 500\n" in out, "the loop's own default, not collect's"
    assert not re.search(r"^  (collect\.(storage|seed)|evaluate\.reality|agent\.force)", out, re.M)


@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_key_is_status_2_and_one_sentence(job: str, command: Command) -> None:
    message = command(job, "storage.rot=/tmp/x", status=2)
    assert "storage.rot" in message and "storage.root" in message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_config_can_be_planned(
    path: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"agent": "train-agent"}.get(path.parent.name, path.parent.name)
    needs = {
        "curate": ["data.datasets=[d0]"],
        "pretrain": ["data.datasets=[d0]"],
        "sweep": ["data.datasets=[d0]"],
        "study": ["pretrain.data.datasets=[d0]"],
        "train-agent": ["world=w0"],
        "serve": ["world=w0"],
        "evaluate": ["world=w0", "agent=a0"],
        "loop/logs": ["datasets=[d0]", "reality.env=CartPole-v1"],
        "loop/pixcart": ["pretrain.data.tokenizer=t0"],
        "loop/minigrid": ["pretrain.data.tokenizer=t0"],
    }.get(f"{job}/{path.stem}" if job == "loop" else job, [])
    status = main([job, "-c", str(path), f"storage.root={root}", "--dry-run", *needs])
    error = capsys.readouterr().err
    if needs:  # only artifacts of earlier jobs may be missing
        missing = r"(datasets/d0|worlds/w0|agents/a0|tokenizers/t0|'w0')"
        assert status == 2 and re.search(missing, error), error
    elif status:  # a package of the environment is missing, and the error says how to install it
        assert "pip install" in error and None in map(find_spec, OPTIONAL), error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loop -c quickstart train.steps=10", "did you mean 'pretrain.train.steps'"),
        ("pretrain data.datasets=abc", "try 'data.datasets=[abc]'"),
        ("collect -c pendulum steps = 100", "write steps=100"),
        ("import logs.csv seed = 3", "write key=value"),
        ("train-agent -c pendulum-ppo", "world is not set; give the world to train in"),
        ("pretrain -c sweep/quickstart", "looks like a config of 'sweep', not of 'pretrain'"),
        ("loop -c collect/pendulum", "looks like a config of 'collect'"),
    ],
)
def test_a_mistake_of_a_newcomer_gets_a_hint(words: str, message: str, command: Command) -> None:
    assert message in command(*words.split(), "--dry-run", status=2)


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
    override: str, message: str, command: Command
) -> None:
    error = command("loop", "-c", "quickstart", "--dry-run", override, status=2)
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "words",
    [
        "collect reality.env=CartPole-v1 steps=0",
        "collect reality.env=CartPol-v1 workers=0",
        "collect reality.env=CartPole-v1 'behaviours=[{kind: nosy}]'",
        "collect reality.env=CartPole-v1 steps=10 reality.budget.steps=5",
        "pretrain data.datasets=[none]",
        "loop -c quickstart evaluate.episodes=0",
        "serve world=none",
        "evaluate -c pendulum world=none",
    ],
)
def test_a_wrong_value_is_reported_before_a_run_begins(
    words: str, root: str, command: Command
) -> None:
    command(*shlex.split(words), status=2)
    assert not Path(root).exists()


def test_a_dry_run_of_a_loop_prices_each_stage(command: Command) -> None:
    rows = json.loads(command("loop", "-c", "quickstart", "--dry-run", "--json"))["stages"]
    assert [(row["stage"], row["real steps"], row["price"]) for row in rows] == [
        ("collect", 500, "5.00 USD"),
        ("explore", 250, "2.50 USD"),
        ("pretrain", 0, "-"),
        ("train-agent", 0, "-"),
        ("baseline PPO", 12_000, "at most 120.00 USD"),
        # 2 rounds and 12 measurements of the baseline, 10 episodes of at most 1000 steps each, at
        # 0.01 a step and 0.1 a reset
        ("judge agents", 20_000, "at most 202.00 USD"),
        ("judge baselines", 120_000, "at most 1,212.00 USD"),
        ("total", 152_750, "at most 1,541.50 USD"),
    ]


@pytest.mark.integration
def test_a_dry_run_prints_words(command: Command) -> None:
    mix = "behaviours=[{kind: random},{kind: random, weight: 2}]"
    out = command("collect", "-c", "pendulum", mix, "--dry-run")
    assert re.search(r"^behaviours +random, random$", out, re.MULTILINE)


def test_a_dry_run_gives_size_and_price_and_does_nothing(root: str, command: Command) -> None:
    """Overrides may stand anywhere."""
    words = "collect steps=500 --dry-run reality.env=CartPole-v1 --json reality.price.per_step=0.5"
    plan = json.loads(command(*words.split()))
    assert plan["real steps"] == 500 and plan["price"] == "250 USD"
    assert not Path(root).exists()


def test_a_dry_run_of_an_import_only_reads(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resolve` would download Minari's datasets, and read all files for their checksums."""
    monkeypatch.setattr(import_logs.JOB, "resolve", None)
    row = {"episode": 0, "observation": 0.5, "action": 0, "reward": 1.0}
    rows = [row | {"step": t, "terminated": t == 2, "truncated": False} for t in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = json.loads(command("import", str(path), "--dry-run", "--json"))
    assert plan["transitions"] == 2
    message = command("import", str(path), "--dry-run", "workers=100000", status=2)
    assert "workers=100000 asks for 100000 CPUs" in message


def test_collect_by_the_command_line(command: Command) -> None:
    words = ["collect", "reality.env=CartPole-v1", "steps=60", "workers=0", "--json"]
    first = json.loads(command(*words))
    assert first["artifact"].startswith("datasets/") and first["ledger"]["spent"] == 60
    assert json.loads(command(*words))["artifact"] == first["artifact"]
