"""Files that name the version, or a tool's version, agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import mesocosm

REPOSITORY = Path(__file__).parents[1]


def test_one_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    versions = {mesocosm.__version__, project["version"], citation["version"], newest[1]}
    assert versions == {mesocosm.__version__}
    images = {
        image
        for path in ("clusters/Dockerfile", "clusters/aws.yaml", "docs/clusters.md")
        for image in re.findall(r"mesocosm:(\d\S*)", (REPOSITORY / path).read_text())
    }
    assert images == {mesocosm.__version__}


def test_pre_commit_runs_the_installed_ruff() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = re.search(r"^ruff==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and [repo["rev"] for repo in hooks] == [f"v{pinned[1]}"]


def test_the_workflow_runs_what_must_pass() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
