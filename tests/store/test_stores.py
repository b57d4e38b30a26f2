"""S3-compatible stores that lack features: what works without them, and what `doctor` reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesocosm.cli.main import main
from mesocosm.cluster.checks import storage_check
from mesocosm.config import JobConfig, StorageConfig
from mesocosm.errors import StorageError, UsageError
from mesocosm.store.artifacts import Storage

from .conftest import fill_with
from .proxy import Conflicts, HttpProxy, drop_if_none_match, no_condition, reject_trailers

TESTS = Path(__file__).parents[1]
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"
Proxied = Callable[..., str]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESOCOSM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def proxied(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxied]:
    """`proxied(change, tls=False)`: the root, behind a proxy that changes or rejects requests."""
    proxies = []

    def make(change: object, *, tls: bool = False, reword: object = None) -> str:
        proxy = HttpProxy(os.environ["AWS_ENDPOINT_URL"], change, tmp_path if tls else None, reword)
        proxies.append(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        if tls:
            monkeypatch.setenv("AWS_CA_BUNDLE", proxy.ca)
        return f"{s3}/{tmp_path.name}"

    yield make
    for proxy in proxies:
        proxy.close()


def _check(root: str) -> tuple[bool, str]:
    check = storage_check(JobConfig(storage=StorageConfig(root)))
    return check.ok, check.found


@pytest.mark.parametrize("setting", [None, "when_required", "WHEN_REQUIRED"])
def test_a_store_that_rejects_checksum_trailers(
    proxied: Proxied, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    monkeypatch.delenv(CHECKSUMS, raising=False)
    if setting is not None:
        monkeypatch.setenv(CHECKSUMS, setting)
    root = proxied(reject_trailers, tls=True)
    assert _check(root) == (True, root)
    storage = Storage(root)
    content = os.urandom(1 << 20)
    fill = fill_with(x=content)
    storage.make("worlds", "w", {}, fill)
    storage.make("worlds", "w", {"n": 2}, fill, force=True)
    shutil.rmtree(storage.local_path("cache"))
    artifact = storage.artifact("worlds", "w")
    assert (artifact.path / "x").read_bytes() == content and artifact.meta == {"n": 2}
    assert storage.create("ledgers/l/0.json", b"a") and not storage.create("ledgers/l/0.json", b"b")
    storage.remove("ledgers")
    assert storage.list("ledgers") == []


def test_the_trailers_of_botocores_default_are_named(
    proxied: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECKSUMS, "when_supported")
    root = proxied(reject_trailers, tls=True)
    ok, text = _check(root)
    assert not ok and "NotImplemented" in text and f"{CHECKSUMS}=when_required" in text
    with pytest.raises(StorageError, match=rf"runs/x .*NotImplemented.*{CHECKSUMS}=when_required"):
        Storage(root).write("runs/x", b"x")


def test_a_creation_that_conflicts_is_tried_again(proxied: Proxied) -> None:
    conflicts = Conflicts()
    root = proxied(conflicts)
    storage = Storage(root)
    assert storage.create("ledgers/l/0.json", b"a") and not storage.create("ledgers/l/0.json", b"b")
    assert conflicts.tries == 4 and storage.read("ledgers/l/0.json") == b"a"


@pytest.mark.parametrize("reword", [None, no_condition])
def test_a_store_with_conditional_writes_is_accepted(proxied: Proxied, reword: object) -> None:
    """Whether or not it names the condition that failed."""
    root = proxied(lambda headers: None, reword=reword)
    assert _check(root) == (True, root)
    storage = Storage(root)
    assert storage.create("ledgers/l/0.json", b"a") and not storage.create("ledgers/l/0.json", b"b")


def test_a_store_without_conditional_writes_is_refused(proxied: Proxied) -> None:
    root = proxied(drop_if_none_match)
    ok, text = _check(root)
    assert not ok and "If-None-Match" in text and root in text
    with pytest.raises(UsageError, match="creates a file twice"):
        Storage(root).check_writable()
    assert Storage(root).files("runs") == {}, "nothing is left behind"


@pytest.mark.slow
def test_a_lost_connection_names_the_artifact(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mesocosm.store.objects.PATIENCE", 1.0)
    proxy = HttpProxy(os.environ["AWS_ENDPOINT_URL"], lambda headers: None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage = Storage(f"{s3}/{tmp_path.name}")
    storage.make("worlds", "w", {}, fill_with(x="x"))
    proxy.close()
    with pytest.raises(StorageError, match=r"worlds/w.*S3 does not answer"):
        storage.find("worlds", "w")
    with pytest.raises(StorageError, match=r"worlds/v.*S3 does not answer"):
        storage.make("worlds", "v", {}, fill_with(), force=True)
    assert main(["data", "list", f"storage.root={storage.root}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "S3 does not answer" in error and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_storage_without_trailers(proxied: Proxied, s3_environment: dict[str, str]) -> None:
    """The other tests of S3, in a process of their own, on the proxy that rejects trailers."""
    proxied(reject_trailers, tls=True)
    names = (
        "store/test_storage.py",
        "cli/test_storage.py",
        "store/test_cache.py",
        "test_damage.py",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow"]
    command += [str(TESTS / name) for name in names]
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    environment = os.environ | s3_environment | {CHECKSUMS: "when_required"}
    environment |= {"AWS_ENDPOINT_URL": endpoint, "MESOCOSM_TEST_S3_ENDPOINT": endpoint}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-5000:]
