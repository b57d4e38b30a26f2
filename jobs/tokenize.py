"""`mesocosm tokenize` as a script: what runs on a cluster."""

from mesocosm.cli.main import job

if __name__ == "__main__":
    job("tokenize")
