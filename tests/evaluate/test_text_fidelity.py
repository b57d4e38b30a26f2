"""How true a text world is: predictions of steps, imagined episodes, and their summaries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

from model.language.test_world import keys, start, world

from mesocosm.envs.text.checks import ImaginedStep
from mesocosm.envs.text.chores import Chores
from mesocosm.envs.text.chores_policies import ChoresExpert
from mesocosm.evaluate.metrics.text_fidelity import (
    ImaginedText,
    Share,
    StepPrediction,
    consistency,
    fidelity,
    imagine_texts,
    predict_steps,
    start_novelty,
)
from mesocosm.model import rng
from mesocosm.model.language.session import TextContext
from mesocosm.model.language.stream import TextEpisode
from mesocosm.model.language.world import TextWorld
from mesocosm.serve.protocol import START

EASY = Chores(easy=True)


def played(seed: int, most: int = 30) -> ImaginedText:
    """A real episode of an expert, of at most `most` steps."""
    act, generator = ChoresExpert(), np.random.default_rng(seed)
    first, _ = EASY.reset(seed=seed)
    act.start(0, generator)
    text, steps, ended = first, [], False
    while not ended and len(steps) < most:
        action = act(text, generator)
        text, reward, ended, _, _ = EASY.step(action)
        steps.append(ImaginedStep(action, text, reward, ended))
    return ImaginedText(first, tuple(steps))


def episode(played: ImaginedText, number: int) -> TextEpisode:
    steps = played.steps
    texts = [played.first_text, *(step.observation for step in steps)]
    rewards = [step.reward for step in steps]
    actions = [step.action for step in steps]
    return TextEpisode("", texts, actions, rewards, True, number, number)


@pytest.mark.parametrize(
    "lengths", [(2, 1), pytest.param((7, 3, 5), marks=pytest.mark.slow)], ids=str
)
def test_predictions_are_those_of_a_session_with_the_true_texts(lengths: tuple[int, ...]) -> None:
    """Also after shorter episodes have left the batch."""
    small = world(2, 1)
    model = TextWorld(small.net, small.tokenizer, window=2048, longest=120, longest_start=300)
    episodes = [episode(played(seed, most), seed) for seed, most in enumerate(lengths)]
    predictions = predict_steps(model, episodes, EASY.check_episode)
    assert len(predictions) == sum(len(e.actions) for e in episodes)
    assert model.temperature == 1.0
    model.temperature = 0.0
    for row, each in enumerate(episodes):
        mine = []
        for t in range(len(each.actions)):
            steps = list(zip(each.actions[:t], each.observations[1 : t + 1], strict=True))
            context = TextContext([""], [each.observations[0]], [steps], torch.tensor([row % 2]))
            _, out = model.step(model.restore(context), [each.actions[t]], keys(1, 0))
            mine.append((float(out.reward[0]), float(out.p_terminated[0])))
        counts = [len(e.actions) for e in episodes]
        order = [(s, r) for s in range(max(counts)) for r, n in enumerate(counts) if s < n]
        theirs = [
            (predictions[i].generated_reward, predictions[i].generated_p)
            for i, (_, r) in enumerate(order)
            if r == row
        ]
        assert theirs == mine


def test_observing_the_generated_text_changes_nothing() -> None:
    model = world(2, 1)
    model.temperature = 0.0
    carry, out = model.step(start(model), ["look"] * 4, keys(4, 0))
    before = [list(window.tokens) for window in carry.windows]
    reward, p = model.observe(carry, out.observation)
    assert torch.equal(reward, out.reward) and torch.equal(p, out.p_terminated)
    assert before == [window.tokens for window in carry.windows]


def prediction(**changes: object) -> StepPrediction:
    step = StepPrediction(0, True, False, 1, 0.0, 0.0, 0.0, False, 0.0, 0.0)
    return replace(step, **changes)  # type: ignore[arg-type]


def test_a_summary_counts_each_kind_of_step_apart() -> None:
    steps = [
        prediction(),
        prediction(exact=False, changed=3),
        prediction(exact=False, revealed=True, changed=2),
        prediction(reward=0.2, predicted_reward=0.2, generated_reward=float("nan")),
        prediction(predicted_reward=0.6),
        prediction(terminated=True, predicted_p=0.9, generated_p=0.1),
    ]
    summary = fidelity(steps)
    assert summary.exact == Share(4, 6) and summary.determined == Share(4, 5)
    assert summary.revealed == Share(0, 1)
    assert summary.wrong_by_changes == {1: Share(0, 4), 3: Share(1, 1)}
    assert summary.reward_events == Share(1, 1)
    assert summary.reward_events_generated == Share(0, 1)
    assert summary.false_rewards == Share(1, 5)
    assert (summary.terminations, summary.terminations_generated) == (Share(1, 1), Share(0, 1))
    assert summary.false_terminations == Share(0, 5)
    assert str(Share(1, 4)) == "25% of 4" and str(Share(0, 0)) == "-"


def test_real_episodes_are_consistent_and_invented_ones_are_not() -> None:
    real = [played(seed) for seed in range(8)]
    truth = consistency(real, EASY.check_episode, target=0.9)
    assert truth.valid_starts == Share(8, 8) and truth.unbroken[20] == Share(8, 8)
    assert truth.agreeing_steps.value == truth.rewards.value == truth.successes.value == 1.0
    flattering = [
        replace(e, steps=(replace(e.steps[0], reward=1.0, terminated=True),)) for e in real
    ]
    assert consistency(flattering, EASY.check_episode, target=0.9).successes == Share(0, 8)
    broken = [
        replace(e, steps=(replace(e.steps[0], observation="Nothing happens."), *e.steps[1:]))
        for e in real
    ]
    assert consistency(broken, EASY.check_episode, target=0.9).unbroken[1] == Share(0, 8)


@pytest.mark.integration
def test_imagined_episodes_are_a_function_of_the_seed() -> None:
    model = world(2, 1, tasks=False)
    acts = [lambda text: "look"] * 3
    first, again = (imagine_texts(model, acts, 4, seed=3) for _ in range(2))
    assert first == again and first != imagine_texts(model, acts, 4, seed=4)
    assert [len(e.steps) for e in first] != [0, 0, 0]
    given = imagine_texts(model, acts, 2, seed=3, starts=["a red mug"] * 3)
    assert {e.first_text for e in given} == {"a red mug"}
    ends = [e for e in first if e.steps[-1].terminated]
    assert all(not step.terminated for e in first for step in e.steps[:-1]) and len(ends) <= 3


def test_copies_of_training_starts_are_counted() -> None:
    model = world(2, 1)
    drawn = list(zip(*model.sample_start(rng.keys(3, torch.arange(4), 0, START)), strict=True))
    result = start_novelty(model, drawn[:2], [drawn[0], ("", "another")], 4, 3)
    assert result.copies == Share(sum(each in drawn[:2] for each in drawn), 4)
    assert result.copies.count >= 2 and result.copies_real == Share(1, 2)
