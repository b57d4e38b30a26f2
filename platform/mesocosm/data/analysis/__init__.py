"""What a dataset covers: nearest neighbours and evidence about actions and rewards."""
