"""How big a model, how much reality, at what price: the grid, the sweep, the law and the
recommendation.
"""
