"""Is a world faithful, and is its agent better in reality? suite.py composes; metrics/,
verdicts.py and report/.
"""
