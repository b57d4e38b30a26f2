"""The jobs by name, for the command line. Imports no job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    module: str
    schema: str
    help: str
    example: str


JOBS = {
    "collect": Job(
        "mesocosm.jobs.collect",
        "CollectConfig",
        "Collect metered real steps into a dataset.",
        "-c configs/collect/pendulum.yaml steps=2000",
    ),
    "import": Job(
        "mesocosm.jobs.import_logs",
        "ImportConfig",
        "Import other people's logs as a dataset.",
        "'logs/*.parquet' --env CartPole-v1",
    ),
    "curate": Job(
        "mesocosm.jobs.curate",
        "CurateConfig",
        "Make a dataset of others by operations.",
        "-c configs/curate/pendulum.yaml data.datasets=[ID]",
    ),
    "pretrain": Job(
        "mesocosm.jobs.pretrain",
        "PretrainConfig",
        "Train a world with DeepSpeed under Ray Train.",
        "-c configs/pretrain/pendulum.yaml model.size=1m",
    ),
    "sweep": Job(
        "mesocosm.jobs.sweep",
        "SweepConfig",
        "Train a grid of sizes and data, and fit a law.",
        "-c configs/sweep/quickstart.yaml data.datasets=[ID] --dry-run",
    ),
    "plan": Job(
        "mesocosm.jobs.plan",
        "PlanConfig",
        "Plan a pretraining from a law and a budget.",
        "--law law.json --money 500 price.per_step=0.01 price.per_exaflop=2",
    ),
    "serve": Job(
        "mesocosm.jobs.serve",
        "ServeConfig",
        "Serve a world with Ray Serve, until Ctrl-C.",
        "-c configs/serve/pendulum.yaml replicas=2",
    ),
    "train-agent": Job(
        "mesocosm.jobs.train_agent",
        "AgentConfig",
        "Train an RLlib agent inside a world.",
        "-c configs/agent/pendulum-ppo.yaml iterations=20",
    ),
    "baseline": Job(
        "mesocosm.jobs.baseline",
        "BaselineConfig",
        "Train model-free RLlib in reality, metered.",
        "-c configs/baseline/pendulum-ppo.yaml",
    ),
    "evaluate": Job(
        "mesocosm.jobs.evaluate",
        "EvaluateConfig",
        "Judge a world, and an agent in reality.",
        "-c configs/evaluate/pendulum.yaml",
    ),
    "propose": Job(
        "mesocosm.jobs.propose",
        "ProposeConfig",
        "Propose the next real steps to collect.",
        "world=ID agents=[ID] steps=2000 --out next.yaml",
    ),
    "loop": Job(
        "mesocosm.jobs.loop",
        "LoopConfig",
        "Run the whole loop, and write a report.",
        "-c configs/loop/quickstart.yaml",
    ),
}
