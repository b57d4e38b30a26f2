"""Mesocosm: the platform on which world models are scaled and put to work."""

__version__ = "0.2.0"
