"""Datasets on disk: manifest, shards, spaces. dataset.py reads them, writer.py writes them."""
