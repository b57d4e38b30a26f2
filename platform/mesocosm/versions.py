"""The version of each job's results: part of the id of what it makes.

Bump a job's number by hand when the same config and inputs give a different result: other digits,
other bytes or another meaning. `tests/golden.json` holds the digits of tiny jobs, and their test
fails when they change without a bump.
"""

VERSIONS = {
    "collect": 1,
    "import": 1,
    "curate": 1,
    "coverage": 2,
    "tokenize": 1,
    "pretrain": 6,
    "sweep": 5,
    "plan": 4,
    "clone": 1,
    "train-agent": 5,
    "baseline": 2,
    "evaluate": 6,
    "propose": 5,
    "loop": 7,
    "study": 1,
}
