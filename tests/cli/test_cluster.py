"""`mesocosm cluster render|up|down`: what is printed, what is asked, and what Ray's launcher is
given. The launcher itself stands in: its arguments are recorded here, and that it takes the config
is tests/test_clusters.py's.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mesocosm.cli.main import main
from mesocosm.cluster import kuberay
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.ec2_launcher import launcher_config

REPOSITORY = Path(__file__).resolve().parents[2]
Launcher = Callable[[], list[str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and the shipped files with a user's own in place of the placeholders."""
    folder = tmp_path / "clusters"
    folder.mkdir()
    for name in ("aws", "kuberay", "local"):
        (folder / f"{name}.yaml").write_text(
            (REPOSITORY / "clusters" / f"{name}.yaml").read_text().replace("your-", "my-")
        )
    (folder / "theirs.yaml").write_text(
        "where: address\naddress: https://ray.example.org\nnodes: [{cpus: 4}]\n"
    )
    monkeypatch.setattr(cluster_spec, "FOLDERS", (folder,))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def launcher(home: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """A `ray` that writes down what it was called with, and the arguments of its one call."""
    folder, record = home / "bin", home / "calls"
    folder.mkdir()
    (folder / "ray").write_text(
        f'#!/bin/sh\necho "ray speaks"\nfor word in "$@"; do echo "$word" >> {record}; done\n[ ! -e'
        f" {home}/broken ]\n"
    )
    (folder / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: record.read_text().splitlines() if record.exists() else []


def config_of(home: Path) -> Path:
    return home / "home" / ".cache" / "mesocosm" / "clusters" / "aws.yaml"


@pytest.mark.parametrize("action", ["render", "up", "down"])
def test_help_has_examples(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", action, "--help"]) == 0
    assert f"Examples:\n    mesocosm cluster {action} " in capsys.readouterr().out


def test_render_prints_what_the_launcher_reads(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "render", "aws"]) == 0
    text = capfd.readouterr().out
    assert yaml.safe_load(text) == launcher_config("aws", cluster_spec.read("aws"))
    assert main(["cluster", "render", "aws"]) == 0 and capfd.readouterr().out == text, (
        "the same twice"
    )
    assert main(["cluster", "render", "aws", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == yaml.safe_load(text)


@pytest.mark.parametrize("kind", kuberay.KINDS)
def test_render_prints_what_kubectl_reads(
    home: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    assert main(["cluster", "render", "kuberay", "--kind", kind]) == 0
    text = capfd.readouterr().out
    documents = list(yaml.safe_load_all(text))
    assert [document["kind"] for document in documents] == [kind, "NetworkPolicy"]
    assert (
        "kubectl create secret generic mesocosm-kuberay-token"
        " --from-file=auth_token=$HOME/.ray/auth_token" in text
    )
    assert "dashboard-host is 0.0.0.0 inside the pod because" in text
    assert main(["cluster", "render", "kuberay", "--kind", kind, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "apiVersion": "v1",
        "kind": "List",
        "items": documents,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["render", "awz"],
            (
                "there is no clusters/awz.yaml; use one of aws, kuberay, local, theirs; did you"
                " mean 'aws'"
            ),
        ),
        (
            ["render", "local"],
            "must have where=launcher or kuberay to be rendered, got where='local'",
        ),
        (
            ["render", "aws", "--kind", "RayJob"],
            "--kind 'RayJob' is for KubeRay, and clusters/aws.yaml has where='launcher'",
        ),
        (["render", "aws", "more"], "Got unexpected extra argument (more)"),
        (["up", "local"], "a job starts its own Ray on this machine"),
        (["up", "kuberay"], "run: mesocosm cluster render kuberay | kubectl apply -f -"),
        (["down", "kuberay"], "run: mesocosm cluster render kuberay | kubectl delete -f -"),
        (["down", "theirs"], "start and end it where it is managed"),
    ],
)
def test_wrong_use_is_status_2_and_one_sentence(
    home: Path,
    launcher: Launcher,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert main(["cluster", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1 and not launcher()


@pytest.mark.parametrize("action", ["up", "down"])
def test_a_dry_run_does_nothing(
    home: Path, launcher: Launcher, capfd: pytest.CaptureFixture[str], action: str
) -> None:
    assert main(["cluster", action, "aws", "--dry-run"]) == 0
    text = capfd.readouterr().out
    assert (
        f"# ray {action} --yes {config_of(home)}" in text
        and "# 4.12 USD an hour at full size, 0.2 while nothing runs" in text
    )
    assert yaml.safe_load(text) == launcher_config("aws", cluster_spec.read("aws"))
    assert main(["cluster", action, "aws", "--dry-run", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["config"] == yaml.safe_load(text) and facts["price_per_hour"] == pytest.approx(
        4.12
    )
    assert not launcher() and not (home / "home").exists(), "no token, no config, no call"


def test_up_gives_the_launcher_a_private_config_and_a_token(
    home: Path, launcher: Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "up", "aws", "--yes"]) == 0
    out = capfd.readouterr().out
    assert (
        launcher() == ["up", "--yes", str(config_of(home))]
        and f"ray dashboard {config_of(home)}" in out
        and "4.12 USD an hour" in out
    )
    config = yaml.safe_load(config_of(home).read_text())
    assert config == launcher_config("aws", cluster_spec.read("aws"))
    token = home / "home" / ".ray" / "auth_token"
    assert [Path(local).expanduser() for local in config["file_mounts"].values()] == [token]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token, config_of(home))] == [
        0o600,
        0o600,
    ]
    secret = token.read_text()
    assert secret and secret not in out + config_of(home).read_text(), "a token is shown nowhere"
    assert main(["cluster", "down", "aws", "--yes", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["command"] == f"ray down --yes {config_of(home)}", (
        "the launcher's words are not on stdout"
    )
    assert launcher()[3:] == ["down", "--yes", str(config_of(home))] and token.read_text() == secret


def test_a_token_that_others_may_read_is_refused(
    home: Path, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    token = home / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("x")
    token.chmod(0o644)
    assert main(["cluster", "up", "aws", "--yes"]) == 2
    assert f"run: chmod 600 {token}" in capsys.readouterr().err and not launcher()


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_it_asks_first(
    home: Path,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    answer: str,
    status: int,
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["cluster", "up", "aws"]) == status
    captured = capfd.readouterr()
    assert "start mesocosm-aws? [y/N]" in captured.err and "4.12 USD an hour" in captured.out
    assert bool(launcher()) == (status == 0) and (home / "home").exists() == (status == 0)


def test_where_nobody_can_be_asked(
    home: Path,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["cluster", "down", "aws"]) == 2
    assert (
        "end mesocosm-aws? There is no terminal to ask; give --yes" in capsys.readouterr().err
        and not launcher()
    )


def test_placeholders_are_not_started(
    home: Path,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster_spec, "FOLDERS", (REPOSITORY / "clusters",))
    assert main(["cluster", "up", "aws", "--yes"]) == 2
    assert (
        "is the shipped placeholder; put your own there" in capsys.readouterr().err
        and not launcher()
    )


def test_a_launcher_that_fails_is_status_1(
    home: Path, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "broken").touch()
    assert main(["cluster", "up", "aws", "--yes"]) == 1
    assert "failed with status 1" in capsys.readouterr().err
