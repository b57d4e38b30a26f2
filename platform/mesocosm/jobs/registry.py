"""The jobs by name, for the command line. Imports no job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JobEntry:
    module: str
    help: str
    example: str


JOBS = {
    "collect": JobEntry(
        "mesocosm.jobs.collect",
        "Collect metered real steps into a dataset.",
        "-c pendulum steps=2000",
    ),
    "import": JobEntry(
        "mesocosm.jobs.import_logs",
        "Import other people's logs as a dataset.",
        "'logs/*.parquet' --env CartPole-v1",
    ),
    "curate": JobEntry(
        "mesocosm.jobs.curate",
        "Filter and combine datasets into a new one.",
        "-c pendulum data.datasets=[ID]",
    ),
    "pretrain": JobEntry(
        "mesocosm.jobs.pretrain",
        "Train a world with DeepSpeed under Ray Train.",
        "-c pendulum data.datasets=[ID] model.size=1m",
    ),
    "sweep": JobEntry(
        "mesocosm.jobs.sweep",
        "Train a grid of sizes and data, and fit a law.",
        "-c quickstart data.datasets=[ID] --dry-run",
    ),
    "plan": JobEntry(
        "mesocosm.jobs.plan",
        "Plan a pretraining from a law and a budget.",
        "--law law.json --money 500 price.per_step=0.01 price.per_exaflop=2",
    ),
    "serve": JobEntry(
        "mesocosm.jobs.serve",
        "Serve a world with Ray Serve, until Ctrl-C.",
        "-c pendulum world=ID replicas=2",
    ),
    "train-agent": JobEntry(
        "mesocosm.jobs.train_agent",
        "Train an RLlib agent inside a world.",
        "-c pendulum-ppo world=ID iterations=20",
    ),
    "baseline": JobEntry(
        "mesocosm.jobs.baseline",
        "Train a model-free agent in reality, and count its steps.",
        "-c pendulum-ppo",
    ),
    "evaluate": JobEntry(
        "mesocosm.jobs.evaluate",
        "Judge a world, and its agent in real episodes.",
        "-c pendulum world=ID agent=ID",
    ),
    "propose": JobEntry(
        "mesocosm.jobs.propose",
        "Propose the next real steps to collect.",
        "world=ID agents=[ID] steps=2000 --out next.yaml",
    ),
    "loop": JobEntry(
        "mesocosm.jobs.loop", "Run the whole loop, and write a report.", "-c quickstart"
    ),
}
