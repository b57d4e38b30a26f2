"""Pretrained networks: a folder, a GGUF file or a hub id. The only module that imports transformers
and huggingface_hub, and only when it needs them: a folder of Llama's kind needs neither.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.language.hf import from_hf, load_folder, read_config, refusal, shape_of
from mesocosm.model.language.llama import Llama, segment_mask
from mesocosm.model.language.shape import Shape
from mesocosm.model.language.tokenizer import TextTokenizer
from mesocosm.model.mup import Kind, init_, tag

SUFFIXES = (".json", ".safetensors")
INSTALL = "install the extra: pip install 'mesocosm[language]'"


class Pretrained(NamedTuple):
    """A backbone with its tokenizer."""

    backbone: nn.Module  # a `net.Backbone`
    tokenizer: TextTokenizer


def load_pretrained(
    source: str, *, context: int = 0, members: int = 1, rank: int = 0, seed: int = 0
) -> Pretrained:
    """Load `model.pretrained`. Networks of Llama's kind become a `Llama`, others remain those of
    transformers.

    Args:
        source: A folder with config.json, safetensors and tokenizer.json; a .gguf file; or a hub
            id, where a network is.
        context: The tokens that will be read.
        members: K, the number of adapters.
        rank: The rank of the adapters; 0 for none.
        seed: Of the adapters.

    Raises:
        UsageError: A package is missing, the hub does not answer, or the architecture has no
            adapters.
        ArtifactError: A file is missing or damaged, or the tokenizer loses text.
    """
    path = locate(source)
    if path.suffix == ".gguf":
        return _from_gguf(path, members, rank, seed)
    folder = path
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    if refusal(read_config(folder), context) is None:
        network = load_folder(folder, members=members, rank=rank, seed=seed)
        return Pretrained(network, tokenizer)
    if rank:
        raise UsageError(
            f"model.adapter.rank must be 0 for {source!r}, which is not of Llama's kind, got {rank}"
        )
    return Pretrained(load_other(folder), tokenizer)


def locate(source: str) -> Path:
    """The GGUF file, or the folder, of `model.pretrained`; a hub id is downloaded.

    Raises:
        UsageError: There is no such file or folder, and the hub does not answer.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model.pretrained must be a file that exists, got {source!r}")
        return path
    return path if path.is_dir() else _download(source)


def pretrained_identity(source: str) -> str:
    """The sha256 of the files that decide the network and its tokenizer, independent of their
    folder.
    """
    path, digest = locate(source), hashlib.sha256()
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def pretrained_shape(source: str, context: int) -> Shape | None:
    """The shape of a checkpoint of Llama's kind, by its config alone where it is a folder.

    Args:
        source: As `load_pretrained`.
        context: The tokens that will be read.

    Returns:
        The shape, or None for another architecture.
    """
    path = locate(source)
    if path.is_dir() and refusal(config := read_config(path), context) is None:
        return shape_of(config)
    backbone = load_pretrained(source, context=context).backbone
    return backbone.shape if isinstance(backbone, Llama) else None


class OtherCache:
    """The keys and values of transformers, for rows of ragged lengths: a chunk takes as many
    columns of every row as its longest, and those without a token are never seen.
    """

    def __init__(self, batch: int, window: int, device: torch.device):
        self.batch, self.window = batch, window
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        """[B, columns]: the position of each column's token; -1 without one"""
        self.past: Any = None

    @property
    def columns(self) -> int:
        """The tokens of a row for which there is memory."""
        return self.position.shape[1]

    def rewind(self, length: Tensor) -> None:
        """Forget the tokens of each row from `length` [B] int64 on."""
        self.length = torch.minimum(self.length, length)
        forgotten = self.position >= self.length.unsqueeze(1)
        self.position = self.position.masked_fill(forgotten, -1)
        if not bool(self.length.any()):
            self.past, self.position = None, self.position[:, :0]

    def select(self, rows: Tensor) -> OtherCache:
        """A new cache of copies of `rows` [N] int64."""
        other = OtherCache(len(rows), self.window, rows.device)
        other.length, other.position = self.length[rows], self.position[rows]
        if self.past is not None:
            other.past = copy.deepcopy(self.past)
            other.past.batch_select_indices(rows)
        return other


