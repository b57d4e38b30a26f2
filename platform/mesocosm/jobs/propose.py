"""The job `propose`: a world and a budget of real steps -> what to collect next, as a config that
`mesocosm collect -c` runs.

What may be collected is what `collect` can run: random actions, agents at several levels of noise,
behaviours of the user's own; where tasks are reset options, each behaviour on each part of them too
(start states are among these where the environment takes them as reset options). Which of it to
take, `buying` says. The artifact holds next.yaml and proposal.json, which says why each part is
there. No real step is taken.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from mesocosm import config
from mesocosm.config import JobConfig, fingerprint, identity
from mesocosm.data.analysis.neighbours import Features
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.horizon import horizon_of
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.parts import start_parts
from mesocosm.envs.config import PriceConfig, RealityConfig, TaskOption
from mesocosm.envs.make import EnvFacts, facts_of, source_hash
from mesocosm.errors import UsageError
from mesocosm.evaluate import buying, policy_set
from mesocosm.evaluate.buying import Bought, Imagined
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.jobs import collect
from mesocosm.jobs.collect import CollectConfig
from mesocosm.jobs.evaluate import reality_of
from mesocosm.model import rng
from mesocosm.model.spec import Parts
from mesocosm.model.world import World
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.policy import Acts, policy_of
from mesocosm.runs.tracking import Run, console
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.versions import VERSIONS

NEXT, PROPOSAL = "next.yaml", "proposal.json"
STARTS = 512
"""Starts that the world draws, beside the logged ones."""
PARTS = 3
"""Into so many equal parts the range of a reset option is cut."""


@dataclass
class ProposeConfig(JobConfig):
    world: str = ""
    """`worlds/<id>`, or a unique prefix of the id."""
    steps: int = 1000
    """Real steps that may be bought."""
    agents: list[str] = field(default_factory=list)
    """`agents/<id>`, or `agents/<id>@<iteration>` for a snapshot: each acts at its best, with every
    level of `noises`.
    """
    noises: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.6])
    """As a behaviour's `noise`."""
    behaviours: list[BehaviourConfig] = field(default_factory=list)
    """More candidates, such as scripted ones (`weight` is not used). Random actions are always one.
    """
    even: float = 0.5
    """Share of the steps that is even over the candidates; the others go where disagreement and
    coverage say.
    """
    imagined: int = 64
    """Imagined episodes of each candidate."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """Where it would be collected; without `reality.env`, the environment that the world is of,
    with the tasks and the price of its newest data.
    """
    out: str | None = None
    """A file to write the config to, beside the artifact's own."""


@dataclass(frozen=True)
class _Candidate:
    behaviour: BehaviourConfig
    policy: Acts

    @property
    def explore(self) -> bool:
        """As `collect` lets it act: trained policies draw from their own distribution."""
        return self.behaviour.kind == "trained"


@dataclass(frozen=True)
class _Question:
    cfg: ProposeConfig
    """With `reality` filled in, and full names of agents"""
    world: Artifact
    datasets: list[Artifact]
    facts: EnvFacts
    horizon: int
    """Steps of an imagined episode at most."""
    members: int
    candidates: list[_Candidate]
    sources: list[str]
    """Hashes of scripted behaviours' code"""

    def collection(self, behaviours: list[BehaviourConfig]) -> CollectConfig:
        """Another seed than those of the world's data, whose episodes would begin alike."""
        seeds = [int(artifact.meta.get("config", {}).get("seed", -1)) for artifact in self.datasets]
        return CollectConfig(
            seed=max(seeds, default=-1) + 1,
            reality=self.cfg.reality,
            steps=self.cfg.steps,
            behaviours=behaviours,
        )


