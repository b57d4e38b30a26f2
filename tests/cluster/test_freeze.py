"""The files of a submission: the user's own, one content hash, nothing secret or too large."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import ray

from mesocosm import config
from mesocosm.cluster import freeze as freezing
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.freeze import CONFIG, Frozen, freeze
from mesocosm.cluster.spec import ClusterConfig, NodeGroup
from mesocosm.cluster.submit import refuse
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.errors import UsageError
from mesocosm.scaling.sweep_config import SweepConfig

CLUSTER = ClusterConfig(
    where="address",
    address="http://127.0.0.1:1",
    storage_root="s3://bucket/prefix",
    nodes=[NodeGroup(cpus=4)],
)


def load_config(*overrides: str) -> CollectConfig:
    return config.load(CollectConfig, [], ["reality.env=CartPole-v1", *overrides])


def frozen(folder: Path, *overrides: str, cluster: ClusterConfig = CLUSTER) -> Frozen:
    return freeze("collect", load_config(*overrides), cluster, folder, None)


def user_files(result: Frozen) -> set[str]:
    return {name for name in result.files if not name.startswith("mesocosm/")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hidden = (".env", ".venv/lib.py", "pkg/__pycache__/x.pyc")
    for name in ("mine.py", "data/table.csv", "ignored.bin", *hidden):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "code"


def test_hidden_and_generated_files_are_not_sent(folder: Path) -> None:
    assert user_files(frozen(folder)) == {"mine.py", "data/table.csv", "ignored.bin"}
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".gitignore").write_text("ignored.bin\n")
    assert user_files(frozen(folder)) == {"mine.py", "data/table.csv"}, "what git ignores, too"


@pytest.mark.parametrize("name", ["http.py", "queue/__init__.py"])
def test_a_file_that_would_replace_a_module_of_pythons_is_refused(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(UsageError, match=name):
        frozen(folder)
    (folder / name).rename(folder / "data" / "harmless.py")
    assert "data/harmless.py" in user_files(frozen(folder))


def test_this_very_package_goes_along(folder: Path, tmp_path: Path) -> None:
    result = frozen(folder)
    result.write(tmp_path / "sent")
    package = tmp_path / "sent" / "mesocosm"
    original = freezing.PACKAGE / "config.py"
    assert (package / "config.py").read_bytes() == original.read_bytes()
    assert (package / "py.typed").exists() and not list(package.rglob("*.pyc"))
    back = config.load(CollectConfig, [tmp_path / "sent" / CONFIG])
    assert (back.storage.root, back.ray.address) == ("s3://bucket/prefix", "auto")
    assert back.reality.env == "CartPole-v1"


def test_the_id_hashes_the_config_and_the_files(folder: Path) -> None:
    first = frozen(folder).id
    assert frozen(folder).id == first and first.startswith("collect-")
    assert frozen(folder, "steps=7").id != first
    (folder / "mine.py").write_text("other")
    assert frozen(folder).id != first


def test_too_much_is_refused_by_its_largest_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "huge.bin").write_bytes(bytes(3 << 20))
    (folder / "large.bin").write_bytes(bytes(2 << 20))
    monkeypatch.setattr(freezing, "LIMIT", 4 << 20)
    largest = r"Jobs API takes 4: the largest are huge.bin \(3 MiB\), large.bin \(2 MiB\)"
    with pytest.raises(UsageError, match=largest):
        frozen(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tracking.uri", "http://me:secret@mlflow"),
        ("reality.kwargs.url", "postgres://me:secret@db/x"),
    ],
)
def test_a_password_is_not_sent(folder: Path, key: str, value: str) -> None:
    override = f"{key}={value}"
    if key == "reality.kwargs.url":
        override = f"reality.kwargs={{url: '{value}'}}"
    with pytest.raises(UsageError, match=f"{key} holds a user and password") as caught:
        frozen(folder, override)
    assert "secret" not in str(caught.value)


def test_a_root_on_this_machine_is_refused(folder: Path) -> None:
    cluster = ClusterConfig(where="address", address="http://127.0.0.1:1")
    with pytest.raises(UsageError, match=r"storage.root must .* all nodes share, got '.mesocosm'"):
        frozen(folder, cluster=cluster)


def test_a_cluster_that_is_too_small_is_refused() -> None:
    report = {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "storage": {"ok": True},
        "mlflow": {"ok": True},
        "resources": {"CPU": 2.0},
        "needs": [{"key": "workers=9", "cpus": 9, "gpus": 0}],
    }
    with pytest.raises(UsageError, match="workers=9 asks for 9 CPUs and cluster 'mine' has 2"):
        refuse("mine", CLUSTER, report)


def test_a_sweep_is_estimated_by_the_file_of_its_cluster(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is sent: on the cluster clusters/ is beside neither the package nor the driver."""
    (folder / "clusters").mkdir()
    values = {"where": "address", "address": "http://127.0.0.1:1", "nodes": [{"cpus": 4}]}
    values["storage_root"] = "s3://bucket/prefix"
    (folder / "clusters" / "mine.yaml").write_text(json.dumps(values))
    monkeypatch.chdir(folder)
    sweep = config.load(SweepConfig, [], [])
    result = freeze("sweep", sweep, cluster_spec.read("mine"), None, "mine")
    assert isinstance(result.config, SweepConfig) and result.config.cluster == "mine"
    assert user_files(result) == {"clusters/mine.yaml"}
