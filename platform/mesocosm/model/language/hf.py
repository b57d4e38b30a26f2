"""Hugging Face checkpoints of Llama's kind, read and written without transformers: config.json and
model.safetensors. Both directions are exact: weights are only split, joined and renamed.

A network of our ladder is written as Granite, which has muP's multipliers in its config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.shape import NORM_EPS, ROPE_THETA, Shape
from mesocosm.model.mup import init_

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
"""Transformers' class of each `model_type` that `Llama` computes."""
LONGEST = 32768
"""`max_position_embeddings` of a written checkpoint: RoPE itself has no limit."""


def refusal(config: Mapping[str, Any], context: int = 0) -> str | None:
    """The reason why `Llama` does not compute a checkpoint, or None if it does.

    Args:
        config: The checkpoint's config.json.
        context: The tokens that will be read: a sliding window of at least this length has no
            effect.
    """
    kind, rope = config.get("model_type"), _rope(config)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if kind not in CLASSES:
        return f"model_type must be one of {', '.join(CLASSES)}, got {kind!r}"
    if rope.get("rope_type", "default") != "default":
        return f"rope_type {rope['rope_type']!r} is not 'default'"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act {config['hidden_act']!r} is not 'silu'"
    if (config.get("attention_bias") and kind != "qwen2") or config.get("mlp_bias"):
        return "it has biases in more than its query, key and value projections"
    if window is not None and window < max(context, 1):
        return f"its sliding_window of {window} tokens is shorter than model.context={context}"
    multiplier = config.get("attention_multiplier")
    if kind == "granite" and multiplier is not None:
        expected = _head(config) ** -0.5
        if abs(multiplier - expected) > 1e-6 * expected:
            return f"attention_multiplier {multiplier} is not head_dim^-1/2"
    return None


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape of a checkpoint. Raises UsageError if `Llama` does not compute it."""
    reason = refusal(config)
    if reason is not None:
        raise UsageError(f"model.pretrained must be a checkpoint of Llama's kind, but {reason}")
    kind, heads = config["model_type"], config["num_attention_heads"]
    granite = kind == "granite"
    return Shape(
        vocabulary=config["vocab_size"],
        d_model=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head=_head(config),
        d_ff=config["intermediate_size"],
        rope_theta=float(_rope(config).get("rope_theta") or ROPE_THETA),
        norm_eps=config.get("rms_norm_eps", NORM_EPS),
        tied=bool(config.get("tie_word_embeddings", kind == "granite")),
        biases=kind == "qwen2",
        head_norms=kind == "qwen3",
        embedding_multiplier=config.get("embedding_multiplier", 1.0) if granite else 1.0,
        residual_multiplier=config.get("residual_multiplier", 1.0) if granite else 1.0,
        logits_divisor=config.get("logits_scaling", 1.0) if granite else 1.0,
        source=kind,
    )


def config_of(shape: Shape, specials: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The config.json of a shape; `specials` holds bos_token_id and eos_token_id."""
    kind = shape.source or "granite"
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head,
        "intermediate_size": shape.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": LONGEST,
        "sliding_window": None,
        **(specials or {}),
    }
    if kind == "granite":
        config |= {
            "attention_multiplier": shape.head**-0.5,
            "embedding_multiplier": shape.embedding_multiplier,
            "residual_multiplier": shape.residual_multiplier,
            "logits_scaling": shape.logits_divisor,
        }
    return config


