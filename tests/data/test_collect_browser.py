"""Collecting in a browser: pages that hang or open dialogs, and workers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browsers
import factories
import pytest

from mesocosm.envs.browser import chromium
from mesocosm.policies.behaviours import BehaviourConfig

from .reality import SAMPLE_ENVS, config

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from traps import Traps
env = Traps(sys.argv[2])
env.reset(seed=0)
print("ready", flush=True)
time.sleep(600)
"""


@browsers.needed
@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("dialog", "the page opened a dialog: 'Are you sure?'"),
        pytest.param("hang", "did not answer in 5 s", marks=pytest.mark.slow),
    ],
)
def test_a_bad_page_is_dropped_metered_and_named(
    page: str,
    reason: str,
    root: str,
    mark: str,
    tmp_path: Path,
    collect: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if page == "hang":
        monkeypatch.setattr(chromium, "ANSWER_S", 5.0)
    monkeypatch.syspath_prepend(str(SAMPLE_ENVS))
    reality = {
        "kwargs": {"folder": str(tmp_path), "pages": ["good", page]},
        "success": "info.success",
    }
    press = [BehaviourConfig("scripted", function="traps:press")]
    artifact = collect(
        config(root, "traps:Traps", steps=12, reality=reality, behaviours=press, lanes=1)
    )
    counts, dropped = artifact.meta["counts"], artifact.meta["dropped"]
    assert counts["dropped"] == len(dropped) >= 1 and counts["outcomes"]["terminated"] >= 1
    assert {each["steps"] for each in dropped} == {2}
    assert all(reason in each["reason"] and "step 2" in each["reason"] for each in dropped)
    assert artifact.meta["ledger"]["purposes"]["collect"]["steps"] == 12
    assert not browsers.processes(mark)


@browsers.needed
def test_no_browser_outlives_a_killed_worker(mark: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(SAMPLE_ENVS), str(tmp_path)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        folders = {path for path in browsers.processes(mark) if "mesocosm-browser" in path.name}
        assert len(folders) == 1
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    factories.wait_until(lambda: not browsers.processes(mark))
    factories.wait_until(lambda: not any(map(Path.exists, folders)))
