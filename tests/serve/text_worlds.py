"""Small text worlds with random weights."""

from __future__ import annotations

from typing import Any

import pytest
from gymnasium import spaces

pytest.importorskip("tokenizers")

from model.language.nets import small

from mesocosm.data.loading.texts import TextCodec
from mesocosm.model.language.net import TextNet
from mesocosm.model.language.tokenizer import TextTokenizer
from mesocosm.model.language.world import TextWorld
from mesocosm.model.spec import PartSpec, Spec

TEXT = spaces.Text(400, min_length=0, charset="abcdefghijklmnopqrstuvwxyz .")
REST = {"reward_values": [0.0, 0.2, 1.0], "terminal_rate": 0.05}
WORDS = ["you see a mug.", "you see a pen.", "take mug", "look", "go to table"]


def text_world(
    observation: Any = TEXT, window: int = 128, members: int = 1, options: Any = ()
) -> TextWorld:
    """A small world with random weights."""
    tokenizer = TextTokenizer.train(WORDS, 300)
    backbone = small("100k", tokenizer.size, members, 2 if members > 1 else 0)
    environment = {"id": "mesocosm.envs.text:Chores-v0", "task": [], "max_episode_steps": 20}
    codec = TextCodec(observation, TEXT, environment, options, {}, REST)
    spec = Spec(PartSpec(), PartSpec(), reward_values=(0.0, 0.2, 1.0), terminal_rate=0.05)
    net = TextNet(backbone, spec)
    sizes: Any = {"window": window, "longest": 12, "longest_start": 16, "codec": codec.to_json()}
    return TextWorld(net, tokenizer, **sizes)
