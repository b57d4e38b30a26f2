"""`make bench-scale`: steps a second of a served world as runners and replicas are added.

    python benchmarks/bench_scale.py [--only simulated|replicas|driver] [--force] [--plot]

Cells, each done once and stored in benchmarks/results/bench_scale.json:

- simulated: a replica that answers every request after 5 ms without using a core, as a GPU does,
  and 1 to 32 runners of 256 environments, each a process with `AgentEnv` and random actions. The
  ceiling is runners x 256 steps every 5 ms. Below it, cores are the limit: CPU time a step is
  measured in the runners and in the replica.
- replicas: a `sequence` world on one and on two replicas, each on a Ray node of its own with one
  CPU, and two runners of 512 environments. The two applications take turns in one run.
- driver: PPO with two runners of 256 environments in the simulated replica, with 0 and 2 learners.
  CPU time a step of the driver, of a runner and of a learner.

All nodes are processes of this machine, and wall times hold for its cores and load only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_AUTH_MODE"] = "token"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Workers import the worlds of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])

import numpy as np
import ray
import torch
from gymnasium import spaces
from matplotlib import rc_context

from mesocosm.agents import rllib, settings
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.env import AgentEnv, make_env
from mesocosm.agents.learner_access import on_learners
from mesocosm.cluster import ray_session
from mesocosm.cluster.spec import make_token
from mesocosm.config import RayConfig, StorageConfig
from mesocosm.model.config import ModelConfig
from mesocosm.model.tensors import Parts
from mesocosm.plotting import STYLE, WORLD, canvas, document, legend
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.connection import LOOPBACK
from mesocosm.serve.deployment import LOGGING, ROUTER, deploy, undeploy
from mesocosm.serve.line import LineServer, packed
from mesocosm.serve.protocol import Message, put, unpack
from mesocosm.serve.session import Sessions
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage
from tests.serve.worlds import untrained

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_scale.json"
PLOT = HERE.parent / "docs" / "plots" / "bench_scale.svg"
SPACES = spaces.Box(-np.inf, np.inf, (4,), np.float64), spaces.Box(-3, 3, (1,), np.float32)
MODEL = {name: getattr(ModelConfig(), name) for name in ("size", "members", "base", "context")}
LATENCY_S = 0.005
RUNNERS = (1, 2, 4, 8, 16, 32)
ENVS, REAL_ENVS = 256, 512
SECONDS, ROUNDS = 4.0, 5
NODES = ("127.0.0.2", "127.0.0.3")
"""Addresses of the nodes other than the head. They are of one machine, but not 127.0.0.1, on which
other nodes reach no line.
"""


class SimulatedReplica:
    """Answers a step with the first step's reply, after LATENCY_S, without computing it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        world = untrained(*SPACES, terminal=1e-9, **MODEL)
        self.sessions = Sessions(lambda _: ("simulated", world))
        self.replies: dict[int, Message] = {}
        self._line = LineServer(NODES[0], self.call)

    def call(self, data: bytes | bytearray) -> bytes:
        """Answer a packed request."""
        request = unpack(data)
        number = request.pop("number")
        size = len(request["episode"]) if request["op"] == "step" else 0
        if size in self.replies:
            time.sleep(LATENCY_S)
            reply = self.replies[size]
        else:
            reply = self.sessions.call(request)
            if size:  # with a task, for environments that reset
                empty = Parts.empty(self.sessions.world("")[1].spec.task, size)
                put(reply, "task", empty)
                self.replies[size] = reply | {"terminated": np.zeros(size, np.bool_)}
        return packed(reply | {"number": number})

    def connect(self) -> dict[str, Any]:
        """The address and token of this replica's line."""
        host, port = self._line.address
        replica = {"host": host, "port": port, "token": self._line.token, "pid": os.getpid()}
        return replica | {"node": ray.get_runtime_context().get_node_id()}

    def cpu(self) -> float:
        """CPU seconds of this process."""
        return time.process_time()


