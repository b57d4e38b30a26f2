"""The language family: a causal language model over texts, from scratch or pretrained.

- `shape`: sizes, by a rung of the ladder or by a checkpoint's config.
- `llama`, `adapter`, `cache`: the network with its four calls (`hidden`, `logits`, `new_cache`,
  `feed`), LoRA members, and the cache of ragged rows.
- `hf`: checkpoints of Hugging Face's format.
- `tokenizer`: texts to tokens and back, without loss.
"""