class OtherBackbone(nn.Module):
    """Any `AutoModelForCausalLM` behind the four calls of `net.Backbone`. Bits depend on the batch
    and on the chunks.
    """

    members = 1

    def __init__(self, model: Any):
        """Raises UsageError if the logits are not the output layer of the last state."""
        super().__init__()
        self.model = model
        config = model.config
        self.shape = Shape(
            vocabulary=config.vocab_size,
            d_model=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=1,
            key_heads=1,
            head=1,
            d_ff=1,
            source=config.model_type,
        )
        embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
        for parameter in model.parameters():
            kind: Kind = "hidden" if parameter.dim() > 1 else "vector"
            tag(parameter, "embedding" if id(parameter) in embeddings else kind)
        ids = torch.arange(8).unsqueeze(0) % config.vocab_size
        with torch.no_grad():
            expected = model(ids).logits
            apart = (
                (self.logits(self.hidden(ids, ids * 0 + torch.arange(8))) - expected).abs().max()
            )
        if float(apart) > 1e-3:
            raise UsageError(
                f"model.pretrained must compute logits from its last state by its output layer, but"
                f" model_type {config.model_type!r} differs by {float(apart):.3g}"
            )

    @property
    def token_bytes(self) -> int:
        """Like `llama.Llama.token_bytes`."""
        config = self.model.config
        heads = getattr(config, "num_attention_heads", 1)
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = head * (getattr(config, "num_key_value_heads", None) or heads)
        return 2 * 4 * int(config.num_hidden_layers * width)

    @property
    def checkpoint_activations(self) -> bool:
        """Recompute the blocks in the backward pass."""
        return bool(self.model.is_gradient_checkpointing)

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        if value:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()

    def hidden(
        self,
        ids: Tensor,
        position: Tensor,
        segment: Tensor | None = None,
        member: Tensor | None = None,
    ) -> Tensor:
        """Like `llama.Llama.hidden`."""
        mask = None if segment is None else self._bias(segment_mask(segment))
        out = self.model.base_model(
            input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False
        )
        states: Tensor = out.last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Like `llama.Llama.logits`."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def new_cache(self, batch: int, window: int) -> OtherCache:
        """Like `llama.Llama.new_cache`."""
        return OtherCache(batch, window, next(self.parameters()).device)

    @torch.no_grad()
    def feed(
        self, cache: OtherCache, ids: Tensor, count: Tensor, member: Tensor | None = None
    ) -> Tensor:
        """Like `llama.Llama.feed`."""
        longest = int((cache.length + count).max())
        if longest > cache.window:
            raise UsageError(f"model.context must be >= {longest} tokens, got {cache.window}")
        columns = torch.arange(ids.shape[1], device=ids.device)
        real = columns < count.unsqueeze(1)
        place = torch.where(real, cache.length.unsqueeze(1) + columns, -1)
        positions = torch.cat((cache.position, place), 1)
        before = cache.position.shape[1]
        seen = (positions >= 0).unsqueeze(1) & (
            torch.arange(positions.shape[1], device=ids.device) <= (before + columns).unsqueeze(1)
        )
        # A query without a token sees itself, so that nothing is divided by zero.
        seen[:, columns, before + columns] = True
        out = self.model.base_model(
            input_ids=ids,
            position_ids=place.clamp(min=0),
            attention_mask=self._bias(seen.unsqueeze(1)),
            past_key_values=cache.past,
            use_cache=True,
        )
        cache.past, cache.position = out.past_key_values, positions
        cache.length = cache.length + count
        states: Tensor = out.last_hidden_state
        return torch.where(real.unsqueeze(-1), states, 0.0)

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights."""
        self.model.save_pretrained(folder)

    def _bias(self, seen: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def load_other(folder: Path) -> OtherBackbone:
    """A checkpoint of any architecture, in float32. Raises UsageError without transformers, and
    ArtifactError if it cannot be read.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UsageError(
            f"model.pretrained={str(folder)!r} needs transformers; {INSTALL}"
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"checkpoint {str(folder)!r} cannot be read: {error}") from error
    return OtherBackbone(model.eval())


def _from_gguf(file: Path, members: int, rank: int, seed: int) -> Pretrained:
    """Read a GGUF file, whose quantised weights become float32."""
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UsageError(
            f"model.pretrained={str(file)!r} needs transformers and gguf; {INSTALL}"
        ) from error
    arguments = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **arguments)
    library = AutoTokenizer.from_pretrained(file.parent, **arguments).backend_tokenizer
    network = Llama(shape_of(model.config.to_dict()), members=members, rank=rank)
    init_(network, seed)
    from_hf(network, model.state_dict())
    return Pretrained(network, TextTokenizer(library))


def _download(source: str) -> Path:
    """The folder of a hub id."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(
            f"model.pretrained={source!r} must be a folder, as a hub id needs huggingface_hub;"
            f" {INSTALL}"
        ) from error
    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the hub's errors share no class
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"model.pretrained must be a folder, a .gguf file or a hub id that can be downloaded,"
            f" got {source!r} ({reason}); without a network, give a folder"
        ) from error
