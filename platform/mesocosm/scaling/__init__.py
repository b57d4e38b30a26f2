"""Scaling laws: grid and trials of a sweep, fit.py, law.py, and plan.py for a budget."""