def check(cfg: ProposeConfig) -> None:
    """Raise UsageError on the first value that cannot be meant. Looks at nothing but the config."""
    if not cfg.world:
        raise UsageError("world is not set; give the world to improve, as in world=worlds/ab12")
    if cfg.steps < 2:
        raise UsageError(f"steps={cfg.steps} is no budget; give at least 2")
    if not 0 <= cfg.even <= 1:
        raise UsageError(f"even={cfg.even} is no share of the steps; give a number from 0 to 1")
    if cfg.imagined < 4:
        raise UsageError(
            f"imagined={cfg.imagined} is too few to tell candidates apart; give at least 4"
        )
    if cfg.agents and not cfg.noises:
        raise UsageError("noises=[] leaves agents no way to act; give levels such as [0,0.3]")
    named = [
        BehaviourConfig(kind="noisy", policy=agent, noise=noise)
        for agent in cfg.agents
        for noise in cfg.noises
    ]
    if named:
        acting.check(named, "agents and noises")
    if cfg.behaviours:
        acting.check(cfg.behaviours)


def plan(cfg: ProposeConfig) -> dict[str, Any]:
    """What would be compared. Imagines nothing and writes nothing."""
    q = _question(cfg, Storage(cfg.storage.root))
    price = q.cfg.reality.price
    return {
        "world": q.world.name,
        "environment": q.cfg.reality.env,
        "candidates": [acting.label(c.behaviour) for c in q.candidates],
        "imagined steps": f"at most {len(q.candidates) * cfg.imagined * q.horizon}",
        "real steps": 0,
        "real steps proposed": cfg.steps,
        "price proposed": (
            f"{cfg.steps * price.per_step:g} {price.currency}, and {price.per_reset:g} a reset"
        ),
    }


