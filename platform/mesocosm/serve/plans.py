"""A served planner: requests of the op `plan`, and the client's side.

The client keeps the planner's state, so that any replica answers with the same bits.
"""

from __future__ import annotations

from types import TracebackType

from mesocosm.data.loading.codec import Codec
from mesocosm.data.planners import load_agent
from mesocosm.errors import UsageError
from mesocosm.model.carry import Context, grouped, prefixed
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.policies.plan_state import PlanSize, PlanState
from mesocosm.policies.planner import Planner
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.serve.check import check_plan
from mesocosm.serve.connection import Connection, Served, reply_of
from mesocosm.serve.protocol import CONTEXT, PLAN, Message, get, put
from mesocosm.store.artifacts import Storage


class PlanServer:
    """Answers the op `plan` for one world, with or without an agent. For one thread at a time."""

    def __init__(self, storage: Storage, id: str, world: World, agent: str | None):
        """Make the planner.

        Args:
            storage: The storage of the agent.
            id: The world's id.
            world: The world.
            agent: `agents/ID`, or None.

        Raises:
            UsageError: There is no such agent, it has other spaces, or the world's actions cannot
                be planned.
            ArtifactError: The agent has no value function.
        """
        self.id = id
        codec = Codec.from_json(world.codec)
        acting = None if agent is None else load_agent(storage, agent)
        self.planner = Planner(world, codec, acting)

    def describe(self) -> Message:
        """The fields of a description that let a client keep the planner's state."""
        size = self.planner.size
        return {"horizon": size.horizon, "plans": size.plans, "iterations": size.iterations}

    def answer(self, request: Message) -> Message:
        """Plan the next actions. Raises UsageError for an invalid request."""
        world = self.planner.world
        check_plan(request, world.spec, world.net.memory, self.planner.size)
        state = PlanState.from_numpy(grouped(request, PLAN))
        try:
            action, after = self.planner.plan(Context.from_numpy(grouped(request, CONTEXT)), state)
        except ValueError as error:  # columns that do not fit the clock
            raise UsageError(
                f"request 'plan': {error}; send the state of the last reply"
            ) from error
        reply: Message = prefixed(PLAN, after.to_numpy())
        put(reply, "action", action)
        return reply


class ServedPlans:
    """Plans of a replica (`policies.planner_policy.Plans`)."""

    def __init__(self, connection: Connection, world: str = ""):
        """Connect to the planner of the application's world. Raises UsageError without one."""
        self._connection = connection
        reply = reply_of(connection.call({"op": "describe", "world": world}))
        if reply.get("planner") is None:
            raise UsageError(
                f"world {reply['world']!r} is served without a planner; serve it with planner=icem"
            )
        self.world: str = reply["world"]
        self.codec = Codec.from_json(reply["codec"])
        self.memory: int = reply["memory"]
        self.size = PlanSize(**reply["planner"])

    def begin(self, batch: int, seed: int) -> PlanState:
        """The state of `batch` environments before their first step."""
        return PlanState.begin(self.codec.spec.action, self.size, batch, seed)

    def plan(self, context: Context, state: PlanState) -> tuple[Parts, PlanState]:
        """The next actions [B, ...], and the state after them."""
        request: Message = {"op": "plan", "world": self.world}
        request |= prefixed(CONTEXT, context.to_numpy()) | prefixed(PLAN, state.to_numpy())
        reply = reply_of(self._connection.call(request))
        return get(reply, "action"), PlanState.from_numpy(grouped(reply, PLAN))


class ServedPlanner(PlannerPolicy):
    """The planner of a served world, as a policy of B environments that step together.

    Call `reset(num_envs, seed)`, then `act(observations)` at each step, and `restart(mask)` before
    it where environments began new episodes. Actions are a function of (world, agent, seed,
    observations, restarts), on any replica.

        planner = ServedPlanner("mesocosm", address="127.0.0.1:PORT")
        planner.reset(num_envs=1, seed=0)
        action = planner.act(observation[None])[0]
    """

    def __init__(
        self, app: str = "mesocosm", *, address: str | None = None, deadline_s: float = 120.0
    ):
        """Connect.

        Args:
            app: Name of the Serve application.
            address: Address of Ray. Defaults to this process's Ray.
            deadline_s: Seconds that a replica may take, including its replacement.

        Raises:
            UsageError: There is no such application, or it serves no planner.
        """
        self._served = Served(app, address, deadline_s)
        super().__init__(ServedPlans(self._served))

    def close(self) -> None:
        """Close the connection."""
        self._served.close()

    def __enter__(self) -> ServedPlanner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
