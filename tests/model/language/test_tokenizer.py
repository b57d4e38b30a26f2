"""Tokenizers lose nothing, and those that would are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")

from mesocosm.errors import ArtifactError, UsageError  # noqa: E402
from mesocosm.model.language.tokenizer import MARKS, TextTokenizer  # noqa: E402

TEXTS = [
    f"You walk to the {place}. On the {place} you see a red mug, a {thing}. You carry nothing."
    for place in ("table", "shelf", "sink")
    for thing in ("book", "plate", "spoon")
]
TOKENIZERS = {split: TextTokenizer.train(TEXTS, 400, split) for split in ("words", "phrases")}


@pytest.mark.parametrize("split", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_every_text_survives(split: str, text: str) -> None:
    tokenizer = TOKENIZERS[split]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.specials)


@pytest.mark.parametrize("split", TOKENIZERS)
def test_marks_and_mixed_languages_are_text(split: str) -> None:
    tokenizer = TOKENIZERS[split]
    text = f"go to {MARKS[1]} 水 \U0001f469\u200d\U0001f680 مرحبا\n\n  ñ,. "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len({tokenizer.bos, tokenizer.eoo, tokenizer.eoa}) == 3


def test_phrases_are_shorter_and_training_is_repeatable() -> None:
    words, phrases = (len(TOKENIZERS[split].encode(TEXTS[0])) for split in ("words", "phrases"))
    assert phrases < words
    again = TextTokenizer.train(TEXTS, 400, "words")
    assert all(again.encode(text) == TOKENIZERS["words"].encode(text) for text in TEXTS)
    assert again.size == TOKENIZERS["words"].size <= 400


def test_broken_bytes_are_replaced() -> None:
    tokenizer = TOKENIZERS["words"]
    first, *_ = tokenizer.encode("é")
    assert tokenizer.decode([first]) == "\ufffd"


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZERS["phrases"].save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXTS[3]) == TOKENIZERS["phrases"].encode(TEXTS[3])
    assert loaded.encode(MARKS[0]) == TOKENIZERS["phrases"].encode(MARKS[0])


def test_a_tokenizer_that_loses_a_byte_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    TOKENIZERS["words"].save(file)
    content = json.loads(file.read_text())
    lost = content["model"]["vocab"].pop("Z")
    assert isinstance(lost, int)
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"every byte.*'Z' comes back as ''") as error:
        TextTokenizer.load(file)
    assert str(file) in str(error.value)


def test_spare_special_tokens_stand_for_missing_bytes(tmp_path: Path) -> None:
    """SmolLM2's vocabulary lacks 8 bytes of UTF-8, and has 14 special tokens of no use here."""
    file = tmp_path / "tokenizer.json"
    TOKENIZERS["words"].save(file)
    content = json.loads(file.read_text())
    alphabet = [c for c in content["model"]["vocab"] if c in ("Z", "\u00f1", "\u0106")]
    assert len(alphabet) == 3  # 0x5a, 0xf1 and 0x06
    for index, character in enumerate(alphabet):
        taken = content["model"]["vocab"].pop(character)
        spare = {**content["added_tokens"][0], "id": taken, "content": f"<spare_{index}>"}
        content["model"]["vocab"][spare["content"]] = taken
        content["added_tokens"].append(spare)
    content["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(content))
    tokenizer = TextTokenizer.load(file)
    for text in ("Zebra Z\x06", "a \U00051234Z b", "<spare_0> You walk to the table."):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(TEXTS[0]) == TOKENIZERS["words"].encode(TEXTS[0])


def test_a_normalizer_that_changes_text_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    TOKENIZERS["words"].save(file)
    library = tokenizers.Tokenizer.from_file(str(file))
    library.normalizer = tokenizers.normalizers.NFC()
    library.save(str(file))
    assert TextTokenizer.load(file).decode(TextTokenizer.load(file).encode("e\u0301")) == "e\u0301"


def test_a_tokenizer_without_marks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    TOKENIZERS["words"].save(file)
    content = json.loads(file.read_text())
    content["added_tokens"] = content["added_tokens"][:2]
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"at least 3 special tokens.*got 2"):
        TextTokenizer.load(file)
    file.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        TextTokenizer.load(file)
    with pytest.raises(UsageError, match=r"model\.vocabulary must be >= 259.*got 100"):
        TextTokenizer.train(TEXTS, 100)
