"""From logs and environments to batches of a dataset: ingest, collecting, curation, loading,
analysis.
"""
