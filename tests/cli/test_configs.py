"""The shipped configs: by name, in any folder, and in a wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mesocosm.cli.main import main
from mesocosm.cluster import spec

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage root in a folder that has no configs."""
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "root")


def test_every_shipped_config_is_listed_and_shown(
    elsewhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((REPOSITORY / "configs").glob("*/*.yaml"))
    assert main(["configs", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == [f"{file.parent.name}/{file.stem}" for file in files]
    assert main(["configs", "show", "loop/quickstart"]) == 0
    text = capsys.readouterr().out
    assert text == (REPOSITORY / "configs" / "loop" / "quickstart.yaml").read_text()


@pytest.mark.integration
def test_a_job_takes_a_shipped_config_by_name(
    elsewhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = []
    for name in ("quickstart", "loop/quickstart", str(REPOSITORY / "configs/loop/quickstart.yaml")):
        words = ["loop", "-c", name, "--dry-run", "--json", f"storage.root={elsewhere}"]
        assert main(words) == 0
        rounds.append(json.loads(capsys.readouterr().out))
    assert rounds[0] == rounds[1] == rounds[2]
    assert "local" in spec.names()


def test_a_file_of_the_user_comes_first(elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("quickstart").write_text("rounds: 7\n")
    words = ["loop", "-c", "loop/quickstart", "-c", "quickstart", "--dry-run", "--json"]
    assert main([*words, f"storage.root={elsewhere}"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 7


@pytest.mark.parametrize("command", [["loop", "-c", "quikstart"], ["configs", "show", "quikstart"]])
def test_an_unknown_name_is_one_sentence(
    elsewhere: str, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'quikstart' is neither a file nor a shipped config" in line and "quickstart" in line


@pytest.mark.slow
def test_a_wheel_holds_them(tmp_path: Path) -> None:
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    sources = tmp_path / "sources"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(sources)], check=True)
    subprocess.run([sys.executable, "-c", build], check=True, cwd=sources, capture_output=True)
    (wheel,) = sources.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for file in [*REPOSITORY.glob("configs/*/*.yaml"), *REPOSITORY.glob("clusters/*.yaml")]:
        assert f"mesocosm/shipped/{file.relative_to(REPOSITORY).as_posix()}" in names
    assert any(name.endswith(".html") for name in names)
