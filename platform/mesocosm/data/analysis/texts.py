"""The texts of a dataset: lengths, vocabulary, duplicates, and novelty against other texts.

A word is a run of letters and digits, a single sign, or a single character of a script that writes
without spaces. Lengths and duplicates are of all texts; words are counted in a sample of whole
episodes, in an order drawn by the seed, of at most SAMPLE_BYTES.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.permutation import key
from mesocosm.datasets.places import episode_rows
from mesocosm.datasets.split import Split
from mesocosm.datasets.texts import SHOWN

Array = NDArray[Any]
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
"""Kana, Han, Hangul and Thai."""
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
GRAM = 5
"""Words of an n-gram, for novelty."""
SAMPLE_BYTES = 1 << 26
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
POINTS = 24
"""Points of the curve of the vocabulary's growth."""
COMMON = 5
"""Repeated texts that are named."""
EPISODES = 0x7E87
"""Salt of the order in which episodes are sampled."""
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class TextLeaf:
    """A Text of the observation or the action, as a dataset stores it."""

    name: str
    """`observation.note`"""
    array: str
    """One of `texts.TEXTS`."""
    column: int


def text_leaves(dataset: Dataset) -> list[TextLeaf]:
    """The texts of the observation, then of the action."""
    return [
        TextLeaf(leaf.name, array, i)
        for codec, array in (
            (dataset.observation_codec, "obs_text"),
            (dataset.action_codec, "act_text"),
        )
        for i, leaf in enumerate(codec.text_leaves)
    ]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def hashed(text: str) -> int:
    """A hash of a text, 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


hashed_word = functools.lru_cache(1 << 18)(hashed)
"""`hashed` of a word, which comes often."""


def grams(text: str, n: int) -> Array:
    """The distinct n-grams of a text's words as hashes, uint64; a shorter text is one n-gram."""
    codes = np.array([hashed_word(word) for word in words(text)], np.uint64)
    size = min(n, len(codes))
    if not size:
        return np.zeros(0, np.uint64)
    mixed = np.zeros(len(codes) - size + 1, np.uint64)
    for i in range(size):
        mixed = (mixed ^ codes[i : i + len(mixed)]) * MIX
    return np.unique(mixed)


def texts_of(dataset: Dataset, leaf: TextLeaf, episode: int) -> list[str]:
    """The texts of an episode: T+1 of an observation, T of an action.

    Args:
        dataset: The dataset.
        leaf: Of `text_leaves`.
        episode: Its number.
    """
    record = dataset.table[episode]
    place = (int(record[name]) for name in ("shard", "first_row", "length"))
    columns = episode_columns(dataset, leaf.array, *place)
    return columns[leaf.column].to_pylist()  # type: ignore[no-any-return]


def episode_columns(dataset: Dataset, array: str, shard: int, first: int, length: int) -> list[Any]:
    """The texts of an episode, an Arrow array a leaf: T+1 of an observation, T of an action.

    Args:
        dataset: The dataset.
        array: One of `texts.TEXTS`.
        shard: Of the episode.
        first: Its first row.
        length: T.
    """
    rows = length + (array == "obs_text")
    return [column.slice(first, rows) for column in dataset.texts(shard, array).columns]


def sampled(
    dataset: Dataset, leaf: TextLeaf, split: Split | None, seed: int
) -> Iterator[Sequence[str]]:
    """The texts of episodes of a split, in an order drawn by `seed`, up to SAMPLE_BYTES."""
    episodes = dataset.episodes(split)
    order = np.argsort(key(seed, EPISODES, episodes), kind="stable")
    size = 0
    for episode in episodes[order].tolist():
        texts = texts_of(dataset, leaf, episode)
        size += sum(map(len, texts))
        if size > SAMPLE_BYTES:
            return
        yield texts


class TextIndex:
    """The texts, lines, words and n-grams of a collection, with their counts."""

    def __init__(self, texts: Iterable[str]):
        """Count.

        Args:
            texts: Any number of them; repeated ones are counted.
        """
        self._texts = Counter(texts)
        self._lines: Counter[str] = Counter()
        self._words: Counter[str] = Counter()
        arrays, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for text, count in self._texts.items():
            for line in text.splitlines():
                self._lines[line] += count
            for word in words(text):
                self._words[word] += count
            arrays.append(grams(text, GRAM))
            counts.append(np.full(len(arrays[-1]), count))
        self._grams, places = np.unique(np.concatenate(arrays), return_inverse=True)
        self._gram_counts = np.bincount(places.reshape(-1), np.concatenate(counts))

    def lacks(self, other: TextIndex) -> dict[str, float | None]:
        """The shares of the other's texts, lines, words and n-grams that are not in this one. A
        share is None if the other has none of them.
        """
        shares: dict[str, float | None] = {}
        for name, first, second in (
            ("texts", self._texts, other._texts),
            ("lines", self._lines, other._lines),
            ("words", self._words, other._words),
        ):
            total = second.total()
            new = sum(count for item, count in second.items() if item not in first)
            shares[name] = new / total if total else None
        new_grams = ~np.isin(other._grams, self._grams)
        every = float(other._gram_counts.sum())
        shares["ngrams"] = float(other._gram_counts[new_grams].sum()) / every if every else None
        return shares


