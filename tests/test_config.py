"""Config composition and the sentences for what is wrong in it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mesocosm.config import JobConfig, fingerprint, identity, load
from mesocosm.errors import UsageError


@dataclass
class Inner:
    size: str = "30k"
    members: int = 4


@dataclass
class Config(JobConfig):
    model: Inner = field(default_factory=Inner)
    rates: list[float] = field(default_factory=list)


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {size: 1m, members: 2}\nseed: 5\n")
    second.write_text("model: {size: 3m}\n")
    config = load(Config, [first, second], ["model.members=7", "rates=[0.1, 2]"])
    assert type(config) is Config and type(config.model) is Inner
    assert (config.model.size, config.model.members, config.seed, config.rates) == (
        "3m",
        7,
        5,
        [0.1, 2.0],
    )


@pytest.mark.parametrize(
    ("files", "overrides", "words"),
    [
        ([], ["model.sise=1m"], ["model.sise", "model.size"]),
        (["modle: {size: 1m}"], [], ["modle", "model"]),
        ([], ["model.members=many"], ["model.members", "many"]),
        (
            [],
            ["model.members=1e2"],
            ["model.members", "must be a whole number, got 100.0; try 100"],
        ),
        ([], ["model.size"], ["key=value"]),
        (["a: [1"], [], ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, files: list[str], overrides: list[str], words: list[str]
) -> None:
    paths = []
    for text in files:
        paths.append(tmp_path / "c.yaml")
        paths[-1].write_text(text)
    with pytest.raises(UsageError) as error:
        load(Config, paths, overrides)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        load(Config, [tmp_path / "nowhere.yaml"])


def test_fingerprint_is_of_values_only() -> None:
    assert fingerprint({"b": 1, "a": (1.5, None)}) == fingerprint({"a": [1.5, None], "b": 1})
    assert fingerprint(1) != fingerprint("1")
    with pytest.raises(TypeError, match="no stable identity"):
        fingerprint(object())


def test_identity_leaves_out_where_a_job_runs() -> None:
    here, there = Config(), Config()
    there.storage.root, there.tracking.uri, there.ray.address, there.force = (
        "s3://b/x",
        "http://m",
        "auto",
        True,
    )
    assert identity(here) == identity(there)
    there.seed = 1
    assert identity(here) != identity(there)


def test_the_source_root_does_not_shadow_the_standard_library() -> None:
    """Ray puts the working directory first on every worker's path: `platform/` must stay a plain
    folder.
    """
    repository = Path(__file__).resolve().parents[1]
    assert not (repository / "platform" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, '.'); import platform, uuid; print(platform.system())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.strip() == "Linux"


@dataclass
class Stages(JobConfig):
    stage: Config = field(default_factory=Config)
    blocks: list[Inner] = field(default_factory=list)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rates=1"], "config key 'rates' must be a list, got 1; try 'rates=[1]'"),
        (["model=abc"], "config key 'model' must be a block of keys, got 'abc'"),
        (["model.members=[1]"], "config key 'model.members' must be a whole number, got [1]"),
        (["model.members=many"], "must be a whole number, got 'many'"),
        (["force=maybe"], "must be true or false, got 'maybe'"),
        (["model.members=3.0"], "must be a whole number, got 3.0; try 3"),
        (["model=abc"], "'model' must be a block of keys, got 'abc'; try model."),
        (["seed="], "config key 'seed' must be set, got null; try seed=VALUE"),
        (
            ["model.members", "=", "3"],
            "override 'model.members' has spaces around its =; write model.members=3",
        ),
        (["model.members=", "3"], "write model.members=3"),
        (["model.members", "=3"], "write model.members=3"),
    ],
)
def test_a_value_of_another_kind_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        load(Config, [], overrides)
    assert message in str(error.value)


def test_a_key_of_a_stage_is_found(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {members: 2}\n")
    for files, overrides in (([], ["model.members=2"]), ([tmp_path / "c.yaml"], [])):
        with pytest.raises(
            UsageError, match=r"unknown config key 'model'; did you mean 'stage.model.members'\?"
        ):
            load(Stages, files, overrides)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("blocks=[abc]", "config key 'blocks[0]' must be a block of keys, got 'abc'"),
        ("blocks=abc", "config key 'blocks' must be a list, got 'abc'"),
    ],
)
def test_a_list_of_blocks_has_an_example(override: str, problem: str) -> None:
    with pytest.raises(UsageError) as error:
        load(Stages, [], [override])
    assert f"{problem}; try 'blocks=[{{KEY: VALUE}}]'" in str(error.value)
