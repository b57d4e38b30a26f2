"""A proposal: which candidates to collect, how many steps of each, and why.

`buying` scores the candidates and shares the steps out. No real step is taken.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from mesocosm import config
from mesocosm.data.analysis.neighbours import Features
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.collecting.config import check as check_collection
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.normalize import mean_duration
from mesocosm.data.loading.windows import start_parts
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import DrawnOption
from mesocosm.evaluate import buying
from mesocosm.evaluate.buying import Bought, Imagined
from mesocosm.evaluate.candidates import CheckedProposal
from mesocosm.evaluate.config import members_of
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.model import rng
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs.tracking import Run

STARTS = 512
"""Starts that the world draws, in addition to the logged ones."""


def propose(q: CheckedProposal, run: Run) -> tuple[dict[str, Any], str]:
    """Imagine and score the candidates, and share the steps out.

    Returns:
        The contents of proposal.json and of next.yaml.
    """
    cfg = q.cfg
    world, dataset = World.load(q.world.path), Dataset([artifact.path for artifact in q.datasets])
    codec, features = codec_of(world), Features(dataset)
    logged = features.sample(dataset, "train", seed=cfg.seed)
    unit = buying.gap_unit(features, dataset, logged.values, logged.episodes, cfg.seed)
    task, observation = _starts(world, dataset, codec, cfg.seed)
    imagined: list[Imagined] = []
    behaviours: list[BehaviourConfig] = []
    unseen: list[str] = []
    with run.progress("propose", len(q.candidates)) as update:
        for done, candidate in enumerate(q.candidates):
            name = acting.label(candidate.behaviour)
            rows = _within(codec, task, candidate.behaviour)
            if not len(rows):
                reason = "the world has seen no such task, so its worth is unknown"
                unseen.append(f"{name}: {reason}; collect some of it once.")
                continue

            def report(steps: int, done: int = done, name: str = name) -> None:
                update(done, f"{name}, imagined step {steps}")

            episodes = buying.imagine(
                world,
                dataset,
                features,
                candidate.policy,
                (task[rows], observation[rows]),
                explore=candidate.behaviour.kind == "trained",
                episodes=cfg.imagined,
                horizon=q.horizon,
                seed=cfg.seed,
                progress=report,
            )
            imagined.append(episodes)
            behaviours.append(candidate.behaviour)
        bought = buying.buy(
            imagined,
            logged.values,
            unit,
            cfg.steps,
            even=cfg.even,
            disagrees=members_of(q.world) > 1,
            seed=cfg.seed,
        )
        chosen = [i for i, steps in enumerate(bought.steps) if steps]
        chosen.sort(key=lambda i: -bought.steps[i])
        update(len(q.candidates), f"{len(chosen)} of {len(imagined)} candidates chosen")
    lengths = [candidate.length for candidate in imagined]
    weights = buying.weights([bought.steps[i] for i in chosen], [lengths[i] for i in chosen])
    pairs = zip(chosen, weights, strict=True)
    job = q.collection([replace(behaviours[i], weight=weight) for i, weight in pairs])
    check_collection(job)
    price = cfg.reality.price
    seconds = (mean_duration(dataset) or 0.0) if price.per_second else 0.0
    answers: list[dict[str, Any]] = [
        {
            "behaviour": acting.label(behaviour),
            "steps": steps,
            "share": steps / cfg.steps,
            "episodes": steps / length,
            "price": price.of(1, 0, seconds) * steps + price.per_reset * steps / length,
            "length": length,
            **asdict(score),
        }
        for behaviour, steps, length, score in zip(
            behaviours, bought.steps, lengths, bought.scores, strict=True
        )
    ]
    answers.sort(key=lambda answer: (-answer["steps"], -answer["worth"]))
    answer = {
        "schema": 1,
        "world": q.world.name,
        "steps": cfg.steps,
        "even": cfg.even,
        "price": sum(answer["price"] for answer in answers),
        "currency": price.currency,
        "gap_unit": unit,
        "left": bought.left,
        "candidates": answers,
        "notes": [*_notes(q, behaviours, bought), *_few(answers), *unseen],
    }
    return answer, _yaml(job, answer)


def _starts(world: World, dataset: Dataset, codec: Codec, seed: int) -> tuple[Parts, Parts]:
    """(task, observation) [N, ...]: the logged starts of training, repeated to as many as the world
    draws, then those.
    """
    drawn = world.sample_start(rng.keys(seed, torch.arange(STARTS, device=world.device), 0, 0))
    logged = start_parts(dataset, codec, "train")
    count = len(logged[0].numbers)
    rows = torch.arange(max(STARTS, count)) % count
    joined = []
    for real, generated in zip(logged, drawn, strict=True):
        a, b = real[rows], generated.to("cpu")
        categories = torch.cat((a.categories, b.categories))
        joined.append(Parts(torch.cat((a.numbers, b.numbers)), categories))
    return joined[0], joined[1]


def _within(codec: Codec, task: Parts, behaviour: BehaviourConfig) -> Tensor:
    """Rows of `task` within the behaviour's task options."""
    options = behaviour.task_options.items()
    if not options:
        return torch.arange(len(task.numbers))

    def holds(part: DrawnOption, value: Any) -> bool:
        if part.choices is None:
            assert part.low is not None and part.high is not None
            return bool(part.low <= value <= part.high)
        if not isinstance(value, float):
            return value in part.choices
        return any(abs(value - choice) < 1e-6 * (1 + abs(choice)) for choice in part.choices)

    inside = [
        all(holds(part, values[name]) for name, part in options)
        for values in codec.task_options(task)
    ]
    return torch.tensor(inside).nonzero().flatten()


