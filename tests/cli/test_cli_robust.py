"""The command line beside other people's code: environments that print, modules with Python's own
names, errors that nobody expected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mesocosm.cli.main import main

pytestmark = pytest.mark.integration

COLLECT = "collect reality.env=chatty:Chatty steps=4 lanes=1 workers=0 --json storage.root=root"
CHATTY = """
import os, subprocess
import gymnasium, numpy as np

print("imported")

class Chatty(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        os.write(1, b"from C\\n")
        subprocess.run(["echo", "from a child"], check=True)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        print("step!", action, flush=True)
        return np.zeros(1, np.float32), 0.0, False, False, {}
"""


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mesocosm", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    (tmp_path / "chatty.py").write_text(
        CHATTY + "import atexit\natexit.register(print, 'at exit')\n"
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_json_is_all_of_stdout_when_an_environment_prints(option: list[str], chatty: Path) -> None:
    done = _run(chatty, *COLLECT.split(), *option)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "imported" in done.stderr and "at exit" in done.stderr
    assert option or "step!" in done.stderr


def test_json_in_this_process(
    chatty: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (chatty / "chatty.py").write_text(CHATTY)
    monkeypatch.chdir(chatty)
    assert main(COLLECT.split()) == 0
    print("printed after the command")
    out, err = capfd.readouterr()
    result, _, rest = out.rpartition("}\n")
    assert json.loads(result + "}") and rest == "printed after the command\n"
    assert "from C" in err and "from a child" in err and "step!" in err


SHADOWS = ["http.py", "queue.py", "types.py", "statistics.py", "colorsys.py", "copy.py"]
HUE = """
import colorsys, gymnasium

def make():
    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)
    return gymnasium.make("CartPole-v1")
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_users_module_does_not_replace_pythons_own(workers: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in SHADOWS:
        (folder / name).write_text("raise RuntimeError('mine')\n")
    (folder / "hue.py").write_text(HUE)
    command = str(Path(sys.executable).parent / "mesocosm")
    words = f"collect reality.env=hue:make steps=20 lanes=1 workers={workers} storage.root=root"
    done = subprocess.run(
        [command, *words.split()], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def _raises(*arguments: Any) -> None:
    raise ZeroDivisionError("division\nby zero")


def test_an_unexpected_error_of_a_job_is_one_sentence_and_in_its_log(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mesocosm.jobs.collect._collect", _raises)
    assert main(["collect", "reality.env=CartPole-v1", f"storage.root={root}"]) == 1
    (log,) = Path(root).glob("runs/collect/*/log.txt")
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        message
        == "mesocosm: the command failed with ZeroDivisionError: division by zero; the traceback"
        f" is in {log}"
    )
    assert "in _raises" in log.read_text()
    assert json.loads((log.parent / "status.json").read_text())["state"] == "failed"


def test_an_unexpected_error_without_a_run_names_the_file_of_its_traceback(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("mesocosm.jobs.collect._resolve", _raises)
    assert main(["collect", "reality.env=CartPole-v1", f"storage.root={root}", "--dry-run"]) == 1
    (path,) = tmp_path.glob("mesocosm-traceback-*.txt")
    assert (
        capsys.readouterr().err
        == "mesocosm: the command failed with ZeroDivisionError: division by zero; the traceback"
        f" is in {path}\n"
    )
    assert "in _raises" in path.read_text()


@pytest.mark.parametrize("words", [["data", "list"], ["data", "list", "--json"]])
def test_a_closed_pipe_is_no_traceback(words: list[str], tmp_path: Path) -> None:
    """`mesocosm data list | head -0`"""
    (tmp_path / "root" / "datasets").mkdir(parents=True)
    command = [sys.executable, "-m", "mesocosm", *words, "storage.root=root"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=280
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
