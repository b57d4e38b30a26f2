"""Tokenizers of frames fitted to datasets, and the codes of datasets."""
