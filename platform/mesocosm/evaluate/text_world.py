"""The evaluation of a text world: likelihood of held-out episodes, predictions of single steps, and
whole imagined episodes by the true rules where the environment has a checker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mesocosm.data.loading.text_batch import start_texts
from mesocosm.data.loading.text_loader import TextLoader
from mesocosm.data.loading.texts import TextCodec, text_episodes
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import EvaluateConfig, reality_of
from mesocosm.evaluate.metrics.text_fidelity import (
    Act,
    Check,
    Consistency,
    Share,
    StartNovelty,
    TextFidelity,
    consistency,
    fidelity,
    imagine_texts,
    predict_steps,
    start_novelty,
)
from mesocosm.model.language.net import bits_per_byte
from mesocosm.model.language.world import TextWorld

BATCH = 8
SUCCESS = 1.0
"""The return of a success in the environments that have a checker."""
ROLLOUT = 20
"""Steps of an imagined episode, at most."""
NOT_MEASURED = (
    "Not measured for worlds of texts: errors of numbers some steps ahead, off-policy errors by"
    " distance, and a classifier of starts. Exact texts and the checker take their place."
)


@dataclass(frozen=True)
class TextEvaluation:
    """The figures of a text world on held-out episodes."""

    losses: dict[str, float]
    """Nats a transition by part, and `total`."""
    bits_per_byte: float
    steps: TextFidelity
    episodes: Consistency | None
    """Figures of imagined episodes with random commands; None without a checker."""
    novelty: StartNovelty
    predicted: int
    """Episodes whose steps were predicted."""

    def to_json(self) -> dict[str, Any]:
        return _plain(asdict(self))

    def figures(self) -> dict[str, float]:
        """The defined figures, to log."""
        values: dict[str, float | None] = {f"valid/{k}": v for k, v in self.losses.items()}
        values["valid/bits_per_byte"] = self.bits_per_byte
        shares = {f"text/{k}": v for k, v in vars(self.steps).items() if isinstance(v, Share)}
        shares |= {f"starts/{k}": v for k, v in vars(self.novelty).items()}
        if self.episodes is not None:
            shares |= {
                f"imagined/{k}": v for k, v in vars(self.episodes).items() if isinstance(v, Share)
            }
            shares |= {f"imagined/unbroken_{k}": v for k, v in self.episodes.unbroken.items()}
        values |= {name: share.value for name, share in shares.items()}
        return {name: value for name, value in values.items() if value is not None}

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each figure, for tables."""
        rows = [("nats a transition", f"{self.losses['total']:.3f}")]
        rows += [(f"  {part}", f"{x:.3f}") for part, x in self.losses.items() if part != "total"]
        rows.append(("bits a byte", f"{self.bits_per_byte:.4f}"))
        s = self.steps
        named = {
            "exact texts": s.exact,
            "exact, where the text is determined": s.determined,
            "exact, where chance reveals something": s.revealed,
            "rewards other than 0 that are right": s.reward_events,
            "the same after the generated text": s.reward_events_generated,
            "rewards that are falsely other than 0": s.false_rewards,
            "terminations that are predicted": s.terminations,
            "the same after its generated text": s.terminations_generated,
            "false terminations": s.false_terminations,
        }
        rows += [(name, str(share)) for name, share in named.items()]
        for count, share in s.wrong_by_changes.items():
            rows.append((f"wrong, of determined steps with {count} changed fields", str(share)))
        rows.append(("starts that copy a training start", str(self.novelty.copies)))
        rows.append(("the same, of held-out real starts", str(self.novelty.copies_real)))
        if self.episodes is not None:
            e = self.episodes
            rows.append(("imagined starts that are valid", str(e.valid_starts)))
            rows.append(("imagined steps that agree with the rules", str(e.agreeing_steps)))
            rows += [(f"unbroken to step {k}", str(share)) for k, share in e.unbroken.items()]
            rows.append(("imagined rewards that are right before a break", str(e.rewards)))
            rows.append(("imagined successes that are true", str(e.successes)))
        return rows


def check_text_config(config: EvaluateConfig) -> None:
    """Raise UsageError for keys that worlds of texts do not read."""
    if config.adversary:
        raise UsageError(
            f"adversary must be 0 for a world of texts, got {config.adversary}: its policies choose"
            " among commands, and none is trained to seek disagreement"
        )


