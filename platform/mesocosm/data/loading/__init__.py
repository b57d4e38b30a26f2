"""Batches: codec.py (arrays to tokens and numbers), index.py (sample number to window), loader.py."""