def from_hf(network: Llama, state: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into a network of its shape.

    Raises:
        ArtifactError: A weight is missing or of another size.
    """
    shape, target = network.shape, network.state_dict()
    copied: dict[str, Tensor] = {}
    try:
        for name, parts in _names(shape):
            copied[name] = torch.cat([state[part].to(target[name].dtype) for part in parts])
        for name, tensor in copied.items():
            target[name].copy_(tensor.view(target[name].shape))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"model.pretrained has other weights than its config: {reason}") from (
            error
        )


def to_hf(network: Llama, member: int | None = None) -> dict[str, Tensor]:
    """The weights by Hugging Face's names: views of the network's, or copies.

    Args:
        network: Its adapters are left out.
        member: Add the adapter of this member to the matrices.
    """
    shape, weights = network.shape, network.state_dict()
    state: dict[str, Tensor] = {}
    sizes = _rows(shape)
    for name, parts in _names(shape):
        tensor = weights[name]
        if member is not None and name.endswith(".weight"):
            adapter = dict(network.named_modules()).get(name.replace(".weight", "_adapter"))
            if adapter is not None:
                tensor = tensor + adapter.correction(member)  # type: ignore[operator]
        rows = sizes.get(name.split(".", 2)[-1], (len(tensor),))
        state |= dict(zip(parts, tensor.split(rows), strict=True))
    return state


def save_folder(
    network: Llama,
    folder: Path,
    specials: Mapping[str, int] | None = None,
    member: int | None = None,
) -> None:
    """Write config.json and model.safetensors, see `to_hf` and `config_of`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(network.shape, specials)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    state = {name: tensor.contiguous() for name, tensor in to_hf(network, member).items()}
    # Slices of a joined matrix share its memory, which safetensors refuses.
    state = {name: t.clone() if t._is_view() else t for name, t in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load_folder(folder: Path, *, members: int = 1, rank: int = 0, seed: int = 0) -> Llama:
    """A network, in float32, from a folder with config.json and safetensors. New adapters are drawn
    from `seed`.

    Raises:
        UsageError: The checkpoint is not of Llama's kind.
        ArtifactError: A file is missing or damaged.
    """
    config = read_config(folder)
    network = Llama(shape_of(config), members=members, rank=rank)
    init_(network, seed)
    from_hf(network, read_state(folder))
    return network


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ArtifactError if it cannot be read."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"checkpoint {str(folder)!r} has no valid config.json: {error}") from (
            error
        )
    return config


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files. Raises ArtifactError if one cannot be read."""
    index = folder / "model.safetensors.index.json"
    try:
        files = {"model.safetensors"}
        if index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        state: dict[str, Tensor] = {}
        for file in sorted(files):
            state |= load_file(folder / file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"checkpoint {str(folder)!r} cannot be read: {error}") from error
    return state


def _head(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_type and rope_theta, in the format of transformers 4 or 5."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta"))
    return rope


def _rows(shape: Shape) -> dict[str, tuple[int, ...]]:
    """How many rows each part of a joined matrix has."""
    queries, keys = shape.heads * shape.head, shape.key_heads * shape.head
    joint = (queries, keys, keys)
    return {"qkv.weight": joint, "bias": joint, "up.weight": (shape.d_ff, shape.d_ff)}


def _names(shape: Shape) -> list[tuple[str, tuple[str, ...]]]:
    """Our names, each with Hugging Face's names of the parts that it joins."""
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    block: dict[str, tuple[str, ...]] = {
        "norm_1.weight": ("input_layernorm.weight",),
        "qkv.weight": tuple(f"{part}.weight" for part in qkv),
        "out.weight": ("self_attn.o_proj.weight",),
        "norm_2.weight": ("post_attention_layernorm.weight",),
        "up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down.weight": ("mlp.down_proj.weight",),
    }
    if shape.biases:
        block["bias"] = tuple(f"{part}.bias" for part in qkv)
    if shape.head_norms:
        block |= {f"norm_{p}.weight": (f"self_attn.{p}_norm.weight",) for p in "qk"}
    names: list[tuple[str, tuple[str, ...]]] = [("embed", ("model.embed_tokens.weight",))]
    names += [("norm.weight", ("model.norm.weight",))]
    if not shape.tied:
        names.append(("output", ("lm_head.weight",)))
    for layer in range(shape.layers):
        for name, parts in block.items():
            full = tuple(f"model.layers.{layer}.{part}" for part in parts)
            names.append((f"blocks.{layer}.{name}", full))
    return names
