"""Actors: exported policies (policy.py) and behaviours for data collection (behaviours.py)."""
