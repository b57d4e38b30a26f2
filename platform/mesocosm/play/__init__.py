"""A world stepped through by a person, on a local web page."""
