"""The language family: a causal language model over texts, from scratch or pretrained.

- `shape`: sizes, by a rung of the ladder or by a checkpoint's config.
- `llama`, `adapter`, `cache`: the network with its four calls (`hidden`, `logits`, `new_cache`,
  `feed`), LoRA members, and the cache of ragged rows.
- `hf`: checkpoints of Hugging Face's format.
- `stream`, `net`: episodes as rows of tokens, and the losses of a backbone with heads of reward and
  termination.
- `tokenizer`: texts to tokens and back, without loss.
"""
