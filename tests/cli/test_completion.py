"""Shell completion, asked of a real bash: commands, options, config keys, files, clusters and jobs,
without importing what jobs run on.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from mesocosm import config
from mesocosm.cli import completion
from mesocosm.cli.keys import config_keys, config_of
from mesocosm.cli.main import commands as program
from mesocosm.cli.main import main
from mesocosm.cluster.records import SubmittedJob, write
from mesocosm.jobs.registry import JOBS

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "deepspeed", "mlflow", "gymnasium")
ASK = """
eval "$(mesocosm completion bash)"
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    if [[ "$line" == *" " ]]; then COMP_WORDS+=(""); fi
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    "$(complete -p mesocosm | sed 's/.* -F //; s/ .*//')" mesocosm "${COMP_WORDS[COMP_CWORD]}"
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which `mesocosm` is this very package, on which nothing heavy can be imported, and
    a home of its own for jobs' records.
    """
    program = tmp_path / "bin" / "mesocosm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mesocosm "$@"\n')
    program.chmod(0o755)
    for name in HEAVY:
        (tmp_path / "traps").mkdir(exist_ok=True)
        (tmp_path / "traps" / f"{name}.py").write_text(
            f"open({str(tmp_path / 'heavy')!r}, 'a').write('{name} ')\nraise"
            f" ImportError('{name}')\n"
        )
    paths = [
        str(tmp_path / "traps"),
        str(Path(completion.__file__).parents[1]),
        os.environ.get("PYTHONPATH", ""),
    ]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MESOCOSM_HOME", str(tmp_path / "home"))
    return tmp_path


def ask(*lines: str, folder: Path = REPOSITORY) -> list[list[str]]:
    """What bash proposes at the end of each line."""
    shell_output = subprocess.run(
        ["bash", "-c", ASK],
        cwd=folder,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert shell_output.returncode == 0 and not shell_output.stderr, shell_output.stderr
    return [line.split() for line in shell_output.stdout.splitlines()]


@pytest.mark.slow
def test_bash_completes_commands_options_keys_files_and_clusters(home: Path) -> None:
    commands, options, first, after, file, folder, cluster, named = ask(
        "mesocosm ",
        "mesocosm pretrain --f",
        "mesocosm pretrain model.f",
        "mesocosm pretrain data.datasets=[a] -c configs/pretrain/pendulum.yaml train.zer",
        "mesocosm sweep -c configs/sweep/quick",
        "mesocosm sweep -c configs/sw",
        "mesocosm pretrain --cluster ",
        "mesocosm cluster render k",
    )
    assert set(commands) == set(program.commands) > set(JOBS)
    assert options == ["--force", "--follow"]
    assert first == ["model.family="] and after == ["train.zero_stage="], (
        "no space after a key, wherever it stands"
    )
    assert file == ["configs/sweep/quickstart.yaml"] and folder == ["configs/sweep/"]
    assert {"aws", "kuberay", "local"} <= set(cluster) and named == ["kuberay"]
    assert not (home / "heavy").exists(), f"imported at Tab: {(home / 'heavy').read_text()}"


@pytest.mark.integration
def test_bash_completes_datasets(home: Path) -> None:
    for id in ("ab12", "ab34", "cd56"):
        (home / ".mesocosm" / "datasets" / id).mkdir(parents=True)
        if id != "ab34":  # which is being made
            (home / ".mesocosm" / "datasets" / id / "COMMIT.json").touch()
    show, second, root = ask(
        "mesocosm data show a",
        "mesocosm data diff ab12 ",
        "mesocosm data list storage.r",
        folder=home,
    )
    assert show == ["ab12"] and set(second) >= {"ab12", "cd56"} and root == ["storage.root="]


@pytest.mark.integration
def test_bash_completes_the_jobs_that_were_submitted_from_here(home: Path) -> None:
    for id in ("pretrain-1a2b3c4d5e-1", "sweep-0f0f0f0f0f-2"):
        write(SubmittedJob(id, id.partition("-")[0], "aws", "s3://bucket", 0.0))
    logs, stop, status = ask(
        "mesocosm jobs logs pre", "mesocosm jobs stop ", "mesocosm jobs status --"
    )
    assert logs == ["pretrain-1a2b3c4d5e-1"] and set(stop) == {
        "pretrain-1a2b3c4d5e-1",
        "sweep-0f0f0f0f0f-2",
    }
    assert "--insecure" in status
    assert not (home / "heavy").exists(), f"imported at Tab: {(home / 'heavy').read_text()}"


def leaves(block: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a dataclass by its fields, without those that a stage gets from its loop."""
    for field in fields(block):
        value = getattr(block, field.name)
        shared = {*(f.name for f in fields(config.JobConfig)), "reality"}
        if prefix and isinstance(block, config.JobConfig) and field.name in shared:
            continue
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize("job", JOBS)
def test_keys_are_those_of_the_dataclass(job: str) -> None:
    schema = importlib.import_module(JOBS[job].module).JOB.config
    keys = config_keys(*config_of(JOBS[job].module))
    assert [key for key, _, is_block in keys if not is_block] == list(leaves(schema()))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_script_that_it_can_read(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert re.search(r"\bmesocosm\b", script)
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here to read it")
    assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_an_unknown_shell_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcl"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
