"""Frozen tokenizers of frames: a frame becomes a grid of discrete codes, and codes a frame."""
