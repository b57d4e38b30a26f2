"""The jobs by name: their modules and the first lines of their help. Imports no job."""

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
        "metered real steps into a dataset",
        "-c configs/collect/pendulum.yaml steps=2000",
    ),
    "import": Job(
        "mesocosm.jobs.import_logs",
        "ImportConfig",
        "logs that others made into a dataset",
        "'logs/*.parquet' --env CartPole-v1",
    ),
    "curate": Job(
        "mesocosm.jobs.curate",
        "CurateConfig",
        "datasets into one, by a list of operations",
        "-c configs/curate/pendulum.yaml data.datasets=[ID]",
    ),
    "pretrain": Job(
        "mesocosm.jobs.pretrain",
        "PretrainConfig",
        "a dataset into a world, by DeepSpeed under Ray Train",
        "-c configs/pretrain/pendulum.yaml model.size=1m",
    ),
    "sweep": Job(
        "mesocosm.jobs.sweep",
        "SweepConfig",
        "a grid of sizes and data into a table and its law",
        "-c configs/sweep/quickstart.yaml data.datasets=[ID] --dry-run",
    ),
    "plan": Job(
        "mesocosm.jobs.plan",
        "PlanConfig",
        "a law and a budget into the config of a pretraining",
        "--law law.json --money 500 price.per_step=0.01 price.per_exaflop=2",
    ),
    "serve": Job(
        "mesocosm.jobs.serve",
        "ServeConfig",
        "a world on Ray Serve, until Ctrl-C",
        "-c configs/serve/pendulum.yaml replicas=2",
    ),
    "train-agent": Job(
        "mesocosm.jobs.train_agent",
        "AgentConfig",
        "an RLlib agent inside a world",
        "-c configs/agent/pendulum-ppo.yaml iterations=20",
    ),
    "baseline": Job(
        "mesocosm.jobs.baseline",
        "BaselineConfig",
        "model-free RLlib on reality, through the ledger",
        "-c configs/baseline/pendulum-ppo.yaml",
    ),
    "evaluate": Job(
        "mesocosm.jobs.evaluate",
        "EvaluateConfig",
        "is the world faithful, is the agent better in reality",
        "-c configs/evaluate/pendulum.yaml",
    ),
    "propose": Job(
        "mesocosm.jobs.propose",
        "ProposeConfig",
        "a world and a budget of real steps into the config of what to collect",
        "world=ID agents=[ID] steps=2000 --out next.yaml",
    ),
    "loop": Job(
        "mesocosm.jobs.loop",
        "LoopConfig",
        "the whole circle, and a report",
        "-c configs/loop/quickstart.yaml",
    ),
}
