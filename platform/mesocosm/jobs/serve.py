"""The job `serve`: a world on Ray Serve, until Ctrl-C."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.job import Job, Plan, Resources
from mesocosm.runs.tracking import Run
from mesocosm.serve.config import ServeConfig, check, first_replicas
from mesocosm.serve.deployment import LISTENERS, check_world, deploy, undeploy
from mesocosm.serve.worlds import find_world
from mesocosm.store.artifacts import Storage


@dataclass(frozen=True, kw_only=True)
class ServePlan(Plan[ServeConfig]):
    """The world to serve: `id` is that of its artifact, or a folder."""

    folder: Path


class Serve(Job[ServeConfig, ServePlan]):
    """A job without an artifact. It ends with Ctrl-C."""

    name, kind, config = "serve", "worlds", ServeConfig

    def resolve(self, config: ServeConfig, storage: Storage) -> ServePlan:
        check(config)
        if not config.world:
            raise UsageError("serve.world must name a world, got ''; try world=worlds/ID")
        id, folder = find_world(storage, config.world)
        check_world(config)
        inputs = {"worlds": [id]}
        if config.agent is not None:
            inputs["agents"] = [storage.artifact("agents", config.agent.partition("@")[0]).id]
        return ServePlan(config=config, inputs=inputs, facts={}, id=id, folder=folder)

    def resources(self, plan: ServePlan) -> Resources:
        config = plan.config
        replicas = first_replicas(config)
        gpus = replicas if config.device == "cuda" else 0
        return {f"replicas={replicas}": (replicas * config.cpus, gpus)}

    def summary(self, plan: ServePlan) -> dict[str, Any]:
        config = plan.config
        summary: dict[str, Any] = {"world": plan.id, "path": str(plan.folder), "app": config.name}
        replicas = first_replicas(config)
        summary |= {"replicas": replicas, "cpus": replicas * config.cpus}
        if config.autoscaling:
            summary["autoscaling"] = config.autoscaling
        if config.planner is not None:
            summary |= {"planner": config.planner, "agent": config.agent}
        return summary | {"http": config.http, "price": 0.0}

    def execute(self, plan: ServePlan, run: Run) -> None:  # type: ignore[override]
        """Deploy, print how to connect, and wait.

        Raises:
            MesocosmError: The application fails later.
        """
        import ray
        from ray import serve

        config, world = plan.config, plan.id
        deploy(config, run.say)
        address = ray.get_runtime_context().gcs_address
        run.record(app=config.name, address=address, inputs={"world": world})
        served = (
            f"world {world} is served as {config.name!r} by {first_replicas(config)} replica(s)"
        )
        run.say(f"{served}; Ctrl-C ends it.")
        if not Path(world).is_absolute():
            words = [f"world={world}", f"app={config.name}", f"ray.address={address}"]
            command = shlex.join([*words, f"storage.root={run.storage.root}"])
            command = f"mesocosm train-agent {command}"
            run.say(f"To train an agent in it, from another terminal:\n  {command}")
        run.say(
            "To step in it, from Python:\n"
            "  import gymnasium, mesocosm.serve.world_env\n"
            f'  envs = gymnasium.make_vec("mesocosm/World-v0", num_envs=64, world="{world}",'
            f' app="{config.name}", address="{address}", horizon=200)'
        )
        if config.planner is not None:
            run.say(
                "To plan actions for real environments, from Python:\n"
                "  import mesocosm\n"
                f'  planner = mesocosm.ServedPlanner("{config.name}", address="{address}")\n'
                "  planner.reset(num_envs=1, seed=0); action = planner.act(observation[None])[0]"
            )
        listener = LISTENERS.get(config.name)
        if listener is not None:
            token = listener.token_source
            token = token if token.startswith("$") else f"$(cat {shlex.quote(token)})"
            header = f'-H "Authorization: Bearer {token}"'
            run.say(f"Over HTTP, from this machine:\n  curl {header} {listener.url}/v1/world")
        try:
            while True:
                time.sleep(1.0)
                state = serve.status().applications.get(config.name)
                if state is None or state.status == "DEPLOY_FAILED":
                    reason = f"is gone ({state.message if state else 'deleted'})"
                    fix = "see the replicas' logs, and serve it again"
                    raise MesocosmError(f"application {config.name!r} {reason}; {fix}")
                if listener is not None and not listener.alive:
                    ingress = f"the HTTP ingress at {listener.url}"
                    raise MesocosmError(f"{ingress} has ended; serve the world again")
        except KeyboardInterrupt:
            run.say("ending")
            run.stopped = True
        finally:
            undeploy(config.name)


JOB = Serve()