def measure(
    world: TextWorld,
    dataset: Dataset,
    config: EvaluateConfig,
    progress: Callable[[str], None] = lambda text: None,
) -> TextEvaluation:
    """Measure a world on the validation split.

    Args:
        world: The world.
        dataset: Data of its spaces.
        config: Its `starts` bounds the predicted and the imagined episodes; its `seed` draws.
        progress: Receives what is measured.

    Raises:
        UsageError: The validation split is empty.
    """
    codec = TextCodec.from_json(world.codec)
    episodes = list(text_episodes(dataset, codec, "valid"))
    if not episodes:
        raise UsageError(
            f"the validation split of {', '.join(dataset.ids)} is empty; collect more episodes, or"
            " name other datasets"
        )
    progress("likelihood")
    losses, bits = likelihood(world, dataset, codec)
    chosen = [episodes[k] for k in _spread(len(episodes), config.starts)]
    rules = _rules(config, codec)
    progress(f"steps of {len(chosen)} episodes")
    steps = fidelity(predict_steps(world, chosen, None if rules is None else rules[0]))
    imagined = None
    if rules is not None:
        check, candidates = rules
        count = min(config.starts, BATCH * BATCH)
        progress(f"{count} imagined episodes")
        acts = [_random(candidates, config.seed, k) for k in range(count)]
        imagined = consistency(imagine_texts(world, acts, ROLLOUT, config.seed), check, SUCCESS)
    progress("starts")
    train = list(zip(*start_texts(dataset, codec, "train"), strict=True))
    valid = [(each.task, each.observations[0]) for each in episodes]
    count = min(max(config.starts, len(valid)), BATCH * BATCH)
    novelty = start_novelty(world, train, valid, count, config.seed)
    return TextEvaluation(losses, bits, steps, imagined, novelty, len(chosen))


def likelihood(
    world: TextWorld, dataset: Dataset, codec: TextCodec
) -> tuple[dict[str, float], float]:
    """(nats a transition by part and `total`, bits per byte) on the validation split."""
    shape = (world.window, BATCH, 0, world.net.members)
    loader = TextLoader(dataset, codec, world.tokenizer, "valid", *shape)
    sums: dict[str, float] = {}
    for rows in loader.eval_batches():
        losses = world.losses(rows.to(world.device))
        for name, value in {**losses.nats, **losses.counts}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    counts = {name: sums.pop(name) for name in ("transitions", "bytes", "tokens")}
    bits = bits_per_byte(sums["dynamics"], counts["bytes"])
    nats = {name: value / counts["transitions"] for name, value in sums.items()}
    return nats | {"total": sum(nats.values())}, bits


def _rules(
    config: EvaluateConfig, codec: TextCodec
) -> tuple[Check, Callable[[str, str], list[str]]] | None:
    """The checker and the candidate commands of the environment, if it has both. It is made, and
    takes no step.
    """
    try:
        reality = reality_of(RealityConfig(), codec.environment)  # a stranger's program is not run
    except UsageError:
        if not config.reality.env:
            return None
        reality = config.reality
    env = make_env(reality)
    try:
        check = getattr(env.unwrapped, "check_episode", None)
        candidates = getattr(env.unwrapped, "candidates", None)
    finally:
        env.close()
    return None if check is None or candidates is None else (check, candidates)


def _random(candidates: Callable[[str, str], list[str]], seed: int, number: int) -> Act:
    """A policy that draws one of the candidates, or `look` if a text has none."""
    generator = np.random.default_rng((seed, number))
    first: list[str] = []

    def act(text: str) -> str:
        first.append(text) if not first else None
        try:
            commands = candidates(first[0], text)
        except (ValueError, LookupError, AttributeError):  # a text that no rule gives
            commands = []
        return str(generator.choice(commands)) if commands else "look"

    return act


def _spread(count: int, most: int) -> Iterator[int]:
    """At most `most` of `count` numbers, spread evenly."""
    taken = min(count, most)
    return (k * count // taken for k in range(taken))


def _plain(value: Any) -> Any:
    """JSON of nested dicts, with text keys."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value
