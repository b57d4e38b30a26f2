"""The commands of every page, run as a reader would type them, in the page's order, each in a
folder and a storage of the page's own.

Jobs are given what makes them short (SHORT). Where a page says `ID` or `ID` stands the newest
artifact of the kind that the word before it names, as the page's own commands made it, or else what
came with the folder. A served world runs until the page's end, or until it serves another.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from factories import free_port

import mesocosm
from mesocosm.jobs.registry import JOBS
from mesocosm.scaling import fit
from mesocosm.scaling.table import CellTable
from mesocosm.store.artifacts import KINDS, Storage

from .reader import REPOSITORY, Command, blocks, commands, lay_out, name, pages
from .test_docs import SOMEBODY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

AGENT = ("iterations=1", "num_envs=8", "rollout=32", "snapshots=1")
FITS = ("model.base_steps=50", "model.head_steps=50")
SHORT = {
    "collect": ("steps=400", "workers=0"),
    "tokenize": ("steps=200",),
    "pretrain": ("model.size=10k", "train.epochs=null", "train.steps=20", *FITS),
    "train-agent": AGENT,
    "evaluate": (
        "episodes=2",
        "graded=0",
        "adversary=0",
        "policies=[]",
        "starts=8",
        "horizons=[1]",
        "full=false",
    ),
    "propose": ("imagined=8",),
    "baseline": ("steps=1200", "judge_every=null", "judge_episodes=2", "select_episodes=0"),
    "loop": (
        "rounds=1",
        "collect.steps=400",
        "collect.workers=0",
        "pretrain.train.steps=20",
        *(f"pretrain.{word}" for word in FITS),
        *(f"agent.{word}" for word in AGENT),
        "evaluate.episodes=2",
        "evaluate.graded=0",
        "evaluate.policies=[]",
        "baselines=[]",
    ),
    "sweep": (
        "grid.sizes=[10k]",
        "grid.data=[2000,4000]",
        "grid.seeds=[0]",
        "train.warmup=2",
        *FITS,
    ),
}
"""What a job's command is given beside its own words."""
QUIET = "tracking.uri=none"
"""What every job is given: MLflow's import takes a quarter of a short job's CPU, and has tests of
its own.
"""
BESIDES = {"/plan.yaml": "data.datasets=[ID]", "collect/halfcheetah": "reality.horizon=50"}
"""What a command with such a word is given, too: the newest plan may be of a law without data of
its own, and few steps must make enough episodes.
"""
ELSEWHERE = {
    "make install": "the tests run in what it made",
    "make run": "README's `mesocosm loop` is what it runs, once it has installed",
    "make test": "this is a part of it",
}
NAMED = {
    "dataset": "datasets",
    "data show": "datasets",
    "world": "worlds",
    "tokenizer": "tokenizers",
    "agent": "agents",
    "law": "laws",
    "plan": "plans",
}
PATIENCE = 900
"""Seconds for one command."""


def _runnable(page: Path) -> list[Command]:
    return [
        command for block in blocks(page) for command in commands(block) if command.no_run is None
    ]


RUN = [page for page in pages() if _runnable(page)]


