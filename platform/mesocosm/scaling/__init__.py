"""Sweeps over model and data sizes, the laws fitted to them, and plans by these laws."""
