"""The public Python API, `import mesocosm`, on small real artifacts and without Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import mesocosm
from mesocosm.data.loading.codec import Codec
from mesocosm.envs.amounts import Usage
from mesocosm.envs.config import BudgetConfig
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.policies.policy import SNAPSHOTS, Layout

TRUTH = {"E": 0.3, "A": 60.0, "B": 8.0, "alpha": 0.5, "beta": 0.4}


@pytest.fixture(scope="module")
def root(cart_root: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with the dataset `cart`, the world `tiny123` and the agent `agent123`, untrained."""
    root = cart_root(tmp_path_factory.mktemp("api"), transitions=100)
    storage = mesocosm.Storage(root)
    codec = Codec.fit(mesocosm.load_dataset("cart", root=root))
    config = ModelConfig(family="ensemble", size="10k", members=2, base=False)
    torch.manual_seed(0)
    net = build(codec.spec, config)
    world = mesocosm.World(net, Base(codec.spec, config), codec.to_json())
    storage.make("worlds", "tiny123", {}, world.save)
    env = gymnasium.make("CartPole-v1")
    layout = Layout("categorical", [{"kind": "linear", "in": 4, "out": 2}])
    policy = mesocosm.Policy("PPO", env.observation_space, env.action_space, layout)

    def save(folder: Path) -> None:
        (folder / SNAPSHOTS / "7").mkdir(parents=True)
        for target in (folder, folder / SNAPSHOTS / "7"):
            policy.save(target)

    storage.make("agents", "agent123", {}, save)
    return root


WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "mlflow", "deepspeed", "s3fs", "matplotlib", "sklearn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def test_a_type_checker_knows_every_public_name() -> None:
    """The names of the TYPE_CHECKING block, each imported from the module that defines it."""
    source = Path(mesocosm.__file__).read_text()
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defined = {name: f"mesocosm.{module}" for name, module in mesocosm._MODULES.items()}
    assert typed == defined and {*typed, "__version__"} == set(mesocosm.__all__)


@pytest.mark.integration
def test_the_api_works_without_the_extras(root: str) -> None:
    script = (
        f"{WITHOUT_EXTRAS}\nimport mesocosm\n"
        "for name in mesocosm.__all__: getattr(mesocosm, name)\n"
        f"world = mesocosm.load_world('tiny123', {root!r})\n"
        "envs = mesocosm.WorldVectorEnv(2, world, horizon=3)\n"
        "envs.reset(seed=0); envs.step(envs.action_space.sample())"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.integration
def test_a_command_names_the_extra_that_it_needs(tmp_path: Path) -> None:
    script = f"{WITHOUT_EXTRAS}\nfrom mesocosm.cli.main import main\nsys.exit(main(['doctor']))"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    message = "mesocosm: the package ray is not installed; run pip install 'mesocosm[all]'"
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1] == message


def test_importing_the_package_imports_nothing_else() -> None:
    """Importing it, and listing its names, loads neither its modules nor torch or Ray."""
    script = (
        "import sys, mesocosm; dir(mesocosm);"
        "heavy = {'torch', 'ray', 'numpy', 'gymnasium'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "assert [n for n in sys.modules if n.startswith('mesocosm')] == ['mesocosm']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.integration
def test_no_public_name_imports_ray() -> None:
    script = (
        "import sys, mesocosm;"
        "[getattr(mesocosm, name) for name in mesocosm.__all__];"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", mesocosm.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(mesocosm, name)
    assert name in dir(mesocosm)
    assert name == "__version__" or value.__doc__
    assert name == "__version__" or value.__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="load_wrld"):
        mesocosm.load_wrld  # noqa: B018


@pytest.mark.parametrize("ref", ["tiny123", "worlds/tiny123", "tiny", "folder"])
def test_a_policy_acts_in_a_loaded_world(root: str, ref: str) -> None:
    folder = mesocosm.Storage(root).artifact("worlds", "tiny123").path
    world = mesocosm.load_world(folder if ref == "folder" else ref, root)
    policy = mesocosm.load_policy("agent123", root)
    envs = mesocosm.WorldVectorEnv(3, world, horizon=5)
    observations, _ = envs.reset(seed=0)
    for _ in range(5):
        observations, rewards, _, _, infos = envs.step(policy.act(observations))
        assert rewards.shape == infos["disagreement"].shape == (3,)
    single = mesocosm.WorldEnv(world, horizon=2)
    observation, _ = single.reset(seed=0)
    assert [single.step(policy.act_one(observation))[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize("ref", ["agent123", "agents/agent123", "agent123@7", "folder"])
def test_a_policy_is_the_saved_one(root: str, ref: str) -> None:
    folder = mesocosm.Storage(root).artifact("agents", "agent123").path
    policy = mesocosm.load_policy(folder if ref == "folder" else ref, root)
    saved, observations = mesocosm.Policy.load(folder), np.ones((2, 4), np.float32)
    assert torch.equal(policy.outputs(observations), saved.outputs(observations))


@pytest.mark.parametrize("ref", ["cart", "datasets/cart", "folder"])
def test_a_dataset_is_opened(root: str, ref: str) -> None:
    folder = mesocosm.Storage(root).artifact("datasets", "cart").path
    dataset = mesocosm.load_dataset(folder if ref == "folder" else ref, root=root)
    assert isinstance(dataset, mesocosm.Dataset) and dataset.environment.id == "CartPole-v1"
    episodes = list(dataset.iter_episodes())
    assert sum(map(len, episodes)) == dataset.transitions >= 100
    with pytest.raises(mesocosm.UsageError, match=r"data\.datasets .*cart, cart"):
        mesocosm.load_dataset("cart", folder, root=root)


def test_a_ledger_counts_real_steps(tmp_path: Path) -> None:
    storage = mesocosm.Storage(str(tmp_path))
    ledger = mesocosm.Ledger(storage, "mine", BudgetConfig(steps=100))
    ledger.confirm(Usage(ledger.reserve("collect", 40), steps=30))
    totals = mesocosm.Ledger(storage, "mine", BudgetConfig(steps=100)).totals()
    assert (totals.purposes["collect"].steps, totals.remaining) == (30, 70)


def test_a_law_is_fitted_to_a_table(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    lines = ["params,data,loss"]
    for n in np.geomspace(1e4, 3e6, 5):
        for d in np.geomspace(1e4, 1e6, 5):
            loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
            lines.append(f"{n},{d},{loss}")
    table.write_text("\n".join(lines) + "\n")
    law = mesocosm.fit_law(table)
    assert law.params == pytest.approx(TRUTH, rel=1e-3)
    law.write(tmp_path / "law.json")
    assert mesocosm.Law.read(tmp_path / "law.json") == law


@pytest.mark.parametrize("kind", ["world", "dataset", "policy"])
def test_a_missing_artifact_is_named(root: str, kind: str) -> None:
    load = {
        "world": mesocosm.load_world,
        "dataset": mesocosm.load_dataset,
        "policy": mesocosm.load_policy,
    }[kind]
    with pytest.raises(mesocosm.UsageError, match=r"no artifact .*nothere"):
        load("nothere", root=root)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(mesocosm.UsageError, match=r"table .*none\.csv"):
        mesocosm.fit_law(tmp_path / "none.csv")