@pytest.fixture(scope="session")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home of its own, this package on PATH and PYTHONPATH."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    (home / "bin" / "mesocosm").write_text(f'#!/bin/sh\nexec {sys.executable} -m mesocosm "$@"\n')
    (home / "bin" / "mesocosm").chmod(0o755)
    path = os.pathsep.join(
        [str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    python = os.pathsep.join(
        filter(None, [str(Path(mesocosm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    return os.environ | {
        "HOME": str(home),
        "MESOCOSM_HOME": str(home / ".mesocosm"),
        "PATH": path,
        "PYTHONPATH": python,
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Path:
    """A folder in which the shortest of each job was run: a page may begin with what another page
    makes. The loop, which several pages run, comes first: its artifacts are not the newest then.
    """
    folder = tmp_path_factory.mktemp("made")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    for text in (
        "mesocosm loop -c loop/quickstart",
        "mesocosm collect -c collect/pendulum",
        "mesocosm pretrain -c pretrain/pendulum data.datasets=[ID]",
        "mesocosm train-agent -c agent/pendulum-ppo world=ID",
    ):
        _run(_filled(text, folder, {}), folder, env)
    (folder / "configs").unlink()
    sizes, data = np.meshgrid(np.geomspace(1e4, 3e6, 5), np.geomspace(1e4, 1e6, 5))
    rows = [
        f"{n:.0f},{d:.0f},{0.3 + 60 / n**0.5 + 8 / d**0.4:.6f}"
        for n, d in zip(sizes.ravel(), data.ravel(), strict=True)
    ]
    (folder / "table.csv").write_text("\n".join(["params,data,loss", *rows]) + "\n")
    law = fit.fit(CellTable.read(folder / "table.csv"))
    law.write(folder / "law.json")
    storage = Storage(str(folder / ".mesocosm"))
    storage.make(
        "laws",
        "law0",
        {"inputs": {"datasets": storage.list("datasets")}, "config": {}},
        lambda to: law.write(to / "law.json"),
    )
    return folder


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_commands_of_a_page_run(
    page: Path, made: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(made, folder)
    lay_out(page, folder)
    heard = {"port": str(free_port())}
    shell: list[str] = []
    with _server() as serve:
        for command in _runnable(page):
            if command.text in ELSEWHERE:
                continue
            for file in folder.glob("*.py"):
                file.write_text(_filled(file.read_text(), folder, heard))
            text = _filled(command.text, folder, heard)
            if re.match(r"\w+=", text):
                shell.append(text)
                continue
            serves = text.startswith("mesocosm serve ") and "--dry-run" not in text
            said = (
                serve(text, folder, env) if serves else _run("\n".join([*shell, text]), folder, env)
            )
            for what, pattern in {
                "session": r'"session": ?"([^"]+)"',
                "address": r"ray\.address=127\.0\.0\.1:(\d+)",
            }.items():
                if match := re.search(pattern, said):
                    heard[what] = match[1]


def _filled(text: str, folder: Path, heard: dict[str, str]) -> str:
    """The command with the reader's own in place of what stands for it, and with what makes its job
    short.
    """
    text = " ".join([text, *(more for word, more in BESIDES.items() if word in text)])

    def newest(match: re.Match[str]) -> str:
        before = text[: match.start()]
        at, kind = max((before.rfind(word), kind) for word, kind in NAMED.items())
        assert at >= 0, f"what is {match[0]} in {text!r}?"
        found = sorted(
            (folder / ".mesocosm" / kind).glob("*/COMMIT.json"),
            key=lambda path: path.stat().st_mtime,
        )
        assert found and kind in KINDS, f"no {kind} for {text!r}"
        return found[-1].parent.name

    for word, what in (
        ("<as reset said>", "session"),
        ("SESSION", "session"),
        ("PORT", "address"),
        ("8000", "port"),
    ):
        if what in heard:
            text = re.sub(rf"(?<!\d){re.escape(word)}(?!\d)", heard[what], text)
    text = SOMEBODY.sub(newest, text)
    words = text.split()
    if words[0] != "mesocosm" or words[1] not in JOBS:
        return text
    return " ".join([text, *(f"'{word}'" for word in (*SHORT.get(words[1], ()), QUIET))])


def _run(script: str, folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{script}"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "curl" not in script or '"detail"' not in done.stdout, f"{script}\n{done.stdout}"
    return done.stdout + done.stderr


@contextmanager
def _server() -> Iterator[Callable[[str, Path, dict[str, str]], str]]:
    """`serve(command, folder, env)` starts a world, waits until it is served and gives what was
    said; one at a time, ended at the end as by Ctrl-C.
    """
    running: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        while running:
            process = running.pop()
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(120) == 0, "Ctrl-C is how it ends"
            finally:
                process.kill()

    def serve(text: str, folder: Path, env: dict[str, str]) -> str:
        end()
        log = folder / "served.log"
        with open(log, "wb") as out:
            running.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {text}"],
                    cwd=folder,
                    env=env,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
        until = time.monotonic() + PATIENCE
        while "make_vec(" not in log.read_text() or (
            "http=" in text and "curl" not in log.read_text()
        ):
            assert running[0].poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        return log.read_text()

    try:
        yield serve
    finally:
        end()
