"""Sweeps: grid.py (cells and their price), trials.py (Ray Tune), trunk.py (trains a cell). Laws:
fit.py, with forms.py, estimate.py and solve.py. plan.py spends a budget.
"""
