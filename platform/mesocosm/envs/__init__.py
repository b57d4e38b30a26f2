"""Real environments. Every real step passes meter.py, which counts it in the ledger (ledger.py) and
refuses it beyond the budget.
"""
