"""Storage on a real S3 endpoint that is damaged, raced, interrupted and cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from factories import SMALL_WORLD, cart_in_bucket

from mesocosm.cli.main import main
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.store import objects
from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint

from .conftest import fill_with, python

pytestmark = pytest.mark.usefixtures("temporary_folder")
Watch = Callable[[bytes], None]


class Proxy:
    """A TCP proxy before a plain HTTP endpoint. `watch` sees all bytes of clients before they are
    passed on.
    """

    def __init__(self, endpoint: str, watch: Watch):
        parts = urlsplit(endpoint)
        assert parts.scheme == "http" and parts.hostname, endpoint
        self._server = (parts.hostname, parts.port or 80)
        self._watch = watch
        self._open: set[socket.socket] = set()
        self._listener = self._listen(0)
        self.port = self._listener.getsockname()[1]

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            self._open |= {client, server}
            for ends in ((client, server, self._watch), (server, client, lambda data: None)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, watch: Watch) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                watch(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)

    def cut(self) -> None:
        """Close every connection, and refuse new ones."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._listener = self._listen(self.port)


@pytest.fixture
def proxied(s3: str) -> Iterator[Callable[[Watch], Proxy]]:
    """`proxied(watch)`: a proxy before the endpoint of `s3`."""
    proxies: list[Proxy] = []

    def make(watch: Watch) -> Proxy:
        proxies.append(Proxy(os.environ["AWS_ENDPOINT_URL"], watch))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.cut()


