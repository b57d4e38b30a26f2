"""The language family: a causal language model over texts, from scratch or pretrained.

- `world`, `session`: `TextWorld` (begin, step, reset, restore, sample_start, losses, save, load) on
  lists of texts, and the carry between its steps.
- `stream`, `net`: episodes as rows of tokens, and the losses of a backbone with heads of reward and
  termination.
- `shape`: sizes, by a rung of the ladder or by a checkpoint's config.
- `llama`, `adapter`, `cache`: the network with its four calls (`hidden`, `logits`, `new_cache`,
  `feed`), LoRA members, and the cache of ragged rows. `sampler`: draws by hashed keys.
- `hf`: checkpoints of Hugging Face's format. `pretrained`: folders, GGUF files and hub ids, and
  other architectures behind the same calls, by transformers.
- `tokenizer`: texts to tokens and back, without loss. It and `world` need the package tokenizers.
"""
