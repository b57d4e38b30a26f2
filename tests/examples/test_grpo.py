"""The example that trains a language model with TRL. It needs the extras `language` and `trl`."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo.py"
CHORES = "mesocosm.envs.text:ChoresEasy-v0"


def small_model(folder: Path) -> str:
    """A folder with an untrained Llama of 2 layers and a byte-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("trl")
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(["go to table\n> open fridge\n"], 300, special_tokens=["<eos>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library._tokenizer, eos_token="<eos>", pad_token="<eos>"
    )
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(fast)}
    config = transformers.LlamaConfig(**sizes, **heads, eos_token_id=fast.eos_token_id)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_steps(tmp_path: Path) -> None:
    """Two steps of GRPO: rollouts mask the environment's tokens, and a reward moves the weights."""
    model = small_model(tmp_path / "model")
    spec = importlib.util.spec_from_file_location("grpo", EXAMPLE)
    assert spec is not None and spec.loader is not None
    grpo: Any = importlib.util.module_from_spec(spec)
    sys.modules["grpo"] = grpo  # which its dataclass looks up
    spec.loader.exec_module(grpo)
    played: list[dict[str, Any]] = []

    class Recorded(grpo.Rollouts):  # type: ignore[misc]
        def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
            output = super().__call__(prompts, trainer)
            played.append(output)
            # An untrained model earns nothing: longer rollouts are better instead.
            return output | {"total": [float(len(ids)) for ids in output["completion_ids"]]}

    grpo.Rollouts = Recorded
    trainer = grpo.train(CHORES, model, 2, 3, 4, 3, str(tmp_path / "out"))
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2 and all(math.isfinite(row["loss"]) for row in logs)
    assert any(row["grad_norm"] > 0 for row in logs)
    for output in played:
        for ids, mask in zip(output["completion_ids"], output["env_mask"], strict=True):
            assert len(ids) == len(mask) and {0, 1} == set(mask)
