"""`mesocosm doctor` through the command line: its exit status and its checklist, on a sound machine
and on a broken one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mesocosm.store.artifacts import Storage

pytestmark = pytest.mark.usefixtures("ray_local")
PLATFORM = Path(__file__).resolve().parents[2] / "platform"


def doctor(*arguments: str, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status and the checks by name, of another process that is given the session's Ray."""
    import ray

    command = [
        sys.executable,
        *(["-S"] if "PYTHONPATH" in env else []),
        "-m",
        "mesocosm.cli.main",
        "doctor",
        "--json",
    ]
    address = f"ray.address={ray.get_runtime_context().gcs_address}"
    terminal = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [*command, address, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**terminal, **env},
    )
    assert done.stdout, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


@pytest.mark.slow
def test_a_sound_machine(root: str) -> None:
    code, checks = doctor(f"storage.root={root}")
    assert code == 0 and all(check["ok"] for check in checks.values())
    assert {"python", "torch", "compiler", "storage", "mlflow", "ray", "disk"} <= checks.keys()
    assert torch.__version__.startswith(checks["torch"]["found"])
    assert checks["storage"]["found"] == root and "4 CPUs" in checks["ray"]["found"]
    assert Storage(root).list("scratch") == [], "nothing is left behind"


@pytest.mark.slow
def test_a_broken_machine(tmp_path: Path) -> None:
    """No mujoco, a storage root that is a file, no compiler: status 1 and a fix each, but a
    compiler is wanted for CUDA alone.
    """
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith("mujoco"):
            (packages / entry.name).symlink_to(entry)
    (tmp_path / "root").write_text("a file")
    path = os.pathsep.join([str(packages), str(PLATFORM)])
    code, checks = doctor(
        f"storage.root={tmp_path / 'root'}", PYTHONPATH=path, PATH=str(Path(sys.executable).parent)
    )
    assert code == 1
    assert (checks["mujoco"]["ok"], checks["mujoco"]["found"], checks["mujoco"]["fix"]) == (
        False,
        "not installed",
        "run pip install 'mesocosm[all]'",
    )
    assert (
        not checks["storage"]["ok"]
        and "storage.root" in checks["storage"]["fix"]
        and str(tmp_path / "root") in checks["storage"]["found"]
    )
    assert not checks["mlflow"]["ok"] and "tracking.uri" in checks["mlflow"]["fix"]
    assert (
        checks["compiler"]["found"].startswith("none")
        and checks["compiler"]["ok"] is not torch.cuda.is_available()
    )
    assert checks["ray"]["ok"] and checks["torch"]["ok"]