def _notes(q: CheckedProposal, behaviours: list[BehaviourConfig], bought: Bought) -> list[str]:
    """Reasons why the proposal says little."""
    notes = []
    if members_of(q.world) == 1:
        notes.append(
            f"{q.world.name} has 1 member, so that nothing disagrees: coverage alone chose;"
            " pretrain with model.members=4 to have both."
        )
    if len(behaviours) == 1:
        only = "random actions are the only candidate, so there is nothing to choose"
        return [*notes, f"{only}; give agents=[ID] or behaviours."]
    best, random = max(bought.scores, key=lambda score: score.worth), bought.scores[0]
    if best is random:
        notes.append("no candidate is worth more than random actions.")
    elif best.interval and random.interval and best.interval[0] <= random.interval[1]:
        notes.append(
            "no candidate differs from random actions (their 90% intervals overlap): the shares are"
            " a guess; raise imagined."
        )
    return notes


def _few(rows: list[dict[str, Any]]) -> list[str]:
    """The notes of a budget that is too small for whole episodes."""
    chosen = [row for row in rows if row["steps"]]
    episodes = sum(row["episodes"] for row in chosen)
    if episodes < 1:
        longest = max(row["length"] for row in chosen)
        few = f"the budget is less than one episode (some {longest:.3g} steps)"
        return [f"{few}, of which the beginning alone would be collected; give more steps."]
    scarce = ", ".join(row["behaviour"] for row in chosen if row["episodes"] < 1)
    few = f"the budget is about {episodes:.3g} episodes, less than one of {scarce}"
    return [f"{few}, which may not come up."] if scarce else []


def _yaml(job: CollectConfig, answer: dict[str, Any]) -> str:
    lines = [
        f"{answer['steps']} real steps for {answer['world']}, about {answer['price']:.4g}"
        f" {answer['currency']}",
        f"{answer['even']:.0%} of the steps are even over the candidates, the others go where they"
        " reduce most what is unknown on all candidates'",
        "paths. Worth, what is unknown of a candidate's step: the mean of log(1 + disagreement) *"
        " log(1 + gap). A tenth of held-out transitions",
        "exceed 1 of either. Weights are shares of episodes.",
    ]
    for row in answer["candidates"]:
        if row["steps"]:
            lines.append(
                f"  {row['behaviour']}: {row['steps']} steps, some {row['episodes']:.3g} episodes"
                f" of {row['length']:.3g}; worth {row['worth']:.3g}, median disagreement"
                f" {row['disagreement']:.3g}, gap {row['gap']:.3g}"
            )
    lines += [f"note: {note}" for note in answer["notes"]]
    head = "".join(f"# {line}\n" for line in lines)
    return head + config.to_yaml(job, ("seed", "reality", "steps", "behaviours"))


def table(answer: dict[str, Any]) -> Table:
    """The proposal on the terminal."""
    head = ("behaviour", "steps", "episodes", "price", "worth", "90%", "disagrees", "gap")
    table = Table(*head, box=None, header_style="dim", pad_edge=False)
    table.columns[0].overflow = "fold"
    for row in answer["candidates"]:
        low_high = row["interval"]
        span = "-" if low_high is None else f"{low_high[0]:.3g} to {low_high[1]:.3g}"
        cells = [f"{row[key]:.3g}" for key in ("worth", "disagreement", "gap")]
        cells = [f"{row['episodes']:.3g}", f"{row['price']:.4g}", cells[0], span, *cells[1:]]
        table.add_row(row["behaviour"], str(row["steps"]), *cells)
    less = f"they would take {1 - answer['left']:.0%} off what is unknown on all candidates' paths"
    price = f"about {answer['price']:.4g} {answer['currency']}"
    table.caption = f"{answer['steps']} steps, {price}; {less}"
    return table