def test_a_flipped_byte_in_a_shard_on_the_bucket(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = cart_in_bucket(f"{s3}/{tmp_path.name}", tmp_path)
    files = [path for path in storage.files("datasets/cart") if path.endswith("obs_num.npy")]
    name, path = files[0].split("/", 3)[3], storage._path(files[0])
    good = storage.fs.cat(path)
    storage.fs.pipe(path, good[:-1] + bytes([good[-1] ^ 1]))
    words = ["pretrain", f"storage.root={storage.root}", "data.datasets=[cart]", "--dry-run"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert (
        f"datasets/cart: file '{name}' is damaged (its sha256 is not that of COMMIT.json)" in error
    )
    assert "make the artifact again by `mesocosm collect` with --force, or restore" in error
    assert f" {storage.url(files[0])} from a copy" in error
    storage.fs.rm(path)
    shutil.rmtree(storage.local_path("cache"))
    message = rf"datasets/cart: file '{re.escape(name)}' is missing; make"
    with pytest.raises(ArtifactError, match=message):
        storage.artifact("datasets", "cart")
    storage.fs.pipe(path, good)
    assert storage.artifact("datasets", "cart").id == "cart", "restored as the message says"


@pytest.mark.integration
def test_two_processes_make_the_same_artifact_at_once(any_root: str, tmp_path: Path) -> None:
    code = """
import time
from pathlib import Path
from mesocosm.store.artifacts import Storage
def fill(folder):
    for name in "abc":
        (folder / name).write_text({me!r} * 1000)
    Path({at!r}, {me!r}).touch()
    while not Path({at!r}, {other!r}).exists():
        time.sleep(0.01)
print(Storage({root!r}).make("laws", "l", {{"maker": {me!r}}}, fill).meta["maker"])
"""
    names = {"at": str(tmp_path), "root": any_root}
    pairs = (("1", "2"), ("2", "1"))
    makers = [python(code.format(me=me, other=other, **names)) for me, other in pairs]
    outputs = [maker.communicate(timeout=600) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], outputs
    (winner,) = {out.strip() for out, _ in outputs}
    lost = ["laws/l was finished by another process meanwhile" in err for _, err in outputs]
    assert lost == [winner == "2", winner == "1"]
    storage = Storage(any_root)
    files = [path for path in storage.files("laws/l") if not path.endswith("COMMIT.json")]
    contents = [storage.read(path) for path in files]
    assert contents == [winner.encode() * 1000] * 3, "whole, and nothing of the other's"
    assert not list(storage.local_path("scratch").iterdir())


MIB = 1 << 20
MAKER = """
from mesocosm.store.artifacts import Storage
def fill(folder):
    (folder / "small").write_bytes(b"s" * 1000)
    (folder / "large").write_bytes(b"0123456789abcdef" * (104 << 16))
Storage({root!r}).make("datasets", "d", {{}}, fill)
"""


def test_an_interrupted_upload_is_never_seen_as_whole(
    s3: str, tmp_path: Path, proxied: Callable[..., Proxy], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its maker is killed when half of a file's parts are under way."""
    seen, stalled, go_on = [0], threading.Event(), threading.Event()

    def watch(data: bytes) -> None:
        seen[0] += len(data)
        if seen[0] > 20 * MIB:
            stalled.set()
            go_on.wait(60)

    root = f"{s3}/{tmp_path.name}"
    proxy = proxied(watch)
    maker = python(MAKER.format(root=root), AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")
    assert stalled.wait(60), maker.communicate()
    maker.send_signal(signal.SIGKILL)
    maker.communicate(timeout=30)
    go_on.set()
    proxy.cut()
    storage = Storage(root)
    assert storage.find("datasets", "d") is None
    with pytest.raises(UsageError, match=r"no artifact datasets/d in .* was interrupted: run"):
        storage.artifact("datasets", "d")

    def garbage(*words: str) -> dict[str, int]:
        capsys.readouterr()
        command = ["storage", "gc", f"storage.root={root}", "--older-than", "0", "--json", *words]
        assert main(command) == 0
        rows = json.loads(capsys.readouterr().out)["remains"]
        return {row["what"]: row["bytes"] for row in rows}

    sizes = garbage("--dry-run")
    assert 0 <= sizes.pop("upload") < 104 * MIB
    assert sizes == {"scratch": 1000 + 104 * MIB, "unfinished artifact": 1000}
    again = python(MAKER.format(root=root))
    assert again.wait(120) == 0, again.communicate()
    names = {path.name for path in storage.artifact("datasets", "d").path.iterdir()}
    assert names == {"large", "small"}
    assert set(garbage("--yes")) == {"scratch", "superseded files", "upload"}
    assert garbage("--dry-run") == {} and storage.artifact("datasets", "d").id == "d"


@pytest.mark.integration
def test_an_endpoint_that_never_answered_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for name, value in (("ENDPOINT_URL", endpoint), ("ACCESS_KEY_ID", "x")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        began = time.monotonic()
        message = r"storage\.root 's3://bucket/p' cannot be written .*127\.0\.0\.1"
        with pytest.raises(UsageError, match=message):
            Storage("s3://bucket/p").check_writable()
        assert time.monotonic() - began < objects.PATIENCE / 2


@pytest.mark.slow
def test_an_outage_is_waited_out(
    s3: str, tmp_path: Path, proxied: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut during an upload and during a download, for longer than the client's own retries."""
    passed, threshold, cuts = [0], [20 * MIB], [0]

    def watch(data: bytes) -> None:
        passed[0] += len(data)
        if passed[0] > threshold[0]:
            threshold[0] = 1 << 60
            cuts[0] += 1
            proxy.cut()
            threading.Timer(8.0, proxy.mend).start()

    proxy = proxied(watch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    storage = Storage(f"{s3}/{tmp_path.name}")
    storage.check_writable()
    content = os.urandom(40 * MIB)
    artifact = storage.make("datasets", "d", {}, fill_with(large=content))
    assert cuts == [1] and (artifact.path / "large").read_bytes() == content
    shutil.rmtree(storage.local_path("cache"))
    threshold[0] = passed[0] + 1500  # the second request or so of the download
    assert (storage.artifact("datasets", "d").path / "large").read_bytes() == content
    assert cuts == [2]


CHECKPOINTS = ("train.steps=4000", "train.checkpoint_every=300", "train.keep_checkpoints=100")
OUTAGE = 30.0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_checkpoint_outlives_an_outage(
    s3: str, tmp_path: Path, proxied: Callable[..., Proxy]
) -> None:
    """The endpoint is cut for 30 s when a checkpoint's first bytes are under way: no worker is
    started again, and the checkpoint is resumed from.
    """
    storage = cart_in_bucket(f"{s3}/{tmp_path.name}", tmp_path)
    name, mended = "", threading.Event()

    def watch(data: bytes) -> None:
        nonlocal name
        match = re.match(rb"(?:PUT|POST) \S*/(checkpoint_[^/\s]+)/\S* HTTP", data)
        if match and not name:
            name = match[1].decode()
            proxy.cut()
            threading.Timer(OUTAGE, lambda: (proxy.mend(), mended.set())).start()

    proxy = proxied(watch)
    mark = uuid.uuid4().hex
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "MESOCOSM_TEST_MARK": mark}

    def start() -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "mesocosm.cli.main",
            "pretrain",
            "data.datasets=[cart]",
            "tracking.uri=none",
        ]
        command += [f"storage.root={storage.root}", "train.lr=3e-3", *SMALL_WORLD, *CHECKPOINTS]
        env = os.environ | environment
        with open(tmp_path / "output", "ab") as output:
            streams = {"stdout": output, "stderr": output, "start_new_session": True}
            return subprocess.Popen(command, env=env, **streams)

    def until(condition: Callable[[], bool], seconds: float, job: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + seconds
        while not condition():
            running = time.monotonic() < end and job.poll() is None
            assert running, (tmp_path / "output").read_text()[-5000:]
            time.sleep(0.2)

    def losses(run: str) -> list[int]:
        lines = (storage.read(f"runs/pretrain/{run}/metrics.jsonl") or b"").splitlines()
        return [line["step"] for line in map(json.loads, lines) if "train/loss" in line]

    try:
        job = start()
        until(lambda: bool(name), 480, job)
        until(mended.is_set, 2 * OUTAGE, job)
        (id,) = storage.list("runs/checkpoints")
        until(lambda: checkpoint.latest(storage, id) is not None, 180, job)
        first = storage.list("runs/pretrain")[-1]
        until(lambda: max(losses(first), default=0) > 300, 120, job)  # it goes on
        _kill(mark)
        job.wait(60)
        last = checkpoint.latest(storage, id)
        assert last is not None
        assert losses(first) == sorted(set(losses(first))), "no worker was started again"
        saved = tmp_path / "saved" / name
        remote = storage._path(f"runs/checkpoints/{id}/{name}/")
        storage.fs.get(remote, str(saved), recursive=True)
        checkpoint.verify(saved)
        assert checkpoint.read_progress(saved).step == 300
        job = start()

        def resumed() -> bool:
            runs = set(storage.list("runs/pretrain")) - {first}
            return any(last[1].step + 1 in losses(run) for run in runs)

        until(resumed, 240, job)
        log = storage.read(f"runs/pretrain/{storage.list('runs/pretrain')[-1]}/log.txt") or b""
        assert f"resuming from step {last[1].step} of 4000".encode() in log
    finally:
        _kill(mark)


def _kill(mark: str) -> None:
    """End this test's own processes: those whose environment holds `mark`."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"MESOCOSM_TEST_MARK={mark}".encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
