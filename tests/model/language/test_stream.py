"""Streams: which tokens count for which part, cutting to a window, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mesocosm.errors import UsageError
from mesocosm.model.language.stream import (
    DYNAMICS,
    READ,
    TASK,
    TextEpisode,
    collate,
    pack,
    retained,
    segment_member,
    segments,
)
from mesocosm.model.rng import member_mask
from mesocosm.model.spec import PartSpec, Spec
from model.language.nets import Bytes, counting

SPEC = Spec(PartSpec(), PartSpec(), reward_values=(0.0, 1.0))
EPISODE = TextEpisode("", ["ab", "é", "c"], ["x", ""], [0.0, 1.0], True)


def test_parts_and_marks() -> None:
    (segment,) = segments(EPISODE, Bytes(), SPEC, 64)
    text = Bytes()
    a, b, c, x = (text.encode(s)[0] for s in "abcx")
    # <bos> a b <eoo> x <eoa> é é <eoo> <eoa> c <eoo>
    assert segment.ids.tolist() == [0, a, b, 1, x, 2, *text.encode("é"), 1, 2, c, 1]
    r, t, d = READ, TASK, DYNAMICS
    assert segment.part.tolist() == [r, t, t, t, r, r, d, d, d, r, d, d]
    assert segment.mark.nonzero()[0].tolist() == [3, 8, 11]
    assert segment.bytes[segment.mark].tolist() == [3, 3, 2]
    assert segment.reward.nonzero()[0].tolist() == segment.ended.nonzero()[0].tolist() == [11]
    rows = collate([[segment, segment], [segment]], 32)
    assert rows.segment is not None and rows.segment[0].tolist() == [0] * 12 + [1] * 12 + [-1] * 8
    assert rows.position[0, :24].tolist() == [*range(12)] * 2
    assert rows.steps.sum(1).tolist() == [4, 2]
    assert collate([[segment], [segment]], 16).segment is None


def test_a_task_comes_first() -> None:
    (segment,) = segments(TextEpisode("t", ["ab"], [], [], False), Bytes(), SPEC, 64)
    t, a, b = (Bytes().encode(s)[0] for s in "tab")
    assert segment.ids.tolist() == [0, t, 2, a, b, 1]
    assert segment.part.tolist() == [READ, *[TASK] * 5]
    assert segment.bytes.tolist() == [0, 0, 0, 0, 0, 5]


def test_a_long_episode_is_cut_and_each_step_is_scored_once() -> None:
    episode = counting(40)
    window, whole = 96, segments(counting(40), Bytes(), SPEC, 4096)[0]
    pieces = segments(episode, Bytes(), SPEC, window)
    start = len(episode.observations[0]) + 2
    assert len(pieces) > 5
    for name in ("bytes", "reward", "ended"):
        joined = np.concatenate([getattr(piece, name)[piece.mark] for piece in pieces])
        assert joined.tolist() == getattr(whole, name)[whole.mark].tolist()
    for index, piece in enumerate(pieces):
        assert len(piece) <= window
        assert piece.ids[:start].tolist() == whole.ids[:start].tolist()
        scored = int((piece.part == DYNAMICS).argmax())
        # The context fills up to half of the window, with whole steps.
        if index:
            assert (piece.part[:scored] == READ).all()
            assert window // 2 - 16 < scored - len(Bytes().encode("add 1")) - 1 <= window // 2


def test_retained() -> None:
    assert retained(10, [9, 9, 9], 40) == 1
    assert retained(10, [9, 5, 5], 40) == 2
    assert retained(30, [1], 40) == retained(3, [], 40) == 0


def test_a_text_longer_than_the_window_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.context must be >= 12 tokens.*got 11"):
        segments(TextEpisode("", ["ab", "abcde"], ["x"], [0.0], False), Bytes(), SPEC, 11)


def test_a_reward_that_the_data_did_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"2 values, got 0\.5"):
        segments(TextEpisode("", ["ab", "y"], ["x"], [0.5], False), Bytes(), SPEC, 64)
    numeric = Spec(PartSpec(), PartSpec(), reward_mean=1.0, reward_scale=2.0)
    (segment,) = segments(TextEpisode("", ["a", "y"], ["x"], [5.0], False), Bytes(), numeric, 64)
    assert segment.reward[segment.mark].tolist() == [0.0, 2.0]


def test_rows_are_nearly_full_and_repeatable() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 500).tolist()
    rows = pack(lengths, 512)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= 512 for row in rows)
    assert sum(lengths) / (512 * len(rows)) > 0.97
    assert rows == pack(lengths, 512)


def test_the_member_of_a_segment_trains_on_its_episode() -> None:
    episodes = torch.arange(50)
    keep = member_mask(episodes, 3)
    for draw in range(4):
        chosen = [segment_member(int(episode), draw, 3) for episode in episodes]
        assert all(keep[member, episode] for episode, member in enumerate(chosen))
        assert len(set(chosen)) == 3
    assert segment_member(7, 1, 1) == 0
