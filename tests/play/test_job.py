"""The command `mesocosm play`: what it refuses before it starts, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
from factories import wait_until
from serve.worlds import untrained

from mesocosm.cli.main import main
from mesocosm.envs.ledger import Ledger
from mesocosm.store.artifacts import Storage

from .conftest import SAMPLES
from .test_game import LINE


@pytest.fixture
def world(root: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The root of a storage with the world `line`, whose environment is none of ours."""
    monkeypatch.syspath_prepend(SAMPLES)
    Storage(root).make("worlds", "line", {}, untrained(*LINE, terminal=0.0).save)
    return root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r"world must name a world, got ''; try world="),
        ("world=none", r"none"),
        ("world=line port=70000", r"port must be from 1024 to 65535, or 0 .*got 70000"),
        ("world=line reality.env=drawn:Drawn", r"reality\.budget\.steps must be set with .*env="),
        ("world=line reality.horizon=9", r"reality\.budget\.steps must be set with .*horizon=9"),
        ("world=line reality.budget.steps=5", r"reality.env='Test-v0' does not exist"),
        (
            "world=line reality.budget.steps=5 reality.env=drawn:Drwn",
            r"neither registers nor defines 'Drwn'; did you mean 'Drawn'",
        ),
        (
            "world=line reality.budget.steps=5 reality.env=CartPole-v1",
            r"CartPole-v1' has the observation space .*, and world line .*; use the world's own",
        ),
        (
            "world=line reality.budget.money=5 reality.env=drawn:Drawn",
            r"reality.budget.money=5 has no effect if reality is free",
        ),
        (
            "world=line reality.budget.steps=5 reality.env=drawn:Drawn ledger=a/b",
            r"a ledger's name must consist of .*got 'a/b'",
        ),
    ],
)
def test_what_cannot_be_played_is_one_sentence(
    words: str, message: str, world: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["play", *words.split(), f"storage.root={world}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not Storage(world).list("runs/play") and not Storage(world).list("ledgers")


def test_a_port_that_is_taken(world: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["play", "world=line", f"port={port}", f"storage.root={world}"]) == 2
    message = capsys.readouterr().err
    assert f"port={port}: the port is taken on 127.0.0.1; set port to another one" in message


def test_an_environment_that_is_a_program_is_not_run_unasked(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A world may be a stranger's."""
    world = untrained(*LINE)
    world.codec["environment"]["id"] = "drawn:Drawn"
    Storage(root).make("worlds", "strange", {}, world.save)
    words = ["play", "world=strange", "reality.budget.steps=5", f"storage.root={root}"]
    assert main(words) == 2
    assert "if you trust it, try reality.env=drawn:Drawn" in capsys.readouterr().err


def test_a_dry_run(world: str, capsys: pytest.CaptureFixture[str]) -> None:
    def dry(*words: str) -> Any:
        capsys.readouterr()
        words = ("play", "world=line", "--dry-run", "--json", f"storage.root={world}", *words)
        assert main(words) == 0
        return json.loads(capsys.readouterr().out)

    plan = {"world": "line", "environment": "Test-v0", "members": 3, "port": "any free one"}
    assert dry() == plan | {"real steps": 0, "price": 0.0}
    priced = ("reality.env=drawn:Drawn", "reality.budget.steps=5", "reality.price.per_step=0.5")
    facts = dry(*priced)
    assert facts["reality"] == "drawn:Drawn" and facts["real steps"] == "at most 5"
    assert facts["price"] == "0.5 a step, 0 a reset USD"
    assert dry(*priced)["ledger"] == facts["ledger"] != dry(*priced, "ledger=mine")["ledger"]
    assert not Storage(world).list("runs") and not Storage(world).list("ledgers")


def started(root: str, *words: str) -> tuple[subprocess.Popen[str], str, str]:
    """A process of the command, its address and its token."""
    command = [sys.executable, "-m", "mesocosm", "play", "world=line", *words]
    command += [f"storage.root={root}", "tracking.uri=none"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=SAMPLES)
    assert process.stderr is not None
    text = ""
    while "#" not in text:
        line = process.stderr.readline()
        assert line, text
        text += line
    match = re.search(r"(http://127\.0\.0\.1:\d+)/#(\S+)", text)
    assert match is not None, text
    return process, match[1], match[2]


@pytest.mark.integration
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_it(world: str, number: int) -> None:
    """Real steps are confirmed, and neither a process nor the port stays."""
    reality = ("reality.env=drawn:Drawn", "reality.budget.steps=5", "ledger=mine")
    process, url, token = started(world, *reality)
    try:
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {token}"
        begun = session.post(f"{url}/v1/begin", json={"split": "reality"}, timeout=60)
        assert begun.status_code == 200, begun.text
        for _ in range(2):
            reply = session.post(f"{url}/v1/step", json={"action": [0.1]}, timeout=60)
            assert reply.json()["beside"], reply.text
        assert requests.get(f"{url}/v1/play", timeout=60).status_code == 401
        process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        process.kill()
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=10)
    totals = Ledger(Storage(world), "mine").totals()
    assert totals.purposes["play"].steps == 2 and not totals.unconfirmed
    (run,) = (Path(world) / "runs" / "play").iterdir()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    written = "".join(path.read_text() for path in run.rglob("*") if path.is_file())
    assert url in written and token not in written


@pytest.mark.slow
@pytest.mark.integration
def test_a_killed_one_leaves_its_steps_counted(world: str) -> None:
    reality = ("reality.env=drawn:Drawn", "reality.budget.steps=5", "ledger=mine")
    process, url, token = started(world, *reality)
    headers = {"Authorization": f"Bearer {token}"}
    requests.post(f"{url}/v1/begin", json={"split": "reality"}, headers=headers, timeout=60)
    requests.post(f"{url}/v1/step", json={"action": [0.1]}, headers=headers, timeout=60)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: process.poll() is not None)
    assert Ledger(Storage(world), "mine").totals().purposes["play"].steps == 1
