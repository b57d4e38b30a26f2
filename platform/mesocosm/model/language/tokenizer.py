"""Texts to tokens and back, without loss: byte-level BPE, trained on a world's texts or loaded with
a checkpoint. A world's tokenizer.json is part of its artifact.

Three special tokens mark a stream, `bos`, `eoo` (the end of an observation) and `eoa` (the end of
an action). No text contains them: a text that spells one out is encoded as ordinary bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.config import LEAST_VOCABULARY

Split = Literal["words", "phrases"]
"""words: a token spans no two words. phrases: a token may span a clause, up to a comma or a full
stop, which makes texts of few phrases about 4 times shorter, but takes more data to learn.
"""
MARKS = ("<bos>", "<eoo>", "<eoa>")
PHRASE = r"[^.,]*[.,] ?|[^.,]+$"
BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|im_start|>", "<|endoftext|>")
EOO_NAMES = ("<eoo>", "<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>")
"""Special tokens of known checkpoints, the most fitting first."""
UTF_8 = [*range(0xC0), *range(0xC2, 0xF5)]
"""The bytes that valid UTF-8 may contain."""
MEMORY = 200_000
"""Texts whose tokens a tokenizer remembers: observations and commands recur."""
REMEMBERED = 4_000
"""Characters of the longest text that is remembered: a client may send megabytes."""
PROBES = (
    # Every byte of UTF-8: ASCII, each second byte, and each first byte of 2, 3 and 4.
    *("".join(map(chr, range(start, start + 32))) for start in range(0, 128, 32)),
    "".join(map(chr, range(0x80, 0x800, 0x3F))) + "".join(map(chr, range(0x80, 0x100))),
    "".join(chr(c) for c in range(0x800, 0x10000, 0x3FF) if not 0xD800 <= c < 0xE000),
    "".join(map(chr, range(0x10000, 0x110000, 0xFFFF))),
    # Texts that a normalizer or a prefix would change.
    "",
    " two  spaces ",
    "\r\n\ttab\n\n",
    "e\u0301 \u00e9 \u212b \ufb01",
    *MARKS,
)


class TextTokenizer:
    """A lossless tokenizer with its three marks."""

    def __init__(self, library: Any):
        """`library`: a `tokenizers.Tokenizer`. Raises ArtifactError if a text does not survive
        encoding, or marks are missing.
        """
        self._library = library
        library.encode_special_tokens = True  # in a text they are text
        library.no_padding()
        library.no_truncation()
        specials = {
            token.content: index
            for index, token in sorted(library.get_added_tokens_decoder().items())
            if token.special
        }
        if len(specials) < len(MARKS):
            raise ArtifactError(
                f"a tokenizer must have at least {len(MARKS)} special tokens to mark observations"
                f" and actions, got {len(specials)}; train one or take another checkpoint"
            )
        names = list(specials)
        bos = next((name for name in BOS_NAMES if name in specials), names[0])
        names.remove(bos)
        eoo = next((name for name in EOO_NAMES if name in names), names[0])
        names.remove(eoo)
        eoa = MARKS[2] if MARKS[2] in names else names[0]
        self.bos, self.eoo, self.eoa = specials[bos], specials[eoo], specials[eoa]
        self.specials = tuple(specials.values())
        """Ids that no text contains, the marks among them."""
        self.size: int = library.get_vocab_size()
        self._memory: dict[str, tuple[int, ...]] = {}
        self._bytes: dict[int, bytes] | None = None
        self._byte_ids: dict[int, int] = {}
        self._missing = b""
        if isinstance(library.decoder, _package().decoders.ByteLevel):
            self._read_bytes([i for i in self.specials if i not in (self.bos, self.eoo, self.eoa)])
        self._require_lossless()

    @staticmethod
    def train(
        texts: Iterable[str], vocabulary: int = 1024, split: Split = "words"
    ) -> TextTokenizer:
        """Merge the most frequent pairs of bytes in `texts`. Equal texts give equal tokenizers.

        Args:
            texts: Of the training split, without duplicates.
            vocabulary: The most tokens, the bytes and marks included.
            split: Where merges stop, see `Split`.

        Raises:
            UsageError: The vocabulary has no room for all bytes and the marks.
        """
        if vocabulary < LEAST_VOCABULARY:
            raise UsageError(
                f"model.vocabulary must be >= {LEAST_VOCABULARY} (256 bytes and {len(MARKS)} marks)"
                f", got {vocabulary}"
            )
        package = _package()
        cuts = package.pre_tokenizers
        library = package.Tokenizer(package.models.BPE())
        if split == "words":
            library.pre_tokenizer = cuts.ByteLevel(add_prefix_space=False)
        else:
            library.pre_tokenizer = cuts.Sequence(
                [
                    cuts.Split(package.Regex(PHRASE), "isolated"),
                    cuts.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        library.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(MARKS),
            initial_alphabet=cuts.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        return TextTokenizer(library)

    @staticmethod
    def load(file: Path) -> TextTokenizer:
        """Read a tokenizer.json. Raises ArtifactError if it cannot be read or loses text."""
        package = _package()
        try:
            library = package.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(f"tokenizer {str(file)!r} cannot be read: {error}") from error
        try:
            return TextTokenizer(library)
        except ArtifactError as error:
            raise ArtifactError(f"tokenizer {str(file)!r} cannot be used: {error}") from error

    def save(self, file: Path) -> None:
        """Write tokenizer.json."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._library.save(str(file))

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self._library.to_str())

    @staticmethod
    def from_json(text: str) -> TextTokenizer:
        """The inverse of `to_json`."""
        return TextTokenizer(_package().Tokenizer.from_str(text))

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, without marks."""
        ids = self._memory.get(text)
        if ids is None:
            if len(self._memory) >= MEMORY:
                self._memory.clear()
            ids = tuple(self._encoded(text))
            if len(text) <= REMEMBERED:
                self._memory[text] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Bytes that are not valid UTF-8 become U+FFFD. Marks are left out."""
        if self._bytes is None:
            return str(self._library.decode(list(ids)))
        return b"".join(self._bytes.get(i, b"") for i in ids).decode(errors="replace")

    def shortened(self, text: str, most: int) -> str:
        """The text, or as much of its start as has at most `most` tokens: broken bytes become
        characters of more tokens.
        """
        ids, length = self.encode(text), most
        while text and len(self.encode(text)) > most:
            text, length = self.decode(ids[:length]), length - 1
        return text

    def _read_bytes(self, spare: list[int]) -> None:
        """Learn the bytes of each token of a byte-level vocabulary. Vocabularies of checkpoints
        lack bytes that their data never had; spare special tokens stand for those.
        """
        alphabet = _byte_alphabet()
        self._bytes = {
            index: bytes(alphabet[c] for c in token)
            for token, index in self._library.get_vocab(with_added_tokens=False).items()
            if index not in self.specials and all(c in alphabet for c in token)
        }
        self._byte_ids = {b[0]: index for index, b in self._bytes.items() if len(b) == 1}
        missing = [byte for byte in UTF_8 if byte not in self._byte_ids]
        for byte, index in zip(missing, spare, strict=False):
            self._bytes[index], self._byte_ids[byte] = bytes([byte]), index
        self._missing = bytes(missing)

    def _encoded(self, text: str) -> list[int]:
        raw = text.encode()
        if not self._missing or len(raw.translate(None, self._missing)) == len(raw):
            return self._library.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        absent = set(self._missing)
        for whole, run in groupby(text, lambda c: absent.isdisjoint(c.encode())):
            part = "".join(run)
            if whole:
                ids += self._library.encode(part, add_special_tokens=False).ids
            else:
                ids += [self._byte_ids[b] for b in part.encode() if b in self._byte_ids]
        return ids

    def _require_lossless(self) -> None:
        lost = self._first_loss()
        if lost is not None and self._library.normalizer is not None:
            # Of a byte-level tokenizer it only changes text (Qwen's NFC), so it can be left out.
            normalizer: Any = self._library.normalizer
            self._library.normalizer = None
            if self._first_loss() is not None:
                self._library.normalizer = normalizer
            else:
                lost = None
        if lost is not None:
            raise ArtifactError(
                f"a tokenizer must encode every byte of UTF-8 without loss, but {lost[0]!r} comes"
                f" back as {lost[1]!r}; use a byte-level tokenizer"
            )

    def _first_loss(self) -> tuple[str, str] | None:
        """The first probe that does not survive, cut to its first lost character if one is lost
        alone, and what it comes back as.
        """
        for probe in PROBES:
            if self._round_trip(probe) != probe:
                lost = next((c for c in probe if self._round_trip(c) != c), probe)
                return lost, self._round_trip(lost)
        return None

    def _round_trip(self, text: str) -> str:
        return self.decode(self._encoded(text))


def _package() -> Any:
    """The package tokenizers. Raises UsageError where it is missing."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise UsageError(
            "model.family=language needs the package tokenizers; install the extra: pip install"
            " 'mesocosm[train]'"
        ) from error


def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level vocabularies write each byte, as GPT-2 does: printable
    characters of Latin-1 stand for themselves, the other bytes for those from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
