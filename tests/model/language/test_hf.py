"""Checkpoints of Llama's kind: exact in both directions, equal to transformers where it is
installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.language.hf import (
    config_of,
    from_hf,
    load_folder,
    refusal,
    save_folder,
    shape_of,
    to_hf,
)
from mesocosm.model.language.llama import Llama
from model.language.nets import randomised, shape, small

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"tied": False},
    "qwen2": {"biases": True},
    "qwen3": {"head_norms": True, "tied": False},
    "": {},  # of our ladder: written as Granite
}


def network(kind: str) -> Llama:
    return randomised(Llama(shape(source=kind, **KINDS[kind]))) if kind else small("300k")


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_are_exact(kind: str, tmp_path: Path) -> None:
    original = network(kind)
    save_folder(original, tmp_path)
    copy = load_folder(tmp_path)
    expected, weights = original.state_dict(), copy.state_dict()
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert {name: t.shape for name, t in to_hf(copy).items()} == {
        name: t.shape for name, t in to_hf(original).items()
    }
    ids, position = torch.randint(0, 61, (2, 20)), torch.arange(20).expand(2, -1)
    logits = [net.logits(net.hidden(ids, position)) for net in (original, copy)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    original = network(kind)
    save_folder(original, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, position = torch.randint(0, 61, (2, 20)), torch.arange(20).expand(2, -1)
    with torch.no_grad():
        expected = other(ids).logits
        logits = original.logits(original.hidden(ids, position))
    assert float((logits - expected).abs().max()) < 1e-4
    assert float(logits.std()) > 0.1


def test_a_checkpoint_that_transformers_made(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_theta=500000.0,
    )
    other = transformers.LlamaForCausalLM(config).eval()
    other.save_pretrained(tmp_path)
    loaded = load_folder(tmp_path).requires_grad_(False)
    ids = torch.randint(0, 50, (1, 30))
    with torch.no_grad():
        expected = other(ids).logits
    logits = loaded.logits(loaded.hidden(ids, torch.arange(30).unsqueeze(0)))
    assert float((logits - expected).abs().max()) < 1e-4


def test_members_are_merged(tmp_path: Path) -> None:
    members = small("30k", members=3, rank=2)
    save_folder(members, tmp_path, member=1)
    merged = load_folder(tmp_path)
    ids, position = torch.randint(0, 61, (1, 20)), torch.arange(20).unsqueeze(0)
    expected = members.hidden(ids, position, None, torch.ones_like(ids))
    torch.testing.assert_close(merged.hidden(ids, position), expected, rtol=1e-4, atol=1e-5)
    assert (members.hidden(ids, position) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"model_type": "gpt2"},
            "model_type must be one of llama, mistral, qwen2, qwen3, granite, got 'gpt2'",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "biases"),
        ({"sliding_window": 512}, "sliding_window of 512"),
    ],
)
def test_other_checkpoints_are_refused(change: dict[str, Any], reason: str) -> None:
    config = config_of(shape(source="llama")) | change
    assert reason in (refusal(config, 1024) or "")
    if "sliding_window" not in change:
        with pytest.raises(UsageError, match=r"model\.pretrained must be"):
            shape_of(config)
    assert refusal({**config_of(shape(source="llama")), "sliding_window": 512}, 512) is None


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_folder(tmp_path)
    save_folder(network("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    with pytest.raises(ArtifactError, match="other weights than its config"):
        load_folder(tmp_path)
    state = to_hf(network("llama"))
    state.pop("model.norm.weight")
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        from_hf(network("llama"), state)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_folder(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="embed_tokens"):
        load_folder(tmp_path)