def simulate(name: str) -> Any:
    """Serve one simulated replica as the application `name`, and return its handle."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    serve.start(proxy_location="Disabled", logging_config=LOGGING)
    deployment = serve.deployment(SimulatedReplica).options(  # type: ignore[attr-defined]
        name="world",
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        logging_config=LOGGING,
    )
    return serve.run(deployment.bind(), name=name, route_prefix=None)


class Runner:
    """A process that steps its environments in a served world."""

    def __init__(self, app: str, index: int, envs: int, world: str):
        options: dict[str, Any] = {"app": app, "first_env": index * envs, "disagreement_every": 0}
        self.env = AgentEnv(WorldVectorEnv(envs, world, **options))
        self.env.reset(seed=0)
        self.actions = self.env.action_space.sample()
        self.env.step(self.actions)
        assert self.env.env._connection.replica is not None, "no line to the replica"

    def run(self, seconds: float) -> tuple[int, float, float]:
        """(steps, wall seconds, CPU seconds) of at least `seconds`."""
        calls, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            self.env.step(self.actions)
            calls += 1
        wall, spent = time.perf_counter() - began, time.process_time() - cpu
        return calls * self.env.num_envs, wall, spent


def start_runners(app: str, count: int, envs: int, world: str = "") -> list[Any]:
    """`count` runners, which have begun to step."""
    actor = ray.remote(Runner).options(num_cpus=0)  # type: ignore[attr-defined]
    runners = [actor.remote(app, i, envs, world) for i in range(count)]
    ray.get([runner.run.remote(0.2) for runner in runners])
    return runners


def measure(runners: list[Any], seconds: float) -> tuple[float, float]:
    """(steps a second of all runners together, CPU microseconds of a runner a step)"""
    results = ray.get([runner.run.remote(seconds) for runner in runners])
    rate = sum(steps / wall for steps, wall, _ in results)
    return rate, 1e6 * sum(cpu for *_, cpu in results) / sum(steps for steps, *_ in results)


def simulated(count: int) -> dict[str, Any]:
    """One number of runners in the simulated replica."""
    handle = simulate("simulated")
    runners = start_runners("simulated", count, ENVS)
    rows = []
    for _ in range(ROUNDS):
        before = handle.cpu.remote().result()
        rate, cpu = measure(runners, SECONDS)
        used = handle.cpu.remote().result() - before
        rows.append((rate, cpu, 1e6 * used / (rate * SECONDS)))
    rate, cpu, of_replica = (statistics.median(column) for column in zip(*rows, strict=True))
    rates = [row[0] for row in rows]
    return {
        "runners": count,
        "steps_per_s": round(rate),
        "lowest": round(min(rates)),
        "highest": round(max(rates)),
        "ceiling": round(count * ENVS / LATENCY_S),
        "runner_cpu_us_per_step": round(cpu, 3),
        "replica_cpu_us_per_step": round(of_replica, 3),
        "load": os.getloadavg()[0],
    }


def replicas() -> dict[str, Any]:
    """One and two replicas of a real world, in turn."""
    with tempfile.TemporaryDirectory() as root:
        world = untrained(*SPACES, "sequence", terminal=0.01, **MODEL)
        Storage(root).make("worlds", "sequence", {}, world.save)
        counts, groups = (1, 2), []
        for count in counts:
            options: dict[str, Any] = {"storage": StorageConfig(root), "cpus": 0.5}
            deploy(ServeConfig(world="sequence", name=f"of{count}", replicas=count, **options))
            groups.append(start_runners(f"of{count}", 2, REAL_ENVS, "sequence"))
        rows = [[measure(group, SECONDS)[0] for group in groups] for _ in range(2 * ROUNDS)]
        for count in counts:
            undeploy(f"of{count}")
    speeds = [round(statistics.median(column)) for column in zip(*rows, strict=True)]
    ratios = sorted(two / one for one, two in rows)
    return {
        "one_replica_steps_per_s": speeds[0],
        "two_replicas_steps_per_s": speeds[1],
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(ratios[0], 2),
        "highest": round(ratios[-1], 2),
        "nodes": len(ray.nodes()),
        "load": os.getloadavg()[0],
    }


def driver(learners: int) -> dict[str, Any]:
    """CPU microseconds a step of each process of a PPO training in the simulated replica."""
    simulate("simulated")
    config = AgentConfig(num_envs=ENVS, rollout=64, runners=2, learners=learners)
    setup = settings.imagined(config)
    arguments = {"app": "simulated", "horizon": 200, "disagreement_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        algorithm = rllib.build(setup, partial(make_env, arguments), Path(folder))

        def clocks() -> list[float]:
            runners = rllib.runners(algorithm).foreach_env_runner(lambda _: time.process_time())
            of_learners = on_learners(algorithm, lambda _: time.process_time())
            return [time.process_time(), sum(runners), sum(of_learners)]

        rllib.train(algorithm)
        before, steps = clocks(), 0
        rllib.statistics(algorithm)
        for _ in range(3):
            rllib.train(algorithm)
            steps += rllib.statistics(algorithm).steps
        spent = [1e6 * (b - a) / steps for a, b in zip(before, clocks(), strict=True)]
        algorithm.stop()
    names = ["driver", "runners", *(["learners"] if learners else [])]
    cells = {f"{name}_cpu_us_per_step": round(x, 1) for name, x in zip(names, spent, strict=False)}
    return {"learners": learners, "epochs": setup.params["num_epochs"], **cells, "steps": steps}


@contextmanager
def nodes(head_cpus: int) -> Iterator[None]:
    """A private Ray of a head and of NODES with one CPU each, all on this machine."""
    from ray.cluster_utils import Cluster

    make_token(Path.home() / ".ray" / "auth_token", "set RAY_AUTH_TOKEN_PATH to one of your own")
    with tempfile.TemporaryDirectory(prefix="mesoray-") as folder:
        options: dict[str, Any] = {"include_dashboard": False}
        head = options | {"num_cpus": head_cpus, "temp_dir": folder, "node_ip_address": LOOPBACK}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for address in NODES:
                cluster.add_node(num_cpus=1, node_ip_address=address, **options)
            ray_session.ensure(RayConfig(address=cluster.address))
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def cells() -> dict[str, Any]:
    """All cells by name: the function that measures each."""
    made: dict[str, Any] = {f"simulated {n}": partial(simulated, n) for n in RUNNERS}
    made["replicas"] = replicas
    return made | {f"driver {n}": partial(driver, n) for n in (0, 2)}


def stored() -> dict[str, Any]:
    """The finished cells by name."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def plot(results: dict[str, Any]) -> None:
    """Plot steps a second against runners, with the ceiling."""
    rows = [cell for name, cell in results.items() if name.startswith("simulated")]
    rows.sort(key=lambda row: row["runners"])
    counts = [row["runners"] for row in rows]
    with rc_context(STYLE):
        figure, axes = canvas(7.2, 3.6)
        axes.plot(counts, [row["ceiling"] for row in rows], color="#667085", ls="--", label="5 ms")
        bars = [[row["steps_per_s"] - row["lowest"] for row in rows]]
        bars.append([row["highest"] - row["steps_per_s"] for row in rows])
        rates = [row["steps_per_s"] for row in rows]
        axes.errorbar(counts, rates, bars, color=WORLD[0], marker="o", capsize=3, label="measured")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("runners of 256 environments")
        axes.set_ylabel("steps a second")
        legend(axes)
        PLOT.write_text(document(figure, "bench_scale"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--plot", action="store_true", help="only draw the stored results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = stored()
    if not options.plot:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, cwd=HERE).stdout.strip()
        for name, function in cells().items():
            chosen = name == options.only or name.startswith(f"{options.only} ".lstrip())
            if not chosen or (name in results and not options.force):
                continue
            with nodes(4 if name.startswith("driver") else 0):
                cell = function()
            results = stored() | {name: cell | {"commit": commit}}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(name, cell, flush=True)
    if any(name.startswith("simulated") for name in results):
        plot(results)


if __name__ == "__main__":
    main()
