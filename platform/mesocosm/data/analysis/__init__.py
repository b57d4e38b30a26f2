"""Coverage of a dataset: nearest neighbours and evidence about actions and rewards."""
