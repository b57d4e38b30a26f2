"""Training of a world, by DeepSpeed under Ray Train.

Read `pretrain` (the driver), `worker` (the loop of every rank), `training` (one step) and `engine`
(DeepSpeed) in this order.
"""