def describe(dataset: Dataset, leaf: TextLeaf, seed: int) -> dict[str, Any]:
    """The facts of one leaf, as JSON.

    Args:
        dataset: The dataset.
        leaf: Of `text_leaves`.
        seed: Draws the sample of words.

    Returns:
        name, texts, bytes, lengths (quantiles in bytes), empty (share), distinct, episodes (all,
        and distinct in their texts), common (texts that come more than once, with counts), words,
        vocabulary, once (share of the vocabulary that comes once), growth (words, distinct,
        exponent), and valid: what training lacks of the held-out texts, as `TextIndex.lacks`; None
        without any.
    """
    every = _AllTexts()
    for shard in range(len(dataset.shards)):
        every.add(dataset, leaf, shard)
    lengths = np.concatenate(every.lengths)
    common = [(text, count) for text, count in every.counts.values() if count > 1]
    common.sort(key=lambda pair: (-pair[1], pair[0]))
    train = [text for texts in sampled(dataset, leaf, "train", seed) for text in texts]
    held_out = [text for texts in sampled(dataset, leaf, "valid", seed) for text in texts]
    return {
        "name": leaf.name,
        "texts": len(lengths),
        "bytes": int(lengths.sum()),
        "lengths": {f"{q:g}": float(np.quantile(lengths, q)) for q in QUANTILES},
        "empty": float((lengths == 0).mean()),
        "distinct": len(every.counts),
        "episodes": {"all": every.episodes.total(), "distinct": len(every.episodes)},
        "common": [{"text": text, "count": count} for text, count in common[:COMMON]],
        **vocabulary(train),
        "valid": TextIndex(train).lacks(TextIndex(held_out)) if held_out else None,
    }


def vocabulary(texts: Sequence[str]) -> dict[str, Any]:
    """The words of texts, and the growth of the vocabulary in their order.

    The exponent b is that of Heaps' law, V = k n^b for V distinct words among n (Heaps 1978),
    fitted to the curve by least squares of logarithms; None for fewer than 100 words.
    """
    counts: Counter[str] = Counter()
    total, curve = 0, []
    for text in texts:
        some = words(text)
        counts.update(some)
        total += len(some)
        curve.append((total, len(counts)))
    chosen = np.unique(np.geomspace(1, max(len(curve), 1), POINTS).astype(int)) - 1
    points = np.array([curve[i] for i in chosen] if curve else np.zeros((0, 2)), np.int64)
    exponent = None
    known = points[points[:, 1] > 0]
    if total >= 100 and len(np.unique(known[:, 0])) >= 3:
        seen, distinct = np.log(known.T)
        exponent = float(np.polyfit(seen, distinct, 1)[0])
    once = sum(count == 1 for count in counts.values())
    return {
        "words": total,
        "vocabulary": len(counts),
        "once": once / len(counts) if counts else 0.0,
        "growth": {
            "words": points[:, 0].tolist(),
            "distinct": points[:, 1].tolist(),
            "exponent": exponent,
        },
    }


def bags_of_words(texts: Array, size: int) -> Array:
    """The words of texts as points, of length sqrt(1/2): texts that share no word are 1 apart.

    Args:
        texts: [N] of `str`.
        size: The number of features that words are hashed into.

    Returns:
        [N, size] float64.
    """
    counts = np.zeros((len(texts), size))
    for row, text in enumerate(texts):
        np.add.at(counts[row], [hashed_word(word) % size for word in words(text)], 1)
    length = np.linalg.norm(counts, axis=1, keepdims=True)
    return np.asarray(np.sqrt(0.5) * counts / np.maximum(length, 1.0))


def compare_texts(a: Dataset, b: Dataset, seed: int) -> dict[str, dict[str, Any]]:
    """The novelty of each dataset's texts against the other's, by the name of each leaf that both
    have: {"observation": {"a_lacks": `TextIndex.lacks`, "b_lacks": ...}}.
    """
    others = {leaf.name: leaf for leaf in text_leaves(b)}
    result: dict[str, dict[str, Any]] = {}
    for leaf in text_leaves(a):
        if leaf.name in others:
            first, second = (
                TextIndex(text for texts in sampled(data, one, None, seed) for text in texts)
                for data, one in ((a, leaf), (b, others[leaf.name]))
            )
            result[leaf.name] = {"a_lacks": first.lacks(second), "b_lacks": second.lacks(first)}
    return result


@dataclass
class _AllTexts:
    """The counts of every text of a leaf."""

    lengths: list[Array] = field(default_factory=list)
    """Bytes of each text, a part a shard."""
    counts: dict[int, tuple[str, int]] = field(default_factory=dict)
    """The beginning and the count of each distinct text, by its hash."""
    episodes: Counter[bytes] = field(default_factory=Counter)
    """Episodes by a digest of their texts in order."""

    def add(self, dataset: Dataset, leaf: TextLeaf, shard: int) -> None:
        """Count the texts of a shard."""
        records = dataset.records(shard)
        rows, ends = episode_rows(records["first_row"], records["length"])
        if leaf.array == "act_text":
            rows = np.delete(rows, ends - 1)
            ends = ends - np.arange(1, len(ends) + 1)
        texts = dataset.texts(shard, leaf.array).columns[leaf.column].take(rows)
        self.lengths.append(pc.binary_length(texts).to_numpy())
        encoded = texts.dictionary_encode()
        places, distinct = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        codes = np.array([hashed(text) for text in distinct], np.uint64)
        counts = np.bincount(places, minlength=len(distinct))
        for text, code, count in zip(distinct, codes.tolist(), counts.tolist(), strict=True):
            beginning, before = self.counts.get(code, (text[:SHOWN], 0))
            self.counts[code] = beginning, before + count
        for texts_of_episode in np.split(codes[places], ends[:-1]):
            digest = hashlib.blake2b(texts_of_episode.tobytes(), digest_size=16).digest()
            self.episodes[digest] += 1
