"""Batches: codec.py (arrays to numbers and tokens), index.py (sample to window), loader.py."""
