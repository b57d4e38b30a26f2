"""Training of a world, by DeepSpeed under Ray Train.

Read in this order: `pretrain` (the driver), `ray_train` (its workers), `worker` (the loop of every
rank), `rank_trainer` (one step) and `engine` (DeepSpeed).
"""
