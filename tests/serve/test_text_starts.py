"""Generated starts of text worlds: one that cannot be read is drawn again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gymnasium import spaces

pytest.importorskip("tokenizers")


from mesocosm.data.loading.text_batch import TextBatchCodec
from mesocosm.data.loading.texts import TextCodec
from mesocosm.datasets.manifest import ResetOption
from mesocosm.errors import MesocosmError
from mesocosm.model.language.session import Texts
from mesocosm.model.language.world import TextWorld
from mesocosm.serve.text_session import DRAWS
from mesocosm.serve.world_env import WorldVectorEnv

from .text_worlds import TEXT, text_world

GOOD, BAD = 'you see a mug.\n{"count": 1}', 'you see a mug.\n{"count": 1'
COUNTED = spaces.Dict({"say": TEXT, "count": spaces.Discrete(3)})


def drawing(world: TextWorld, good: Callable[[int], bool], bad: str = BAD) -> list[int]:
    """Let the world draw `GOOD` for the keys of `good` and `bad` for the others. The keys."""
    keys: list[int] = []

    def sample_start(drawn: torch.Tensor) -> tuple[list[str], list[str]]:
        keys.extend(drawn.tolist())
        return [""] * len(drawn), [GOOD if good(key) else bad for key in drawn.tolist()]

    world.sample_start = sample_start  # type: ignore[method-assign]
    return keys


@pytest.mark.parametrize("bad", [BAD, "you see a mug.", "a\n" + "[" * 5000, 'a\n{"count": 7}'])
def test_a_start_that_cannot_be_read_is_drawn_again(bad: str) -> None:
    world = text_world(COUNTED)
    keys = drawing(world, lambda key: key % 2 == 0, bad)
    transcripts = []
    for _ in range(2):
        env = WorldVectorEnv(4, world, horizon=2)
        transcripts.append((env.reset(seed=0)[0]["count"].tolist(), env.step(("look",) * 4)[0]))
    assert transcripts[0][0] == [1] * 4 and str(transcripts[0]) == str(transcripts[1])
    first, again = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    assert first == again, "the same keys in the same order"
    wrong = [key for key in first[:4] if key % 2]
    assert wrong and len(first) >= 4 + len(wrong) and len(set(first)) == len(first)


def test_starts_that_can_never_be_read_name_the_world_and_cost_no_session() -> None:
    """The other environments, and this one, continue where the client gives logged starts."""
    world = text_world(COUNTED)
    drawing(world, lambda key: True)
    env, undisturbed = WorldVectorEnv(2, world), WorldVectorEnv(2, world)
    for each in (env, undisturbed):
        each.reset(seed=0)
        assert each.step(("look", "look"))[3].all(), "a world without training writes no JSON"
    keys = drawing(world, lambda key: False)
    message = rf"world in-memory: none of {DRAWS} generated starts of environment 0, episode 1, can"
    with pytest.raises(MesocosmError, match=message) as caught:
        env.step(("look", "look"))
    assert "logged starts" in str(caught.value) and len(keys) == 2 * DRAWS
    logged = Texts([""]), Texts([GOOD])
    env.starts = undisturbed.starts = logged
    for _ in range(3):
        one, two = env.step(("look", "look")), undisturbed.step(("look", "look"))
        assert str(one[0]) == str(two[0]) and one[1].tolist() == two[1].tolist()
    env.starts = Texts([""]), Texts([BAD])
    with pytest.raises(MesocosmError, match="take starts from the world's own data"):
        env.reset(seed=0)


def test_a_task_that_cannot_be_read_is_drawn_again() -> None:
    """Its reset options too: `task_options` would raise a bare error."""
    options = [ResetOption(name="level", values=[1, 2]), ResetOption(name="speed")]
    good = '{"level": 2, "speed": 0.5}'
    bad = ["", "{}", "{", '{"level": 3, "speed": 0.5}', '{"level": 2, "speed": "x"}']
    bad += ['{"level": true, "speed": 0.5}', '{"level": 2, "speed": NaN}', "[1]"]
    for text in bad:
        world = text_world(options=options)
        tasks = iter([text, good, good])

        def sample_start(keys: torch.Tensor, left: Any = tasks) -> tuple[list[str], list[str]]:
            return [next(left) for _ in keys], ["you see a mug."] * len(keys)

        world.sample_start = sample_start  # type: ignore[method-assign]
        env = WorldVectorEnv(2, world)
        env.reset(seed=0)
        assert env.task_options == [{"level": 2, "speed": 0.5}] * 2, text
    codec = TextBatchCodec(TextCodec.from_json(text_world(options=options).codec))
    with pytest.raises(MesocosmError, match="a start must be a text of the world's observation"):
        codec.task_options(Texts(["{"]))
