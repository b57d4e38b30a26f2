"""The jobs by name, for the command line. Imports no job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JobEntry:
    """A job's summary, and an example of its command line."""

    name: str
    help: str
    example: str

    @property
    def module(self) -> str:
        """The module that defines the job's `JOB`."""
        name = "import_logs" if self.name == "import" else self.name.replace("-", "_")
        return f"mesocosm.jobs.{name}"


_ENTRIES = (
    ("collect", "Collect metered real steps into a dataset.", "-c pendulum steps=2000"),
    ("import", "Import logs as a dataset.", "'logs/*.parquet' --env CartPole-v1"),
    ("curate", "Filter and combine datasets into a new one.", "-c pendulum data.datasets=[ID]"),
    (
        "tokenize",
        "Fit a tokenizer to the images of datasets, and encode them.",
        "data.datasets=[ID] patch=8",
    ),
    (
        "pretrain",
        "Train a world with DeepSpeed under Ray Train.",
        "-c pendulum data.datasets=[ID] model.size=1m",
    ),
    (
        "sweep",
        "Train a grid of sizes and data, and fit a law.",
        "-c quickstart data.datasets=[ID] --dry-run",
    ),
    (
        "plan",
        "Plan a pretraining from a law and a budget.",
        "--law law.json --money 500 price.per_step=0.01 price.per_exaflop=2",
    ),
    ("serve", "Serve a world with Ray Serve, until Ctrl-C.", "-c pendulum world=ID replicas=2"),
    ("play", "Step through a world on a local web page, until Ctrl-C.", "world=ID"),
    (
        "clone",
        "Clone the best episodes of text logs into an agent.",
        "datasets=[ID] candidates=module:candidates share=0.2",
    ),
    ("train-agent", "Train an RLlib agent in a world.", "-c pendulum-ppo world=ID iterations=20"),
    ("baseline", "Train a model-free agent in reality, and count its steps.", "-c pendulum-ppo"),
    ("evaluate", "Judge a world, and its agent in reality.", "-c pendulum world=ID agent=ID"),
    (
        "propose",
        "Propose the next real steps to collect.",
        "world=ID agents=[ID] steps=2000 --out next.yaml",
    ),
    ("loop", "Run the whole loop, and write a report.", "-c quickstart"),
    (
        "study",
        "Train an agent in each of several worlds, and compare imagined with real gains.",
        "-c chores pretrain.data.datasets=[ID] agent.init=agents/ID --dry-run\n"
        "  mesocosm study -c reacher pretrain.data.datasets=[ID] worlds=[ID,ID,ID]",
    ),
)
JOBS = {entry[0]: JobEntry(*entry) for entry in _ENTRIES}