def run(cfg: ProposeConfig, run: Run) -> Artifact:
    """Write next.yaml and proposal.json, or find the proposal that was made so before.

    Raises UsageError before anything is imagined: a wrong config, a missing world, dataset or
    agent, other spaces than the world's.
    """
    q = _question(cfg, run.storage)
    inputs = {"worlds": [q.world.id], "datasets": [a.id for a in q.datasets], "agents": _agents(q)}
    what = identity(q.cfg, without=["world", "out"])
    id = fingerprint(
        "plans", "propose", what, inputs, q.sources, q.facts.version, VERSIONS["propose"], SCHEMA
    )
    with run.making("plans", id, cfg) as artifact:
        found = artifact or _make(q, run, id, inputs)
    answer = json.loads((found.path / PROPOSAL).read_text())
    run.record(
        artifact=found.name,
        inputs=inputs,
        proposal={key: answer[key] for key in ("steps", "price", "currency", "notes")},
    )
    if not run.quiet:
        console.print(_table(answer))
    for note in answer["notes"]:
        run.say(f"note: {note}")
    path = found.path / NEXT
    if cfg.out is not None:
        path = Path(cfg.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((found.path / NEXT).read_text())
    run.artifact(found.path / NEXT)
    run.say(f"mesocosm collect -c {path}")
    return found


def _make(q: _Question, run: Run, id: str, inputs: dict[str, list[str]]) -> Artifact:
    answer, text = _answer(q, run)

    def fill(folder: Path) -> None:
        (folder / PROPOSAL).write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n")
        (folder / NEXT).write_text(text)

    meta = {"inputs": inputs, "config": identity(q.cfg), "job": "propose", "run": run.id}
    return run.storage.make("plans", id, meta, fill, force=q.cfg.force)


def _agents(q: _Question) -> list[str]:
    policies = [c.behaviour.policy for c in q.candidates if c.behaviour.policy is not None]
    return sorted({policy.removeprefix("agents/").partition("@")[0] for policy in policies})


# -- the question
# -----------------------------------------------------------------------------------------------------


def _question(cfg: ProposeConfig, storage: Storage) -> _Question:
    check(cfg)
    world = storage.artifact("worlds", cfg.world)
    datasets = [storage.artifact("datasets", id) for id in world.meta["inputs"]["datasets"]]
    codec = Codec.from_json(json.loads((world.path / "codec.json").read_text()))
    reality = _reality(cfg.reality, codec, datasets)
    facts = facts_of(reality)
    for name, theirs, own in zip(
        ("observation", "action"),
        facts.spaces,
        (codec.observation_space, codec.action_space),
        strict=True,
    ):
        if theirs != own:
            raise UsageError(
                f"reality.env={reality.env!r} has the {name} space {theirs}, and {world.name}"
                f" {own}; propose for its own environment"
            )
    cfg = replace(
        cfg, reality=reality, agents=[acting.full_name(storage, agent) for agent in cfg.agents]
    )
    acting.check_tasks(cfg.behaviours, reality)
    candidates = [_Candidate(b, _policy(b, storage, facts)) for b in _behaviours(cfg, storage)]
    sources = [
        source_hash(acting.load_function(c.behaviour.function))
        for c in candidates
        if c.behaviour.function is not None
    ]
    members = json.loads((world.path / "world.json").read_text())["config"]["members"]
    horizon = horizon_of(storage, world, facts.max_episode_steps, "reality.horizon").steps
    return _Question(cfg, world, datasets, facts, horizon, members, candidates, sources)


def _reality(reality: RealityConfig, codec: Codec, datasets: list[Artifact]) -> RealityConfig:
    """Given, or that of the world, with what its newest data's collection says of tasks and price.
    Raises UsageError where nobody says how the task's reset options are drawn.
    """
    if not reality.env:
        said: dict[str, Any] = next(
            (
                a.meta["config"]["reality"]
                for a in reversed(datasets)
                if a.meta.get("job") == "collect"
            ),
            {},
        )
        reality = reality_of(reality, codec)
        if not reality.task_options:
            reality = replace(
                reality,
                task_options={
                    name: TaskOption(**option)
                    for name, option in said.get("task_options", {}).items()
                },
            )
        if reality.price == PriceConfig() and "price" in said:
            reality = replace(reality, price=PriceConfig(**said["price"]))
    lacking = [option.name for option in codec.options if option.name not in reality.task_options]
    if lacking:
        raise UsageError(
            f"the world's task has the reset option {lacking[0]!r}; say how it is drawn:"
            f" reality.task_options.{lacking[0]}.choices=[...]"
        )
    return reality


def _behaviours(cfg: ProposeConfig, storage: Storage) -> list[BehaviourConfig]:
    """Every candidate, each once."""
    plain = [
        BehaviourConfig(),
        *(
            BehaviourConfig(kind="noisy", policy=agent, noise=noise)
            for agent in cfg.agents
            for noise in cfg.noises
        ),
    ]
    plain += [replace(policy_set.full(b, storage), weight=1.0) for b in cfg.behaviours]
    every = [
        *plain,
        *(
            replace(b, task_options=part)
            for b in plain
            if not b.task_options
            for part in _parts(cfg.reality.task_options)
        ),
    ]
    return list({acting.label(b): b for b in every}.values())


def _parts(options: dict[str, TaskOption]) -> list[dict[str, TaskOption]]:
    """One reset option at a time: each of its choices, or each third of its range."""
    found = []
    for name, option in options.items():
        if option.choices is not None:
            found += [
                {name: TaskOption(choices=[choice])}
                for choice in option.choices
                if len(option.choices) > 1
            ]
        else:
            assert option.low is not None and option.high is not None
            edges = [float(edge) for edge in np.linspace(option.low, option.high, PARTS + 1)]
            found += [
                {name: TaskOption(low=low, high=high)} for low, high in itertools.pairwise(edges)
            ]
    return found


def _policy(behaviour: BehaviourConfig, storage: Storage, facts: EnvFacts) -> Acts:
    acting.build(behaviour, *facts.spaces, storage)  # refuses a policy of other spaces
    if behaviour.kind == "trained":
        assert behaviour.policy is not None
        return policy_of(storage, behaviour.policy)
    return policy_set.named(behaviour, storage, *facts.spaces).policy


# -- the answer
# -------------------------------------------------------------------------------------------------------


def _answer(q: _Question, run: Run) -> tuple[dict[str, Any], str]:
    """(proposal.json, next.yaml)"""
    cfg = q.cfg
    world, dataset = World.load(q.world.path), Dataset([artifact.path for artifact in q.datasets])
    codec, features = codec_of(world), Features(dataset)
    logged = features.sample(dataset, "train", seed=cfg.seed)
    unit = buying.gap_unit(features, dataset, logged.values, logged.episodes, cfg.seed)
    starts = _starts(world, dataset, codec, cfg.seed)
    imagined: list[Imagined] = []
    behaviours: list[BehaviourConfig] = []
    notes: list[str] = []
    with run.progress("propose", len(q.candidates)) as update:
        for done, candidate in enumerate(q.candidates):
            name = acting.label(candidate.behaviour)
            rows = _within(codec, starts[0], candidate.behaviour)
            if not len(rows):
                notes.append(
                    f"{name}: the world has seen no such task and can say nothing of it; what is"
                    " new to it is best looked at once, by collecting some."
                )
                continue
            own = starts[0][rows], starts[1][rows]

            def told(steps: int, done: int = done, name: str = name) -> None:
                update(done, f"{name}, imagined step {steps}")

            imagined.append(
                buying.imagine(
                    world,
                    dataset,
                    features,
                    candidate.policy,
                    own,
                    explore=candidate.explore,
                    episodes=cfg.imagined,
                    horizon=q.horizon,
                    seed=cfg.seed,
                    progress=told,
                )
            )
            behaviours.append(candidate.behaviour)
        bought = buying.buy(
            imagined,
            logged.values,
            unit,
            cfg.steps,
            even=cfg.even,
            disagrees=q.members > 1,
            seed=cfg.seed,
        )
        update(
            len(q.candidates),
            f"{sum(s > 0 for s in bought.steps)} of {len(imagined)} candidates chosen",
        )
    chosen = buying.kept(behaviours, bought)
    weights = buying.weights(
        [bought.steps[i] for i in chosen], [imagined[i].length for i in chosen]
    )
    job = q.collection(
        [replace(behaviours[i], weight=weight) for i, weight in zip(chosen, weights, strict=True)]
    )
    collect.check(job)
    price = cfg.reality.price
    resets = sum(bought.steps[i] / imagined[i].length for i in chosen)
    rows = [
        {
            "behaviour": acting.label(behaviours[i]),
            "steps": bought.steps[i],
            "share": bought.steps[i] / cfg.steps,
            "episodes": bought.steps[i] / imagined[i].length,
            "price": bought.steps[i] * (price.per_step + price.per_reset / imagined[i].length),
            "length": imagined[i].length,
            **asdict(bought.scores[i]),
        }
        for i in sorted(
            range(len(behaviours)), key=lambda i: (-bought.steps[i], -bought.scores[i].worth)
        )
    ]
    answer = {
        "schema": 1,
        "world": q.world.name,
        "steps": cfg.steps,
        "even": cfg.even,
        "price": cfg.steps * price.per_step + resets * price.per_reset,
        "currency": price.currency,
        "gap_unit": unit,
        "left": bought.left,
        "candidates": rows,
        "notes": [*_notes(q, behaviours, bought), *_few(rows), *notes],
    }
    return answer, _yaml(job, answer)


def _starts(world: World, dataset: Dataset, codec: Codec, seed: int) -> tuple[Parts, Parts]:
    """(task, observation) [N, ...]: as many logged starts of training as the world draws, by turns
    through those that there are.
    """
    drawn = world.sample_start(rng.keys(seed, torch.arange(STARTS, device=world.device), 0, 0))
    logged = start_parts(dataset, codec, "train")
    count = len(logged[0].numbers)
    rows = torch.arange(max(STARTS, count)) % count
    return _joined(logged[0][rows], drawn[0]), _joined(logged[1][rows], drawn[1])


def _joined(a: Parts, b: Parts) -> Parts:
    b = b.to("cpu")
    return Parts(torch.cat((a.numbers, b.numbers)), torch.cat((a.categories, b.categories)))


def _within(codec: Codec, task: Parts, behaviour: BehaviourConfig) -> Any:
    """Rows of `task` that the behaviour may be given."""

    def holds(options: dict[str, Any]) -> bool:
        for name, part in behaviour.task_options.items():
            value = options[name]
            if part.choices is not None:
                if not any(
                    (
                        abs(value - choice) < 1e-6 * (1 + abs(choice))
                        if isinstance(value, float)
                        else value == choice
                    )
                    for choice in part.choices
                ):
                    return False
            elif (
                part.low is not None
                and part.high is not None
                and not part.low <= value <= part.high
            ):
                return False
        return True

    if not behaviour.task_options:
        return torch.arange(len(task.numbers))
    return torch.tensor(
        [row for row, options in enumerate(codec.task_options(task)) if holds(options)],
        dtype=torch.int64,
    )


def _notes(q: _Question, behaviours: list[BehaviourConfig], bought: Bought) -> list[str]:
    """When there is little to tell."""
    found = []
    if q.members == 1:
        found.append(
            f"{q.world.name} has 1 member, so that nothing disagrees: coverage alone chose;"
            " pretrain with model.members=4 to have both."
        )
    if len(behaviours) == 1:
        found.append(
            "random actions are the only candidate, so there is nothing to choose; give agents=[ID]"
            " or behaviours."
        )
        return found
    best = max(bought.scores, key=lambda score: score.worth)
    random = bought.scores[0]
    if best is random:
        found.append("no candidate is worth more than random actions.")
    elif (
        best.interval is not None
        and random.interval is not None
        and best.interval[0] <= random.interval[1]
    ):
        found.append(
            "no candidate is told apart from random actions (their 90% intervals meet): take the"
            " shares for a guess, or raise imagined."
        )
    return found


def _few(rows: list[dict[str, Any]]) -> list[str]:
    """Whole episodes are collected."""
    chosen = [row for row in rows if row["steps"]]
    episodes = sum(row["episodes"] for row in chosen)
    if episodes < 1:
        longest = max(row["length"] for row in chosen)
        return [
            f"the budget is less than one episode (some {longest:.3g} steps), of which the"
            " beginning alone would be collected; give more steps."
        ]
    scarce = [row["behaviour"] for row in chosen if row["episodes"] < 1]
    return (
        [
            f"the budget is about {episodes:.3g} episodes, less than one of {', '.join(scarce)},"
            " which may not come up."
        ]
        if scarce
        else []
    )


def _yaml(job: CollectConfig, answer: dict[str, Any]) -> str:
    head = [
        (
            f"# {answer['steps']} real steps for {answer['world']}, about {answer['price']:.4g}"
            f" {answer['currency']}"
        ),
        (
            f"# {answer['even']:.0%} of the steps are even over the candidates, the others go where"
            " they take the most off what is unknown on all candidates'"
        ),
        (
            "# paths. Worth, what is unknown of a candidate's step: the mean of log(1 +"
            " disagreement) * log(1 + gap); 1 of either is what a tenth of held-out"
        ),
        "# transitions exceed. Weights are shares of episodes.",
    ]
    for row in answer["candidates"]:
        if row["steps"]:
            said = (
                f"{row['steps']} steps, some {row['episodes']:.3g} episodes of {row['length']:.3g};"
                f" worth {row['worth']:.3g}"
            )
            head.append(
                f"#   {row['behaviour']}: {said}, median disagreement {row['disagreement']:.3g},"
                f" gap {row['gap']:.3g}"
            )
    head += [f"# note: {note}" for note in answer["notes"]]
    return "\n".join(head) + "\n" + config.to_yaml(job, ("seed", "reality", "steps", "behaviours"))


def _table(answer: dict[str, Any]) -> Table:
    table = Table(
        "behaviour",
        "steps",
        "episodes",
        "price",
        "worth",
        "90%",
        "disagrees",
        "gap",
        box=None,
        header_style="dim",
        pad_edge=False,
    )
    table.columns[0].overflow = "fold"
    for row in answer["candidates"]:
        span = (
            "-"
            if row["interval"] is None
            else f"{row['interval'][0]:.3g} to {row['interval'][1]:.3g}"
        )
        cells = [str(row["steps"]), f"{row['episodes']:.3g}", f"{row['price']:.4g}"]
        table.add_row(
            row["behaviour"],
            *cells,
            f"{row['worth']:.3g}",
            span,
            f"{row['disagreement']:.3g}",
            f"{row['gap']:.3g}",
        )
    less = f"they would take {1 - answer['left']:.0%} off what is unknown on all candidates' paths"
    table.caption = (
        f"{answer['steps']} steps, about {answer['price']:.4g} {answer['currency']}; {less}"
    )
    return table
