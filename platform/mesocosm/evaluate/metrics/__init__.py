"""Figures of an evaluation, without real steps."""
