"""Operations of `curate`. Each reads a table of the episodes and drops some.

scan.py         measures episodes from the memory-mapped shards, in this process or on Ray Data
table.py        the kept episodes, and the account of the others by operation and reason
duplicates.py   copies and near copies
sensors.py      stuck and saturated sensors
choose.py       filters, balance, mix, failures put back, hold-out
operations.py   all operations by name, made from the config
"""
