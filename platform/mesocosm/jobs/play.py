"""The job `play`: a web page in which a person steps through a world, until Ctrl-C."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from mesocosm.config import fingerprint
from mesocosm.data.loading.text_batch import batch_codec
from mesocosm.datasets.horizon import MAX_EPISODE_STEPS
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import MesocosmError
from mesocosm.evaluate.config import facts_for, reality_of
from mesocosm.job import Job, Plan
from mesocosm.model.any_world import AnyWorld, load_any
from mesocosm.play.config import PlayConfig, check
from mesocosm.play.game import Game
from mesocosm.play.main_thread import MainThread
from mesocosm.play.real_side import RealSide
from mesocosm.play.routes import application
from mesocosm.runs.tracking import Run, console
from mesocosm.serve.http_server import LoopbackServer
from mesocosm.serve.worlds import find_world
from mesocosm.store.artifacts import Storage


@dataclass(frozen=True, kw_only=True)
class PlayPlan(Plan[PlayConfig]):
    """The world to play: `id` is that of its artifact, or a folder."""

    world: AnyWorld
    horizon: int | None
    """Steps after which an episode is truncated; None for never."""
    ledger: str | None
    """The ledger of the real steps; None if no real steps are taken."""


class PlayJob(Job[PlayConfig, PlayPlan]):
    """A job without an artifact. It ends with Ctrl-C."""

    name, kind, config = "play", "worlds", PlayConfig

    def resolve(self, config: PlayConfig, storage: Storage) -> PlayPlan:
        check(config)
        id, folder = find_world(storage, config.world)
        LoopbackServer(config.port, "port").close()
        world = load_any(folder)
        codec = batch_codec(world.codec)
        horizon, ledger = codec.environment.get("max_episode_steps"), None
        if config.has_budget:
            config = replace(config, reality=reality_of(config.reality, codec.environment))
            facts = facts_for(config.reality, f"world {id}", codec)
            ledger = config.ledger or _ledger(id, config)
            Ledger(storage, ledger).totals()
            horizon = config.reality.horizon or facts.max_episode_steps or MAX_EPISODE_STEPS
        return PlayPlan(
            config=config,
            inputs={"worlds": [id]},
            facts={},
            id=id,
            world=world,
            horizon=horizon,
            ledger=ledger,
        )

    def summary(self, plan: PlayPlan) -> dict[str, Any]:
        config = plan.config
        environment = batch_codec(plan.world.codec).environment["id"]
        summary: dict[str, Any] = {"world": plan.id, "environment": environment}
        summary |= {"members": plan.world.net.members, "port": config.port or "any free one"}
        if plan.ledger is None:
            return summary | {"real steps": 0, "price": 0.0}
        budget, price = config.reality.budget, config.reality.price
        summary |= {"reality": config.reality.env, "ledger": plan.ledger}
        steps = "no bound" if budget.steps is None else f"at most {budget.steps}"
        each = f"{price.per_step:g} a step, {price.per_reset:g} a reset"
        each += f", {price.per_second:g} a second" if price.per_second else ""
        most = "" if budget.money is None else f"at most {budget.money:g} {price.currency}; "
        return summary | {"real steps": steps, "price": f"{most}{each} {price.currency}"}

    def execute(self, plan: PlayPlan, run: Run) -> None:  # type: ignore[override]
        """Serve the page, print its address, and wait.

        Raises:
            UsageError: The port is taken by now.
            MesocosmError: The server ends.
        """
        config = plan.config
        server, main = LoopbackServer(config.port, "port"), MainThread()
        run.record(inputs=plan.inputs)
        game = Game(plan.world, plan.id, run.storage, _reality(plan, run.storage), plan.horizon)
        try:
            game.begin("generated", 0, config.seed)
            token = secrets.token_urlsafe(24)
            server.start(application(game, main.call, token))
            run.say(f"world {plan.id} is played at {server.url}; Ctrl-C ends it")
            # The address is not logged, because everybody who reads it may play.
            console.print(f"Open in a browser on this machine:\n  {server.url}/#{token}")
            main.run(lambda: server.alive)
            raise MesocosmError(f"the server at {server.url} has ended; start it again")
        except KeyboardInterrupt:
            run.say("ending")
            run.stopped = True
        finally:
            server.close()
            game.close()
            if game.real is not None:
                run.record(ledger=game.real.ledger.totals().to_json())


def _ledger(world: str, config: PlayConfig) -> str:
    """The name of the ledger of this world and its environment."""
    return fingerprint("play", world, config.reality.env, dict(config.reality.kwargs))


def _reality(plan: PlayPlan, storage: Storage) -> RealSide | None:
    if plan.ledger is None:
        return None
    reality = plan.config.reality
    return RealSide(reality, Ledger(storage, plan.ledger, reality.budget, reality.price))


JOB = PlayJob()
