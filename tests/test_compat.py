"""Each patch of a library: what the library does, what the patch makes of it, and what happens on
another version.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from mesocosm import compat
from mesocosm.errors import UsageError

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
MACHINE = "192.0.2.1"
PRESTART = "RAY_prestart_worker_first_driver"


@pytest.fixture
def another_version(monkeypatch: pytest.MonkeyPatch) -> str:
    """A version that every installed library has: of no library's tested minor version."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.1")
    return "9.9.1"


def test_the_tested_versions_are_those_of_constraints() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
    assert {name: pins[name].rpartition(".")[0] for name in compat.TESTED} == compat.TESTED
    assert all(compat.is_tested(name) for name in compat.TESTED)


@pytest.mark.parametrize(
    "patch",
    [
        compat.loopback_only,
        compat.send_token_of_home,
        compat.job_config_of_command_line,
        compat.keep_aws_keys_from_trials,
        partial(compat.algorithm_in_folder, object, "PPO", Path()),
        partial(compat.wait_for_weights, SimpleNamespace(sync_weights=None)),
        partial(compat.sample_infos, SimpleNamespace(sample=None)),
        partial(importlib.import_module, "mesocosm.train.ray_train"),
    ],
)
def test_what_a_result_or_secret_depends_on_needs_the_tested_version(
    patch: Callable[[], Any], another_version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mesocosm.train.ray_train", raising=False)
    with pytest.raises(UsageError) as error:
        patch()
    assert f"ray must be version {compat.TESTED['ray']}, got {another_version}" in str(error.value)


def test_what_saves_time_is_left_out_on_another_version(
    another_version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services

    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    popen, ops = services.ConsolePopen, {"adam": True}
    deepspeed = SimpleNamespace(ops=SimpleNamespace(__compatible_ops__=ops))
    with compat.private_start(), compat.mlflow_hidden():
        assert services.ConsolePopen is popen and "mlflow" not in sys.modules
    compat.list_no_ops(deepspeed)
    assert deepspeed.ops.__compatible_ops__ is ops


def test_the_daemons_of_a_private_ray_have_process_groups_of_their_own() -> None:
    from ray._private import services

    def group_is_own() -> bool:
        with services.ConsolePopen(["cat"], stdin=subprocess.PIPE) as daemon:
            return os.getpgid(daemon.pid) == daemon.pid

    assert not group_is_own()
    with compat.private_start():
        assert group_is_own()
    assert not group_is_own()


def test_the_start_of_a_private_ray_leaves_sigterm_alone() -> None:
    from ray._private import utils

    before = signal.getsignal(signal.SIGTERM)
    try:
        with compat.private_start():
            utils.set_sigterm_handler(signal.SIG_IGN)
            assert signal.getsignal(signal.SIGTERM) is before
        utils.set_sigterm_handler(signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("start", ["start_monitor", "start_log_monitor", "start_api_server"])
def test_a_private_ray_starts_no_needless_daemon(start: str) -> None:
    from ray._private import node

    class Started(Exception):
        """Ray opens a daemon's log before it starts the daemon."""

    class Node(node.Node):  # type: ignore[misc]
        def __init__(self) -> None:
            """No Ray is started."""

        def get_log_file_names(self, *args: Any, **options: Any) -> Any:
            raise Started

    arguments = {"include_dashboard": False, "raise_on_failure": False}
    options = arguments if start == "start_api_server" else {}
    with pytest.raises(Started):
        getattr(Node(), start)(**options)
    with compat.private_start():
        getattr(Node(), start)(**options)


def test_the_agent_and_the_workers_of_a_private_ray_are_minimal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private import utils

    monkeypatch.delenv(PRESTART, raising=False)
    assert utils.get_dashboard_dependency_error() is None
    with compat.private_start():
        assert isinstance(utils.get_dashboard_dependency_error(), ImportError)
        assert os.environ[PRESTART] == "0"
    assert utils.get_dashboard_dependency_error() is None
    assert PRESTART not in os.environ


def test_the_processes_of_a_private_ray(ray_local: None) -> None:
    commands = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    scripts = {Path(word).name for command in commands for word in command if word.endswith(".py")}
    assert not scripts & {"monitor.py", "log_monitor.py", "dashboard.py"}
    (raylet,) = (command for command in commands if Path(command[0]).name == "raylet")
    assert any("agent.py" in word and "--minimal" in word for word in raylet)


def test_loopback_stays_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services, worker

    monkeypatch.setattr(worker, "_global_node", None)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: MACHINE)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    assert services.resolve_ip_for_localhost("127.0.0.1") == MACHINE
    compat.loopback_only()
    assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
    assert services.get_node_ip_address() == "127.0.0.1"


TOKEN = """
from ray._raylet import AuthenticationMode, get_authentication_mode
from mesocosm import compat
assert get_authentication_mode() != AuthenticationMode.TOKEN
compat.send_token_of_home()
assert get_authentication_mode() == AuthenticationMode.TOKEN
"""


@pytest.mark.integration
def test_the_token_of_home_is_sent_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    assert run(TOKEN, HOME=str(tmp_path)) == ""


def run(code: str, **changes: str) -> str:
    """Run Python code with an environment without settings of Ray; return what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | changes, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_workers_do_not_search_the_drivers_folder_first() -> None:
    """`ray._private.worker.connect` adds the folder unless the job has a folder of its own."""
    from ray.job_config import JobConfig

    assert not JobConfig()._runtime_env_has_working_dir()
    assert compat.job_config_of_command_line()._runtime_env_has_working_dir()


@pytest.mark.integration
def test_trials_get_no_aws_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import tune
    from ray.tune.execution import class_cache

    def environment() -> dict[str, str]:
        class Trial(tune.Trainable):  # type: ignore[misc]
            """A class that the cache has not seen."""

        actor = class_cache._ActorClassCache().get(Trial)
        variables: dict[str, str] = actor._default_options["runtime_env"]["env_vars"]
        return variables

    names = {*class_cache.ENV_VARS_TO_PROPAGATE, "AWS_SECRET_ACCESS_KEY"}
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", names)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    assert environment()["AWS_SECRET_ACCESS_KEY"] == "secret"
    compat.keep_aws_keys_from_trials()
    assert "secret" not in environment().values()
    assert environment()["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


@pytest.mark.integration
def test_an_algorithm_has_its_files_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune
    from ray.tune.trainable import trainable

    results, folder = tmp_path / "ray_results", tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(trainable, "DEFAULT_STORAGE_PATH", str(results))
    changed = compat.algorithm_in_folder(tune.Trainable, "PPO", folder)
    assert changed().logdir == str(folder) and changed.__name__ == "PPO"
    assert not results.exists()
    assert Path(tune.Trainable().logdir).parent == results


@pytest.mark.integration
def test_no_weights_are_dropped(ray_local: None, tmp_path: Path) -> None:
    """See also tests/agents/test_weights.py."""
    import ray
    from ray.rllib.env.env_runner_group import EnvRunnerGroup
    from ray.rllib.utils.actor_manager import FaultAwareApply, FaultTolerantActorManager

    gate = tmp_path / "gate"

    class Runner(FaultAwareApply):  # type: ignore[misc]
        """An environment runner that is busy until `gate` exists."""

        def set_state(self, state: dict[str, int]) -> None:
            while not gate.exists():
                time.sleep(0.01)
            self.weights = state["rl_module"]

        def get_weights(self) -> int:
            return self.weights

    runner = ray.remote(num_cpus=0)(Runner).remote()
    group: Any = EnvRunnerGroup.__new__(EnvRunnerGroup)
    group._local_env_runner = None
    group._worker_manager = FaultTolerantActorManager(
        [runner], max_remote_requests_in_flight_per_actor=1
    )
    group._remote_config = SimpleNamespace(enable_env_runner_and_connector_v2=True)
    group._ignore_ray_errors_on_env_runners = False

    def sync(weights: int) -> None:
        state = {"rl_module": weights}
        learner: Any = SimpleNamespace(get_state=lambda **options: state)
        group.sync_weights(from_worker_or_learner_group=learner)

    sync(1)
    sync(2)
    gate.touch()
    assert ray.get(runner.get_weights.remote()) == 1, "RLlib has dropped the second weights"
    compat.wait_for_weights(group)
    for weights in (3, 4, 5):
        sync(weights)
    assert ray.get(runner.get_weights.remote()) == 5


@pytest.mark.integration
def test_replayed_episodes_have_infos() -> None:
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode
    from ray.rllib.utils.replay_buffers import PrioritizedEpisodeReplayBuffer

    buffer = PrioritizedEpisodeReplayBuffer(capacity=100)
    infos = [{"duration": 2.0}] * 9
    buffer.add(
        SingleAgentEpisode(
            observations=list(np.zeros((9, 1), np.float32)),
            actions=[0] * 8,
            rewards=[0.0] * 8,
            infos=infos,
            terminated=True,
            len_lookback_buffer=0,
        )
    )

    def durations() -> list[Any]:
        episodes = buffer.sample(num_items=4, sample_episodes=True)
        return [episode.get_infos(-1).get("duration") for episode in episodes]

    assert durations() == [None] * 4
    compat.sample_infos(buffer)
    assert durations() == [2.0] * 4


DEEPSPEED = """
import importlib, sys
from mesocosm.train import engine
deepspeed = engine.import_deepspeed()
from deepspeed import ops
from deepspeed.autotuning import autotuner
from deepspeed.comm.torch import build_shm_op
assert "mlflow" not in sys.modules and not autotuner.has_mlflow
assert importlib.reload(autotuner).has_mlflow

probes = []
ops._probe_compatible_ops = lambda: probes.append("probed") or {}
assert build_shm_op() is None and probes == []
del ops.__dict__["__compatible_ops__"]
assert build_shm_op() is None and probes == ["probed"]
"""


@pytest.mark.integration
def test_deepspeed_imports_no_mlflow_and_builds_no_op(tmp_path: Path) -> None:
    """DeepSpeed by itself does both, as the second half of each check shows."""
    (tmp_path / "mlflow.py").touch()  # quicker to import than MLflow
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run(DEEPSPEED, DS_ACCELERATOR="cpu", PYTHONPATH=path)
