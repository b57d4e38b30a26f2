"""A root, a tracking server or a Ray that cannot be used is refused before a run begins."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import free_port

from mesocosm.cli.main import main
from mesocosm.config import JobConfig, load
from mesocosm.errors import UsageError
from mesocosm.jobs import preflight
from mesocosm.store.artifacts import Storage

TINY = ["rounds=2", "collect.steps=300", "explore.steps=100", "reality.env=CartPole-v1"]
DRY = ["collect", "--dry-run", "reality.env=CartPole-v1", "steps=10"]
Refused = Callable[..., str]


@pytest.fixture
def dry_run_refused(root: str, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The message of a dry run that is wrong use."""

    def run(*words: str) -> str:
        words = words if words[0] == "loop" else (*DRY, *words)
        assert main([words[0], f"storage.root={root}", *words[1:]]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path, dry_run_refused: Refused) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    message = dry_run_refused(f"storage.root={tmp_path}/closed/root")
    assert "cannot be written (Permission denied" in message


def test_a_root_that_is_a_file_is_refused(tmp_path: Path, dry_run_refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    message = dry_run_refused(f"storage.root={tmp_path}/file")
    assert "storage.root" in message and "cannot be written (Not a directory" in message


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    assert main([*DRY, f"storage.root={tmp_path}/a/b"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://me:secret@there/mlflow",
        "mlruns",
        "http://me:secret@host:port/",
        "http://[::1",
        "http://.example",
    ],
)
def test_a_tracking_uri_that_cannot_be_used_is_refused(uri: str, dry_run_refused: Refused) -> None:
    message = dry_run_refused(f"tracking.uri={uri}")
    assert "tracking.uri" in message and "secret" not in message


@pytest.mark.parametrize(
    "uri", ["postgresql://a:1,b:2/mlflow", "mysql+pymysql://me@h/m", "databricks", "sqlite://"]
)
def test_a_tracking_database_is_left_to_mlflow(uri: str, root: str) -> None:
    config = load(JobConfig, [], [f"storage.root={root}", f"tracking.uri={uri}"])
    assert preflight.check(config) is None


def test_hard_links_are_asked_of_the_root_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run_refused: Refused
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(source))

    monkeypatch.setattr(os, "link", refuse)  # as FAT and some network filesystems do
    message = dry_run_refused("lanes=1")
    assert "storage.root" in message and "without hard links" in message
    assert preflight._check_tracking(f"sqlite:///{tmp_path}/mlflow.db") is None


@pytest.mark.parametrize("address", ["127.0.0.1:port", "127.0.0.1:99999", "ray://[::1"])
def test_a_malformed_ray_address_is_refused(address: str, dry_run_refused: Refused) -> None:
    message = dry_run_refused(f"ray.address={address}")
    assert "ray.address is not a valid address" in message
    assert repr(address.removeprefix("ray://")) in message


def test_a_tracking_server_that_is_away_is_a_warning(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    assert main([*DRY, f"storage.root={root}", f"tracking.uri={uri}"]) == 0
    assert "does not answer" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", port)):
        config = load(JobConfig, [], [f"storage.root={root}", f"tracking.uri={uri}"])
        assert preflight.check(config) is None


@pytest.mark.slow
def test_a_remote_root_must_create_exclusively(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(JobConfig, [], [f"storage.root={s3}"])
    assert preflight.check(config) is None
    assert Storage(s3).list("runs") == []
    monkeypatch.setattr(Storage, "create", lambda self, path, data: True)  # ignores If-None-Match
    with pytest.raises(UsageError, match="ignores If-None-Match"):
        preflight.check(config)


def test_too_many_workers_are_refused(dry_run_refused: Refused) -> None:
    message = dry_run_refused("workers=500", "lanes=500", "steps=1000", "ray.cpus=4")
    assert "workers=500 asks for 500 CPUs and the cluster has 4" in message
    words = ["pretrain.train.workers=8", "pretrain.train.batch=32", "ray.cpus=4", "--dry-run"]
    message = dry_run_refused("loop", *TINY, *words)
    assert "pretrain.train.workers=8 asks for 8 CPUs" in message


def test_a_ray_that_does_not_answer_is_refused_at_once(dry_run_refused: Refused) -> None:
    address = f"127.0.0.1:{free_port()}"
    message = dry_run_refused(f"ray.address={address}")
    assert f"ray.address '{address}' does not answer" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("behaviours=[{kind: trained, policy: nope}]", "no artifact agents/nope"),
        ("reality.budget.steps=5", "steps must be <= reality.budget.steps=5, got 10"),
    ],
)
def test_collect_is_checked_in_a_dry_run(
    override: str, message: str, dry_run_refused: Refused
) -> None:
    assert message in dry_run_refused(override)
