"""The command line's contract: exit status, one sentence for what is wrong, help and dry runs that start nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesocosm.cli import JOBS, main

REPOSITORY = Path(__file__).resolve().parents[1]


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_an_example_and_the_keys(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([job, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and "example:" in out and "storage:" in out


@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_key_is_status_2_and_one_sentence(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([job, "storage.rot=/tmp/x"]) == 2
    err = capsys.readouterr().err
    assert "storage.rot" in err and "storage.root" in err and len(err.strip().splitlines()) == 1


SHIPPED = sorted(REPOSITORY.glob("configs/*/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_config_loads(path: Path) -> None:
    import importlib

    from mesocosm import config

    job = JOBS[{"agent": "train-agent"}.get(path.parent.name, path.parent.name)]
    module = importlib.import_module(job.module)
    assert config.load(getattr(module, job.schema), [path])


def test_a_dry_run_says_size_and_price_and_does_nothing(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["collect", f"storage.root={root}", "reality.env=CartPole-v1", "steps=500", "reality.price.per_step=0.5", "--dry-run", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["real steps"] == 500 and plan["price"] == "250 USD"
    assert not Path(root).exists()


def test_no_such_environment_is_status_2(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", f"storage.root={root}", "reality.env=CartPol-v1", "workers=0"]) == 2
    err = capsys.readouterr().err
    assert "CartPol-v1" in err and "CartPole-v1" in err


def test_collect_by_the_command_line(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["collect", f"storage.root={root}", "reality.env=CartPole-v1", "steps=60", "workers=0", "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["artifact"].startswith("datasets/") and first["ledger"]["spent"] == 60
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["artifact"] == first["artifact"]
    assert main(["pretrain", f"storage.root={root}", "data.datasets=[nonesuch]", "--json"]) == 2
    assert "nonesuch" in capsys.readouterr().err
