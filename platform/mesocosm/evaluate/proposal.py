"""A proposal: which candidates to collect, how many steps of each, and why.

`buying` scores the candidates and shares the steps out. No real step is taken.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from rich.table import Table

from mesocosm import config
from mesocosm.data.analysis.neighbours import Features
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.collecting.config import check as check_collection
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.windows import start_parts
from mesocosm.evaluate import buying
from mesocosm.evaluate.buying import Bought, Imagined
from mesocosm.evaluate.candidates import Question
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.model import rng
from mesocosm.model.spec import Parts
from mesocosm.model.world import World
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs.tracking import Run

STARTS = 512
"""Starts that the world draws, beside the logged ones."""


def propose(q: Question, run: Run) -> tuple[dict[str, Any], str]:
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
    check_collection(job)
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


def _notes(q: Question, behaviours: list[BehaviourConfig], bought: Bought) -> list[str]:
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


def table(answer: dict[str, Any]) -> Table:
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
