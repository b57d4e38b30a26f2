"""What `curate` does to episodes: each operation a small function that looks at a table of the
episodes and says which go, and why.

scan.py         per-episode features, measured from the memory-mapped shards, here or on Ray Data
table.py        what is kept so far, and the account of what went, by operation and reason
broken.py       copies, near copies, stuck and saturated sensors
choose.py       filters, balance, mix, failures put back, hold-out
operations.py   all of them by name, made from the config
"""
