"""Storage: artifacts.py (COMMIT.json makes an artifact whole), leases, cache, garbage."""
