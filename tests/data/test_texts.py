"""Texts of observations and actions: stored as bytes of any length, read as texts or as slots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gymnasium import spaces

from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.texts import TextCodec, text_episodes
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.spaces import SpaceCodec, shown_space
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import ArtifactError, MesocosmError, UsageError
from mesocosm.jobs.pretrain import JOB
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import new_text_net
from mesocosm.model.language.world import TextWorld
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train.config import PretrainConfig
from mesocosm.train.texts import TextCorpus

from .reality import config

Write = Callable[..., Path]
Collect = Callable[[CollectConfig], Artifact]
CHARSET = "\0abcdefghijklmnopqrstuvwxyz .\nüß日本🙂D:0123"
LONG = spaces.Text(10**6, min_length=0, charset=CHARSET)
SHORT = spaces.Text(6, min_length=0, charset=CHARSET)
TEXTS = ["", "a", "日本 🙂", "über.\n", "x" * 100_000]


def episode(observations: list[Any], actions: list[Any], index: int = 0, **rest: Any) -> Episode:
    return Episode(
        index, 0, "random", observations, actions, np.arange(len(actions)) / 2, "terminated", **rest
    )


@pytest.mark.parametrize("shard_rows", [1 << 20, 3])
def test_texts_of_any_length_round_trip(write: Write, shard_rows: int) -> None:
    episodes = [episode(TEXTS, TEXTS[1:], k) for k in range(3)]
    folder = write(episodes, observation_space=LONG, action_space=LONG, shard_rows=shard_rows)
    dataset = Dataset([folder])
    assert len(dataset.shards) == (3 if shard_rows == 3 else 1)
    for read in dataset.iter_episodes():
        assert read.observations == TEXTS and read.actions == TEXTS[1:]
    table = pq.read_table(folder / "episodes" / "00000.parquet")
    assert table["observation"].to_pylist()[:5] == TEXTS
    assert table["action"].to_pylist()[:5] == [*TEXTS[1:], None]


def test_texts_are_bytes_and_no_slots_on_disk(write: Write) -> None:
    space = spaces.Dict(word=SHORT, mode=spaces.Discrete(3))
    values = [{"word": word, "mode": 1} for word in ("ab", "🙂", "")]
    folder = write([episode(values, [0, 1])], observation_space=space)
    shard = folder / "shards" / "00000"
    assert np.load(shard / "obs_cat.npy").tolist() == [[1], [1], [1]]
    with pa.memory_map(str(shard / "texts.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema.names == ["observation.word"]
    assert table["observation.word"].to_pylist() == ["ab", "🙂", ""]
    assert json.loads((folder / "manifest.json").read_text())["schema_version"] == 3


@pytest.mark.parametrize("in_memory", [0, 1 << 28])
def test_short_texts_are_slots_for_models(
    write: Write, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    """As any batch of the environment is, in every way a dataset is read."""
    monkeypatch.setattr("mesocosm.datasets.shards.IN_MEMORY", in_memory)
    space = spaces.Dict(mode=spaces.Discrete(3), word=SHORT)
    words = ["ab", "🙂日本", "", "üß\n", "abc.ab"]
    values = [{"word": word, "mode": i % 3} for i, word in enumerate(words)]
    data = [episode(values, ["a", "", "日", "b"], k) for k in range(6)]
    dataset = Dataset([write(data, observation_space=space, action_space=SHORT, shard_rows=7)])
    _, expected = dataset.observation_codec.encode_list(values)
    (chunk,) = [c for c in dataset.chunks() if len(c.episodes) == 6]
    np.testing.assert_array_equal(chunk.arrays["obs_cat"], np.tile(expected, (6, 1)))
    codec = Codec.fit(dataset)
    assert [(span.start, span.length) for span in codec.spec.observation.texts] == [(1, 6)]
    for window in (2, 16):
        loader = Loader(dataset, codec, "train", window, 4, 0)
        windows = loader.batch(0)
        shown = codec.decode_observation(windows.observation[:, 0])["word"]
        assert set(shown) <= set(words)
        acted = codec.decode_action(windows.action.flatten())
        assert set(acted) <= {"a", "", "日", "b"}


def test_the_window_holds_the_longest_action_before_the_longest_observation(write: Write) -> None:
    """Training reads each logged step alone; a world may answer any action with a long text, and
    would otherwise refuse a logged action.
    """
    pytest.importorskip("tokenizers")
    long = "0123:D" * 20
    episodes = [episode(["a", "b", long], [long, "b"], k) for k in range(8)]
    dataset = Dataset([write(episodes, observation_space=LONG, action_space=LONG)])
    model = ModelConfig("language", "10k", members=1, context=4096, vocabulary=259)
    corpus = TextCorpus.fit(dataset, model)
    assert corpus.longest == 121 and corpus.longest_step == 242, "a token a byte, and the marks"
    needed = corpus.longest_start + corpus.longest_step
    with pytest.raises(UsageError, match=f"model.context must be >= {needed} tokens .* action"):
        TextCorpus.fit(dataset, replace(model, context=needed - 1))
    TextCorpus.fit(dataset, replace(model, context=needed))
    net = new_text_net(corpus.spec, model)
    sizes: Any = {"longest": corpus.longest, "longest_start": corpus.longest_start}
    world = TextWorld(net, corpus.tokenizer, window=needed, **sizes)
    carry = world.begin([""], ["a"], torch.zeros(1, dtype=torch.int64))
    world.require_room(carry, [long])


def test_noisy_logs_of_chores_hold_no_long_step(collect: Collect, tmp_path: Path) -> None:
    """Random commands are candidates, or made of words of the texts: never drawn characters."""
    expert = "mesocosm.envs.text.chores_policies:ChoresExpert"
    behaviours = [BehaviourConfig("noisy", noise=noise, function=expert) for noise in (1.0, 0.4)]
    reality = RealityConfig(env="mesocosm.envs.text:Chores-v0")
    logs = CollectConfig(reality=reality, steps=400, behaviours=behaviours, workers=0)
    logs.storage.root = str(tmp_path)
    dataset = Dataset([collect(logs).path])
    episodes = list(text_episodes(dataset, TextCodec.fit(dataset)))
    assert max(len(action) for e in episodes for action in e.actions) <= 40
    assert max(len(text) for e in episodes for text in e.observations) <= 240


def test_a_text_that_is_too_long_for_slots_is_refused_in_one_sentence(write: Write) -> None:
    dataset = Dataset([write([episode(["a", "b"], [0])], observation_space=LONG)])
    assert dataset.observation_codec.categories == 0
    with pytest.raises(UsageError, match="observation may have 1000000 characters") as caught:
        Codec.fit(dataset)
    assert "ensemble and sequence" in str(caught.value) and "\n" not in str(caught.value)
    many = spaces.Text(250, charset="".join(map(chr, range(32, 2000))))
    with pytest.raises(UsageError, match="out of 1968"):
        SpaceCodec(many).check_slots()


@pytest.mark.parametrize(
    ("space", "text", "words"),
    [
        (LONG, "a\ud800", ["lone surrogate '\\ud800' at character 1", "errors='replace'"]),
        (spaces.Text(9), "a b", ["the character ' '", "gymnasium's default", "charset=..."]),
        (spaces.Text(9), "", ["1 to 9 characters, got 0", "min_length"]),
        (SHORT, "a" * 7, ["0 to 6 characters, got 7", "max_length"]),
        (spaces.Text(9, charset=CHARSET), "b" * 5000, ["bbb...'", "got 5000"]),
    ],
)
def test_a_text_that_cannot_be_stored_is_refused_by_name(
    write: Write, space: spaces.Text, text: str, words: list[str]
) -> None:
    nested = spaces.Dict(note=space)
    with pytest.raises(MesocosmError) as caught:
        write([episode([{"note": text}] * 2, [0])], observation_space=nested)
    message = str(caught.value)
    assert "observation.note" in message and "\n" not in message and len(message) < 500
    assert all(word in message for word in words), message


def test_long_charsets_are_cut_in_messages() -> None:
    everything = spaces.Text(9, charset="".join(map(chr, range(32, 5000))))
    space = spaces.Dict(note=everything, pair=spaces.Tuple([spaces.Discrete(2), SHORT]))
    assert "charset of 4968 characters" in shown_space(space)
    assert "Discrete(2)" in shown_space(space) and len(shown_space(space)) < 300
    assert shown_space(spaces.Discrete(3)) == str(spaces.Discrete(3))


def test_damaged_texts_and_earlier_versions_are_refused(write: Write) -> None:
    folder = write([episode(["a", "b"], [0])], observation_space=SHORT)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema_version": 3', '"schema_version": 2'))
    with pytest.raises(ArtifactError, match="earlier version, which stored texts as characters"):
        Dataset([folder])
    manifest.write_text(text)
    file = folder / "shards" / "00000" / "texts.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged"):
        Dataset([folder]).episode(0)


def talking(root: str, function: str, *more: BehaviourConfig, **kwargs: Any) -> CollectConfig:
    acts = [BehaviourConfig("scripted", function=f"talk:{function}"), *more]
    reality = {"horizon": 12, "kwargs": kwargs}
    return config(root, "talk:Talk", steps=60, behaviours=acts, reality=reality)


def test_a_scripted_behaviour_acts_in_text(root: str, collect: Collect, user_module: None) -> None:
    result = collect(talking(root, "talker", BehaviourConfig("random")))
    dataset = Dataset([result.path])
    talked = [e for e in dataset.iter_episodes() if e.behaviour.startswith("scripted")]
    assert {a for e in talked for a in e.actions} >= {"look", "", "öffne die Tür 🙂"}
    scenes = [o["scene"] for e in talked for o in e.observations]
    assert any("日本語" in scene for scene in scenes) and scenes[0].startswith("You stand")
    with pytest.raises(MesocosmError, match="the character '!'"):
        collect(talking(root, "shouter"))


def test_an_episode_with_a_lone_surrogate_is_dropped_with_its_reason(
    root: str, collect: Collect, user_module: None
) -> None:
    with pytest.raises(MesocosmError, match="lone surrogate"):
        collect(talking(root, "talker", answer="\udcff"))


# -- episodes as texts


MIXED = spaces.Dict(
    goal=SHORT,
    say=LONG,
    at=spaces.Box(-9, 9, (2,), np.float32),
    pair=spaces.Tuple([spaces.Discrete(3, start=5), spaces.MultiBinary(2)]),
)


def mixed(write: Write, task: list[str]) -> Dataset:
    rng = np.random.default_rng(0)
    values = [
        {
            "goal": "find",
            "say": f"Du siehst {i} Dinge.\nüber dir: 🙂",
            "at": rng.normal(size=2).astype(np.float32),
            "pair": (np.int64(5 + i % 3), np.array([i % 2, 1], np.int8)),
        }
        for i in range(4)
    ]
    episodes = [
        episode(values, [1, 0, 1], k, task={"map": f"m{k % 2}"} if "map" in task else {})
        for k in range(5)
    ]
    return Dataset([write(episodes, observation_space=MIXED, task=task)])


def test_episodes_are_texts_with_other_leaves_as_json(write: Write) -> None:
    dataset = mixed(write, ["goal", "map"])
    codec = TextCodec.fit(dataset)
    episodes = list(text_episodes(dataset, codec))
    assert len(episodes) == 5 and len(list(text_episodes(dataset, codec, "train"))) == 4
    first = episodes[0]
    assert first.task == 'find\n{"map": "m0"}' and first.actions == ["1", "0", "1"]
    assert first.terminated and list(first.rewards) == [0, 0.5, 1]
    head, _, rest = first.observations[1].rpartition("\n")
    assert head == "Du siehst 1 Dinge.\nüber dir: 🙂"
    values = json.loads(rest)
    assert values["pair"] == {"0": 6, "1": [1, 1]} and "goal" not in values
    raw = dataset.episode(0).observations[1]
    np.testing.assert_allclose(values["at"], raw["at"], atol=5e-6)
    assert all(len(str(abs(x))) <= 7 for x in values["at"]), "at a precision of 1e-5"
    back = TextCodec.from_json(json.loads(json.dumps(codec.to_json())))
    again = back.read_observation(first.observations[1], raw)
    assert MIXED.contains(again) and back.observation(again) == first.observations[1]
    assert again["goal"] == "find" and back.read_action("1") == 1


def test_a_lone_text_is_its_own_text(write: Write) -> None:
    dataset = Dataset(
        [write([episode(TEXTS, TEXTS[1:])], observation_space=LONG, action_space=LONG)]
    )
    codec = TextCodec.fit(dataset)
    (only,) = text_episodes(dataset, codec)
    assert only.observations == TEXTS and only.actions == TEXTS[1:] and only.task == ""
    assert codec.read_observation("so\nso", None) == "so\nso"


@pytest.mark.parametrize("text", ["no json", "a\n{", "a\n{}", 'a\n{"at": [1], "pair": 2}'])
def test_a_generated_text_of_another_form_is_refused(write: Write, text: str) -> None:
    dataset = mixed(write, ["goal"])
    codec = TextCodec.fit(dataset)
    with pytest.raises(ValueError):
        codec.read_observation(text, dataset.episode(0).observations[0])


def test_a_task_that_changes_is_refused(write: Write) -> None:
    dataset = mixed(write, ["say"])
    with pytest.raises(UsageError, match="change within episode"):
        list(text_episodes(dataset, TextCodec.fit(dataset)))


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_pretraining_refuses_long_texts_before_it_starts(
    root: str, write_walks: Callable[..., str], family: str
) -> None:
    write_walks([episode(["a", "b"], [0], k) for k in range(6)], observation_space=LONG)
    pretrain = PretrainConfig()
    pretrain.data.datasets, pretrain.model.family = ["d0"], family
    with pytest.raises(UsageError, match="one category per character"):
        JOB.resolve(pretrain, Storage(root))
